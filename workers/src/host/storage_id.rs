//! The mark of the storage: a file with a number drawn by chance, by which the orchestrator sees whether two workers share it.

use std::path::Path;

use contraflow_runtime::random::from_system;

/// The file, in the storage.
const STORAGE_ID_FILE: &str = ".contraflow-storage";

/// The mark of the storage; the first worker that sees it makes one.
pub(super) fn storage_id(storage: &Path) -> Result<String, String> {
    let path = storage.join(STORAGE_ID_FILE);
    let words = |error: std::io::Error| format!("--storage: {}: {error}", path.display());
    std::fs::create_dir_all(storage).map_err(words)?;
    if !path.exists() {
        // Created atomically: a second process finds the file of the first.
        let mark = format!("{:016x}", u64::from_le_bytes(from_system().map_err(words)?));
        let fresh = storage.join(format!("{STORAGE_ID_FILE}.{mark}"));
        std::fs::write(&fresh, &mark).map_err(words)?;
        let linked = std::fs::hard_link(&fresh, &path);
        std::fs::remove_file(&fresh).map_err(words)?;
        match linked {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(words(error)),
            _ => {}
        }
    }
    contraflow_runtime::files::read_to_string(&path).map_err(words)
}
