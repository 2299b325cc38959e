//! Packets: what ranks send one another, on its way between tensors and the fabric's regions.
//!
//! In process a region is the tensor itself; bytes are taken from it only for a wire, and read back here with the form that
//! came with them. What a peer sends is checked, never trusted.

use std::sync::Arc;

use contraflow_kernels::dispatch::pairs_are_within;
use contraflow_kernels::tensor::{Format, HostMemory, ScaleRule, Study, Tensor, Tile};
use contraflow_runtime::fabric::{FabricError, Memory, PayloadShape, Region, Tag};

/// [`PayloadShape::kind`] of each payload.
const F32_TENSOR: u8 = 1;
const U32_TENSOR: u8 = 3;
const TOTALS: u8 = 5;
const BF16_TENSOR: u8 = 6;
/// E4M3 with a scale for each 128 columns; the rule of its scales is added.
const E4M3_TENSOR: u8 = 8;

/// How a format is called on the wire; `None` for those that stay on their rank.
fn kind_of(format: Format) -> Option<u8> {
    match format {
        Format::F32 => Some(F32_TENSOR),
        Format::U32 => Some(U32_TENSOR),
        Format::BF16 => Some(BF16_TENSOR),
        Format::E4M3(Tile::Row, ScaleRule { floor, power_of_two, study: Study::NONE }) => {
            Some(E4M3_TENSOR + u8::from(floor) + 2 * u8::from(power_of_two))
        }
        Format::E4M3(..) | Format::E5M6 => None,
    }
}

fn format_of(kind: u8) -> Option<Format> {
    match kind {
        F32_TENSOR => Some(Format::F32),
        U32_TENSOR => Some(Format::U32),
        BF16_TENSOR => Some(Format::BF16),
        E4M3_TENSOR..=11 => {
            let rule = kind - E4M3_TENSOR;
            let (floor, power_of_two) = (rule & 1 != 0, rule & 2 != 0);
            Some(Format::E4M3(Tile::Row, ScaleRule { floor, power_of_two, study: Study::NONE }))
        }
        _ => None,
    }
}

/// One piece of a packet.
pub enum Payload {
    /// Rows of activations or gradients, a slice of a flat bucket, rows and experts, routing weights.
    Tensor(Tensor),
    /// Sums over the global batch.
    Totals(Vec<f64>),
}

impl Memory for Payload {
    fn part(&self, index: usize) -> Option<&[u8]> {
        match self {
            Payload::Tensor(tensor) => tensor.parts().nth(index),
            Payload::Totals(totals) => (index == 0).then(|| bytemuck::cast_slice(totals)),
        }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Payload::Tensor(tensor) => tensor.num_bytes(),
            Payload::Totals(totals) => size_of_val(totals.as_slice()),
        }
    }

    fn form(&self) -> PayloadShape {
        let (kind, rows, cols) = match self {
            Payload::Tensor(tensor) => {
                let kind = kind_of(tensor.format());
                (kind.expect("such a tensor is not sent"), tensor.rows(), tensor.cols())
            }
            Payload::Totals(totals) => (TOTALS, 1, totals.len()),
        };
        PayloadShape { kind, rows: rows as u64, cols: cols as u64 }
    }
}

impl Payload {
    /// What came over a wire, by its form; `None` if form and bytes do not fit. A tensor stays where it is.
    fn from_wire(region: &Region) -> Option<Payload> {
        let payload = match region.form().kind {
            TOTALS => Payload::Totals(numbers(region.bytes())?),
            kind => Payload::Tensor(arrived(region, format_of(kind)?)?),
        };
        (payload.form() == region.form()).then_some(payload)
    }

    fn name(&self) -> String {
        match self {
            Payload::Tensor(tensor) => format!("a tensor {tensor:?}"),
            Payload::Totals(totals) => format!("{} totals", totals.len()),
        }
    }
}

/// A region that is a tensor.
pub fn tensor(tensor: Tensor) -> Region {
    Region::new(Payload::Tensor(tensor))
}

/// A region that stays where the wire has put it.
struct Arrived(Region);

impl HostMemory for Arrived {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

fn arrived(region: &Region, format: Format) -> Option<Tensor> {
    let PayloadShape { rows, cols, .. } = region.form();
    let shape = [usize::try_from(rows).ok()?, usize::try_from(cols).ok()?];
    Tensor::borrowing(format, &shape, Arc::new(Arrived(region.clone())))
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
        let PayloadShape { kind, rows, cols } = part.form();
        let got = || format!("{} bytes declared as {rows} x {cols} of kind {kind}", part.len());
        Payload::from_wire(&part).map(Arc::new).ok_or_else(|| self.wrong(expected, &got()))
    }

    fn wrong(&self, expected: &str, got: &str) -> FabricError {
        FabricError::Content { tag: self.tag, expected: expected.to_owned(), got: got.to_owned() }
    }

    /// The next part as rows of a known width and format.
    ///
    /// **Shapes**: output `[N, width]`.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn rows(&mut self, width: usize, format: Format) -> Result<Tensor, FabricError> {
        self.matrix(format, width, || format!("rows of width {width}"))
    }

    /// The next part as a known number of rows of the width and the format of others.
    ///
    /// **Shapes**: `like` `[.., width]`, output `[num_rows, width]`.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn all_rows(&mut self, num_rows: usize, like: &Tensor) -> Result<Tensor, FabricError> {
        let width = like.cols();
        let rows = self.rows(width, like.format())?;
        if rows.rows() != num_rows {
            let expected = format!("{num_rows} rows of width {width}");
            return Err(self.wrong(&expected, &format!("a tensor {rows:?}")));
        }
        Ok(rows)
    }

    /// The next part as pairs of a row and an expert, each below its number, in U32.
    ///
    /// **Shapes**: output `[P, 2]`.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn pairs(&mut self, num_rows: usize, num_experts: usize) -> Result<Tensor, FabricError> {
        let expected = || format!("pairs of {num_rows} rows and {num_experts} experts");
        let pairs = self.matrix(Format::U32, 2, expected)?;
        if !pairs_are_within(&pairs, num_rows, num_experts) {
            return Err(self.wrong(&expected(), &format!("others among {}", pairs.rows())));
        }
        Ok(pairs)
    }

    fn matrix(
        &mut self,
        format: Format,
        width: usize,
        expected: impl Fn() -> String,
    ) -> Result<Tensor, FabricError> {
        let part = self.next(&expected())?;
        match &*part {
            Payload::Tensor(tensor) if tensor.format() == format && tensor.cols() == width => {
                Ok(tensor.clone())
            }
            other => Err(self.wrong(&expected(), &other.name())),
        }
    }

    /// The next part as a flat tensor of a known length, in F32.
    ///
    /// **Shapes**: output `[len]`.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn flat(&mut self, len: usize) -> Result<Tensor, FabricError> {
        self.flat_in(len, Format::F32)
    }

    /// [`flat`](Self::flat) in another format.
    ///
    /// **Shapes**: output `[len]`.
    ///
    /// **Errors**: [`FabricError::Content`] if it is something else.
    pub fn flat_in(&mut self, len: usize, format: Format) -> Result<Tensor, FabricError> {
        let part = self.next("a slice")?;
        match &*part {
            Payload::Tensor(tensor) if tensor.format() == format && tensor.len() == len => {
                Ok(tensor.clone().reshape(&[len]))
            }
            other => Err(self.wrong(&format!("a slice of {len} elements"), &other.name())),
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
    use contraflow_kernels::host::{HostValues, HostValuesMut};
    use contraflow_runtime::fabric::{FrameKind, Phase};
    use contraflow_runtime::schedule::Chunk;
    use proptest::prelude::*;

    /// Bytes with a form, as they come over a wire.
    struct Wire(Vec<u64>, usize, PayloadShape);

    impl Memory for Wire {
        fn part(&self, index: usize) -> Option<&[u8]> {
            (index == 0).then(|| &bytemuck::cast_slice(&self.0)[..self.1])
        }

        fn num_bytes(&self) -> usize {
            self.1
        }

        fn form(&self) -> PayloadShape {
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

    fn bytes(tensor: &Tensor) -> &[u8] {
        tensor.parts().next().unwrap()
    }

    #[test]
    fn what_comes_over_a_wire_is_what_was_sent_and_a_tensor_is_not_copied() {
        let rows = Tensor::from_vec(&[2, 3], vec![1.0, -2.5, 3.0, f32::MIN_POSITIVE, 5.0, -0.0]);
        let parts = [
            tensor(rows.clone()),
            tensor(Tensor::from_vec(&[1, 2], vec![7_u32, 3])),
            tensor(Tensor::from_vec(&[1], vec![0.25])),
            Region::new(Payload::Totals(vec![1e300, -1.0])),
            tensor(Tensor::zeros(&[0, 3])),
            tensor(rows.clone()),
        ];
        let came: Vec<Region> = parts.iter().map(sent).collect();
        assert!(parts.iter().zip(&came).all(|(sent, came)| sent.len() == came.bytes().len()));
        let address = came[0].bytes().as_ptr();
        let mut frame = unpack(came);
        let mut got = frame.rows(3, Format::F32).unwrap();
        assert_eq!((got.shape(), bytes(&got)), (rows.shape(), bytes(&rows)));
        assert_eq!(bytes(&got).as_ptr(), address);
        got.values_mut::<f32>()[0] = 9.0;
        assert_ne!(bytes(&got).as_ptr(), address, "written where others read");
        assert_eq!(frame.pairs(8, 4).unwrap().values::<u32>(), [7, 3]);
        assert_eq!(frame.flat(1).unwrap().values::<f32>(), [0.25]);
        assert_eq!(frame.totals(2).unwrap(), [1e300, -1.0]);
        assert_eq!(frame.rows(3, Format::F32).unwrap().shape(), [0, 3]);
        assert_eq!(frame.flat(6).unwrap().shape(), [6]);
        assert!(matches!(frame.pairs(8, 4), Err(FabricError::Content { .. })));
    }

    #[test]
    fn unexpected_content_is_reported_with_what_came() {
        let message =
            |part: Region, width: usize| unpack(vec![part]).rows(width, Format::F32).unwrap_err().to_string();
        let unknown = Region::new(Wire(vec![0; 2], 16, PayloadShape { kind: 2, rows: 2, cols: 4 }));
        let error = message(unknown, 4);
        assert!(
            error.ends_with("expected rows of width 4, got 16 bytes declared as 2 x 4 of kind 2"),
            "{error}"
        );
        let error = message(sent(&tensor(Tensor::zeros(&[2, 4]))), 5);
        assert!(error.ends_with("expected rows of width 5, got a tensor F32[2, 4]"), "{error}");
        let ids = || sent(&tensor(Tensor::from_vec(&[1, 4], vec![0_u32; 4])));
        let error = message(ids(), 4);
        assert!(error.ends_with("expected rows of width 4, got a tensor U32[1, 4]"), "{error}");
        let error = unpack(vec![ids()]).flat(4).unwrap_err().to_string();
        assert!(error.ends_with("expected a slice of 4 elements, got a tensor U32[1, 4]"), "{error}");
        let error = unpack(vec![tensor(Tensor::zeros(&[1, 2]))]).pairs(1, 1).unwrap_err().to_string();
        assert!(error.ends_with("expected pairs of 1 rows and 1 experts, got a tensor F32[1, 2]"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_of_any_form_make_it_panic(words in proptest::collection::vec(any::<u64>(), 0..8), cut in 0_usize..8,
                                              kind in 0_u8..8, rows in any::<u64>(), cols in 0_u64..40) {
            let len = (8 * words.len()).saturating_sub(cut);
            for rows in [rows, 0, 1, 2, 4] {
                let part = || Region::new(Wire(words.clone(), len, PayloadShape { kind, rows, cols }));
                if let Ok(tensor) = unpack(vec![part()]).rows(cols as usize, Format::F32) {
                    let shape = (tensor.rows() as u64, tensor.num_bytes());
                    prop_assert!(kind == F32_TENSOR && shape == (rows, len) && bytes(&tensor).len() == len);
                }
                let _ = (unpack(vec![part()]).pairs(2, 2), unpack(vec![part()]).flat(2), unpack(vec![part()]).totals(2));
            }
        }
    }
}
