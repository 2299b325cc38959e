//! Exported weights that every rank has written its part of: index and configuration beside them, then their name.
//!
//! Knows files by name, no tensors.

use std::io;
use std::path::Path;

use crate::control::ExportedFile;
use crate::files::UNFINISHED_SUFFIX;

/// Writes index and configuration beside the weights, and gives the folder its name: its own without
/// [`UNFINISHED_SUFFIX`]. A folder without that ending keeps its name.
///
/// **Errors**: what the system says.
pub fn publish_weights(dir: &Path, files: &[ExportedFile], model_config: &str) -> io::Result<()> {
    let map: serde_json::Map<String, serde_json::Value> = files
        .iter()
        .flat_map(|file| file.tensors.iter().map(|tensor| (tensor.clone(), file.file.clone().into())))
        .collect();
    let total_size: u64 = files.iter().map(|file| file.bytes).sum();
    let index = serde_json::json!({"metadata": {"total_size": total_size}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), format!("{index:#}\n"))?;
    std::fs::write(dir.join("config.json"), model_config)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match name.strip_suffix(UNFINISHED_SUFFIX) {
        Some(name) => {
            let target = dir.with_file_name(name);
            // A resumed run that had been finished before writes its model once more.
            if target.exists() {
                std::fs::remove_dir_all(&target)?;
            }
            std::fs::rename(dir, target)
        }
        None => Ok(()),
    }
}
