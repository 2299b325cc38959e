//! What the orchestrator remembers on disk: the event log with its snapshot, step records and log lines of the jobs.
//!
//! One file in the state folder, kept by `redb`: a call that returns has reached the disk, all of it or nothing; where the disk
//! fails it returns later ([`Store::trouble`]). Knows bytes, sequence numbers and jobs' numbers; what a record says is the
//! core's business. Calls block on the disk, so an actor makes them on a blocking thread.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

#[cfg(test)]
pub(crate) mod disk;
mod error;
mod patient;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{
    Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableHandle, WriteTransaction,
};

use error::contain;
pub use error::{StoreError, StoreErrorKind};
pub use patient::Trouble;
use patient::{Patience, Patient};

/// Version of what the tables hold; a file of another one is refused. Since 2 jobs go by [`JobId`]s, since 3 a snapshot is in
/// parts.
///
/// [`JobId`]: contraflow_runtime::topology::JobId
pub const FORMAT: u64 = 3;

/// A format that is still read, and written as [`FORMAT`] from then on.
const READABLE: u64 = 2;

/// The file within the state folder.
pub const FILE_NAME: &str = "events.redb";

/// Log lines kept of a job; with more of them the oldest go.
pub const LINES_PER_JOB: u64 = 100_000;

/// Step records kept of a job; with more of them the oldest go.
pub const STEPS_PER_JOB: u64 = 1_000_000;

/// The longest record of a fact or a step, log line, or part of a snapshot. **Units**: bytes.
pub const MAX_RECORD: usize = 16 << 20;

/// Parts of a snapshot that are written at once: between two writes others have their turn. **Units**: bytes.
const SNAPSHOT_WRITE: usize = 4 << 20;

/// Pages that are kept in memory; the system keeps others. What jobs leave behind fills it within an hour, whatever it is. **Units**:
/// bytes.
const CACHE: usize = 16 << 20;

/// Numbers about the file itself, by name: [`FORMAT_KEY`], [`INCARNATION_KEY`] and [`SNAPSHOT_KEY`].
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// The record of a sequence number, for all that the snapshot does not cover.
const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// The part of (sequence number, index): the state after the record of that number. Only those of the number under
/// [`SNAPSHOT_KEY`] count; others are of a snapshot that is being written, or was not finished.
const PARTS: TableDefinition<(u64, u64), &[u8]> = TableDefinition::new("snapshot_parts");
/// Where format 2 has its snapshot, as one value.
const WHOLE: TableDefinition<u64, &[u8]> = TableDefinition::new("snapshot");
/// The record of (job, step).
const STEPS: JobTable = TableDefinition::new("steps");
/// The log line of (job, number).
const LINES: JobTable = TableDefinition::new("lines");

const FORMAT_KEY: &str = "format";
const INCARNATION_KEY: &str = "incarnation";
/// The record up to which the snapshot holds everything; absent as long as there is none.
const SNAPSHOT_KEY: &str = "snapshot";

type JobTable = TableDefinition<'static, (u64, u64), &'static [u8]>;

/// A number (of a sequence, a step or a line) and the bytes under it.
pub type Numbered = (u64, Vec<u8>);

/// The open state folder of an orchestrator, locked against others.
#[derive(Debug)]
pub struct Store {
    database: Database,
    patience: Arc<Patience>,
    /// Named in every error.
    file: Arc<Path>,
    /// [`LINES_PER_JOB`], fewer in tests.
    lines_per_job: u64,
    /// [`STEPS_PER_JOB`], fewer in tests.
    steps_per_job: u64,
}

/// What is kept at once: all of it, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// For the end of the event log.
    pub records: Vec<Vec<u8>>,
    /// By job, records of steps; one of the same step takes the place of the one before. Those more than [`STEPS_PER_JOB`] before
    /// the latest go.
    pub steps: BTreeMap<u64, Vec<Numbered>>,
    /// By job, further lines of its log; the oldest beyond [`LINES_PER_JOB`] go. A job's first line is 1.
    pub lines: BTreeMap<u64, Vec<Vec<u8>>>,
    /// What goes then.
    pub gone: Removals,
}

/// What goes with the facts that say so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removals {
    /// Jobs that are forgotten: their step records and log lines.
    pub jobs: Vec<u64>,
    /// Jobs that go back to a checkpoint, and its step: the records of later steps.
    pub steps_after: Vec<(u64, u64)>,
}

/// What a store held when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The state after the record of that number, in parts; 0 where it was taken before the first.
    pub snapshot: Option<(u64, Vec<Vec<u8>>)>,
    /// The records after it, in order and without a gap.
    pub records: Vec<Numbered>,
    /// How many times the folder was opened, this one included. On disk before it is announced.
    pub incarnation: u64,
}

impl Store {
    /// Opens the state folder, or makes it, and raises the incarnation. Reads and checks the whole file.
    ///
    /// # Errors
    /// The folder is in use, cannot be read or written, is damaged or of another format.
    pub fn open(dir: &Path) -> Result<(Store, Replay), StoreError> {
        let path = dir.join(FILE_NAME);
        let io = |error| StoreError::new(&path, StoreErrorKind::Io(error));
        std::fs::create_dir_all(dir).map_err(io)?;
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let file = contain(&path, || Ok(FileBackend::new(file)?))?;
        let opened = Store::on(file, &path)?;
        // The file's name must be as durable as what it holds.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        Ok(opened)
    }

    /// Opens what a file holds. From then on a disk that fails is waited for.
    fn on(file: impl StorageBackend, path: &Path) -> Result<(Store, Replay), StoreError> {
        let patience = Arc::new(Patience::of(path.into()));
        let file = Patient::new(file, patience.clone());
        let database = contain(path, || {
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
            Ok(builder.create_with_backend(file)?)
        })?;
        let (lines_per_job, steps_per_job) = (LINES_PER_JOB, STEPS_PER_JOB);
        let store = Store { database, patience, file: path.into(), lines_per_job, steps_per_job };
        let replay =
            contain(path, || store.begin_incarnation())?.map_err(|fault| StoreError::new(path, fault))?;
        if let Some(reason) = gap(&replay) {
            return Err(StoreError::new(path, StoreErrorKind::Damaged(reason)));
        }
        store.patience.begin();
        Ok((store, replay))
    }

    /// What the disk refuses just now; calls wait for it.
    pub fn trouble(&self) -> Option<Trouble> {
        self.patience.trouble()
    }

    /// Waits for the disk no more: calls that do fail, and so does all that comes after them. For the end of a process.
    pub fn give_up(&self) {
        self.patience.give_up();
    }

    /// Makes the tables of a new file, raises the incarnation, reads. The inner error: not a file of ours; unchanged.
    fn begin_incarnation(&self) -> Result<Result<Replay, StoreErrorKind>, redb::Error> {
        let write = self.database.begin_write()?;
        let is_new = write.list_tables()?.next().is_none();
        if !is_new && write.list_tables()?.all(|table| table.name() != META.name()) {
            return Ok(Err(StoreErrorKind::Damaged(
                "expected an orchestrator's event log, got another database".into(),
            )));
        }
        let incarnation = {
            let mut meta = write.open_table(META)?;
            let format =
                if is_new { FORMAT } else { meta.get(FORMAT_KEY)?.map_or(0, |format| format.value()) };
            match format {
                FORMAT => {}
                READABLE => part_whole_snapshot(&write, &mut meta)?,
                got => return Ok(Err(StoreErrorKind::Format { got })),
            }
            let before = meta.get(INCARNATION_KEY)?.map_or(0, |before| before.value());
            let Some(incarnation) = before.checked_add(1) else {
                return Ok(Err(StoreErrorKind::Damaged(format!("expected an incarnation, got {before}"))));
            };
            meta.insert(FORMAT_KEY, FORMAT)?;
            meta.insert(INCARNATION_KEY, incarnation)?;
            incarnation
        };
        let (snapshot, records) = {
            let numbered = |entry: Result<Entry<'_, u64>, redb::StorageError>| {
                entry.map(|(number, bytes)| (number.value(), bytes.value().to_vec()))
            };
            let snapshot = match covered(&write)? {
                Some(number) => {
                    let table = write.open_table(PARTS)?;
                    let parts = table.range((number, 0)..=(number, u64::MAX))?;
                    let parts = parts.map(|entry| entry.map(|(_, bytes)| bytes.value().to_vec()));
                    Some((number, parts.collect::<Result<_, _>>()?))
                }
                None => None,
            };
            let records = write.open_table(LOG)?.iter()?.map(numbered).collect::<Result<_, _>>()?;
            (snapshot, records)
        };
        write.open_table(PARTS)?;
        write.open_table(STEPS)?;
        write.open_table(LINES)?;
        write.commit()?;
        Ok(Ok(Replay { snapshot, records, incarnation }))
    }

    /// Keeps a batch, with one wait for the disk however much it holds; returns the number of the latest record of the event log.
    /// The first of all is 1.
    ///
    /// # Errors
    /// A record or line is too long.
    pub fn keep(&self, batch: &Batch) -> Result<u64, StoreError> {
        let steps = batch.steps.values().flatten().map(|(_, record)| record);
        let lines = batch.lines.values().flatten();
        batch
            .records
            .iter()
            .chain(steps)
            .chain(lines)
            .try_for_each(|bytes| self.check_length(bytes.len()))?;
        self.write(|write| {
            batch.steps.iter().try_for_each(|(&job, steps)| self.keep_steps(write, job, steps))?;
            batch.lines.iter().try_for_each(|(&job, lines)| self.keep_lines(write, job, lines))?;
            let first = next_number(write)?;
            let mut log = write.open_table(LOG)?;
            for (number, record) in (first..).zip(&batch.records) {
                log.insert(number, record.as_slice())?;
            }
            for &job in &batch.gone.jobs {
                for table in [STEPS, LINES] {
                    write.open_table(table)?.retain_in((job, 0)..=(job, u64::MAX), |_, _| false)?;
                }
            }
            for &(job, step) in &batch.gone.steps_after {
                let later = (job, step.saturating_add(1))..=(job, u64::MAX);
                write.open_table(STEPS)?.retain_in(later, |_, _| false)?;
            }
            Ok(first + batch.records.len() as u64 - 1)
        })
    }

    fn keep_steps(&self, write: &WriteTransaction, job: u64, steps: &[Numbered]) -> Result<(), redb::Error> {
        let mut table = write.open_table(STEPS)?;
        for (step, record) in steps {
            table.insert((job, *step), record.as_slice())?;
        }
        let last = table.range((job, 0)..=(job, u64::MAX))?.next_back().transpose()?;
        let last = last.map_or(0, |(key, _)| key.value().1);
        let oldest = last.saturating_add(1).saturating_sub(self.steps_per_job);
        table.retain_in((job, 0)..(job, oldest), |_, _| false)?;
        Ok(())
    }

    fn keep_lines(&self, write: &WriteTransaction, job: u64, lines: &[Vec<u8>]) -> Result<(), redb::Error> {
        let mut table = write.open_table(LINES)?;
        let last = table.range((job, 0)..=(job, u64::MAX))?.next_back().transpose()?;
        let first = last.map_or(1, |(key, _)| key.value().1.saturating_add(1));
        for (number, line) in (first..).zip(lines) {
            table.insert((job, number), line.as_slice())?;
        }
        let end = first.saturating_add(lines.len() as u64);
        let oldest = end.saturating_sub(self.lines_per_job);
        table.retain_in((job, 0)..(job, oldest), |_, _| false)?;
        Ok(())
    }

    /// Keeps the state after the record `number`, in parts, in place of the snapshot before and of all records up to and
    /// including that one; returns what it takes in bytes. It is written piece by piece, and takes that place when it is whole:
    /// until then, and if anything fails, everything stands as before.
    ///
    /// # Errors
    /// There is no such record yet; there is a newer snapshot; a part is too long.
    pub fn snapshot(&self, number: u64, parts: impl Iterator<Item = Vec<u8>>) -> Result<u64, StoreError> {
        let (before, next) = self.write(|write| {
            let before = covered(write)?;
            // Parts of one that was not finished.
            write.open_table(PARTS)?.retain(|(of, _), _| Some(of) == before)?;
            Ok((before, next_number(write)?))
        })?;
        let least = before.unwrap_or(0);
        if number < least || number >= next {
            return Err(self.refuse(format!(
                "expected a snapshot at a record from {least} to {}, got one at {number}",
                next - 1
            )));
        }
        if before == Some(number) {
            return Ok(0);
        }
        let bytes = self.write_parts(number, parts)?;
        self.write(|write| {
            write.open_table(META)?.insert(SNAPSHOT_KEY, number)?;
            write.open_table(PARTS)?.retain(|(of, _), _| of == number)?;
            write.open_table(LOG)?.retain_in(..=number, |_, _| false)?;
            Ok(bytes)
        })
    }

    /// Writes parts under a number, some at a time; returns their bytes.
    fn write_parts(&self, number: u64, parts: impl Iterator<Item = Vec<u8>>) -> Result<u64, StoreError> {
        let (mut piece, mut piece_bytes, mut bytes) = (Vec::new(), 0, 0);
        let keep = |piece: &mut Vec<(u64, Vec<u8>)>| {
            self.write(|write| {
                let mut table = write.open_table(PARTS)?;
                for (index, part) in piece.drain(..) {
                    table.insert((number, index), part.as_slice())?;
                }
                Ok(())
            })
        };
        for (index, part) in (0..).zip(parts) {
            self.check_length(part.len())?;
            piece_bytes += part.len();
            bytes += part.len() as u64;
            piece.push((index, part));
            if piece_bytes >= SNAPSHOT_WRITE {
                keep(&mut piece)?;
                piece_bytes = 0;
            }
        }
        keep(&mut piece)?;
        Ok(bytes)
    }

    /// The records of a job from a step on, in order, as they stand now.
    ///
    /// # Errors
    /// The disk fails, now or later on.
    pub fn steps(&self, job: u64, from: u64) -> Result<Entries, StoreError> {
        self.entries(STEPS, job, from)
    }

    /// The lines of a job from a number on, in order, as they stand now; those before were dropped or asked to be left out.
    ///
    /// # Errors
    /// The disk fails, now or later on.
    pub fn lines(&self, job: u64, from: u64) -> Result<Entries, StoreError> {
        self.entries(LINES, job, from)
    }

    /// One transaction: on the disk when this returns, or without a trace.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        contain(&self.file, || {
            let write = self.database.begin_write()?;
            let value = change(&write)?;
            write.commit()?;
            Ok(value)
        })
    }

    fn entries(&self, table: JobTable, job: u64, from: u64) -> Result<Entries, StoreError> {
        let range = contain(&self.file, || {
            let table = self.database.begin_read()?.open_table(table)?;
            Ok(table.range((job, from)..=(job, u64::MAX))?)
        })?;
        Ok(Entries { range, file: self.file.clone() })
    }

    fn check_length(&self, len: usize) -> Result<(), StoreError> {
        if len <= MAX_RECORD {
            return Ok(());
        }
        Err(self.refuse(format!("expected at most {MAX_RECORD} bytes at once, got {len}")))
    }

    fn refuse(&self, reason: String) -> StoreError {
        StoreError::new(&self.file, StoreErrorKind::Refused(reason))
    }
}

type Entry<'a, K> = (redb::AccessGuard<'a, K>, redb::AccessGuard<'a, &'static [u8]>);

/// Number and bytes of each entry of a job in one table, read while it is walked, in the state at its begin.
pub struct Entries {
    range: redb::Range<'static, (u64, u64), &'static [u8]>,
    file: Arc<Path>,
}

impl Iterator for Entries {
    type Item = Result<Numbered, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = contain(&self.file, || Ok(self.range.next().transpose()?));
        entry.map(|entry| entry.map(|(key, bytes)| (key.value().1, bytes.value().to_vec()))).transpose()
    }
}

impl DoubleEndedIterator for Entries {
    fn next_back(&mut self) -> Option<Self::Item> {
        let entry = contain(&self.file, || Ok(self.range.next_back().transpose()?));
        entry.map(|entry| entry.map(|(key, bytes)| (key.value().1, bytes.value().to_vec()))).transpose()
    }
}

/// The number of the record that comes next.
fn next_number(write: &WriteTransaction) -> Result<u64, redb::Error> {
    let logged = write.open_table(LOG)?.last()?.map_or(0, |(number, _)| number.value());
    Ok(logged.max(covered(write)?.unwrap_or(0)).saturating_add(1))
}

/// The record up to which the snapshot holds everything, if there is one.
fn covered(write: &WriteTransaction) -> Result<Option<u64>, redb::Error> {
    Ok(write.open_table(META)?.get(SNAPSHOT_KEY)?.map(|number| number.value()))
}

/// Turns the snapshot of format 2 into one of a single part.
fn part_whole_snapshot(
    write: &WriteTransaction,
    meta: &mut redb::Table<'_, &str, u64>,
) -> Result<(), redb::Error> {
    if let Some((number, state)) = write.open_table(WHOLE)?.last()? {
        let number = number.value();
        write.open_table(PARTS)?.insert((number, 0), state.value())?;
        meta.insert(SNAPSHOT_KEY, number)?;
    }
    write.delete_table(WHOLE)?;
    Ok(())
}

/// Where the records do not follow the snapshot and one another by one.
fn gap(replay: &Replay) -> Option<String> {
    let first = replay.snapshot.as_ref().map_or(0, |(number, _)| *number).saturating_add(1);
    let wrong = (first..).zip(&replay.records).find(|(expected, (got, _))| expected != got);
    wrong.map(|(expected, (got, _))| format!("expected record {expected} in the event log, got {got}"))
}
