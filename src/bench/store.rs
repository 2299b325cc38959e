//! `contraflow bench store`: records a second that reach the disk, by how many share one wait for it, and a new start.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contraflow_orchestrator::store::{Batch, Store, StoreError};
use serde::Serialize;

use crate::failure::Failure;
use crate::run_dir;

/// How long each size of batch is measured.
const SPAN: Duration = Duration::from_secs(2);

/// Bytes of a record: more than most events have.
const RECORD: usize = 200;

/// Removes the folder of the bench with whatever is in it.
struct BenchFolder(PathBuf);

impl Drop for BenchFolder {
    fn drop(&mut self) {
        // No longer needed; if it cannot be removed, its name says what it is.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// What the disk makes of the event log.
#[derive(Debug, Serialize)]
pub(super) struct StoreFigures {
    dir: String,
    record_bytes: usize,
    batches: Vec<BatchFigures>,
    /// Opening it again: everything is checked and read.
    reopened_records: usize,
    total_records: usize,
    reopen_s: f64,
    /// A snapshot of 1 MiB in the place of all records.
    snapshot_s: f64,
    reopen_after_snapshot_s: f64,
}

/// Records that share one wait for the disk.
#[derive(Debug, Serialize)]
struct BatchFigures {
    records_per_wait: usize,
    records_per_second: f64,
    median_wait_ms: f64,
    longest_wait_ms: f64,
}

/// Measures it.
///
/// **Errors**: code 1 if the disk fails.
pub(super) fn run() -> Result<StoreFigures, Failure> {
    let folder = BenchFolder(Path::new(run_dir::RUNS).join(format!(".bench-store-{}", std::process::id())));
    measure(&folder.0).map_err(|error| Failure::run(error.to_string()))
}

fn measure(dir: &Path) -> Result<StoreFigures, StoreError> {
    let (store, _) = Store::open(dir)?;
    let (mut batches, mut total_records) = (Vec::new(), 0);
    for records_per_wait in [1, 16, 256] {
        let batch = Batch { records: vec![vec![b'x'; RECORD]; records_per_wait], ..Batch::default() };
        let mut waits = Vec::new();
        let began = Instant::now();
        while began.elapsed() < SPAN {
            let before = Instant::now();
            store.keep(&batch)?;
            waits.push(before.elapsed().as_secs_f64());
        }
        let seconds = began.elapsed().as_secs_f64();
        let written = records_per_wait * waits.len();
        total_records += written;
        waits.sort_by(f64::total_cmp);
        batches.push(BatchFigures {
            records_per_wait,
            records_per_second: written as f64 / seconds,
            median_wait_ms: 1e3 * waits[waits.len() / 2],
            longest_wait_ms: 1e3 * waits[waits.len() - 1],
        });
    }
    drop(store);
    let began = Instant::now();
    let (store, replay) = Store::open(dir)?;
    let reopen_s = began.elapsed().as_secs_f64();
    let began = Instant::now();
    store.snapshot(total_records as u64, std::iter::once(vec![b'x'; 1 << 20]))?;
    let snapshot_s = began.elapsed().as_secs_f64();
    drop(store);
    let began = Instant::now();
    Store::open(dir)?;
    Ok(StoreFigures {
        dir: dir.display().to_string(),
        record_bytes: RECORD,
        batches,
        reopened_records: replay.records.len(),
        total_records,
        reopen_s,
        snapshot_s,
        reopen_after_snapshot_s: began.elapsed().as_secs_f64(),
    })
}

impl fmt::Display for StoreFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "records of {} bytes in {}", self.record_bytes, self.dir)?;
        for batch in &self.batches {
            writeln!(
                f,
                "{:4} a wait for the disk: {:.0} records/s, a wait of {:.2} ms median, {:.2} ms longest",
                batch.records_per_wait, batch.records_per_second, batch.median_wait_ms, batch.longest_wait_ms
            )?;
        }
        let StoreFigures { reopened_records, total_records, reopen_s, .. } = self;
        writeln!(
            f,
            "opened again, checked and read: {reopened_records} of {total_records} records in {reopen_s:.2} s"
        )?;
        writeln!(f, "a snapshot of 1 MiB in their place: {:.2} s", self.snapshot_s)?;
        writeln!(f, "opened once more: {:.2} s", self.reopen_after_snapshot_s)
    }
}
