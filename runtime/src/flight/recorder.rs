//! The writer of a ring: takes a number, stores eight words. Threads of a rank share it without a lock.
//!
//! A thread that is stopped within a record leaves a torn one, which its check sum gives away; so does one that is overtaken by
//! a whole ring of others meanwhile.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::mapped::{RingWords, is_mappable};
use super::record::{self, Event, Frame, Record};
use super::ring::{ALIVE, HEADER_WORDS, Header, NUM_RECORDS};
use super::ring_path;
use crate::fabric::{Observer, Traffic};
use crate::files;
use crate::topology::FormationId;

/// What the rings of a formation's ranks have in common.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// The formation.
    pub formation: FormationId,
    /// All its ranks.
    pub world: usize,
}

/// Records what a rank does.
#[derive(Debug)]
pub struct Recorder {
    words: RingWords,
    began: Instant,
    /// Records so far.
    count: AtomicU64,
}

/// The calling thread, as records name it.
fn lane() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    thread_local! {
        static LANE: Cell<u16> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    // A thread that is ending has no place of its own any more.
    LANE.try_with(Cell::get).unwrap_or(u16::MAX)
}

/// Whole nanoseconds; they last for centuries.
fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Recorder {
    /// Begins the ring of a rank, in a file that is not there yet; `is_mapped`: what is recorded is in the file at once, else with the next
    /// beat.
    ///
    /// **Errors**: what the system says: the file cannot be made or mapped.
    pub fn create(path: &Path, rank: usize, about: &About, is_mapped: bool) -> io::Result<Recorder> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
        let header = Header {
            rank: number(rank),
            world: number(about.world),
            job: about.formation.job.bits(),
            generation: about.formation.generation.number(),
            process: std::process::id(),
            began: nanoseconds(now),
            program: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let mut words = header.words().to_vec();
        words.resize(HEADER_WORDS + NUM_RECORDS * record::WORDS, 0);
        let words = RingWords::create(path, &words, is_mapped)?;
        Ok(Recorder { words, began: Instant::now(), count: AtomicU64::new(0) })
    }

    /// Something has happened on this thread.
    pub fn note(&self, event: Event, at: Instant) {
        let number = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let at = nanoseconds(at.saturating_duration_since(self.began));
        let record = Record { number, at, lane: lane(), event };
        let slot = ((number - 1) % NUM_RECORDS as u64) as usize;
        self.words.store(HEADER_WORDS + slot * record::WORDS, &record.words());
    }

    /// The process is alive. Where the file is a copy it is brought up to date, which may wait for the file system.
    pub fn beat(&self) {
        self.words.store(ALIVE, &[nanoseconds(self.began.elapsed())]);
        self.words.copy();
    }
}

impl Observer for Recorder {
    fn observe(&self, traffic: Traffic<'_>) {
        let rank = |rank: usize| u32::try_from(rank).unwrap_or(u32::MAX);
        let event = match traffic {
            Traffic::Sent { to, tag } => Event::Sent(Frame::new(tag, rank(to))),
            Traffic::Awaited(tag) => Event::Awaited(Frame::new(tag, tag.source)),
            Traffic::Received(tag) => Event::Received(Frame::new(tag, tag.source)),
            Traffic::StorageBegan => Event::StorageBegan,
            Traffic::StorageEnded => Event::StorageEnded,
        };
        self.note(event, Instant::now());
    }
}

/// The recorders of the ranks of one process, by rank.
#[derive(Clone, Debug, Default)]
pub struct Recorders(BTreeMap<usize, Arc<Recorder>>);

impl Recorders {
    /// Begins the rings of all ranks in a folder that is made anew: what is there of an earlier formation goes.
    ///
    /// **Errors**: what the system says.
    pub fn create(folder: &Path, about: &About) -> io::Result<Recorders> {
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Recorders::join(folder, 0..about.world, about),
        }
    }

    /// Begins the rings of some ranks of a formation, in a folder that other processes may have made for theirs. All or none.
    ///
    /// **Errors**: what the system says.
    pub fn join(
        folder: &Path,
        ranks: impl IntoIterator<Item = usize>,
        about: &About,
    ) -> io::Result<Recorders> {
        files::make_dir(folder)?;
        let is_mapped = is_mappable(folder)?;
        let mut begun = Recorders::default();
        for rank in ranks {
            let path = ring_path(folder, rank);
            match Recorder::create(&path, rank, about, is_mapped) {
                Ok(recorder) => drop(begun.0.insert(rank, Arc::new(recorder))),
                Err(error) => {
                    let made = begun
                        .0
                        .keys()
                        .copied()
                        .chain((error.kind() != io::ErrorKind::AlreadyExists).then_some(rank));
                    made.for_each(|rank| drop(std::fs::remove_file(ring_path(folder, rank))));
                    return Err(error);
                }
            }
        }
        Ok(begun)
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// That of a rank; none where nothing is recorded.
    pub fn of(&self, rank: usize) -> Option<Arc<Recorder>> {
        self.0.get(&rank).cloned()
    }

    /// The process is alive.
    pub fn beat(&self) {
        self.0.values().for_each(|recorder| recorder.beat());
    }

    /// All ranks have done all that they were asked.
    pub fn finish(&self) {
        self.0.values().for_each(|recorder| recorder.note(Event::Finished, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RING_BYTES, Ring, read_folder};
    use super::*;
    use crate::schedule::Work;
    use crate::topology::{Generation, JobId};

    fn about(world: usize) -> About {
        About { formation: FormationId::new(JobId::new(3, 0), Generation::new(2)), world }
    }

    #[test]
    fn what_many_threads_record_at_once_is_in_the_file_whole_while_the_recorder_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = ring_path(dir.path(), 5);
        let recorder = Recorder::create(&path, 5, &about(8), true).unwrap();
        const EACH: usize = 5_000;
        std::thread::scope(|scope| {
            for bucket in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || {
                    for step in 0..EACH as u64 {
                        recorder.note(Event::Began(Work::Pack { bucket }, step), Instant::now());
                    }
                });
            }
        });
        recorder.beat();
        // The process need not end for others to see it, nor in an orderly way.
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), RING_BYTES);
        let ring = Ring::read(&bytes).unwrap();
        assert_eq!((ring.header.rank, ring.header.world, ring.header.generation), (5, 8, 2));
        assert_eq!(ring.header.program, env!("CARGO_PKG_VERSION"));
        assert!(ring.alive > 0);
        // Threads that overtake one another by a whole lap leave torn records, which are rare.
        assert!(ring.unreadable < NUM_RECORDS / 2, "{}", ring.unreadable);
        let newest = ring.records.last().unwrap();
        assert_eq!(newest.number, 4 * EACH as u64);
        let lanes: std::collections::BTreeSet<_> = ring
            .records
            .iter()
            .map(|record| match record.event {
                Event::Began(Work::Pack { bucket }, _) => (record.lane, bucket),
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(
            lanes.iter().map(|(lane, _)| lane).collect::<std::collections::BTreeSet<_>>().len()
                == lanes.len()
        );
        drop(recorder);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn the_rings_of_an_earlier_formation_go_and_a_ring_that_is_there_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("flight");
        let first = Recorders::create(&folder, &about(3)).unwrap();
        assert_eq!(read_folder(&folder).unwrap().len(), 3);
        first.of(2).unwrap().note(Event::StorageBegan, Instant::now());
        let second = Recorders::create(&folder, &about(2)).unwrap();
        // Whoever still holds one of the first writes to a file without a name.
        first.of(1).unwrap().note(Event::StorageBegan, Instant::now());
        second.finish();
        let rings = read_folder(&folder).unwrap();
        let events: Vec<Vec<Event>> = rings
            .into_iter()
            .map(|(_, ring)| ring.unwrap().records.iter().map(|record| record.event).collect())
            .collect();
        assert_eq!(events, [[Event::Finished], [Event::Finished]]);
        assert!(second.of(2).is_none());
        assert!(Recorder::create(&ring_path(&folder, 0), 0, &about(2), true).is_err());
        std::fs::write(ring_path(&folder, 1), "no ring").unwrap();
        assert!(read_folder(&folder).unwrap()[1].1.is_err());
        assert!(read_folder(&dir.path().join("nothing")).unwrap().is_empty());
    }

    #[test]
    fn where_a_file_is_not_mapped_it_has_what_was_recorded_by_the_latest_beat() {
        let dir = tempfile::tempdir().unwrap();
        let path = ring_path(dir.path(), 1);
        let recorder = Recorder::create(&path, 1, &about(2), false).unwrap();
        let ring = || Ring::read(&std::fs::read(&path).unwrap()).unwrap();
        recorder.note(Event::StorageBegan, Instant::now());
        assert_eq!((ring().records.len(), ring().alive), (0, 0));
        recorder.beat();
        assert_eq!((ring().records.len(), ring().unreadable, ring().alive > 0), (1, 0, true));
        // Who has removed the file has no use for it.
        std::fs::remove_file(&path).unwrap();
        recorder.beat();
        assert!(!path.exists());
    }

    #[test]
    fn a_beat_changes_the_sign_of_life_alone_in_a_copied_file_and_brings_what_was_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = ring_path(dir.path(), 1);
        let recorder = Recorder::create(&path, 1, &about(2), false).unwrap();
        let file = || std::fs::read(&path).unwrap();
        let alive = ALIVE * size_of::<u64>()..(ALIVE + 1) * size_of::<u64>();
        let note = |step| recorder.note(Event::Ended(Work::Totals, step), Instant::now());
        let total = NUM_RECORDS as u64 + 7;
        // From nothing, within a lap, and around its end.
        for (from, to) in [(0, 3), (3, 3), (3, 2_040), (2_040, total), (total, total)] {
            (from..to).for_each(note);
            let mut before = file();
            recorder.beat();
            let after = file();
            if from == to {
                assert_ne!(before[alive.clone()], after[alive.clone()]);
                before[alive.clone()].copy_from_slice(&after[alive.clone()]);
                assert_eq!(before, after);
            }
            let ring = Ring::read(&after).unwrap();
            let steps: Vec<(u64, Event)> =
                ring.records.iter().map(|record| (record.number, record.event)).collect();
            let first = to.saturating_sub(NUM_RECORDS as u64);
            let noted: Vec<(u64, Event)> =
                (first..to).map(|step| (step + 1, Event::Ended(Work::Totals, step))).collect();
            assert_eq!((steps, ring.unreadable), (noted, 0));
            assert_eq!(ring.bytes(), after, "as the ring is");
        }
    }

    #[test]
    fn processes_of_one_formation_share_a_folder_and_one_that_cannot_record_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("flight");
        let first = Recorders::join(&folder, [0, 2], &about(4)).unwrap();
        assert!(first.of(2).is_some() && first.of(1).is_none());
        // Rank 2 is somebody else's: of rank 1, which came before it, nothing is left.
        assert!(Recorders::join(&folder, [1, 2], &about(4)).is_err());
        let ranks = || read_folder(&folder).unwrap().into_iter().map(|(rank, _)| rank).collect::<Vec<_>>();
        assert_eq!(ranks(), [0, 2]);
        Recorders::join(&folder, [1, 3], &about(4)).unwrap();
        assert_eq!(ranks(), [0, 1, 2, 3]);
        // The folder of the job is gone: it is not made anew.
        assert!(Recorders::join(&dir.path().join("job/flight"), [0], &about(4)).is_err());
    }
}
