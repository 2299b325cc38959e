//! Everything at once: kills, freezes, cuts, drains, jobs of higher priority, restarts of the orchestrator, storage that fails. Every
//! job is done, every step told once, no curve shows it, nothing is left behind.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::cluster::{Cluster, curve, spawn, until};
use crate::cut_off::Gate;

const WORKERS: usize = 6;

/// A storm: few and short here, more and longer ones where the test runs alone.
fn storms() -> (u64, Duration, u64) {
    match std::env::var("CONTRAFLOW_STORMS") {
        Ok(storms) => (storms.parse().unwrap(), Duration::from_secs(90), 1_500),
        Err(_) => (1, Duration::from_secs(20), 200),
    }
}

/// What ends by itself, and how.
#[derive(Clone, Debug)]
enum Fault {
    Dead(usize),
    Frozen(usize),
    Cut(Vec<usize>),
    Drained(usize),
    NoOrchestrator,
    FrozenOrchestrator,
    /// Where the folder of checkpoints is, and where the file was that is in its place.
    NoStorage(PathBuf, PathBuf),
}

struct Storm {
    cluster: Cluster,
    gates: Vec<Gate>,
    random: u64,
    /// What is not well, and when it ends.
    faults: Vec<(Instant, Fault)>,
    num_faults: usize,
    short: Vec<String>,
}

impl Storm {
    fn begin(seed: u64) -> Self {
        let mut cluster = Cluster::start(0);
        let gates: Vec<Gate> = (0..WORKERS).map(|_| Gate::open(&cluster.address)).collect();
        cluster.workers.resize_with(WORKERS, || None);
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut storm =
            Storm { cluster, gates, random, faults: Vec::new(), num_faults: 0, short: Vec::new() };
        (0..WORKERS).for_each(|number| storm.start_worker(number));
        until("all workers", || (storm.cluster.nodes().len() == WORKERS).then_some(()));
        storm
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % end
    }

    fn start_worker(&mut self, number: usize) {
        let (label, name) = (format!("node=n{number}"), format!("worker-{number}"));
        let join = &self.gates[number].address;
        let arguments = ["worker", "--join", join, "--storage", "storage", "--labels", &label];
        self.cluster.workers[number] = Some(spawn(self.cluster.path(), &name, &arguments));
    }

    fn is(&self, like: impl Fn(&Fault) -> bool) -> bool {
        self.faults.iter().any(|(_, fault)| like(fault))
    }

    /// Something goes wrong, unless it is wrong already.
    fn strike(&mut self, long: &str) {
        let worker = self.below(WORKERS as u64) as usize;
        let is_touched =
            self.is(|fault| matches!(fault, Fault::Dead(of) | Fault::Frozen(of) if *of == worker));
        let is_away = self.is(|fault| matches!(fault, Fault::NoOrchestrator | Fault::FrozenOrchestrator));
        let lasts = Duration::from_millis(200 + self.below(5_000));
        let fault = match self.below(9) {
            0 | 1 if !is_touched => {
                self.cluster.workers[worker].as_mut().unwrap().kill();
                Fault::Dead(worker)
            }
            2 if !is_touched => {
                self.cluster.workers[worker].as_ref().unwrap().signal(Signal::STOP);
                Fault::Frozen(worker)
            }
            3 | 4 if !self.is(|fault| matches!(fault, Fault::Cut(_))) => {
                let cut: Vec<usize> = if self.below(3) == 0 { (0..WORKERS).collect() } else { vec![worker] };
                cut.iter().for_each(|&gate| self.gates[gate].cut(true));
                Fault::Cut(cut)
            }
            5 if !is_away && !self.is(|fault| matches!(fault, Fault::Drained(_))) => {
                if self.cluster.run(&["drain", &format!("n{worker}")]).0 != 0 {
                    return;
                }
                Fault::Drained(worker)
            }
            6 if !is_away => {
                if self.below(2) == 0 {
                    self.cluster.orchestrator.kill();
                    Fault::NoOrchestrator
                } else {
                    self.cluster.orchestrator.signal(Signal::STOP);
                    Fault::FrozenOrchestrator
                }
            }
            7 if !self.is(|fault| matches!(fault, Fault::NoStorage(..))) => {
                let folder = self.cluster.path().join("storage/jobs").join(long);
                let (checkpoints, other) = (folder.join("checkpoints"), folder.join("aside"));
                std::fs::write(&other, "in the way").unwrap();
                if exchange(&checkpoints, &other).is_err() {
                    return;
                }
                Fault::NoStorage(checkpoints, other)
            }
            8 if !is_away && self.short.len() < 4 => {
                let key = format!("short {}", self.short.len());
                let job = self.cluster.submit(&["training.steps=30"], &["--priority", "1", "--key", &key]);
                self.short.push(job);
                self.num_faults += 1;
                return;
            }
            _ => return,
        };
        self.num_faults += 1;
        self.faults.push((Instant::now() + lasts, fault));
    }

    /// Ends what has lasted long enough.
    fn heal(&mut self, now: Instant) {
        let all = std::mem::take(&mut self.faults).into_iter();
        let (mut over, faults): (Vec<_>, Vec<_>) = all.partition(|(until, _)| *until <= now);
        self.faults = faults;
        // Taking a node back needs the orchestrator.
        over.sort_by_key(|(_, fault)| matches!(fault, Fault::Drained(_)));
        for (_, fault) in over {
            match fault.clone() {
                Fault::Dead(worker) => self.start_worker(worker),
                Fault::Frozen(worker) => self.cluster.workers[worker].as_ref().unwrap().signal(Signal::CONT),
                Fault::Cut(gates) => gates.iter().for_each(|&gate| self.gates[gate].cut(false)),
                Fault::NoOrchestrator => self.cluster.start_orchestrator(&[]),
                Fault::FrozenOrchestrator => self.cluster.orchestrator.signal(Signal::CONT),
                Fault::NoStorage(checkpoints, other) => exchange(&checkpoints, &other).unwrap(),
                Fault::Drained(worker) => {
                    // Its orchestrator may be away.
                    let is_away =
                        self.is(|fault| matches!(fault, Fault::NoOrchestrator | Fault::FrozenOrchestrator));
                    if is_away || self.cluster.run(&["drain", "--undo", &format!("n{worker}")]).0 != 0 {
                        self.faults.push((now + Duration::from_millis(500), fault));
                    }
                }
            }
        }
        // Processes that were told to end have a supervisor.
        for number in 0..WORKERS {
            let has_ended = |worker: &mut crate::cluster::Process| worker.has_ended();
            let is_dead = self.is(|fault| matches!(fault, Fault::Dead(of) if *of == number));
            if !is_dead && self.cluster.workers[number].as_mut().is_some_and(has_ended) {
                self.start_worker(number);
            }
        }
    }
}

/// Two paths change places at once.
fn exchange(one: &std::path::Path, other: &std::path::Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

fn assert_done(cluster: &Cluster, job: &str, expected: &[(u64, u64, u64)], seed: impl Debug) {
    let steps = cluster.finish(job);
    assert_eq!(curve(&steps), expected, "{seed:?}: {}", cluster.run(&["logs", job]).1);
    assert_eq!(cluster.status(job).unwrap()["state"], "done", "{seed:?}");
}

#[test]
fn a_storm_of_everything_does_not_show_in_any_curve() {
    let (storms, lasts, steps) = storms();
    let (long, every) = (format!("training.steps={steps}"), "checkpoint.every=10");
    let mut reference = None;
    let first = std::env::var("CONTRAFLOW_SEED").map_or(1, |seed| seed.parse().unwrap());
    for seed in first..first + storms {
        let mut storm = Storm::begin(seed);
        let of = |cluster: &Cluster, changes: &[&str]| curve(&cluster.finish(&cluster.submit(changes, &[])));
        let (whole, short) = reference.get_or_insert_with(|| {
            (of(&storm.cluster, &[&long, every]), of(&storm.cluster, &["training.steps=30"]))
        });
        let job = storm.cluster.submit(&[&long, every], &[]);
        storm.cluster.until_step(&job, 12);
        let began = Instant::now();
        while began.elapsed() < lasts {
            storm.strike(&job);
            storm.heal(Instant::now());
            let wait = Duration::from_millis(100 + storm.below(1_500));
            // The time between two faults.
            std::thread::sleep(wait);
        }
        let long_over = Instant::now() + Duration::from_secs(3_600);
        while !storm.faults.is_empty() {
            storm.heal(long_over);
        }
        let reached = storm.cluster.status(&job).map(|status| status["step"].clone());
        assert_done(&storm.cluster, &job, whole, seed);
        storm.short.iter().for_each(|job| assert_done(&storm.cluster, job, short, seed));
        until("a full house of which nothing is used", || {
            storm.heal(Instant::now());
            let nodes = storm.cluster.nodes();
            (nodes.len() == WORKERS && nodes.iter().all(|node| node["used"] == 0)).then_some(())
        });
        let left: Vec<String> = unfinished(&storm.cluster.path().join("storage"));
        assert!(left.is_empty(), "{seed}: {left:?}");
        eprintln!("storm {seed}: {} faults, step {reached:?} of {steps} at its end", storm.num_faults);
    }
}

/// Files and folders that were begun and not finished.
fn unfinished(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let own = folders.iter().chain(&files).map(|path| path.display().to_string());
    let own = own.filter(|path| path.ends_with(".part"));
    own.chain(folders.iter().flat_map(|folder| unfinished(folder))).collect()
}
