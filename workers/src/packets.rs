//! Packets: what ranks send one another, on its way between tensors and the fabric's regions.
//!
//! In process a region is the tensor itself; bytes are taken from it only for a wire, and read back here with the form that
//! came with them. What a peer sends is checked, never trusted.

use std::sync::Arc;

use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::fabric::{FabricError, Form, Memory, Region, Tag};

/// [`Form::kind`] of each payload.
const TENSOR_F32: u8 = 1;
const TENSOR_BF16: u8 = 2;
const IDS: u8 = 3;
const WEIGHTS: u8 = 4;
const TOTALS: u8 = 5;

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

    fn form(&self) -> Form {
        let (kind, rows, cols) = match self {
            Payload::Tensor(tensor) => {
                let kind = match tensor.format() {
                    Format::F32 => TENSOR_F32,
                    Format::Bf16 => TENSOR_BF16,
                };
                (kind, tensor.rows(), tensor.cols())
            }
            Payload::Ids(ids) => (IDS, 1, ids.len()),
            Payload::Weights(weights) => (WEIGHTS, 1, weights.len()),
            Payload::Totals(totals) => (TOTALS, 1, totals.len()),
        };
        Form { kind, rows: rows as u64, cols: cols as u64 }
    }
}

impl Payload {
    /// What [`Memory::bytes`] and [`Memory::form`] of a payload say it was; `None` if they do not fit.
    pub fn from_wire(form: Form, bytes: &[u8]) -> Option<Payload> {
        let shape = [usize::try_from(form.rows).ok()?, usize::try_from(form.cols).ok()?];
        let payload = match form.kind {
            TENSOR_F32 => Payload::Tensor(Tensor::from_bytes(&shape, Format::F32, bytes)?),
            TENSOR_BF16 => Payload::Tensor(Tensor::from_bytes(&shape, Format::Bf16, bytes)?),
            IDS => Payload::Ids(numbers(bytes)?),
            WEIGHTS => Payload::Weights(numbers(bytes)?),
            TOTALS => Payload::Totals(numbers(bytes)?),
            _ => return None,
        };
        (payload.form() == form).then_some(payload)
    }

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

/// `None` unless the bytes are a whole number of values.
fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Option<Vec<T>> {
    let values = bytes.chunks_exact(size_of::<T>());
    values.remainder().is_empty().then(|| values.map(bytemuck::pod_read_unaligned).collect())
}

/// What everything here computes with; a peer may send what it likes.
fn is_f32(tensor: &Tensor) -> bool {
    tensor.format() == Format::F32
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
        if let Some(payload) = part.clone().downcast::<Payload>() {
            return Ok(payload);
        }
        let Form { kind, rows, cols } = part.form();
        let got = || format!("{} bytes said to be {rows} x {cols} of kind {kind}", part.len());
        Payload::from_wire(part.form(), part.bytes())
            .map(Arc::new)
            .ok_or_else(|| self.wrong(expected, &got()))
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
            Payload::Tensor(tensor) if is_f32(tensor) && tensor.cols() == width => Ok(tensor.clone()),
            other => Err(self.wrong(&format!("rows of width {width}"), &other.name())),
        }
    }

    /// The next part as a flat tensor of a known length.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn flat(&mut self, len: usize) -> Result<Tensor, FabricError> {
        let part = self.next("a slice")?;
        match &*part {
            Payload::Tensor(tensor) if is_f32(tensor) && tensor.len() == len => {
                Ok(tensor.clone().reshape(&[len]))
            }
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
