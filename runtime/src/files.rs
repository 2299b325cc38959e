//! Files as this program reads and writes them: only regular ones are opened, waits for a file system are noted, and a file
//! is whole once it has its name (written under another one, synced, renamed). Knows no contents.

mod calls;
pub mod objects;
mod open;
mod reloaded;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

pub use calls::{FileCall, STUCK, StuckCall, call, in_task, map_parallel, new_task, stuck};
pub use open::{Reader, Refused, confine, metadata, open, read, read_dir, read_to_string, reader};
pub use reloaded::{Reloaded, Stamp, stamps};

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

/// Makes a folder in one that is there, unless it is there itself.
///
/// **Errors**: what the system says, also where the parent is missing: it may be a file system that is not mounted.
pub fn make_dir(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// What may still be written in the file system of a path. **Units**: bytes.
///
/// **Errors**: what the system says.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// What the files below a folder take together; what goes while it is read takes nothing. **Units**: bytes.
///
/// **Errors**: what the system says.
pub fn bytes_below(dir: &Path) -> io::Result<u64> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match std::fs::read_dir(dir) {
        Err(error) if gone(&error) => return Ok(0),
        entries => entries?,
    };
    let mut bytes = 0;
    for entry in entries {
        let entry = entry?;
        bytes += match entry.metadata() {
            Ok(found) if found.is_dir() => bytes_below(&entry.path())?,
            Ok(found) => found.len(),
            Err(error) if gone(&error) => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(bytes)
}

/// Makes the names in a folder durable.
///
/// **Errors**: what the system says.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
