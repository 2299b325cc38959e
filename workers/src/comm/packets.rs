//! Packets: what ranks send one another, on its way between tensors and the fabric's regions.
//!
//! In process a region is the tensor itself; bytes are taken from it only for a wire, and read back here with the form that
//! came with them. What a peer sends is checked, never trusted.

use std::sync::Arc;

use contraflow_kernels::tensor::{Format, Tensor, Values};
use contraflow_runtime::fabric::{FabricError, Form, Memory, Region, Tag};

/// [`Form::kind`] of each payload.
const TENSOR: u8 = 1;
/// Nothing computes with it yet, so nobody may send it.
const NARROW_TENSOR: u8 = 2;
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
                    Format::F32 => TENSOR,
                    Format::Bf16 => NARROW_TENSOR,
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
    /// What came over a wire, by its form; `None` if form and bytes do not fit. A tensor stays where it is.
    fn from_wire(region: &Region) -> Option<Payload> {
        let (form, bytes) = (region.form(), region.bytes());
        let payload = match form.kind {
            TENSOR => {
                let shape = [usize::try_from(form.rows).ok()?, usize::try_from(form.cols).ok()?];
                let num_values = bytemuck::try_cast_slice::<u8, f32>(bytes).ok()?.len();
                if shape[0].checked_mul(shape[1]) != Some(num_values) {
                    return None;
                }
                Payload::Tensor(Tensor::borrowing(&shape, Arc::new(Arrived(region.clone()))))
            }
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

/// A region that has been seen to hold f32 values where they can be read in place.
struct Arrived(Region);

impl Values for Arrived {
    fn values(&self) -> &[f32] {
        bytemuck::cast_slice(self.0.bytes())
    }
}

/// `None` unless the bytes are a whole number of values.
fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Option<Vec<T>> {
    let values = bytes.chunks_exact(size_of::<T>());
    values.remainder().is_empty().then(|| values.map(bytemuck::pod_read_unaligned).collect())
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
        Payload::from_wire(&part).map(Arc::new).ok_or_else(|| self.wrong(expected, &got()))
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
            Payload::Tensor(tensor) if tensor.len() == len => Ok(tensor.clone().reshape(&[len])),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::address::StepId;
    use contraflow_runtime::fabric::{FrameKind, Phase};
    use contraflow_runtime::schedule::Chunk;
    use proptest::prelude::*;

    /// Bytes with a form, as they come over a wire.
    struct Wire(Vec<u64>, usize, Form);

    impl Memory for Wire {
        fn bytes(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[..self.1]
        }

        fn form(&self) -> Form {
            self.2
        }
    }

    /// What is left of a region on the other side of a wire.
    fn sent(region: &Region) -> Region {
        let bytes = region.bytes();
        let mut words = vec![0; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Region::new(Wire(words, bytes.len(), region.form()))
    }

    fn unpack(parts: Vec<Region>) -> Unpack {
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
        Unpack::new(tag, parts)
    }

    #[test]
    fn what_comes_over_a_wire_is_what_was_sent_and_a_tensor_is_not_copied() {
        let rows = Tensor::from_vec(&[2, 3], vec![1.0, -2.5, 3.0, f32::MIN_POSITIVE, 5.0, -0.0]);
        let parts = [
            tensor(rows.clone()),
            Region::new(Payload::Ids(vec![7, u32::MAX])),
            Region::new(Payload::Weights(vec![0.25])),
            Region::new(Payload::Totals(vec![1e300, -1.0])),
            tensor(Tensor::zeros(&[0, 3])),
            tensor(rows.clone()),
        ];
        let came: Vec<Region> = parts.iter().map(sent).collect();
        let address = came[0].bytes().as_ptr();
        let mut frame = unpack(came);
        let mut got = frame.rows(3).unwrap();
        assert_eq!((got.shape(), got.bytes()), (rows.shape(), rows.bytes()));
        assert_eq!(got.bytes().as_ptr(), address);
        got.f32_mut()[0] = 9.0;
        assert_ne!(got.bytes().as_ptr(), address, "written where others read");
        assert_eq!(frame.ids().unwrap(), [7, u32::MAX]);
        assert_eq!(frame.weights(1).unwrap(), [0.25]);
        assert_eq!(frame.totals(2).unwrap(), [1e300, -1.0]);
        assert_eq!(frame.rows(3).unwrap().shape(), [0, 3]);
        assert_eq!(frame.flat(6).unwrap().shape(), [6]);
        assert!(matches!(frame.ids(), Err(FabricError::Content { .. })));
    }

    #[test]
    fn content_that_does_not_fit_is_told_with_what_came() {
        let narrow = tensor(Tensor::zeros(&[2, 4]).to_format(Format::Bf16));
        let error = unpack(vec![sent(&narrow)]).rows(4).unwrap_err().to_string();
        assert!(error.ends_with("expected rows, got 16 bytes said to be 2 x 4 of kind 2"), "{error}");
        let error = unpack(vec![sent(&tensor(Tensor::zeros(&[2, 4])))]).rows(5).unwrap_err().to_string();
        assert!(error.ends_with("expected rows of width 5, got a tensor of shape [2, 4]"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_of_any_form_make_it_panic(words in proptest::collection::vec(any::<u64>(), 0..8), cut in 0_usize..8,
                                              kind in 0_u8..8, rows in any::<u64>(), cols in 0_u64..40) {
            let len = (8 * words.len()).saturating_sub(cut);
            for rows in [rows, 0, 1, 2, 4] {
                let part = || Region::new(Wire(words.clone(), len, Form { kind, rows, cols }));
                if let Ok(tensor) = unpack(vec![part()]).rows(cols as usize) {
                    prop_assert!(kind == TENSOR && tensor.rows() as u64 == rows && tensor.bytes().len() == len);
                }
                let _ = (unpack(vec![part()]).ids(), unpack(vec![part()]).weights(2), unpack(vec![part()]).totals(2));
            }
        }
    }
}
