//! A process that writes to the store is killed at seeded moments: what it had been told is on the disk is there, once
//! and whole, and nothing else than what it wrote.
//!
//! The writer is this very test, started again with a folder in its environment.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use contraflow_orchestrator::store::{Store, StoreError};

const FOLDER: &str = "CONTRAFLOW_TEST_STORE";
const KILLS: u64 = 40;

/// Numbers that depend on the seed alone.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// The only bytes that may stand under a number.
fn record(number: u64) -> Vec<u8> {
    let mut bytes = Seeded(number);
    let len = 1 + bytes.below(if number.is_multiple_of(7) { 9000 } else { 300 });
    (0..len).map(|_| bytes.below(256) as u8).collect()
}

/// Writes for ever: records in batches, snapshots, steps and lines; says what it was told is durable.
fn write_and_tell(dir: &Path) {
    let (store, replay) = Store::open(dir).unwrap();
    let mut say = std::io::stdout();
    let mut next = 1 + replay.records.last().or(replay.snapshot.as_ref()).map_or(0, |(number, _)| *number);
    let mut seeded = Seeded(replay.incarnation);
    writeln!(say, "opened {}", replay.incarnation).unwrap();
    loop {
        let count = 1 + seeded.below(9);
        let records: Vec<_> = (next..next + count).map(record).collect();
        assert_eq!(store.append(&records).unwrap(), next);
        next += count;
        writeln!(say, "record {}", next - 1).unwrap();
        store.append_steps(7, &[(next, record(next))]).unwrap();
        writeln!(say, "step {next}").unwrap();
        if seeded.below(8) == 0 {
            let covered = next - 1 - seeded.below(count);
            store.snapshot(covered, &record(covered)).unwrap();
            writeln!(say, "snapshot {covered}").unwrap();
        }
    }
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_writer_loses_nothing_it_was_told", "--nocapture"])
        .env(FOLDER, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The numbers that were told last.
#[derive(Default)]
struct Told {
    incarnation: u64,
    record: u64,
    step: u64,
    snapshot: u64,
}

impl Told {
    fn hear(&mut self, line: &str) {
        // The test harness says something of its own before the first.
        let mut words = line.split_whitespace().rev();
        let Some(number) = words.next().and_then(|number| number.parse().ok()) else { return };
        let Some(what) = words.next() else { return };
        match what {
            "opened" => self.incarnation = number,
            "record" => self.record = number,
            "step" => self.step = number,
            "snapshot" => self.snapshot = number,
            _ => {}
        }
    }
}

/// Lets the writer tell some things, kills it a little later, hears what it said till then.
fn kill_somewhen(dir: &Path, seeded: &mut Seeded, told: &mut Told) {
    let mut child = spawn(dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..seeded.below(30) {
        told.hear(&lines.next().expect("the writer ended by itself").unwrap());
    }
    let moment = Instant::now() + Duration::from_micros(seeded.below(4000));
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // A line that the kill cut short tells nothing.
    lines.map_while(Result::ok).for_each(|line| told.hear(&line));
}

fn check(dir: &Path, told: &mut Told) -> Result<(), StoreError> {
    let (store, replay) = Store::open(dir)?;
    assert!(
        replay.incarnation > told.incarnation,
        "opened as {}, told {}",
        replay.incarnation,
        told.incarnation
    );
    told.incarnation = replay.incarnation;
    let covered = replay.snapshot.as_ref().map_or(0, |(number, _)| *number);
    assert!(covered >= told.snapshot, "snapshot {covered}, told {}", told.snapshot);
    if let Some((number, bytes)) = &replay.snapshot {
        assert_eq!(*bytes, record(*number));
    }
    let last = replay.records.last().map_or(covered, |(number, _)| *number);
    assert!(last >= told.record, "the last record is {last}, told {}", told.record);
    let expected: Vec<_> = (covered + 1..=last).map(|number| (number, record(number))).collect();
    assert!(replay.records == expected, "records {covered} to {last} are not what was written");
    let steps: Vec<_> = store.steps(7, 0)?.collect::<Result<_, _>>()?;
    assert!(steps.last().map_or(0, |(step, _)| *step) >= told.step);
    assert!(steps.iter().all(|(step, bytes)| *bytes == record(*step)));
    Ok(())
}

#[test]
fn a_killed_writer_loses_nothing_it_was_told() {
    if let Some(dir) = std::env::var_os(FOLDER) {
        return write_and_tell(&PathBuf::from(dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut seeded, mut told) = (Seeded(5), Told::default());
    for _ in 0..KILLS {
        kill_somewhen(dir.path(), &mut seeded, &mut told);
        check(dir.path(), &mut told).unwrap();
    }
    assert!(
        told.record > KILLS && told.snapshot > 0,
        "too little was written for the kills to mean anything"
    );
}
