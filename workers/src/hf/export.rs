//! Writes a model as an HF directory: shards with an index, configuration, tokenizer files, checksums.
//!
//! Some rows of one tensor are in memory at a time; a shard that is on disk is not made again. Knows names and files, no layers.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::UNIX_EPOCH;

use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::files::{self, sync_dir, write_synced};
use contraflow_runtime::model_config::{ModelConfig, WeightShape};
use safetensors::Dtype;

use super::check::{CHECKSUMS_FILE, CHECKSUMS_VERSION, Checksums, FileChecksum, file_fault};
use super::fp8::{self, Blocks};
use super::shard::{Form, Shard, Values, num_bytes};
use super::unfinished::Journal;
use super::weights::{HfWeights, INDEX_FILE, SINGLE_FILE, file_error};
use crate::data::model_tokenizer::tokenizer_files;
use crate::error::RankError;
use crate::hashed_file::FinishedFile;

/// Files beside the weights that go along where they are, with all that belongs to a tokenizer.
const COMPANIONS: [&str; 2] = ["chat_template.jinja", "generation_config.json"];

/// What a tensor becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// What it is; FP8 becomes the f32 numbers that it stands for.
    AsIs,
    /// Every tensor in f32.
    F32,
    /// Rounded to bf16; the gate biases stay in f32, as published.
    Bf16,
    /// As DeepSeek publishes: the matrices of attention and FFNs in E4M3 with a scale per block of 128 x 128, all else as with
    /// [`ExportFormat::Bf16`]. A matrix that is in FP8 keeps its codes and scales.
    Fp8,
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
    /// Number of tensors, scales included.
    pub num_tensors: usize,
    /// Number of weight files.
    pub num_shards: usize,
    /// How many of them an earlier process had made.
    pub num_taken_up: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Export<'_> {
    /// Equal for two exports if they write the same from the same files, as names, sizes and times have it.
    ///
    /// **Errors**: a folder that cannot be read, by name.
    pub fn identity(&self) -> Result<String, RankError> {
        let mut hasher = blake3::Hasher::new();
        let what = (self.format, self.source.is_averaged());
        hasher.update(format!("{what:?}\n{}\n", self.config_json).as_bytes());
        for shard in self.shards() {
            hasher.update(shard.header().as_bytes());
        }
        for dir in [self.source.dir(), self.companions] {
            for entry in files::read_dir(dir).map_err(file_error(dir))? {
                // Links lead to what is read; one that leads nowhere is not.
                let Ok(found) = files::metadata(&entry.path()) else { continue };
                let since = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
                let stamp = (entry.file_name(), found.len(), since);
                if found.is_file() {
                    hasher.update(format!("{stamp:?}\n").as_bytes());
                }
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Writes everything into a folder that is empty but for what an export of the same identity has left there.
    ///
    /// **Errors**: a tensor that cannot be read or is not finite, by name; what the system says, with the path.
    pub fn write(&self, dir: &Path, journal: &mut Journal) -> Result<Written, RankError> {
        let shards = self.shards();
        let mut checksums = Checksums { format_version: CHECKSUMS_VERSION, files: BTreeMap::new() };
        let mut weight_map = serde_json::Map::new();
        let mut written = Written { num_shards: shards.len(), ..Written::default() };
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE_FILE.to_owned(),
                all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
            };
            let earlier = journal.done(&name).filter(|file| file_fault(&dir.join(&name), file).is_none());
            let file = match earlier.cloned() {
                Some(file) => {
                    written.num_taken_up += 1;
                    file
                }
                None => {
                    let FinishedFile { bytes, blake3 } = shard.write(dir, &name, self)?;
                    sync_dir(dir).map_err(file_error(dir))?;
                    failpoint("export.shard-named");
                    let file = FileChecksum { bytes, blake3 };
                    journal.add(&name, file.clone()).map_err(file_error(dir))?;
                    failpoint("export.shard-noted");
                    file
                }
            };
            weight_map.extend(shard.names().map(|tensor| (tensor.to_owned(), name.clone().into())));
            written.num_tensors += shard.names().count();
            written.bytes += shard.bytes();
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
            let path = dir.join(&name);
            write_synced(&path, &bytes).map_err(file_error(&path))?;
            let blake3 = blake3::hash(&bytes).to_hex().to_string();
            checksums.files.insert(name, FileChecksum { bytes: bytes.len() as u64, blake3 });
        }
        failpoint("export.texts-written");
        let checksums = serde_json::to_string_pretty(&checksums).expect("a seal is texts and numbers");
        let path = dir.join(CHECKSUMS_FILE);
        write_synced(&path, format!("{checksums}\n").as_bytes()).map_err(file_error(&path))?;
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
    fn shards(&self) -> Vec<Shard> {
        let mut shards: Vec<Vec<(WeightShape, Form)>> = vec![Vec::new()];
        let mut filled = 0;
        for weight in self.config.weights() {
            let form = self.form(&weight);
            let bytes = num_bytes(&weight, form);
            if filled > 0 && filled + bytes > self.shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            shards.last_mut().expect("there is always one").push((weight, form));
        }
        shards.into_iter().map(Shard::new).collect()
    }

    /// Under which name the source has a tensor: a copy of a shared one need not be there.
    fn source_name<'w>(&self, weight: &'w WeightShape) -> &'w str {
        match weight.tied_to {
            Some(original) if self.source.info(&weight.name).is_none() => original,
            _ => &weight.name,
        }
    }

    fn form(&self, weight: &WeightShape) -> Form {
        match self.format {
            ExportFormat::AsIs => {
                let info = self.source.info(self.source_name(weight));
                Form::Numbers(info.map_or(Dtype::F32, |(_, dtype)| dtype))
            }
            ExportFormat::Fp8 if weight.is_in_blocks() => Form::Blocks,
            ExportFormat::Bf16 | ExportFormat::Fp8 if !weight.is_gate_bias() => Form::Numbers(Dtype::BF16),
            _ => Form::Numbers(Dtype::F32),
        }
    }
}

impl Values for Export<'_> {
    fn rows(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Vec<f32>, RankError> {
        let first = rows.start * weight.shape.last().copied().unwrap_or(1);
        let values = self.source.read_rows(self.source_name(weight), &weight.shape, rows)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let path = self.source.dir().display().to_string();
                let (name, got, at) = (&weight.name, values[at], first + at);
                let message = format!("{name}: expected finite values, got {got} at {at}");
                Err(RankError::Content { path, message })
            }
        }
    }

    fn blocks(&self, weight: &WeightShape, rows: Range<usize>) -> Result<Blocks, RankError> {
        match self.source.read_blocks(self.source_name(weight), &weight.shape, rows.clone())? {
            Some(blocks) => Ok(blocks),
            None => Ok(fp8::quantize(self.rows(weight, rows)?, weight.shape[1])),
        }
    }
}
