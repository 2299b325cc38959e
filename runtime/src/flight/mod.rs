//! The flight recorder: each rank keeps its last operations, frames and waits in a ring in a file, and what the rings of all
//! ranks say together about a failure or a hang.
//!
//! The file is mapped into memory, so what has been recorded outlives a SIGKILL of the process; a record costs no system call
//! and no lock. On network file systems it is a copy of the last second instead. Knows operations and tags as values, no tensors, and nobody who reads.

mod analysis;
mod beats;
mod generations;
mod mapped;
mod record;
mod recorder;
mod ring;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use analysis::{Analysis, Doing, RankState, Verdict};
pub use beats::Beats;
pub use generations::{drop_old, generation_folder, read_all};
pub use record::{Event, Frame, Record};
pub use recorder::{About, Recorder, Recorders};
pub use ring::{Header, Ring, Unreadable};

use crate::files;

/// Folder of the rings in that of a run; in that of a job it has one for each formation.
pub const FOLDER: &str = "flight";

/// By how much the clocks of machines that train together, of their storage, and of whoever looks at them may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// What a ring takes on the disk. **Units**: bytes.
pub const RING_BYTES: usize = ring::HEADER_BYTES + ring::NUM_RECORDS * record::BYTES;

/// The file of a rank's ring.
pub fn ring_path(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank:05}.ring"))
}

/// A rank, and its ring or why that cannot be read.
pub type RankRing = (usize, Result<Ring, Unreadable>);

/// The rings in a folder, by rank: as read, or why one cannot be. Without the folder there are none.
///
/// **Errors**: the folder cannot be read.
pub fn read_folder(folder: &Path) -> io::Result<Vec<RankRing>> {
    let entries = match files::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let rank_of = |name: &str| name.strip_prefix("rank-")?.strip_suffix(".ring")?.parse::<usize>().ok();
    let ranks = entries.iter().filter_map(|entry| rank_of(&entry.file_name().to_string_lossy()));
    Ok(ranks.map(|rank| (rank, read_file(&ring_path(folder, rank)))).collect())
}

fn read_file(path: &Path) -> Result<Ring, Unreadable> {
    let unreadable = |error: io::Error| Unreadable(error.to_string());
    let length = files::metadata(path).map_err(unreadable)?.len();
    if length > ring::MAX_BYTES {
        return Err(Unreadable(format!("expected at most {} bytes, got {length}", ring::MAX_BYTES)));
    }
    Ring::read(&files::read(path).map_err(unreadable)?)
}
