//! Is an HF directory whole? Every tensor against `config.json`, every file against its checksum, all faults at once.
//!
//! Knows files, names and shapes; no layers and no ranks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use contraflow_runtime::files;
use contraflow_runtime::model_config::{HEAD, ModelConfig, WeightShape};
use serde::{Deserialize, Serialize};

use super::weights::HfWeights;

/// Name of the file with the checksums of a directory that this program wrote.
pub const CHECKSUMS_FILE: &str = "contraflow.json";

/// The form of [`Checksums`] that this program writes and reads.
pub const CHECKSUMS_VERSION: u32 = 1;

/// What the files of a directory must be, bit for bit.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Checksums {
    /// See [`CHECKSUMS_VERSION`].
    pub format_version: u32,
    /// By name.
    pub files: BTreeMap<String, FileChecksum>,
}

/// What one file must be.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct FileChecksum {
    /// Its size.
    pub bytes: u64,
    /// Its blake3, as 64 hex digits.
    pub blake3: String,
}

/// A directory without faults.
pub struct Checked {
    /// What `config.json` says.
    pub config: ModelConfig,
    /// Where its tensors are.
    pub weights: HfWeights,
}

/// Checks a directory: configuration, checksums where there are any, files, names and shapes of the tensors.
///
/// **Errors**: every fault, with the file.
pub fn check(dir: &Path) -> Result<Checked, Vec<String>> {
    let config = read_config(dir);
    let mut faults = checksum_faults(dir);
    let (weights, broken) = HfWeights::survey(dir);
    faults.extend(broken.iter().map(ToString::to_string));
    match config {
        Ok(config) => {
            faults.extend(tensor_faults(&config, &weights, dir, broken.is_empty()));
            if faults.is_empty() { Ok(Checked { config, weights }) } else { Err(faults) }
        }
        Err(of_config) => Err(of_config.into_iter().chain(faults).collect()),
    }
}

/// Checks that the directory's tensors are those of a given model.
///
/// **Errors**: every fault, with the file.
pub fn check_against(config: &ModelConfig, dir: &Path) -> Result<(), Vec<String>> {
    let (weights, broken) = HfWeights::survey(dir);
    let mut faults: Vec<String> = broken.iter().map(ToString::to_string).collect();
    faults.extend(tensor_faults(config, &weights, dir, broken.is_empty()));
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// Reads `config.json`.
///
/// **Errors**: every fault, with the file.
pub fn read_config(dir: &Path) -> Result<ModelConfig, Vec<String>> {
    let path = dir.join("config.json");
    let text = files::read_to_string(&path).map_err(|error| vec![format!("{}: {error}", path.display())])?;
    ModelConfig::from_hf_json(&text).map_err(|faults| {
        faults.to_string().lines().map(|fault| format!("{}: {fault}", path.display())).collect()
    })
}

/// The faults of the files that a [`Checksums`] names; none where there is no seal.
fn checksum_faults(dir: &Path) -> Vec<String> {
    let path = dir.join(CHECKSUMS_FILE);
    let text = match files::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![format!("{}: {error}", path.display())],
    };
    let checksums = match parse_checksums(&text) {
        Ok(checksums) => checksums,
        Err(message) => return vec![format!("{}: {message}", path.display())],
    };
    checksums.files.iter().filter_map(|(name, file)| file_fault(&dir.join(name), file)).collect()
}

/// Reads a seal.
///
/// **Errors**: invalid JSON, or a newer format version.
pub fn parse_checksums(text: &str) -> Result<Checksums, String> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let Version { format_version } = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if format_version != CHECKSUMS_VERSION {
        return Err(format!("format_version: expected {CHECKSUMS_VERSION}, got {format_version}"));
    }
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// What is said of a file that people change by hand, and its seal does not know.
fn edited(path: &Path, sealed: String, got: String) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!(
        "expected {sealed}, as in {CHECKSUMS_FILE}, got {got}: edited or damaged; if it was edited, remove {CHECKSUMS_FILE}, or \
         its line of {name}"
    )
}

fn file_fault(path: &Path, checksums: &FileChecksum) -> Option<String> {
    let reported = |message: String| Some(format!("{}: {message}", path.display()));
    let size = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) => return reported(format!("{error}, although {CHECKSUMS_FILE} names it")),
    };
    let is_weights = path.extension().is_some_and(|ending| ending == "safetensors");
    if size != checksums.bytes && !is_weights {
        return reported(edited(path, format!("{} bytes", checksums.bytes), format!("{size} bytes")));
    }
    if size != checksums.bytes {
        let word = if size < checksums.bytes { ": truncated" } else { "" };
        return reported(format!("expected {} bytes, got {size}{word}", checksums.bytes));
    }
    let mut hasher = blake3::Hasher::new();
    match files::reader(path).and_then(|file| hasher.update_reader(file).map(|_| ())) {
        Err(error) => reported(error.to_string()),
        Ok(()) => {
            let got = hasher.finalize().to_hex();
            let sealed = &checksums.blake3;
            match got.as_str() == sealed {
                true => None,
                false if is_weights => reported(format!("expected blake3 {sealed}, got {got}: damaged")),
                false => reported(edited(path, format!("blake3 {sealed}"), format!("blake3 {got}"))),
            }
        }
    }
}

/// What is missing, too much or of another shape, and copies that are none. If files are broken, what is missing is unknown.
fn tensor_faults(
    config: &ModelConfig,
    weights: &HfWeights,
    dir: &Path,
    files_are_whole: bool,
) -> Vec<String> {
    let expected = config.weights();
    let mut faults = Vec::new();
    if files_are_whole {
        faults.extend(missing(config, &expected, weights));
    }
    let known: Vec<WeightShape> = expected.into_iter().chain(config.head_copy()).collect();
    let names: BTreeSet<&str> = known.iter().map(|weight| weight.name.as_str()).collect();
    let extra = weights.names().filter(|name| !names.contains(name));
    faults.extend(extra.map(|name| format!("{name}: expected no such tensor in this model, got one")));
    for weight in &known {
        match weights.info(&weight.name) {
            Some((shape, _)) if shape != weight.shape => {
                faults.push(format!("{}: expected shape {:?}, got {shape:?}", weight.name, weight.shape));
            }
            _ => faults.extend(copy_fault(weight, weights)),
        }
    }
    faults.into_iter().map(|fault| format!("{}: {fault}", dir.display())).collect()
}

/// What is wrong with the copy of a shared tensor, if the directory has that copy and an original of its shape.
fn copy_fault(copy: &WeightShape, weights: &HfWeights) -> Option<String> {
    let has = |name: &str| weights.info(name).is_some_and(|(shape, _)| shape == copy.shape);
    let original = copy.tied_to.filter(|original| has(original) && has(&copy.name))?;
    match (weights.read(&copy.name, &copy.shape), weights.read(original, &copy.shape)) {
        (Ok(values), Ok(originals)) => {
            let is_same = |(value, original): (&f32, &f32)| value.to_bits() == original.to_bits();
            let is_copy = values.iter().zip(&originals).all(is_same);
            (!is_copy).then(|| format!("{}: expected a copy of {original}, got other values", copy.name))
        }
        (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
    }
}

/// The tensors that are not there. A copy of a shared tensor may be left out; a whole block of multi-token prediction that
/// is not there is one fault.
fn missing(config: &ModelConfig, expected: &[WeightShape], weights: &HfWeights) -> Vec<String> {
    let absent: Vec<&WeightShape> = expected
        .iter()
        .filter(|weight| weight.tied_to.is_none() && weights.info(&weight.name).is_none())
        .collect();
    let mtp = config.mtp_layer().map(|layer| format!("model.layers.{layer}."));
    let of_mtp = |name: &str| mtp.as_ref().is_some_and(|prefix| name.starts_with(prefix.as_str()));
    let has_mtp = weights.names().any(of_mtp);
    let mut faults: Vec<String> = absent
        .iter()
        .filter(|weight| has_mtp || !of_mtp(&weight.name))
        .map(|weight| {
            // Files of models whose head is the embedding have no head of their own.
            let hint = if weight.name == HEAD {
                "; \"tie_word_embeddings\": true in config.json takes the embedding for it"
            } else {
                ""
            };
            format!("{}: expected a tensor of shape {:?}, got none{hint}", weight.name, weight.shape)
        })
        .collect();
    if let Some(prefix) = mtp.filter(|_| !has_mtp) {
        faults.push(format!(
            "{prefix}*: expected the block of multi-token prediction, got none; \"num_nextn_predict_layers\": 0 in config.json disables it"
        ));
    }
    faults
}
