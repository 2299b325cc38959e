//! The manifest of a checkpoint: the position of the run, what it belongs to, and the shards with sizes and checksums.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CheckpointError, is_unfinished};
use crate::faults::ErrorKind;
use crate::files;
use crate::recipe::Recipe;
use crate::schedule::ScheduleKind;
use crate::stability::StabilityWatch;
use crate::topology::{Generation, Topology};

/// Name of the manifest in a checkpoint's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// What this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 2;

/// No manifest comes near it: a shard takes some 150 bytes of it.
pub(super) const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// Position of a run between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Optimizer updates made.
    pub step: u64,
    /// Sequences used: the place in the order that `training.seed` gives them.
    pub cursor: u64,
    /// Tokens seen.
    pub tokens: u64,
}

/// The axes and the schedule under which a checkpoint was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Sizes of the axes.
    pub topology: Topology,
    /// Order of the work.
    pub schedule: ScheduleKind,
    /// Threads of a rank's arithmetic.
    pub threads_per_rank: usize,
}

impl Layout {
    /// Of a recipe.
    pub fn of(recipe: &Recipe) -> Self {
        Layout {
            topology: recipe.topology(),
            schedule: recipe.parallel.schedule,
            threads_per_rank: recipe.parallel.threads_per_rank,
        }
    }
}

/// On what the bits of a run depend beside recipe and data: a resumed run has the bits of the undisturbed one where all
/// of this is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeBy {
    /// Axes, schedule, threads.
    pub layout: Layout,
    /// Version and blake3 of the program.
    pub binary: String,
    /// Vector extensions that choose the code of the kernels.
    pub instruction_set: String,
}

/// A file of a checkpoint: one rank's, or one beside them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardFile {
    /// File name within the folder.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// blake3 of the file, 64 hex digits.
    pub blake3: String,
}

/// What `manifest.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// Formation that made it; 0 where all ranks are in one process.
    #[serde(default)]
    pub generation: Generation,
    /// Position of the run.
    pub position: Position,
    /// State of the stability watch.
    pub watch: StabilityWatch,
    /// The resolved recipe, as TOML. All that is random in a run follows from its seed and the position.
    pub recipe: String,
    /// The model's `config.json`.
    pub model: serde_json::Value,
    /// blake3 of the data, see `Corpus`.
    pub corpus_hash: String,
    /// For the question whether bits can be compared.
    pub made_by: MadeBy,
    /// By rank.
    pub shards: Vec<ShardFile>,
    /// The model's configuration and its tokenizer, for other programs; format 1 does not name them.
    #[serde(default)]
    pub companions: Vec<ShardFile>,
}

/// A text that is no manifest for this program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestFault {
    /// Of a later format.
    #[error("expected format version {FORMAT_VERSION} or earlier, got {0}: written by a newer contraflow")]
    Newer(u32),
    /// Of no format.
    #[error("{0}")]
    Damaged(String),
}

impl Manifest {
    /// Reads and checks the manifest of a checkpoint's folder; the shards must be there and have their sizes.
    ///
    /// **Errors**: all faults at once: an unfinished folder, no manifest, a damaged one, a newer format, each shard that is
    /// missing or of another size.
    pub fn read(dir: &Path) -> Result<Self, Vec<CheckpointError>> {
        if is_unfinished(dir) {
            let message =
                "expected a committed checkpoint, got one that is being written or was never finished";
            return Err(vec![CheckpointError::new(dir, message)]);
        }
        let path = dir.join(MANIFEST_FILE);
        let text = read_bounded(&path).map_err(|error| vec![error])?;
        let manifest = Manifest::parse(&text).map_err(|fault| {
            let kind = match fault {
                // Another program reads it: that says nothing of what it holds.
                ManifestFault::Newer(_) => ErrorKind::Node,
                ManifestFault::Damaged(_) => ErrorKind::Config,
            };
            vec![CheckpointError { kind, ..CheckpointError::new(&path, fault) }]
        })?;
        let faults: Vec<CheckpointError> =
            manifest.files().filter_map(|file| file.check_size(dir).err()).collect();
        if faults.is_empty() { Ok(manifest) } else { Err(faults) }
    }

    /// All files that it names.
    pub fn files(&self) -> impl Iterator<Item = &ShardFile> {
        self.shards.iter().chain(&self.companions)
    }

    /// Reads the text of a manifest.
    ///
    /// **Errors**: no JSON of this form, a newer format, shards under names that are no plain file names or twice.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestFault> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let damaged = |error: serde_json::Error| {
            ManifestFault::Damaged(format!("expected a manifest, got a damaged file: {error}"))
        };
        let Version { format_version } = serde_json::from_slice(text).map_err(damaged)?;
        if format_version > FORMAT_VERSION {
            return Err(ManifestFault::Newer(format_version));
        }
        let manifest: Manifest = serde_json::from_slice(text).map_err(damaged)?;
        let mut names = BTreeSet::new();
        for shard in manifest.files() {
            let is_plain = Path::new(&shard.file).file_name().is_some_and(|name| name == shard.file.as_str());
            if !is_plain || !names.insert(&shard.file) {
                let message =
                    format!("expected a plain file name for each file, each once, got {:?}", shard.file);
                return Err(ManifestFault::Damaged(message));
            }
        }
        if manifest.shards.is_empty() {
            return Err(ManifestFault::Damaged("expected at least one shard, got none".into()));
        }
        Ok(manifest)
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let failed = |error: std::io::Error| CheckpointError::of_system(path, error);
    let mut text = Vec::new();
    let file = files::reader(path).map_err(failed)?;
    file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(CheckpointError::new(
            path,
            format!("expected at most {MAX_MANIFEST_BYTES} bytes, got more"),
        ));
    }
    Ok(text)
}

impl ShardFile {
    /// Of a file with these bytes.
    pub fn of(file: &str, bytes: &[u8]) -> Self {
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        ShardFile { file: file.to_owned(), bytes: bytes.len() as u64, blake3 }
    }

    /// Looks whether the file is there, as long as it was written.
    ///
    /// **Errors**: it is not, with its path.
    pub(super) fn check_size(&self, dir: &Path) -> Result<(), CheckpointError> {
        let path = dir.join(&self.file);
        let got = files::metadata(&path).map_err(|error| CheckpointError::of_system(&path, error))?.len();
        if got != self.bytes {
            let message = format!("expected {} bytes, got {got}: the file is damaged", self.bytes);
            return Err(CheckpointError::new(&path, message));
        }
        Ok(())
    }

    /// Reads the whole file and compares its checksum.
    ///
    /// **Errors**: it cannot be read, or has other bytes than were written.
    pub fn verify(&self, dir: &Path) -> Result<(), CheckpointError> {
        let path = dir.join(&self.file);
        let failed = |error: std::io::Error| CheckpointError::of_system(&path, error);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(files::reader(&path).map_err(failed)?).map_err(failed)?;
        let got = hasher.finalize().to_hex();
        if got.as_str() != self.blake3 {
            let message = format!("expected blake3 {}, got {got}: the file is damaged", self.blake3);
            return Err(CheckpointError::new(&path, message));
        }
        Ok(())
    }
}
