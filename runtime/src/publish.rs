//! Exported weights that every rank has written its part of: index and configuration beside them, then their name.
//!
//! Knows files by name, no tensors.

use std::io;
use std::path::Path;

use crate::control::ExportedFile;
use crate::files::UNFINISHED_SUFFIX;

/// Numbers the files through, writes index and configuration beside them, and gives the folder its name: its own without
/// [`UNFINISHED_SUFFIX`]. A folder without that ending keeps its name. What was done before is not done again.
///
/// **Errors**: what the system says.
pub fn publish_weights(dir: &Path, files: &[ExportedFile], model_config: &str) -> io::Result<()> {
    let names: Vec<String> = (1..=files.len()).map(|number| weight_file(number, files.len())).collect();
    for (file, name) in files.iter().zip(&names) {
        rename_once(&dir.join(&file.file), &dir.join(name))?;
    }
    let map: serde_json::Map<String, serde_json::Value> = files
        .iter()
        .zip(&names)
        .flat_map(|(file, name)| file.tensors.iter().map(|tensor| (tensor.clone(), name.clone().into())))
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

/// The published name of one of several weight files, counted from 1.
fn weight_file(number: usize, of: usize) -> String {
    format!("model-{number:05}-of-{of:05}.safetensors")
}

/// Ranks write in order of their numbers, so a file never takes the name of one that has yet to be renamed.
fn rename_once(from: &Path, to: &Path) -> io::Result<()> {
    if from == to {
        return Ok(());
    }
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && to.is_file() => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_as_those_that_exist_and_a_second_time_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        std::fs::create_dir(&dir).unwrap();
        // Of four ranks two answer for weights.
        let file = |rank: usize, tensor: &str| {
            let file = format!("rank-{rank}");
            std::fs::write(dir.join(&file), tensor).unwrap();
            ExportedFile { file, tensors: vec![tensor.into()], bytes: 1 }
        };
        let files = [file(0, "a"), file(2, "b")];
        for _ in 0..2 {
            publish_weights(&dir, &files, "{}").unwrap();
            let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
            assert_eq!(read("model-00001-of-00002.safetensors"), "a");
            assert_eq!(read("model-00002-of-00002.safetensors"), "b");
            let index: serde_json::Value =
                serde_json::from_str(&read("model.safetensors.index.json")).unwrap();
            assert_eq!(index["weight_map"]["b"], "model-00002-of-00002.safetensors");
            assert_eq!(dir.read_dir().unwrap().count(), 4);
        }
    }
}
