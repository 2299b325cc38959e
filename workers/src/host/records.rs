//! `metrics.jsonl` in a job's folder: a line a step, as `contraflow train` leaves it. The worker of rank 0 asks the orchestrator for
//! what is durable and not in the file yet, and adds it. Knows no ranks.
//!
//! Another worker may have written before, or have been about to: the file is looked at again whenever it is not as it was left.
//! Where a job has gone back the file is written anew beside the old one, and replaces it at once when it is whole.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use contraflow_proto::{StepRecord, v1};
use contraflow_runtime::checkpoint::{FolderError, JobFolder};
use contraflow_runtime::control::wire::formation_numbers;
use contraflow_runtime::files::{self, UNFINISHED_SUFFIX, sync_dir};
use contraflow_runtime::topology::FormationId;

/// Name of the file.
const FILE: &str = "metrics.jsonl";

/// An answer that has not come by then has been lost.
const LATE: Duration = Duration::from_secs(5);

/// No line is longer. **Units**: bytes.
const LONGEST: u64 = 1 << 20;

/// Something that a keeper should know.
pub(super) enum Note {
    /// Steps up to this one are durable.
    Durable(u64),
    /// An answer.
    Records(v1::Records),
    /// Questions that were under way are lost.
    AskAgain,
    /// The formation is over: what is missing is added, and that is all.
    Over,
}

/// The way to the thread that keeps the file of a job. It ends once everything is in the file and the formation is over, or when
/// another worker keeps the file.
pub(super) struct RecordKeeper {
    notes: Sender<Note>,
    thread: JoinHandle<()>,
}

impl RecordKeeper {
    /// Begins with what is missing.
    pub(super) fn start(
        formation: FormationId,
        folder: JobFolder,
        ask: impl Fn(v1::RecordsWanted) + Send + 'static,
    ) -> Self {
        let (notes, heard) = channel();
        let keeper = Keeper::new(formation, folder);
        let thread = std::thread::spawn(move || keeper.run(&heard, &ask));
        RecordKeeper { notes, thread }
    }

    /// Tells it.
    pub(super) fn note(&self, note: Note) {
        // It may have ended.
        drop(self.notes.send(note));
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Where a file ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct At {
    /// Of its last line.
    step: u64,
    generation: u32,
    /// Its length.
    bytes: u64,
}

struct Keeper {
    formation: FormationId,
    folder: JobFolder,
    path: PathBuf,
    /// Where what is being written ends: the file, or the one beside it.
    at: At,
    /// While it is written anew: the length of the old file.
    old_bytes: Option<u64>,
    /// The last step that is known to be durable.
    durable: u64,
    asked: Option<Instant>,
}

impl Keeper {
    fn new(formation: FormationId, folder: JobFolder) -> Self {
        let path = folder.path().join(FILE);
        Keeper { formation, path, folder, at: At::default(), old_bytes: None, durable: 0, asked: None }
    }

    fn run(mut self, notes: &Receiver<Note>, ask: &impl Fn(v1::RecordsWanted)) {
        let (mut is_over, mut has_failed) = (false, false);
        self.look_again();
        self.ask(ask);
        while let Ok(note) = notes.recv() {
            let mut is_behind = is_over;
            match note {
                Note::Durable(step) => self.durable = self.durable.max(step),
                Note::AskAgain => (self.asked, is_behind) = (None, true),
                Note::Over => (self.asked, is_over, is_behind) = (None, true, true),
                Note::Records(records) if records.is_over => return,
                Note::Records(records) => {
                    self.asked = None;
                    let is_all = records.records.is_empty();
                    match self.take(records) {
                        Ok(()) if is_all && is_over => return,
                        Ok(()) => (has_failed, is_behind) = (false, !is_all),
                        Err(_) if is_over => return,
                        Err(error) if !std::mem::replace(&mut has_failed, true) => {
                            let job = self.formation.job.bits();
                            tracing::warn!(job, rank = 0_u64, "{}: {error}", self.path.display());
                        }
                        // It is tried again after the next step.
                        Err(_) => {}
                    }
                }
            }
            if is_behind || self.durable > self.at.step {
                self.ask(ask);
            }
        }
    }

    fn ask(&mut self, ask: &impl Fn(v1::RecordsWanted)) {
        if self.asked.is_some_and(|asked| asked.elapsed() < LATE) {
            return;
        }
        self.asked = Some(Instant::now());
        let (job, generation) = formation_numbers(self.formation);
        let At { step: after_step, generation: of_generation, .. } = self.at;
        ask(v1::RecordsWanted { job, generation, after_step, of_generation });
    }

    /// Where a file is written anew. Named by the generation: a worker that stood still meanwhile has another one.
    fn beside(&self) -> PathBuf {
        let generation = self.formation.generation.number();
        self.path.with_file_name(format!("{FILE}.g{generation}{UNFINISHED_SUFFIX}"))
    }

    /// Adds the steps after the last one, or writes the file anew where the orchestrator knows another history.
    fn take(&mut self, v1::Records { after_step, records, .. }: v1::Records) -> Result<(), FolderError> {
        self.folder.verify()?;
        let written = self.add(after_step, &records);
        if !matches!(written, Ok(true)) {
            // It is not as it was left, or a part of a line may be there.
            self.look_again();
        }
        written.map(drop).map_err(|source| FolderError::File { path: self.path.clone(), source })
    }

    /// Whether the files were as they had been left.
    ///
    /// **Errors**: what the system says.
    fn add(&mut self, after_step: u64, records: &[StepRecord]) -> io::Result<bool> {
        if ![0, self.at.step].contains(&after_step) {
            return Ok(false);
        }
        if after_step < self.at.step {
            let beside = File::create(self.beside())?;
            drop(beside);
            let old_bytes = self.old_bytes.unwrap_or(self.at.bytes);
            (self.at, self.old_bytes) = (At::default(), Some(old_bytes));
        }
        let path = self.old_bytes.map_or_else(|| self.path.clone(), |_| self.beside());
        let mut file = File::options().append(true).create(true).open(&path)?;
        if file.metadata()?.len() != self.at.bytes {
            return Ok(false);
        }
        let lines = records.iter().map(line).collect::<io::Result<Vec<_>>>()?.concat();
        file.write_all(lines.as_bytes())?;
        self.at.bytes += lines.len() as u64;
        if let Some(StepRecord { step, generation, .. }) = records.last() {
            (self.at.step, self.at.generation) = (*step, *generation);
        }
        // Readers see the old history until the new one is whole.
        let is_whole = records.is_empty() || self.at.step >= self.durable;
        if let Some(old_bytes) = self.old_bytes.take_if(|_| is_whole) {
            file.sync_all()?;
            if std::fs::metadata(&self.path)?.len() != old_bytes {
                return Ok(false);
            }
            std::fs::rename(&path, &self.path)?;
            sync_dir(self.folder.path())?;
        }
        Ok(true)
    }

    /// Reads where the file ends; half a line at its end is cut off. One that cannot be read is written anew.
    fn look_again(&mut self) {
        self.old_bytes = None;
        // Seldom is there one, and it means nothing by itself.
        drop(std::fs::remove_file(self.beside()));
        self.at = end_of(&self.path).unwrap_or_default();
        if let Ok(file) = File::options().write(true).open(&self.path) {
            // If it cannot be cut, its length will not be as expected.
            drop(file.set_len(self.at.bytes));
        }
    }
}

fn line(record: &StepRecord) -> io::Result<String> {
    Ok(serde_json::to_string(record)? + "\n")
}

/// **Errors**: what the system says, and a last line that is none of this file.
fn end_of(path: &std::path::Path) -> io::Result<At> {
    let mut file = files::open(path)?;
    let length = file.metadata()?.len();
    let begin = length.saturating_sub(2 * LONGEST);
    file.seek(SeekFrom::Start(begin))?;
    let mut tail = Vec::new();
    file.take(length - begin).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|&byte| byte == b'\n') else { return Ok(At::default()) };
    let first = tail[..end].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let StepRecord { step, generation, .. } = serde_json::from_slice(&tail[first..end])?;
    Ok(At { step, generation, bytes: begin + end as u64 + 1 })
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::checkpoint::{Owner, Storage};
    use contraflow_runtime::topology::{Generation, JobId};

    use super::*;

    fn record(step: u64, generation: u32) -> StepRecord {
        StepRecord { step, generation, loss: 1.0 / step as f64, ..StepRecord::default() }
    }

    fn keeper(storage: &std::path::Path) -> Keeper {
        let job = JobId::new(7, 1);
        let folder = JobFolder::claim(&Storage::open(storage).unwrap(), Owner { state: 1, job }).unwrap();
        let formation = FormationId::new(job, Generation::new(1));
        let mut keeper = Keeper::new(formation, folder);
        keeper.look_again();
        keeper
    }

    fn records(after_step: u64, steps: std::ops::RangeInclusive<u64>, generation: u32) -> v1::Records {
        let records = steps.map(|step| record(step, generation)).collect();
        v1::Records { after_step, records, ..v1::Records::default() }
    }

    fn nothing_after(after_step: u64) -> v1::Records {
        v1::Records { after_step, ..v1::Records::default() }
    }

    fn steps(keeper: &Keeper) -> Vec<(u64, u32)> {
        let text = std::fs::read_to_string(&keeper.path).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<StepRecord>(line).unwrap());
        records.map(|record| (record.step, record.generation)).collect()
    }

    #[test]
    fn steps_are_added_once_and_those_of_a_history_that_was_left_are_replaced() {
        let storage = tempfile::tempdir().unwrap();
        let mut one = keeper(storage.path());
        one.take(records(0, 1..=2, 1)).unwrap();
        one.take(records(2, 3..=3, 1)).unwrap();
        assert_eq!(steps(&one), [(1, 1), (2, 1), (3, 1)]);
        // Another worker goes on, and what was on its way to the first one is dropped.
        let mut other = keeper(storage.path());
        assert_eq!((other.at.step, other.at.generation), (3, 1));
        other.take(records(3, 4..=5, 2)).unwrap();
        one.take(records(3, 4..=4, 1)).unwrap();
        assert_eq!(steps(&one), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]);
        assert_eq!(one.at, other.at);
        one.take(records(0, 1..=2, 3)).unwrap();
        assert_eq!(steps(&one), [(1, 3), (2, 3)]);
        one.take(v1::Records::default()).unwrap();
        assert_eq!(steps(&one), []);
    }

    #[test]
    fn a_history_that_was_left_stands_until_the_other_one_is_whole() {
        let storage = tempfile::tempdir().unwrap();
        let mut keeper = keeper(storage.path());
        keeper.take(records(0, 1..=9, 1)).unwrap();
        let left: Vec<(u64, u32)> = (1..=9).map(|step| (step, 1)).collect();
        keeper.durable = 5;
        keeper.take(records(0, 1..=2, 2)).unwrap();
        assert_eq!((steps(&keeper), keeper.at.step), (left.clone(), 2));
        keeper.take(records(2, 3..=4, 2)).unwrap();
        assert_eq!(steps(&keeper), left);
        // The job has gone back once more meanwhile.
        keeper.take(records(0, 1..=3, 3)).unwrap();
        assert_eq!(steps(&keeper), left);
        keeper.take(records(3, 4..=5, 3)).unwrap();
        assert_eq!(steps(&keeper), (1..=5).map(|step| (step, 3)).collect::<Vec<_>>());
        keeper.take(records(5, 6..=6, 3)).unwrap();
        assert_eq!(steps(&keeper).last(), Some(&(6, 3)));
        assert!(!keeper.beside().exists());

        // Another worker has written while the file was made anew: its steps stand.
        keeper.durable = 9;
        keeper.take(records(0, 1..=2, 4)).unwrap();
        let mut other = self::keeper(storage.path());
        other.formation.generation = Generation::new(5);
        other.take(records(6, 7..=7, 5)).unwrap();
        keeper.take(records(2, 3..=9, 4)).unwrap();
        assert_eq!((steps(&keeper).last(), keeper.at), (Some(&(7, 5)), other.at));
    }

    #[test]
    fn half_a_line_is_cut_off_and_a_file_of_something_else_is_written_anew() {
        let storage = tempfile::tempdir().unwrap();
        let mut first = keeper(storage.path());
        first.take(records(0, 1..=2, 1)).unwrap();
        let mut file = File::options().append(true).open(&first.path).unwrap();
        file.write_all(b"{\"step\":3,\"gen").unwrap();
        let mut next = keeper(storage.path());
        assert_eq!(next.at.step, 2);
        next.take(records(2, 3..=3, 1)).unwrap();
        assert_eq!(steps(&next), [(1, 1), (2, 1), (3, 1)]);
        std::fs::write(&next.path, "no record\n").unwrap();
        let mut next = keeper(storage.path());
        next.take(records(0, 1..=1, 1)).unwrap();
        assert_eq!(steps(&next), [(1, 1)]);
    }

    #[test]
    fn a_keeper_asks_until_it_has_everything_and_ends_with_its_formation() {
        let storage = tempfile::tempdir().unwrap();
        let Keeper { formation, folder, path, .. } = keeper(storage.path());
        let (asked, questions) = channel();
        let keeper =
            RecordKeeper::start(formation, folder, move |wanted| asked.send(wanted.after_step).unwrap());
        let next = || questions.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(next(), 0);
        keeper.note(Note::Records(records(0, 1..=2, 1)));
        assert_eq!(next(), 2);
        keeper.note(Note::Records(nothing_after(2)));
        keeper.note(Note::Durable(2));
        keeper.note(Note::Durable(3));
        assert_eq!(next(), 2);
        // The stream has broken meanwhile.
        keeper.note(Note::AskAgain);
        assert_eq!(next(), 2);
        keeper.note(Note::Over);
        assert_eq!(next(), 2);
        keeper.note(Note::Records(records(2, 3..=3, 1)));
        assert_eq!(next(), 3);
        keeper.note(Note::Records(nothing_after(3)));
        keeper.thread.join().unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 3);
    }
}
