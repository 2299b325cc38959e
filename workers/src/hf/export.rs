//! Writes a model as an HF directory: shards with an index, configuration, tokenizer files, checksums.
//!
//! One tensor is in memory at a time. A directory is made under another name,
//! brought to disk and renamed: under its own name it is whole or not there. Knows names and files, no layers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use contraflow_runtime::files::{self, sync_dir};
use contraflow_runtime::model_config::{ModelConfig, WeightShape};
use safetensors::Dtype;

use super::check::{CHECKSUMS_FILE, CHECKSUMS_VERSION, Checksums, FileChecksum};
use super::weights::{HfWeights, INDEX_FILE, SINGLE_FILE, file_error, header_text};
use crate::data::model_tokenizer::tokenizer_files;
use crate::error::RankError;
use crate::hashed_file::{FinishedFile, HashedFile};

/// Files beside the weights that go along where they are, with all that belongs to a tokenizer.
const COMPANIONS: [&str; 2] = ["chat_template.jinja", "generation_config.json"];

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// What it is.
    AsIs,
    /// Every tensor in f32.
    F32,
    /// Rounded to bf16; the gate biases stay in f32, as published.
    Bf16,
}

/// A model on its way into a directory.
pub struct Export<'a> {
    /// Where its tensors come from.
    pub source: &'a HfWeights,
    /// What they are.
    pub config: &'a ModelConfig,
    /// The contents of `config.json`.
    pub config_json: String,
    /// Where tokenizer files are taken from, if there are any.
    pub companions: &'a Path,
    /// What the tensors become.
    pub format: ExportFormat,
    /// Largest shard; a tensor that is larger has one of its own.
    ///
    /// **Units**: bytes of data.
    pub shard_bytes: u64,
}

/// What has been written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Number of tensors.
    pub num_tensors: usize,
    /// Number of weight files.
    pub num_shards: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Where a folder is made before it has its name.
pub fn part_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    target.with_file_name(name)
}

/// Lets `write` fill a new folder beside `target`, brings it to disk and gives it the name `target`, which must not exist or
/// be an empty folder. What fails leaves nothing.
///
/// **Errors**: those of `write`, and what the system says.
pub fn staged<T>(target: &Path, write: impl FnOnce(&Path) -> Result<T, RankError>) -> Result<T, RankError> {
    let part = part_of(target);
    std::fs::create_dir(&part).map_err(file_error(&part))?;
    let done = write(&part).and_then(|done| {
        sync_dir(&part).map_err(file_error(&part))?;
        std::fs::rename(&part, target).map_err(file_error(target))?;
        Ok(done)
    });
    match done {
        Ok(done) => {
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            sync_dir(parent).map_err(file_error(parent))?;
            Ok(done)
        }
        Err(error) => {
            // The first error is reported.
            drop(std::fs::remove_dir_all(&part));
            Err(error)
        }
    }
}

impl Export<'_> {
    /// Writes everything into an empty folder.
    ///
    /// **Errors**: a tensor that cannot be read or is not finite, by name; what the system says, with the path.
    pub fn write(&self, dir: &Path) -> Result<Written, RankError> {
        let shards = self.shards();
        let mut checksums = Checksums { format_version: CHECKSUMS_VERSION, files: BTreeMap::new() };
        let mut weight_map = serde_json::Map::new();
        let mut written = Written { num_shards: shards.len(), ..Written::default() };
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE_FILE.to_owned(),
                all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
            };
            let (file, bytes) = self.write_shard(&dir.join(&name), shard)?;
            weight_map.extend(shard.iter().map(|weight| (weight.name.clone(), name.clone().into())));
            written.num_tensors += shard.len();
            written.bytes += bytes;
            checksums.files.insert(name, file);
        }
        let mut texts = vec![("config.json".to_owned(), self.config_json.clone().into_bytes())];
        if shards.len() > 1 {
            let index =
                serde_json::json!({"metadata": {"total_size": written.bytes}, "weight_map": weight_map});
            texts.push((INDEX_FILE.to_owned(), format!("{index:#}\n").into_bytes()));
        }
        texts.extend(self.companions()?);
        for (name, bytes) in texts {
            write_whole(&dir.join(&name), &bytes)?;
            let blake3 = blake3::hash(&bytes).to_hex().to_string();
            checksums.files.insert(name, FileChecksum { bytes: bytes.len() as u64, blake3 });
        }
        let checksums = serde_json::to_string_pretty(&checksums).expect("a seal is texts and numbers");
        write_whole(&dir.join(CHECKSUMS_FILE), format!("{checksums}\n").as_bytes())?;
        Ok(written)
    }

    /// Names and contents of the files that go along.
    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, RankError> {
        let of_tokenizer = tokenizer_files(self.companions)
            .map_err(|fault| RankError::Content { path: fault.file.clone(), message: fault.to_string() })?;
        let names = of_tokenizer.into_iter().chain(COMPANIONS.map(str::to_owned));
        let files = names.filter(|name| self.companions.join(name).is_file());
        files
            .map(|name| {
                let path = self.companions.join(&name);
                Ok((name, files::read(&path).map_err(file_error(&path))?))
            })
            .collect()
    }

    /// The tensors in the order of the layers, cut so that no file is larger than it may be.
    fn shards(&self) -> Vec<Vec<WeightShape>> {
        let mut shards: Vec<Vec<WeightShape>> = vec![Vec::new()];
        let mut filled = 0;
        for weight in self.config.weights() {
            let bytes = weight.num_elements() * (self.dtype(&weight).bitsize() / 8) as u64;
            if filled > 0 && filled + bytes > self.shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            shards.last_mut().expect("there is always one").push(weight);
        }
        shards
    }

    /// Under which name the source has a tensor: a copy of a shared one need not be there.
    fn source_name<'w>(&self, weight: &'w WeightShape) -> &'w str {
        match weight.tied_to {
            Some(original) if self.source.info(&weight.name).is_none() => original,
            _ => &weight.name,
        }
    }

    fn dtype(&self, weight: &WeightShape) -> Dtype {
        match self.format {
            ExportFormat::AsIs => {
                self.source.info(self.source_name(weight)).map_or(Dtype::F32, |(_, dtype)| dtype)
            }
            ExportFormat::Bf16 if !weight.name.ends_with("e_score_correction_bias") => Dtype::BF16,
            ExportFormat::F32 | ExportFormat::Bf16 => Dtype::F32,
        }
    }

    /// The values of a tensor.
    ///
    /// **Errors**: they cannot be read or are not finite.
    fn values(&self, weight: &WeightShape) -> Result<Vec<f32>, RankError> {
        let values = self.source.read(self.source_name(weight), &weight.shape)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let path = self.source.dir().display().to_string();
                let message = format!("{}: expected finite values, got {} at {at}", weight.name, values[at]);
                Err(RankError::Content { path, message })
            }
        }
    }

    fn write_shard(&self, path: &Path, shard: &[WeightShape]) -> Result<(FileChecksum, u64), RankError> {
        let listed = shard.iter().map(|weight| (weight.name.as_str(), self.dtype(weight), &weight.shape[..]));
        let (header, bytes) = header_text(listed);
        let mut out = HashedFile::create(path).map_err(file_error(path))?;
        let write = |out: &mut HashedFile, bytes: &[u8]| out.write(bytes).map_err(file_error(path));
        write(&mut out, &(header.len() as u64).to_le_bytes())?;
        write(&mut out, header.as_bytes())?;
        for weight in shard {
            let values = self.values(weight)?;
            let dtype = self.dtype(weight);
            for block in values.chunks(BLOCK) {
                write(&mut out, &encode(block, dtype))?;
            }
        }
        let FinishedFile { bytes: size, blake3 } = out.finish().map_err(file_error(path))?;
        Ok((FileChecksum { bytes: size, blake3 }, bytes))
    }
}

/// Values that are encoded at once.
const BLOCK: usize = 1 << 16;

fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RankError> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(file_error(path))
}
