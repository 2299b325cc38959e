//! Packets: what ranks send one another, on its way between tensors and the fabric's regions.
//!
//! In process a region is the tensor itself; bytes are taken from it only for a wire.

use std::sync::Arc;

use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::fabric::{FabricError, Memory, Region, Tag};

/// One piece of a packet.
pub enum Payload {
    /// Rows of activations or gradients, or a slice of a flat bucket.
    Tensor(Tensor),
    /// Row and expert numbers.
    Ids(Vec<u32>),
    /// Routing weights and their gradients.
    Weights(Vec<f32>),
    /// Sums over the global batch.
    Totals(Vec<f64>),
}

impl Memory for Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Payload::Tensor(tensor) => tensor.bytes(),
            Payload::Ids(ids) => bytemuck::cast_slice(ids),
            Payload::Weights(weights) => bytemuck::cast_slice(weights),
            Payload::Totals(totals) => bytemuck::cast_slice(totals),
        }
    }
}

impl Payload {
    fn name(&self) -> String {
        match self {
            Payload::Tensor(tensor) => format!("a tensor of shape {:?}", tensor.shape()),
            Payload::Ids(ids) => format!("{} ids", ids.len()),
            Payload::Weights(weights) => format!("{} weights", weights.len()),
            Payload::Totals(totals) => format!("{} totals", totals.len()),
        }
    }
}

/// A region that is a tensor.
pub fn tensor(tensor: Tensor) -> Region {
    Region::new(Payload::Tensor(tensor))
}

/// The parts of a frame, taken one by one in the order in which they were put in.
pub struct Unpack {
    tag: Tag,
    parts: std::vec::IntoIter<Region>,
}

impl Unpack {
    /// Begins with a frame as it came.
    pub fn new(tag: Tag, parts: Vec<Region>) -> Self {
        Unpack { tag, parts: parts.into_iter() }
    }

    fn next(&mut self, expected: &str) -> Result<Arc<Payload>, FabricError> {
        let part = self.parts.next().ok_or_else(|| self.wrong(expected, "the end of the frame"))?;
        part.downcast::<Payload>().ok_or_else(|| self.wrong(expected, "foreign memory"))
    }

    fn wrong(&self, expected: &str, got: &str) -> FabricError {
        FabricError::Content { tag: self.tag, expected: expected.to_owned(), got: got.to_owned() }
    }

    /// The next part as rows of a known width.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn rows(&mut self, width: usize) -> Result<Tensor, FabricError> {
        let part = self.next("rows")?;
        match &*part {
            Payload::Tensor(tensor) if tensor.cols() == width => Ok(tensor.clone()),
            other => Err(self.wrong(&format!("rows of width {width}"), &other.name())),
        }
    }

    /// The next part as a flat tensor of a known length.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn flat(&mut self, len: usize) -> Result<Tensor, FabricError> {
        let part = self.next("a slice")?;
        match &*part {
            Payload::Tensor(tensor) if tensor.len() == len => Ok(tensor.clone()),
            other => Err(self.wrong(&format!("a slice of {len} elements"), &other.name())),
        }
    }

    /// The next part as numbers.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn ids(&mut self) -> Result<Vec<u32>, FabricError> {
        let part = self.next("ids")?;
        match &*part {
            Payload::Ids(ids) => Ok(ids.clone()),
            other => Err(self.wrong("ids", &other.name())),
        }
    }

    /// The next part as a known number of weights.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn weights(&mut self, len: usize) -> Result<Vec<f32>, FabricError> {
        let part = self.next("weights")?;
        match &*part {
            Payload::Weights(weights) if weights.len() == len => Ok(weights.clone()),
            other => Err(self.wrong(&format!("{len} weights"), &other.name())),
        }
    }

    /// The next part as a known number of totals.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn totals(&mut self, len: usize) -> Result<Vec<f64>, FabricError> {
        let part = self.next("totals")?;
        match &*part {
            Payload::Totals(totals) if totals.len() == len => Ok(totals.clone()),
            other => Err(self.wrong(&format!("{len} totals"), &other.name())),
        }
    }
}
