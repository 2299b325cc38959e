//! Which threads of this process write checkpoints, and since when: a storage that never answers holds each of them for ever, so
//! a rank whose earlier one has not returned gets no further one, whatever formation it was of. Knows no tensors.

use std::path::{Path, PathBuf};
use std::time::Instant;

use contraflow_runtime::files::STUCK;
use parking_lot::Mutex;

use crate::error::RankError;

static WRITERS: Writers = Writers(Mutex::new(Vec::new()));

#[derive(Debug)]
struct Writers(Mutex<Vec<Writing>>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Writing {
    folder: PathBuf,
    rank: usize,
    step: u64,
    since: Instant,
}

/// A thread that writes, until this is dropped.
#[derive(Debug)]
pub struct Writer {
    all: &'static Writers,
    own: Writing,
}

impl Writers {
    fn begin(
        &'static self,
        folder: &Path,
        (step, rank): (u64, usize),
        since: Instant,
    ) -> Result<Writer, RankError> {
        let mut all = self.0.lock();
        let hangs = |other: &&Writing| {
            other.folder == folder
                && other.rank == rank
                && since.saturating_duration_since(other.since) >= STUCK
        };
        if let Some(Writing { step: earlier, since: began, .. }) = all.iter().find(hangs) {
            let (path, waits) = (folder.display(), since - *began);
            let message = format!(
                "{path}: the write of rank {rank} after step {earlier} has not returned for {} s; no other one begins",
                waits.as_secs()
            );
            return Err(RankError::Storage { message });
        }
        let own = Writing { folder: folder.to_owned(), rank, step, since };
        all.push(own.clone());
        Ok(Writer { all: self, own })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some(at) = all.iter().position(|writing| *writing == self.own) {
            all.swap_remove(at);
        }
    }
}

/// This thread begins to write a rank's part of the checkpoint of a step into a folder of checkpoints.
///
/// **Errors**: an earlier write of this rank hangs.
pub fn begin(folder: &Path, (step, rank): (u64, usize)) -> Result<Writer, RankError> {
    WRITERS.begin(folder, (step, rank), Instant::now())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rank_whose_write_hangs_begins_no_other_one_in_any_formation() {
        let writers: &'static Writers = Box::leak(Box::new(Writers(Mutex::default())));
        let (folder, other, begin) =
            (Path::new("/mnt/job-1/checkpoints"), Path::new("/mnt/job-2"), Instant::now());
        let hanging = writers.begin(folder, (40, 1), begin).unwrap();
        // One that takes its time does not hang, and a job may have been formed anew meanwhile.
        drop(writers.begin(folder, (40, 1), begin + STUCK / 2).unwrap());
        let late = begin + STUCK + Duration::from_secs(2);
        let refused = writers.begin(folder, (44, 1), late).unwrap_err();
        assert!(matches!(refused, RankError::Storage { .. }), "it is tried again");
        let words = "the write of rank 1 after step 40 has not returned for 32 s; no other one begins";
        assert!(refused.to_string().contains(words), "{refused}");
        assert!(writers.begin(folder, (44, 0), late).is_ok() && writers.begin(other, (44, 1), late).is_ok());
        drop(hanging);
        assert!(writers.begin(folder, (44, 1), late).is_ok());
        assert_eq!(writers.0.lock().len(), 0);
    }
}
