//! Between real processes: frames are the same bytes, and a process that is killed is a lost peer within a second.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use contraflow_runtime::fabric::{Address, FabricError, FrameKind, Region, Transport};

use crate::lab::{DEADLINE, Site, WIRES, close, form, formation, listener, noise, tag};

const PART: &str = "CONTRAFLOW_FABRIC_TEST_WIRE";

/// The other process: rank 1, which sends back what it gets until its input ends.
#[test]
fn the_other_process() {
    let Ok(wire) = std::env::var(PART) else { return };
    let own = listener();
    println!("\naddress {}", serde_json::to_string(&own.address()).unwrap());
    let mut lines = std::io::stdin().lock().lines();
    let first: Address = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    let wire = WIRES.into_iter().find(|known| format!("{known:?}") == wire).unwrap();
    let site = form(&own, formation(vec![first, own.address()], &[1], wire));
    let end = site.network.join(1).unwrap();
    let mut step = 0;
    while let Ok(parts) = end.receive(tag(step, 0, FrameKind::Activation)) {
        end.send(0, tag(step, 1, FrameKind::Activation), parts).unwrap();
        step += 1;
    }
    site.network.close();
}

struct Pair {
    site: Site,
    child: Child,
    /// The child ends with its input, and must be able to say so to its output.
    _pipes: (ChildStdin, Lines<BufReader<ChildStdout>>),
}

fn pair(wire: Transport) -> Pair {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::the_other_process", "--nocapture"])
        .env(PART, format!("{wire:?}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let reply = lines.find_map(|line| line.unwrap().strip_prefix("address ").map(str::to_owned)).unwrap();
    let own = listener();
    writeln!(input, "{}", serde_json::to_string(&own.address()).unwrap()).unwrap();
    let ranks = vec![own.address(), serde_json::from_str(&reply).unwrap()];
    let site = form(&own, formation(ranks, &[0], wire));
    Pair { site, child, _pipes: (input, lines) }
}

#[test]
fn frames_go_there_and_back_unchanged() {
    for wire in WIRES {
        let Pair { site, mut child, _pipes } = pair(wire);
        let end = site.network.join(0).unwrap();
        for (step, len) in [0, 5, 4000, 300_000, 20 << 20].into_iter().enumerate() {
            let (step, payload) = (step as u64, noise(len, len as u64));
            let parts = vec![Region::new(payload.clone()), Region::new(vec![step as u8])];
            end.send(1, tag(step, 0, FrameKind::Activation), parts).unwrap();
            let back = end.receive(tag(step, 1, FrameKind::Activation)).unwrap();
            assert!(back[0].bytes() == payload && back[1].bytes() == [step as u8], "{wire:?}");
        }
        assert_eq!(close(vec![site]), []);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_process_that_is_killed_is_lost_within_a_second() {
    for wire in WIRES {
        let Pair { site, mut child, _pipes } = pair(wire);
        let end = site.network.join(0).unwrap();
        // Frames are on their way in both directions.
        let block = Region::new(noise(4 << 20, 1));
        for step in 0..100 {
            end.send(1, tag(step, 0, FrameKind::Activation), vec![block.clone()]).unwrap();
        }
        end.receive(tag(0, 1, FrameKind::Activation)).unwrap();
        child.kill().unwrap();
        let killed = Instant::now();
        let error =
            (1..=100).find_map(|step| end.receive(tag(step, 1, FrameKind::Activation)).err()).unwrap();
        assert!(killed.elapsed() < Duration::from_secs(1), "it took {:?}", killed.elapsed());
        assert!(matches!(error, FabricError::Lost { rank: 1, .. }), "{wire:?}: {error}");
        assert_eq!(site.faults.recv_timeout(DEADLINE).unwrap().ranks, [1]);
        child.wait().unwrap();
        assert_eq!(close(vec![site]), [], "a second fault");
    }
}
