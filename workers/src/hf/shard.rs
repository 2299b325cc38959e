//! One weights file as it is written: which tensors follow each other in it, in what form, and their bytes.
//!
//! Some rows of one tensor are in memory at a time. Matrices in FP8 have their scales as tensors of their own. Knows shapes and
//! forms, no directory and no layers.

use std::ops::Range;
use std::path::Path;

use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::View;
use contraflow_runtime::control::ExportedFile;
use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::model_config::WeightShape;
use safetensors::Dtype;

use super::fp8::{self, Blocks};
use super::header::header_text;
use super::weights::{file_error, strips};
use crate::error::RankError;
use crate::hashed_file::{FinishedFile, HashedFile};

/// How a tensor lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As numbers, in F32, BF16 or F16.
    Numbers(Dtype),
    /// A matrix, as E4M3 codes and one scale per block of 128 x 128.
    Blocks,
}

/// Where the values of tensors come from.
pub(crate) trait Values {
    /// Some rows of a tensor, the first of them a multiple of 128.
    ///
    /// **Errors**: they cannot be read, or are not what a model may have.
    fn rows(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Vec<f32>, RankError>;

    /// The same of a matrix as blocks.
    ///
    /// **Errors**: as [`Values::rows`].
    fn blocks(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Blocks, RankError> {
        Ok(fp8::quantize(self.rows(weight, rows)?, weight.shape[1]))
    }
}

/// What of a tensor is in one place of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Numbers(Dtype),
    Codes,
    Scales,
}

/// One tensor of the file: a part of one of the model.
struct Piece {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Which tensor of the model.
    weight: usize,
    part: Part,
}

impl Piece {
    fn of(weight: usize, WeightShape { name, shape, .. }: &WeightShape, form: Form) -> Vec<Piece> {
        let piece = |ending: &str, dtype, shape, part| Piece {
            name: format!("{name}{ending}"),
            dtype,
            shape,
            weight,
            part,
        };
        match (form, fp8::scales_shape(shape)) {
            (Form::Blocks, Some(scales)) => vec![
                piece("", Dtype::F8_E4M3, shape.clone(), Part::Codes),
                piece(fp8::SCALES, Dtype::F32, scales.to_vec(), Part::Scales),
            ],
            (Form::Blocks, None) => panic!("{name}: expected a matrix to write in blocks, got {shape:?}"),
            (Form::Numbers(dtype), _) => vec![piece("", dtype, shape.clone(), Part::Numbers(dtype))],
        }
    }

    fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// How far off a multiple of four bytes it leaves what follows. Readers want numbers at multiples of their size, and the format
    /// has no gaps; so what ends at one comes first.
    fn misalignment(&self) -> u8 {
        match self.num_bytes() % 4 {
            0 => 0,
            2 => 1,
            _ => 2,
        }
    }
}

/// Bytes of a tensor in a form, its scales included.
pub(crate) fn num_bytes(weight: &WeightShape, form: Form) -> u64 {
    Piece::of(0, weight, form).iter().map(|piece| piece.num_bytes() as u64).sum()
}

/// A weights file that is to be written.
pub(crate) struct Shard {
    weights: Vec<WeightShape>,
    /// In the order of the file.
    pieces: Vec<Piece>,
    header: String,
    bytes: u64,
}

impl Shard {
    /// The file of these tensors, in their order as far as alignment allows it.
    pub(crate) fn new(weights: Vec<(WeightShape, Form)>) -> Self {
        let pieces =
            weights.iter().enumerate().flat_map(|(index, (weight, form))| Piece::of(index, weight, *form));
        let mut pieces: Vec<Piece> = pieces.collect();
        pieces.sort_by_key(Piece::misalignment);
        let listed = pieces.iter().map(|piece| (piece.name.as_str(), piece.dtype, piece.shape.as_slice()));
        let (header, bytes) = header_text(listed);
        Shard { weights: weights.into_iter().map(|(weight, _)| weight).collect(), pieces, header, bytes }
    }

    /// Names of its tensors, in the order of the file.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().map(|piece| piece.name.as_str())
    }

    /// Its first bytes, which say everything but the values.
    pub(crate) fn header(&self) -> &str {
        &self.header
    }

    /// **Units**: bytes of all its tensors.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the file under another name, brings it to disk and gives it its own.
    ///
    /// **Errors**: those of the values; what the system says, with the path.
    pub(crate) fn write(
        &self,
        dir: &Path,
        name: &str,
        values: &impl Values,
    ) -> Result<FinishedFile, RankError> {
        let part = dir.join(format!(".{name}.part"));
        let mut file = HashedFile::create(&part).map_err(file_error(&part))?;
        let out = &mut |bytes: &[u8]| file.write(bytes).map_err(file_error(&part));
        out(&(self.header.len() as u64).to_le_bytes())?;
        out(self.header.as_bytes())?;
        // Of matrices whose codes have been written.
        let mut scales: Vec<Option<Vec<f32>>> = vec![None; self.weights.len()];
        for piece in &self.pieces {
            let weight = &self.weights[piece.weight];
            match piece.part {
                Part::Numbers(dtype) => {
                    for rows in strips(&weight.shape) {
                        out(&encode(&values.rows(weight, rows)?, dtype))?;
                    }
                }
                Part::Codes => scales[piece.weight] = Some(each_block(weight, values, &mut *out)?),
                Part::Scales => {
                    let known = scales[piece.weight].take();
                    let known = known.map_or_else(|| each_block(weight, values, &mut |_| Ok(())), Ok)?;
                    out(&encode(&known, Dtype::F32))?;
                }
            }
        }
        failpoint("export.shard-written");
        let finished = file.finish().map_err(file_error(&part))?;
        failpoint("export.shard-synced");
        std::fs::rename(&part, dir.join(name)).map_err(file_error(&part))?;
        Ok(finished)
    }
}

/// Hands over the codes of a matrix, block row by block row, and returns all its scales.
fn each_block(
    weight: &WeightShape,
    values: &impl Values,
    codes: &mut impl FnMut(&[u8]) -> Result<(), RankError>,
) -> Result<Vec<f32>, RankError> {
    let mut scales = Vec::new();
    for rows in strips(&weight.shape) {
        let blocks = values.blocks(weight, rows)?;
        codes(&blocks.codes)?;
        scales.extend(blocks.scales);
    }
    Ok(scales)
}

fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// One tensor of a rank's own.
pub struct Entry<'a> {
    /// Published name.
    pub name: String,
    /// Published shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: View<'a>,
}

/// A rank's own tensors, by name.
struct Entries<'a>(Vec<Entry<'a>>);

impl Values for Entries<'_> {
    fn rows(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Vec<f32>, RankError> {
        let at = self.0.binary_search_by(|entry| entry.name.cmp(&weight.name));
        let values = self.0[at.expect("what is written was listed")].values.values::<f32>();
        let cols = weight.shape.last().copied().unwrap_or(1);
        Ok(values[rows.start * cols..rows.end * cols].to_vec())
    }
}

/// Writes tensors into one safetensors file, under a temporary name first, so that a file of the final name is whole.
///
/// **Errors**: what the system says, with the path.
pub fn write_file(dir: &Path, name: &str, mut entries: Vec<Entry>) -> Result<ExportedFile, RankError> {
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let weight = |entry: &Entry| {
        let weight = WeightShape { name: entry.name.clone(), shape: entry.shape.clone(), tied_to: None };
        (weight, Form::Numbers(Dtype::F32))
    };
    let shard = Shard::new(entries.iter().map(weight).collect());
    shard.write(dir, name, &Entries(entries))?;
    let tensors = shard.names().map(str::to_owned).collect();
    Ok(ExportedFile { file: name.to_owned(), tensors, bytes: shard.bytes() })
}

#[cfg(test)]
mod tests {
    use contraflow_kernels::tensor::Tensor;

    use super::*;
    use crate::hf::weights::{HfWeights, SINGLE_FILE};

    fn weight(name: &str, shape: &[usize]) -> WeightShape {
        WeightShape { name: name.into(), shape: shape.to_vec(), tied_to: None }
    }

    #[test]
    fn what_is_written_is_read_back_and_readable_by_the_safetensors_crate() {
        let dir = tempfile::tempdir().unwrap();
        let values = [1.5, -2.0, 3.25, f32::MIN_POSITIVE, 0.0, 7.0];
        let tensor = Tensor::from_vec(&[6], values.to_vec());
        let entries = vec![
            Entry { name: "b".into(), shape: vec![2], values: tensor.view(4..6) },
            Entry { name: "a".into(), shape: vec![2, 2], values: tensor.view(0..4) },
        ];
        let written = write_file(dir.path(), SINGLE_FILE, entries).unwrap();
        assert_eq!((written.tensors, written.bytes), (vec!["a".to_owned(), "b".to_owned()], 24));
        let weights = HfWeights::open(dir.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(weights.read("a", &[2, 2]).unwrap(), values[..4]);
        let bytes = std::fs::read(dir.path().join(SINGLE_FILE)).unwrap();
        let other = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(other.tensor("b").unwrap().data().len(), 8);
        let wrong = weights.read("a", &[4]).unwrap_err().to_string();
        assert!(wrong.contains("a: expected shape [4], got [2, 2]"), "{wrong}");
    }

    /// Values of which every block has other ones.
    struct Slopes;

    impl Values for Slopes {
        fn rows(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Vec<f32>, RankError> {
            let cols = weight.shape.last().copied().unwrap_or(1);
            Ok((rows.start * cols..rows.end * cols).map(|at| at as f32 - 1000.0).collect())
        }
    }

    #[test]
    fn tensors_lie_at_multiples_of_their_size_and_matrices_of_odd_sizes_are_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (bf16, f32) = (Form::Numbers(Dtype::BF16), Form::Numbers(Dtype::F32));
        let all = [
            (weight("odd.half", &[3]), bf16),
            (weight("odd.matrix", &[131, 129]), Form::Blocks),
            (weight("single", &[3]), f32),
            (weight("even.matrix", &[130, 2050]), Form::Blocks),
            (weight("tall.matrix", &[2500, 132]), Form::Blocks),
            (weight("last.matrix", &[1, 1]), Form::Blocks),
        ];
        let expected_bytes: u64 = all.iter().map(|(weight, form)| num_bytes(weight, *form)).sum();
        let shard = Shard::new(all.to_vec());
        shard.write(dir.path(), SINGLE_FILE, &Slopes).unwrap();
        let bytes = std::fs::read(dir.path().join(SINGLE_FILE)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!((file.len(), shard.bytes()), (10, expected_bytes));
        for (name, tensor) in file.tensors() {
            let at = tensor.data().as_ptr().addr() - bytes.as_ptr().addr();
            assert!(at.is_multiple_of(tensor.dtype().bitsize() / 8), "{name} at {at}");
        }
        assert_eq!(file.tensor("tall.matrix_scale_inv").unwrap().shape(), [20, 2]);
        let read = HfWeights::open(dir.path()).unwrap();
        for (weight, form) in &all {
            let cols = weight.shape.last().unwrap();
            let exact = Slopes.rows(weight, 0..weight.num_elements() as usize / cols).unwrap();
            let whole = match form {
                Form::Blocks => fp8::dequantize(&fp8::quantize(exact, *cols), *cols),
                Form::Numbers(Dtype::F32) => exact,
                Form::Numbers(_) => exact.iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect(),
            };
            assert!(read.read(&weight.name, &weight.shape).unwrap() == whole, "{}", weight.name);
        }
    }
}
