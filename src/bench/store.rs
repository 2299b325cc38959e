//! `contraflow bench store`: records a second that reach the disk, by how many share one wait for it, and a new start.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contraflow_orchestrator::store::{Store, StoreError};

use crate::failure::Failure;
use crate::output::print;
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

/// Runs the command; figures go to stdout.
///
/// **Errors**: code 1 if the disk fails.
pub fn run() -> Result<(), Failure> {
    let folder = BenchFolder(Path::new(run_dir::RUNS).join(format!(".bench-store-{}", std::process::id())));
    let lines = measure(&folder.0).map_err(|error| Failure::run(error.to_string()))?;
    print(&lines)
}

fn measure(dir: &Path) -> Result<String, StoreError> {
    let (store, _) = Store::open(dir)?;
    let mut lines = format!("records of {RECORD} bytes in {}\n", dir.display());
    let mut total = 0;
    for batch in [1, 16, 256] {
        let records = vec![vec![b'x'; RECORD]; batch];
        let mut waits = Vec::new();
        let began = Instant::now();
        while began.elapsed() < SPAN {
            let before = Instant::now();
            store.append(&records)?;
            waits.push(before.elapsed().as_secs_f64());
        }
        let seconds = began.elapsed().as_secs_f64();
        total += batch * waits.len();
        waits.sort_by(f64::total_cmp);
        lines += &format!(
            "{batch:4} a wait for the disk: {:.0} records/s, a wait of {:.2} ms median, {:.2} ms longest\n",
            (batch * waits.len()) as f64 / seconds,
            1e3 * waits[waits.len() / 2],
            1e3 * waits[waits.len() - 1]
        );
    }
    drop(store);
    let began = Instant::now();
    let (store, replay) = Store::open(dir)?;
    lines += &format!(
        "opened again, checked and read: {} of {total} records in {:.2} s\n",
        replay.records.len(),
        began.elapsed().as_secs_f64()
    );
    let began = Instant::now();
    store.snapshot(total as u64, &vec![b'x'; 1 << 20])?;
    lines += &format!("a snapshot of 1 MiB in their place: {:.2} s\n", began.elapsed().as_secs_f64());
    drop(store);
    let began = Instant::now();
    Store::open(dir)?;
    lines += &format!("opened once more: {:.2} s\n", began.elapsed().as_secs_f64());
    Ok(lines)
}
