//! The way between workers and orchestrator is cut while the ranks train on: nobody is lost for it, nothing is made again.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cluster::{Cluster, curve, spawn, until};

/// Forwards connections to an address. While it is cut nothing passes, and connections stay open.
pub struct Gate {
    pub address: String,
    is_cut: Arc<AtomicBool>,
}

impl Gate {
    pub fn open(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, to) = (listener.local_addr().unwrap().to_string(), to.to_owned());
        let is_cut = Arc::new(AtomicBool::new(false));
        let cut = is_cut.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let cut = cut.clone();
                    std::thread::spawn(move || pass_on(from, to, &cut));
                }
            }
        });
        Gate { address, is_cut }
    }

    pub fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::Relaxed);
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, is_cut: &AtomicBool) {
    let mut piece = [0; 65_536];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        while is_cut.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    for end in [from, to] {
        drop(end.shutdown(Shutdown::Both));
    }
}

#[test]
fn an_orchestrator_that_nobody_reaches_for_a_while_loses_nobody() {
    let mut cluster = Cluster::start(0);
    let gates: Vec<Gate> = (0..4).map(|_| Gate::open(&cluster.address)).collect();
    for (number, gate) in gates.iter().enumerate() {
        let label = format!("node=n{number}");
        let arguments = ["worker", "--join", &gate.address, "--storage", "storage", "--labels", &label];
        cluster.workers.push(Some(spawn(cluster.path(), &format!("worker-{number}"), &arguments)));
    }
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    // Nothing on disk to resume from: what is lost from memory is lost from the start.
    let endless = ["training.steps=100000", "checkpoint.every=0"];
    let job = cluster.submit(&endless, &[]);
    cluster.until_step(&job, 10);
    let cut = |is_cut: bool| gates.iter().for_each(|gate| gate.cut(is_cut));
    cut(true);
    until("status that says that nobody is heard", || {
        let waits = cluster.status(&job)?["waiting_for"].as_str()?.to_owned();
        waits.contains("hears no worker").then_some(())
    });
    // Longer than any lease.
    std::thread::sleep(Duration::from_secs(4));
    let reached = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cut(false);
    cluster.until_step(&job, reached + 10);
    let status = cluster.status(&job).unwrap();
    assert_eq!((&status["generation"], &status["losses"]), (&1.into(), &0.into()), "{status}");
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&endless, steps.len())));
}

#[test]
fn a_watcher_says_once_that_the_orchestrator_is_away_and_goes_on() {
    let mut cluster = Cluster::start(4);
    let job = cluster.submit(&["training.steps=100000"], &[]);
    let watcher = spawn(cluster.path(), "watcher", &["watch", &job, "--orchestrator", &cluster.address]);
    let words = "the orchestrator is away, waited for up to 60 s: ";
    for absence in 1..=2 {
        let shown = watcher.stdout().lines().count();
        until("another step", || (watcher.stdout().lines().count() > shown).then_some(()));
        cluster.orchestrator.kill();
        // The sleep is the absence itself: several tries fail in it.
        std::thread::sleep(Duration::from_secs(4));
        cluster.start_orchestrator(&[]);
        let told = watcher.stderr().matches(words).count() as u64;
        assert_eq!(told, absence, "{}", watcher.stderr());
    }
    let status = cluster.status(&job).unwrap();
    assert_eq!(status["losses"], 0, "{status}");
}
