//! What makes a file whole once it has its name: written under another one, synced, renamed. Knows no contents.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Ending of a file or folder that is being written or removed.
pub const UNFINISHED_SUFFIX: &str = ".part";

/// Writes a file and makes its contents durable.
///
/// **Errors**: what the system says.
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes the names in a folder durable.
///
/// **Errors**: what the system says.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
