//! The store on a simulated disk: against a plain list, through power losses, with no room, and on files that are none.

use std::io;

use proptest::prelude::*;

use super::disk::Disk;
use super::*;

/// Further records of the event log; returns the number of the last.
fn append(store: &Store, records: &[Vec<u8>]) -> Result<u64, StoreError> {
    store.keep(&Batch { records: records.to_vec(), ..Batch::default() })
}

fn of_steps(job: u64, steps: &[Numbered]) -> Batch {
    Batch { steps: [(job, steps.to_vec())].into(), ..Batch::default() }
}

fn of_lines(job: u64, lines: &[Vec<u8>]) -> Batch {
    Batch { lines: [(job, lines.to_vec())].into(), ..Batch::default() }
}

fn all(entries: Entries) -> Vec<Numbered> {
    entries.collect::<Result<_, _>>().unwrap()
}

/// One thing that is done to a store.
#[derive(Clone, Debug)]
enum Act {
    Append(Vec<Vec<u8>>),
    /// At this share (of 256) of the numbers that are allowed.
    Snapshot(u8),
    Steps(u64, Vec<Numbered>),
    Lines(u64, Vec<Vec<u8>>),
    Forget(u64),
    /// A job goes back to the checkpoint of a step.
    GoBack(u64, u64),
    Reopen,
    /// The power goes; the bits say which unsynced writes arrived.
    PowerLoss(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let bytes = || prop_oneof![6 => prop::collection::vec(any::<u8>(), 0..40), 1 => Just(vec![7; 9000])];
    let many = move || prop::collection::vec(bytes(), 0..6);
    let steps = prop::collection::vec((0_u64..12, bytes()), 0..6);
    let act = prop_oneof![
        6 => many().prop_map(Act::Append),
        2 => any::<u8>().prop_map(Act::Snapshot),
        2 => (0_u64..3, steps).prop_map(|(job, steps)| Act::Steps(job, steps)),
        2 => (0_u64..3, many()).prop_map(|(job, lines)| Act::Lines(job, lines)),
        1 => (0_u64..3).prop_map(Act::Forget),
        1 => (0_u64..3, 0_u64..12).prop_map(|(job, step)| Act::GoBack(job, step)),
        2 => Just(Act::Reopen),
        2 => any::<u64>().prop_map(Act::PowerLoss),
    ];
    prop::collection::vec(act, 1..30)
}

/// What a store should hold, in plain collections.
#[derive(Default)]
struct Model {
    /// All records ever; number 1 first.
    history: Vec<Vec<u8>>,
    covered: u64,
    has_snapshot: bool,
    steps: BTreeMap<(u64, u64), Vec<u8>>,
    lines: BTreeMap<(u64, u64), Vec<u8>>,
    opened: u64,
}

impl Model {
    /// A state whose every byte depends on the records before it.
    fn fold(state: Vec<u8>, records: &[Vec<u8>]) -> Vec<u8> {
        records.iter().fold(state, |mut state, record| {
            state.extend((record.len() as u64).to_le_bytes());
            state.extend(record);
            state
        })
    }

    fn state(&self, number: u64) -> Vec<u8> {
        Model::fold(Vec::new(), &self.history[..number as usize])
    }

    fn check_replay(&self, replay: &Replay) {
        assert_eq!(replay.incarnation, self.opened);
        assert_eq!(replay.snapshot.as_ref().map(|(at, _)| *at), self.has_snapshot.then_some(self.covered));
        let numbers: Vec<u64> = replay.records.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (self.covered + 1..=self.history.len() as u64).collect::<Vec<_>>());
        let tail: Vec<Vec<u8>> = replay.records.iter().map(|(_, bytes)| bytes.clone()).collect();
        let begin = replay.snapshot.clone().map(|(_, parts)| parts.concat()).unwrap_or_default();
        assert_eq!(Model::fold(begin, &tail), self.state(self.history.len() as u64));
    }

    fn check_tables(&self, store: &Store) {
        for job in 0..3 {
            for (table, entries) in
                [(&self.steps, store.steps(job, 3).unwrap()), (&self.lines, store.lines(job, 3).unwrap())]
            {
                let expected =
                    table.range((job, 3)..=(job, u64::MAX)).map(|(key, value)| (key.1, value.clone()));
                assert_eq!(all(entries), expected.collect::<Vec<_>>());
            }
        }
    }

    fn apply(&mut self, store: &Store, act: Act) {
        match act {
            Act::Append(records) => {
                let last = append(store, &records).unwrap();
                self.history.extend(records);
                assert_eq!(last, self.history.len() as u64);
            }
            Act::Snapshot(share) => {
                let end = self.history.len() as u64;
                self.covered += (end - self.covered) * u64::from(share) / 255;
                self.has_snapshot = true;
                let state = self.state(self.covered);
                let parts = state.chunks(1 + usize::from(share)).map(<[u8]>::to_vec);
                store.snapshot(self.covered, parts).unwrap();
                let none = std::iter::empty;
                assert!(store.snapshot(end + 1, none()).is_err());
                assert!(store.snapshot(self.covered.wrapping_sub(1), none()).is_err());
            }
            Act::Steps(job, steps) => {
                store.keep(&of_steps(job, &steps)).unwrap();
                self.steps.extend(steps.into_iter().map(|(step, bytes)| ((job, step), bytes)));
                let of_job = |(key, _): &(&(u64, u64), &Vec<u8>)| key.0 == job;
                let last = self.steps.iter().rfind(of_job).map_or(0, |(key, _)| key.1);
                self.steps.retain(|key, _| key.0 != job || key.1 + store.steps_per_job > last);
            }
            Act::Lines(job, lines) => self.apply_lines(store, job, lines),
            Act::Forget(job) => {
                let record = format!("job {job} is forgotten").into_bytes();
                let number = self.history.len() as u64 + 1;
                let gone = Removals { jobs: vec![job], ..Removals::default() };
                let batch = Batch { records: vec![record.clone()], gone, ..Batch::default() };
                assert_eq!(store.keep(&batch).unwrap(), number);
                self.history.push(record);
                self.steps.retain(|key, _| key.0 != job);
                self.lines.retain(|key, _| key.0 != job);
            }
            Act::GoBack(job, step) => {
                let record = format!("job {job} goes back to step {step}").into_bytes();
                let gone = Removals { steps_after: vec![(job, step)], ..Removals::default() };
                store.keep(&Batch { records: vec![record.clone()], gone, ..Batch::default() }).unwrap();
                self.history.push(record);
                self.steps.retain(|key, _| key.0 != job || key.1 <= step);
            }
            Act::Reopen | Act::PowerLoss(_) => unreachable!("done by the caller"),
        }
    }

    fn apply_lines(&mut self, store: &Store, job: u64, lines: Vec<Vec<u8>>) {
        let of_job = |(key, _): &(&(u64, u64), &Vec<u8>)| key.0 == job;
        let first = self.lines.iter().rfind(of_job).map_or(1, |(key, _)| key.1 + 1);
        store.keep(&of_lines(job, &lines)).unwrap();
        self.lines.extend((first..).zip(lines).map(|(number, line)| ((job, number), line)));
        while self.lines.iter().filter(of_job).count() as u64 > store.lines_per_job {
            let oldest = *self.lines.iter().find(of_job).unwrap().0;
            self.lines.remove(&oldest);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_store_is_a_list_that_outlives_reopening_and_power_losses(acts in acts()) {
        let mut disk = Disk::default();
        let mut model = Model { opened: 1, ..Model::default() };
        let (mut store, replay) = disk.open().unwrap();
        model.check_replay(&replay);
        for act in acts {
            (store.lines_per_job, store.steps_per_job) = (5, 8);
            match act {
                Act::Reopen => drop(store),
                Act::PowerLoss(bits) => {
                    let mut bits = bits;
                    let lost = disk.after_power_loss(|| { bits = bits.rotate_left(1); bits & 1 == 1 });
                    drop(store);
                    disk = lost;
                }
                act => {
                    model.apply(&store, act);
                    model.check_tables(&store);
                    continue;
                }
            }
            model.opened += 1;
            let (opened, replay) = disk.open().unwrap();
            model.check_replay(&replay);
            model.check_tables(&opened);
            store = opened;
        }
    }

    /// The power goes within an append, at each of its writes: the records before are there, of its own all or none; and what
    /// they forget is gone with them, or there.
    #[test]
    fn a_power_loss_within_an_append_leaves_all_or_nothing(before in 1_usize..40, batch in 1_usize..6, arrived: u64) {
        let disk = Disk::default();
        let (store, _) = disk.open().unwrap();
        let record = |number: usize| vec![number as u8; 1 + number * 97 % 3000];
        append(&store, &(1..=before).map(record).collect::<Vec<_>>()).unwrap();
        store.keep(&of_steps(7, &[(1, b"a step".to_vec())])).unwrap();
        store.keep(&of_lines(7, &[b"a line".to_vec()])).unwrap();
        store.give_up();
        let room = disk.state().now.len();
        // Fails at a write of its own choice: what was written till then is what may have arrived.
        disk.state().room = Some(room * (arrived % 64) as usize / 63);
        let records: Vec<_> = (before + 1..=before + batch).map(record).collect();
        let gone = Removals { jobs: vec![7], ..Removals::default() };
        let outcome = store.keep(&Batch { records, gone, ..Batch::default() });
        let mut bits = arrived;
        let lost = disk.after_power_loss(|| { bits = bits.rotate_left(1); bits & 1 == 1 });
        drop(store);
        let (store, replay) = lost.open().unwrap();
        let held = replay.records.len();
        let left = (all(store.steps(7, 0).unwrap()).len(), all(store.lines(7, 0).unwrap()).len());
        prop_assert_eq!(left, if held == before { (1, 1) } else { (0, 0) });
        prop_assert!(held == before + batch || (held == before && outcome.is_err()), "{held} {outcome:?}");
        for (number, bytes) in &replay.records {
            prop_assert_eq!(bytes, &record(*number as usize));
        }
    }

    #[test]
    fn a_damaged_file_is_refused_with_a_message_or_read_unchanged(place: prop::sample::Index, flip in 1_u8.., cut in any::<bool>()) {
        let disk = Disk::default();
        let (store, _) = disk.open().unwrap();
        append(&store, &vec![vec![5; 700]; 40]).unwrap();
        drop(store);
        let mut bytes = disk.state().now.clone();
        let place = place.index(bytes.len());
        if cut { bytes.truncate(place.max(1)) } else { bytes[place] ^= flip }
        match Disk::with(bytes).open() {
            Ok((_, replay)) => prop_assert_eq!(replay.records, (1..=40).map(|n| (n, vec![5; 700])).collect::<Vec<_>>()),
            Err(error) => prop_assert!(error.to_string().starts_with("state/events.redb: "), "{error}"),
        }
    }
}

#[test]
fn a_full_disk_that_is_not_waited_for_is_an_error_with_a_message_and_loses_nothing() {
    let disk = Disk::default();
    let (store, _) = disk.open().unwrap();
    append(&store, &[b"one".to_vec()]).unwrap();
    let room = disk.state().now.len();
    disk.state().room = Some(room);
    store.give_up();
    let error = append(&store, &[vec![1; 8 << 20]]).unwrap_err();
    assert!(error.to_string().starts_with("state/events.redb: cannot be read or written: "), "{error}");
    assert!(
        matches!(error.fault, StoreErrorKind::Io(ref error) if error.kind() == io::ErrorKind::StorageFull),
        "{error:?}"
    );
    drop(store);
    disk.state().room = None;
    let (store, replay) = disk.open().unwrap();
    assert_eq!((replay.records, replay.incarnation), (vec![(1, b"one".to_vec())], 2));
    assert_eq!(append(&store, &[b"two".to_vec()]).unwrap(), 2);
}

#[test]
fn what_is_too_long_is_refused_and_nothing_of_it_written() {
    let (store, _) = Disk::default().open().unwrap();
    let error = append(&store, &[vec![1], vec![0; MAX_RECORD + 1]]).unwrap_err();
    assert_eq!(error.to_string(), "state/events.redb: expected at most 16777216 bytes at once, got 16777217");
    assert!(store.keep(&of_steps(1, &[(1, vec![0; MAX_RECORD + 1])])).is_err());
    assert!(store.keep(&of_lines(1, &[vec![0; MAX_RECORD + 1]])).is_err());
    assert_eq!(append(&store, &[vec![1]]).unwrap(), 1);
    let error = store.snapshot(2, std::iter::empty()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "state/events.redb: expected a snapshot at a record from 0 to 1, got one at 2"
    );
}

#[test]
fn a_snapshot_that_fails_leaves_records_and_the_snapshot_before() {
    let disk = Disk::default();
    let (store, _) = disk.open().unwrap();
    let records: Vec<Vec<u8>> = (1..=9).map(|number| vec![number; 3]).collect();
    append(&store, &records[..4]).unwrap();
    assert_eq!(store.snapshot(2, [b"ab".to_vec(), b"c".to_vec()].into_iter()).unwrap(), 3);
    // More than one write, and then a part that is too long.
    let large = std::iter::repeat_n(vec![b'x'; SNAPSHOT_WRITE], 3).chain([vec![0; MAX_RECORD + 1]]);
    let error = store.snapshot(4, large).unwrap_err();
    assert!(error.to_string().contains("expected at most 16777216 bytes at once, got 16777217"), "{error}");
    let expected = |replay: &Replay, last: usize| {
        assert_eq!(replay.snapshot, Some((2, vec![b"ab".to_vec(), b"c".to_vec()])));
        let tail: Vec<Vec<u8>> = replay.records.iter().map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(tail, records[2..last]);
    };
    assert_eq!(append(&store, &records[4..5]).unwrap(), 5, "it goes on");
    drop(store);
    let (store, replay) = disk.open().unwrap();
    expected(&replay, 5);
    // The power goes between two of its writes.
    let room = disk.state().now.len();
    disk.state().room = Some(room + SNAPSHOT_WRITE);
    store.give_up();
    assert!(store.snapshot(5, std::iter::repeat_n(vec![b'x'; SNAPSHOT_WRITE], 8)).is_err());
    drop(store);
    disk.state().room = None;
    let (store, replay) = disk.open().unwrap();
    expected(&replay, 5);
    store.snapshot(5, [b"abcde".to_vec()].into_iter()).unwrap();
    drop(store);
    let (store, replay) = disk.open().unwrap();
    assert_eq!((replay.snapshot, replay.records), (Some((5, vec![b"abcde".to_vec()])), Vec::new()));
    // Parts of one that failed do not come back in the next one at the same record.
    append(&store, &records[5..6]).unwrap();
    let large = std::iter::repeat_n(vec![b'x'; SNAPSHOT_WRITE], 3).chain([vec![0; MAX_RECORD + 1]]);
    assert!(store.snapshot(6, large).is_err());
    store.snapshot(6, [b"abcdef".to_vec()].into_iter()).unwrap();
    drop(store);
    let (_, replay) = disk.open().unwrap();
    assert_eq!((replay.snapshot, replay.records), (Some((6, vec![b"abcdef".to_vec()])), Vec::new()));
}

#[test]
fn a_state_of_format_2_is_read_with_its_snapshot_in_one_value() {
    let disk = Disk::default();
    drop(disk.open().unwrap());
    let database = Database::builder().create_with_backend(disk.clone()).unwrap();
    let write = database.begin_write().unwrap();
    write.open_table(META).unwrap().insert(FORMAT_KEY, READABLE).unwrap();
    write.open_table(WHOLE).unwrap().insert(7, b"state".as_slice()).unwrap();
    write.open_table(LOG).unwrap().insert(8, b"eight".as_slice()).unwrap();
    write.delete_table(PARTS).unwrap();
    write.commit().unwrap();
    drop(database);
    for _ in 0..2 {
        let (store, replay) = disk.open().unwrap();
        assert_eq!(replay.snapshot, Some((7, vec![b"state".to_vec()])));
        assert_eq!(replay.records, [(8, b"eight".to_vec())]);
        drop(store);
    }
    let (store, _) = disk.open().unwrap();
    assert_eq!(append(&store, &[b"nine".to_vec()]).unwrap(), 9);
}

#[test]
fn a_folder_in_use_is_refused_until_it_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let (store, replay) = Store::open(&dir.path().join("new/state")).unwrap();
    assert_eq!(replay, Replay { snapshot: None, records: Vec::new(), incarnation: 1 });
    let error = Store::open(&dir.path().join("new/state")).unwrap_err();
    assert!(matches!(error.fault, StoreErrorKind::InUse));
    let words = "in use by another orchestrator; stop that one or choose another state folder";
    assert_eq!(
        error.to_string(),
        format!("{}: {words}", dir.path().join("new/state").join(FILE_NAME).display())
    );
    drop(store);
    assert_eq!(Store::open(&dir.path().join("new/state")).unwrap().1.incarnation, 2);
}

#[test]
fn files_of_others_and_of_other_formats_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(FILE_NAME);
    std::fs::write(&file, "a text of somebody").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error.fault, StoreErrorKind::Damaged(_)), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"a text of somebody");

    let set_format = |disk: &Disk, table: TableDefinition<&str, u64>, format| {
        let database = Database::builder().create_with_backend(disk.clone()).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(table).unwrap().insert(FORMAT_KEY, format).unwrap();
        write.commit().unwrap();
    };
    let disk = Disk::default();
    drop(disk.open().unwrap());
    for format in [READABLE - 1, FORMAT + 7] {
        set_format(&disk, META, format);
        let reported = disk.open().unwrap_err().to_string();
        let words =
            format!("state/events.redb: expected format {FORMAT}, got {format}: written by another version");
        assert!(reported.starts_with(&words) && reported.contains("choose a new state folder"), "{reported}");
    }
    set_format(&disk, META, READABLE);
    assert_eq!(disk.open().unwrap().1.incarnation, 2, "a refused opening must not count");

    let other = Disk::default();
    set_format(&other, TableDefinition::new("wares"), 1);
    let error = other.open().unwrap_err();
    assert!(
        error.to_string().ends_with("expected an orchestrator's event log, got another database"),
        "{error}"
    );

    let strange = Disk::default();
    drop(strange.open().unwrap());
    let database = Database::builder().create_with_backend(strange.clone()).unwrap();
    let write = database.begin_write().unwrap();
    write.delete_table(STEPS).unwrap();
    write.open_table(TableDefinition::<u64, u64>::new("steps")).unwrap();
    write.commit().unwrap();
    drop(database);
    assert!(matches!(strange.open().unwrap_err().fault, StoreErrorKind::Damaged(_)));
}
