//! A process that writes to the store is killed at seeded moments: what was acknowledged to it is on disk, once
//! and whole, and nothing else than what it wrote.
//!
//! The writer is this very test, started again with a folder in its environment.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use contraflow_orchestrator::store::{Batch, Store, StoreError};

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

/// Writes for ever: records in batches, snapshots, steps and lines; prints what was acknowledged as durable.
fn write_and_print(dir: &Path) {
    let (store, replay) = Store::open(dir).unwrap();
    let mut out = std::io::stdout();
    let covered = replay.snapshot.as_ref().map_or(0, |(number, _)| *number);
    let mut next = 1 + replay.records.last().map_or(covered, |(number, _)| *number);
    let mut seeded = Seeded(replay.incarnation);
    writeln!(out, "opened {}", replay.incarnation).unwrap();
    loop {
        let count = 1 + seeded.below(9);
        let records: Vec<_> = (next..next + count).map(record).collect();
        next += count;
        let steps = [(7, vec![(next, record(next))])].into();
        assert_eq!(store.keep(&Batch { records, steps, ..Batch::default() }).unwrap(), next - 1);
        writeln!(out, "record {}", next - 1).unwrap();
        writeln!(out, "step {next}").unwrap();
        if seeded.below(8) == 0 {
            let covered = next - 1 - seeded.below(count);
            let (state, cut) = (record(covered), 1 + seeded.below(40) as usize);
            store.snapshot(covered, state.chunks(cut).map(<[u8]>::to_vec)).unwrap();
            writeln!(out, "snapshot {covered}").unwrap();
        }
    }
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_writer_loses_nothing_that_was_acknowledged", "--nocapture"])
        .env(FOLDER, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The numbers that were printed last.
#[derive(Default)]
struct Acknowledged {
    incarnation: u64,
    record: u64,
    step: u64,
    snapshot: u64,
}

impl Acknowledged {
    fn read_line(&mut self, line: &str) {
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

/// Lets the writer print for a while, kills it a little later, and reads the rest of its output.
fn kill_at_random(dir: &Path, seeded: &mut Seeded, reported: &mut Acknowledged) {
    let mut child = spawn(dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..seeded.below(30) {
        reported.read_line(&lines.next().expect("the writer ended by itself").unwrap());
    }
    let moment = Instant::now() + Duration::from_micros(seeded.below(4000));
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // A line that the kill cut short is ignored.
    lines.map_while(Result::ok).for_each(|line| reported.read_line(&line));
}

fn check(dir: &Path, reported: &mut Acknowledged) -> Result<(), StoreError> {
    let (store, replay) = Store::open(dir)?;
    assert!(
        replay.incarnation > reported.incarnation,
        "opened as {}, told {}",
        replay.incarnation,
        reported.incarnation
    );
    reported.incarnation = replay.incarnation;
    let covered = replay.snapshot.as_ref().map_or(0, |(number, _)| *number);
    assert!(covered >= reported.snapshot, "snapshot {covered}, told {}", reported.snapshot);
    if let Some((number, parts)) = &replay.snapshot {
        assert_eq!(parts.concat(), record(*number));
    }
    let last = replay.records.last().map_or(covered, |(number, _)| *number);
    assert!(last >= reported.record, "the last record is {last}, told {}", reported.record);
    let expected: Vec<_> = (covered + 1..=last).map(|number| (number, record(number))).collect();
    assert!(replay.records == expected, "records {covered} to {last} are not what was written");
    let steps: Vec<_> = store.steps(7, 0)?.collect::<Result<_, _>>()?;
    assert!(steps.last().map_or(0, |(step, _)| *step) >= reported.step);
    assert!(steps.iter().all(|(step, bytes)| *bytes == record(*step)));
    // What was kept at once is there at once.
    assert_eq!(steps.last().map(|(step, _)| *step), (last > 0).then_some(last + 1));
    Ok(())
}

#[test]
fn a_killed_writer_loses_nothing_that_was_acknowledged() {
    if let Some(dir) = std::env::var_os(FOLDER) {
        return write_and_print(&PathBuf::from(dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut seeded, mut reported) = (Seeded(5), Acknowledged::default());
    for _ in 0..KILLS {
        kill_at_random(dir.path(), &mut seeded, &mut reported);
        check(dir.path(), &mut reported).unwrap();
    }
    assert!(
        reported.record > KILLS && reported.snapshot > 0,
        "too little was written for the kills to mean anything"
    );
}
