//! Weights in files: HF directories of safetensors under the published names, read and written.
//!
//! Reads F32, BF16, F16 and FP8 with scales from one file or from several with an index; converts to f32. Buffers that follow from the
//! configuration are skipped. Knows names and shapes, no layers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use contraflow_kernels::host::{HostValues, HostValuesMut};
use contraflow_kernels::tensor::{Tensor, View};
use contraflow_runtime::checkpoint::MANIFEST_FILE;
use contraflow_runtime::control::ExportedFile;
use contraflow_runtime::files;
use contraflow_runtime::model_config::is_derived_buffer;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::fp8;
use crate::checkpoint::{Checkpoint, CheckpointFaults, Kind};
use crate::error::RankError;
use crate::model::params::{Params, gate_bias_name};

/// Name of the only weights file of a directory without an index.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the index of a directory with several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest header that is read: that of the 91,991 tensors of DeepSeek-V3 is a tenth of it.
const MAX_HEADER_BYTES: u64 = 100 << 20;

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
    fn bytes(&self) -> Result<Vec<u8>, RankError> {
        let (from, to) = self.info.data_offsets;
        let mut bytes = vec![0; to - from];
        let mut file = files::open(&self.file).map_err(file_error(&self.file))?;
        file.seek(SeekFrom::Start(self.start)).map_err(file_error(&self.file))?;
        file.read_exact(&mut bytes).map_err(file_error(&self.file))?;
        Ok(bytes)
    }

    fn values(&self) -> Result<Vec<f32>, RankError> {
        let bytes = self.bytes()?;
        match &self.scales {
            None => Ok(to_f32(&bytes, self.info.dtype)),
            Some(scales) => Ok(fp8::dequantize(&bytes, self.info.shape[1], &scales.values()?)),
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
        let mut faults = Vec::new();
        let index = dir.join(INDEX_FILE);
        let listed = if index.exists() { indexed_tensors(&index) } else { Ok(single_file()) };
        for (name, tensors) in listed.unwrap_or_else(|fault| {
            faults.push(fault);
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
                    weights.tensors.extend(found);
                    let absent = tensors.iter().filter(|tensor| !weights.tensors.contains_key(*tensor));
                    faults.extend(absent.map(|tensor| {
                        content_error(
                            &path,
                            format!("expected {tensor}, as {INDEX_FILE} says, got no such tensor"),
                        )
                    }));
                }
                Err(fault) => faults.push(fault),
            }
        }
        // Scales may be missing because their file is.
        let without_scales = weights.attach_scales();
        if faults.is_empty() {
            faults.extend(without_scales);
        }
        (weights, faults)
    }

    /// Gives each FP8 matrix its scales, which are no tensors of the model.
    ///
    /// **Errors**: the matrices that have none, or none that fit.
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
        faults
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
            Some(checkpoint) => checkpoint.records.shape(Kind::Weight, name).map(|shape| (shape, Dtype::F32)),
            None => self.tensors.get(name).map(|place| (place.info.shape.as_slice(), place.dtype())),
        }
    }

    /// Reads one tensor.
    ///
    /// **Errors**: it is missing, has another shape, or cannot be read.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, RankError> {
        if let Some(checkpoint) = &self.checkpoint {
            return checkpoint.records.read_numbers(Kind::Weight, name, shape);
        }
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| content_error(&self.dir, format!("has no tensor {name}")))?;
        if place.info.shape != shape {
            let message = format!("{name}: expected shape {shape:?}, got {:?}", place.info.shape);
            return Err(content_error(&place.file, message));
        }
        place.values()
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

/// The tensors that are expected in each file.
type Listed = BTreeMap<String, Vec<String>>;

fn single_file() -> Listed {
    BTreeMap::from([(SINGLE_FILE.to_owned(), Vec::new())])
}

fn indexed_tensors(index: &Path) -> Result<Listed, RankError> {
    let text = files::read_to_string(index).map_err(file_error(index))?;
    parse_index(&text).map_err(|message| content_error(index, message))
}

/// What an index says: the weights of each file of its directory. Buffers that follow from the configuration need not be
/// where the index has them.
///
/// **Errors**: if it is no index or names a file elsewhere.
pub fn parse_index(text: &str) -> Result<Listed, String> {
    #[derive(serde::Deserialize)]
    struct WeightIndex {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: WeightIndex = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut files = Listed::new();
    for (tensor, file) in parsed.weight_map {
        if Path::new(&file).file_name() != Some(file.as_ref()) {
            return Err(format!("{tensor}: expected the name of a file beside the index, got {file:?}"));
        }
        if !is_derived_buffer(&tensor) {
            files.entry(file).or_default().push(tensor);
        }
    }
    Ok(files)
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

/// Reads the header of a safetensors file of `size` bytes; no tensor in it reaches beyond the file. Also gives the length
/// of the header.
///
/// **Errors**: if it is damaged, truncated or no safetensors file.
pub fn read_header(file: &mut impl Read, size: u64) -> Result<(u64, Metadata), String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| format!("header: {error}"))?;
    let length = u64::from_le_bytes(length);
    // No more memory is asked for than the file has bytes.
    if length > MAX_HEADER_BYTES || length + 8 > size {
        return Err(format!("a header of {length} bytes in a file of {size}: damaged or no safetensors"));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|error| format!("header: {error}"))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| format!("header: {error}"))?;
    let room = size - 8 - length;
    for (name, info) in metadata.tensors() {
        let end = info.data_offsets.1 as u64;
        if end > room {
            return Err(format!("{name}: expected {end} bytes of data in the file, got {room}: truncated"));
        }
    }
    Ok((length, metadata))
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

/// One tensor to be written.
pub struct Entry<'a> {
    /// Published name.
    pub name: String,
    /// Published shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: View<'a>,
}

/// The header of a safetensors file with these tensors in this order, and how many bytes of data follow it.
pub fn header_text<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>) -> (String, u64) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for (name, dtype, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.to_owned(), info);
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // The format wants the data to begin at a multiple of 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    (text, offset as u64)
}

/// Writes tensors into one safetensors file, under a temporary name first, so that a file of the final name is whole.
///
/// **Errors**: what the system says, with the path.
pub fn write_file(dir: &Path, name: &str, mut entries: Vec<Entry>) -> Result<ExportedFile, RankError> {
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let listed = entries.iter().map(|entry| (entry.name.as_str(), Dtype::F32, entry.shape.as_slice()));
    let (text, offset) = header_text(listed);
    let temporary = dir.join(format!(".{name}.part"));
    let final_path = dir.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(File::create(&temporary)?);
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        for entry in &entries {
            for value in entry.values.values::<f32>() {
                file.write_all(&value.to_le_bytes())?;
            }
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&temporary, &final_path)
    };
    write().map_err(file_error(&final_path))?;
    let tensors = entries.into_iter().map(|entry| entry.name).collect();
    Ok(ExportedFile { file: name.to_owned(), tensors, bytes: offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_and_readable_by_the_safetensors_crate() {
        let dir = folder();
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
