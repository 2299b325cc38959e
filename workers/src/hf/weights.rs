//! Weights in files: HF directories of safetensors under the published names, read some rows at a time.
//!
//! Reads F32, BF16, F16 and FP8 with scales from one file or from several with an index; converts to f32. Buffers that follow from the
//! configuration are skipped. Knows names and shapes, no layers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use contraflow_kernels::host::HostValuesMut;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::checkpoint::MANIFEST_FILE;
use contraflow_runtime::files;
use contraflow_runtime::model_config::is_derived_buffer;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::fp8::{self, BLOCK, Blocks};
use super::header::{Listed, parse_index, read_header};
use crate::checkpoint::{Checkpoint, CheckpointFaults, Kind};
use crate::error::RankError;
use crate::model::params::{Params, gate_bias_name};

/// Name of the only weights file of a directory without an index.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the index of a directory with several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Values that pass through memory at once, if a block of rows has no more.
const STRIP: usize = 1 << 18;

/// Rows and columns of a tensor; one with a single dim is a row.
fn rows_and_cols(shape: &[usize]) -> (usize, usize) {
    let (&cols, outer) = shape.split_last().unwrap_or((&1, &[]));
    (outer.iter().product(), cols)
}

/// A tensor's rows in parts that are small enough to be in memory; each begins with a block.
pub(crate) fn strips(shape: &[usize]) -> impl Iterator<Item = Range<usize>> + use<> {
    let (rows, cols) = rows_and_cols(shape);
    let height = BLOCK * (STRIP / (BLOCK * cols.max(1))).max(1);
    (0..rows).step_by(height).map(move |first| first..rows.min(first + height))
}

/// Where one tensor is.
struct TensorLocation {
    file: PathBuf,
    /// First byte of the tensor in the file.
    start: u64,
    info: TensorInfo,
    /// The scales of an FP8 matrix, which may be in another file.
    scales: Option<Box<TensorLocation>>,
}

impl TensorLocation {
    fn bytes(&self, rows: &Range<usize>) -> Result<Vec<u8>, RankError> {
        let row_bytes = rows_and_cols(&self.info.shape).1 * self.info.dtype.bitsize() / 8;
        let mut bytes = vec![0; rows.len() * row_bytes];
        let mut file = files::open(&self.file).map_err(file_error(&self.file))?;
        let first = self.start + (rows.start * row_bytes) as u64;
        file.seek(SeekFrom::Start(first)).map_err(file_error(&self.file))?;
        file.read_exact(&mut bytes).map_err(file_error(&self.file))?;
        Ok(bytes)
    }

    fn all_rows(&self) -> Range<usize> {
        0..rows_and_cols(&self.info.shape).0
    }

    fn numbers(&self, rows: &Range<usize>) -> Result<Vec<f32>, RankError> {
        Ok(to_f32(&self.bytes(rows)?, self.info.dtype))
    }

    /// Rows that begin with a block, of an FP8 matrix.
    fn blocks(&self, name: &str, rows: &Range<usize>) -> Result<Option<Blocks>, RankError> {
        let Some(scales) = &self.scales else { return Ok(None) };
        let codes = self.bytes(rows)?;
        if let Some(at) = codes.iter().position(|&code| fp8::is_nan(code)) {
            let cols = self.info.shape[1];
            let (code, row, col) = (codes[at], rows.start + at / cols, at % cols);
            let message =
                format!("{name}: expected E4M3 codes of numbers, got {code:#x} (NaN) at [{row}, {col}]");
            return Err(content_error(&self.file, message));
        }
        let of_blocks = rows.start / BLOCK..rows.end.div_ceil(BLOCK);
        Ok(Some(Blocks { codes, scales: scales.numbers(&of_blocks)? }))
    }

    fn values(&self, name: &str, rows: &Range<usize>) -> Result<Vec<f32>, RankError> {
        match self.blocks(name, rows)? {
            Some(blocks) => Ok(fp8::dequantize(&blocks, self.info.shape[1])),
            None => self.numbers(rows),
        }
    }

    /// Type of its values as they are read.
    fn dtype(&self) -> Dtype {
        if self.scales.is_some() { Dtype::F32 } else { self.info.dtype }
    }
}

/// The weights of an HF directory or of a checkpoint, by name; values are read on demand.
pub struct HfWeights {
    dir: PathBuf,
    /// Of an HF directory.
    tensors: BTreeMap<String, TensorLocation>,
    /// Tensors of an HF directory that are no weights.
    buffers: BTreeSet<String>,
    /// In the place of files under published names, if the folder is that of a checkpoint.
    checkpoint: Option<Box<Checkpoint>>,
    /// What is read of a checkpoint: the weights, or their average.
    kind: Kind,
}

/// The error of a file, with its path.
pub(crate) fn file_error(path: &Path) -> impl Fn(std::io::Error) -> RankError + '_ {
    move |source| RankError::File { path: path.display().to_string(), source }
}

fn content_error(path: &Path, message: impl Into<String>) -> RankError {
    RankError::Content { path: path.display().to_string(), message: message.into() }
}

impl HfWeights {
    /// Reads the headers of all weight files of a directory.
    ///
    /// **Errors**: a missing or damaged file, by name; an FP8 tensor without its scales, by name. The first fault of [`HfWeights::survey`].
    pub fn open(dir: &Path) -> Result<Self, RankError> {
        let (weights, faults) = Self::survey(dir);
        faults.into_iter().next().map_or(Ok(weights), Err)
    }

    /// Reads the headers of all weight files that can be read, and says everything that is wrong with them.
    pub fn survey(dir: &Path) -> (Self, Vec<RankError>) {
        let mut weights = HfWeights {
            dir: dir.to_owned(),
            tensors: BTreeMap::new(),
            buffers: BTreeSet::new(),
            checkpoint: None,
            kind: Kind::Weight,
        };
        if dir.join(MANIFEST_FILE).exists() {
            let faults = match Checkpoint::open(dir) {
                Ok(checkpoint) => {
                    weights.checkpoint = Some(Box::new(checkpoint));
                    Vec::new()
                }
                Err(CheckpointFaults(faults)) => faults.into_iter().map(RankError::from).collect(),
            };
            return (weights, faults);
        }
        let (mut faults, mut all_are_read) = (Vec::new(), true);
        let index = dir.join(INDEX_FILE);
        let listed = if index.exists() { indexed_tensors(&index) } else { Ok(single_file()) };
        for (name, tensors) in listed.unwrap_or_else(|fault| {
            faults.push(fault);
            all_are_read = false;
            BTreeMap::new()
        }) {
            let path = dir.join(&name);
            match open_header(&path) {
                Ok(found) => {
                    let (buffers, found): (Vec<_>, Vec<_>) =
                        found.into_iter().partition(|(tensor, _)| is_derived_buffer(tensor));
                    weights.buffers.extend(buffers.into_iter().map(|(tensor, _)| tensor));
                    faults.extend(
                        found.iter().filter_map(|(t, place)| supported(&path, t, place.info.dtype).err()),
                    );
                    for (tensor, place) in found {
                        let earlier = weights.tensors.get(&tensor).map(|earlier| earlier.file.display());
                        faults.extend(earlier.map(|earlier| {
                            let message = format!("{tensor}: expected in one file, got it in {earlier} too");
                            content_error(&path, message)
                        }));
                        weights.tensors.entry(tensor).or_insert(place);
                    }
                    let absent = tensors.iter().filter(|tensor| !weights.tensors.contains_key(*tensor));
                    faults.extend(absent.map(|tensor| {
                        content_error(
                            &path,
                            format!("expected {tensor}, as {INDEX_FILE} says, got no such tensor"),
                        )
                    }));
                }
                Err(fault) => {
                    faults.push(fault);
                    all_are_read = false;
                }
            }
        }
        // Scales may be missing because their file is.
        let without_scales = weights.attach_scales();
        if all_are_read {
            faults.extend(without_scales);
        }
        (weights, faults)
    }

    /// In the place of a checkpoint's weights their moving average, under the same names.
    ///
    /// **Errors**: this is no checkpoint, or one of a run that keeps no average.
    pub fn averaged(self) -> Result<Self, RankError> {
        let expected = "expected a checkpoint with a moving average of the weights";
        match &self.checkpoint {
            None => Err(content_error(&self.dir, format!("{expected}, got a directory of weights"))),
            Some(checkpoint) if checkpoint.records.has(Kind::Average) => {
                Ok(HfWeights { kind: Kind::Average, ..self })
            }
            Some(_) => {
                let got = "got one of a run without training.ema_decay";
                Err(content_error(&self.dir, format!("{expected}, {got}")))
            }
        }
    }

    /// Whether they are the moving average of a checkpoint's weights.
    pub fn is_averaged(&self) -> bool {
        self.kind == Kind::Average
    }

    /// Gives each FP8 matrix its scales, which are no tensors of the model.
    ///
    /// **Errors**: the matrices that have none, or none that fit, and the scales of anything else.
    fn attach_scales(&mut self) -> Vec<RankError> {
        let is_fp8 = |place: &TensorLocation| place.info.dtype == Dtype::F8_E4M3;
        let fp8 = self.tensors.iter().filter(|(_, place)| is_fp8(place));
        let names: Vec<String> = fp8.map(|(name, _)| name.clone()).collect();
        let mut faults = Vec::new();
        for name in names {
            let scales = self.tensors.remove(&format!("{name}{}", fp8::SCALES));
            let Some(place) = self.tensors.get_mut(&name) else { continue };
            let fault = scales_fault(&name, &place.info, scales.as_ref().map(|scales| &scales.info));
            match fault {
                Some(message) => faults.push(content_error(&place.file, message)),
                None => place.scales = scales.map(Box::new),
            }
        }
        let left = self.tensors.extract_if(.., |name, _| name.ends_with(fp8::SCALES));
        let left: Vec<(String, TensorLocation)> = left.collect();
        faults.extend(left.into_iter().map(|(name, place)| {
            let matrix = name.trim_end_matches(fp8::SCALES);
            let got = match self.tensors.get(matrix) {
                Some(TensorLocation { info, .. }) => format!("one in {:?}", info.dtype),
                None => "none".to_owned(),
            };
            content_error(
                &place.file,
                format!("{name}: expected scales of an FP8 matrix {matrix}, got {got}"),
            )
        }));
        faults
    }

    /// What is wrong with the scales of FP8 matrices: all of them are read.
    pub fn scale_faults(&self) -> Vec<RankError> {
        let with_scales =
            self.tensors.iter().filter_map(|(name, place)| Some((name, place.scales.as_deref()?)));
        let fault = |(name, scales): (&String, &TensorLocation)| {
            let values = match scales.numbers(&scales.all_rows()) {
                Ok(values) => values,
                Err(error) => return Some(error),
            };
            let at = values.iter().position(|&value| !fp8::is_scale(value))?;
            let (value, cols) = (values[at], scales.info.shape[1]);
            let message = format!(
                "{name}{}: expected finite scales above 0, got {value} at [{}, {}]",
                fp8::SCALES,
                at / cols,
                at % cols
            );
            Some(content_error(&scales.file, message))
        };
        with_scales.filter_map(fault).collect()
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let kept = self.checkpoint.iter().flat_map(|checkpoint| checkpoint.records.weights());
        self.tensors.keys().map(String::as_str).chain(kept.map(|(name, _)| name))
    }

    /// Names of the tensors that were skipped: buffers that follow from the configuration.
    pub fn buffers(&self) -> &BTreeSet<String> {
        &self.buffers
    }

    /// Shape of a tensor and type of its values as they are read, if there is one of that name.
    pub fn info(&self, name: &str) -> Option<(&[usize], Dtype)> {
        match &self.checkpoint {
            Some(checkpoint) => checkpoint.records.shape(self.kind, name).map(|shape| (shape, Dtype::F32)),
            None => self.tensors.get(name).map(|place| (place.info.shape.as_slice(), place.dtype())),
        }
    }

    /// Reads one tensor.
    ///
    /// **Errors**: it is missing, has another shape, holds a code that is no number, or cannot be read.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, RankError> {
        self.read_rows(name, shape, 0..rows_and_cols(shape).0)
    }

    /// Reads some rows of a tensor, the first of them a multiple of 128; a tensor with a single dim is one row.
    ///
    /// **Errors**: as [`HfWeights::read`].
    pub fn read_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>, RankError> {
        if let Some(checkpoint) = &self.checkpoint {
            let cols = rows_and_cols(shape).1;
            let range = rows.start * cols..rows.end * cols;
            return checkpoint.records.read_range(self.kind, (name, shape), range);
        }
        self.place(name, shape)?.values(name, &rows)
    }

    /// The same of a matrix as it is stored, if that is in FP8.
    ///
    /// **Errors**: as [`HfWeights::read`].
    pub(super) fn read_blocks(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
    ) -> Result<Option<Blocks>, RankError> {
        match self.checkpoint {
            Some(_) => Ok(None),
            None => self.place(name, shape)?.blocks(name, &rows),
        }
    }

    fn place(&self, name: &str, shape: &[usize]) -> Result<&TensorLocation, RankError> {
        let place = self.tensors.get(name);
        let place = place.ok_or_else(|| content_error(&self.dir, format!("has no tensor {name}")))?;
        if place.info.shape != shape {
            let message = format!("{name}: expected shape {shape:?}, got {:?}", place.info.shape);
            return Err(content_error(&place.file, message));
        }
        Ok(place)
    }

    /// Fills parameters with the tensors of their names, and the gate biases of their layers.
    ///
    /// **Errors**: those of [`HfWeights::read`], for the first tensor that is wrong.
    pub fn fill(&self, params: &mut Params) -> Result<(), RankError> {
        for param in params.iter_mut() {
            param.fill(|part, mut target| {
                target.values_mut().copy_from_slice(&self.read(&part.name, &part.shape)?);
                Ok::<_, RankError>(())
            })?;
        }
        for (layer, bias) in &mut params.gate_biases {
            let values = self.read(&gate_bias_name(*layer), &[bias.len()])?;
            *bias = Tensor::from_vec(&[values.len()], values);
        }
        Ok(())
    }
}

fn single_file() -> Listed {
    BTreeMap::from([(SINGLE_FILE.to_owned(), Vec::new())])
}

fn indexed_tensors(index: &Path) -> Result<Listed, RankError> {
    let text = files::read_to_string(index).map_err(file_error(index))?;
    parse_index(&text).map_err(|message| content_error(index, message))
}

fn open_header(path: &Path) -> Result<Vec<(String, TensorLocation)>, RankError> {
    let mut file = files::open(path).map_err(file_error(path))?;
    let size = file.metadata().map_err(file_error(path))?.len();
    let (length, metadata) = read_header(&mut file, size).map_err(|message| content_error(path, message))?;
    let place = |(name, info): (String, &TensorInfo)| {
        let start = 8 + length + info.data_offsets.0 as u64;
        (name, TensorLocation { file: path.to_owned(), start, info: info.clone(), scales: None })
    };
    Ok(metadata.tensors().into_iter().map(place).collect())
}

fn supported(file: &Path, tensor: &str, dtype: Dtype) -> Result<(), RankError> {
    match dtype {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F8_E4M3 => Ok(()),
        other => Err(content_error(
            file,
            format!("{tensor}: expected F32, BF16, F16, or F8_E4M3 with scales, got {other:?}"),
        )),
    }
}

/// What is wrong with the scales of an FP8 tensor.
fn scales_fault(name: &str, weight: &TensorInfo, scales: Option<&TensorInfo>) -> Option<String> {
    let Some(fitting) = fp8::scales_shape(&weight.shape) else {
        return Some(format!("{name}: expected a matrix, as it is FP8, got shape {:?}", weight.shape));
    };
    let block = fp8::BLOCK;
    let expected = format!("scales {name}{} of shape {fitting:?}, one per {block} x {block}", fp8::SCALES);
    match scales {
        None => Some(format!("{name}: FP8, expected {expected}, got none")),
        Some(TensorInfo { dtype: Dtype::F32, shape, .. }) if *shape == fitting => None,
        Some(TensorInfo { dtype, shape, .. }) => {
            Some(format!("{name}: FP8, expected {expected} in F32, got {shape:?} in {dtype:?}"))
        }
    }
}

fn to_f32(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => {
            let halves = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            halves.map(|bits| half::bf16::from_bits(bits).to_f32()).collect()
        }
        Dtype::F16 => {
            let halves = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            halves.map(|bits| half::f16::from_bits(bits).to_f32()).collect()
        }
        _ => bytes
            .chunks_exact(4)
            .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_damaged_or_foreign_file_is_refused_by_name() {
        let dir = folder();
        let path = dir.path().join(SINGLE_FILE);
        let open = || HfWeights::open(dir.path()).err().unwrap().to_string();
        assert!(open().contains(SINGLE_FILE));
        std::fs::write(&path, [255; 64]).unwrap();
        assert!(open().contains("damaged or no safetensors"));
        let data: Vec<u8> = vec![0; 8];
        let f8 = safetensors::tensor::TensorView::new(Dtype::F8_E4M3, vec![8], &data).unwrap();
        std::fs::write(&path, safetensors::serialize([("model.norm.weight", f8)], None).unwrap()).unwrap();
        assert!(open().contains("model.norm.weight: expected a matrix, as it is FP8, got shape [8]"));
        let f8 = safetensors::tensor::TensorView::new(Dtype::F8_E4M3, vec![2, 4], &data).unwrap();
        let scales = safetensors::tensor::TensorView::new(Dtype::F32, vec![1, 2], &data).unwrap();
        let both = [("head.weight", f8.clone()), ("head.weight_scale_inv", scales)];
        for (tensors, got) in [(&both[..1], "none"), (&both[..], "[1, 2] in F32")] {
            let tensors = tensors.iter().map(|(name, view)| (*name, view.clone()));
            std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
            let expected =
                "head.weight: FP8, expected scales head.weight_scale_inv of shape [1, 1], one per 128 x 128";
            assert!(open().contains(expected) && open().ends_with(&format!("got {got}")), "{}", open());
        }
        let e5m2 = safetensors::tensor::TensorView::new(Dtype::F8_E5M2, vec![8], &data).unwrap();
        std::fs::write(&path, safetensors::serialize([("x", e5m2)], None).unwrap()).unwrap();
        assert!(open().contains("x: expected F32, BF16, F16, or F8_E4M3 with scales, got F8_E5M2"));
        let bf16 = safetensors::tensor::TensorView::new(Dtype::BF16, vec![4], &data).unwrap();
        let whole = safetensors::serialize([("x", bf16)], None).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(open().contains("truncated"));
    }
}
