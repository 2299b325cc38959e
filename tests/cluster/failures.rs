//! Whatever goes wrong ends the run, soon, with one message that names the rank, what it was doing, and the cause.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use contraflow_orchestrator::metrics::Subscriber;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::fabric::LocalOptions;
use contraflow_runtime::schedule::{Component, Lane, Op, Work};
use contraflow_workers::checkpoint::shard_name;
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use rustix::fs::{CWD, Mode, mkfifoat};
use tokio::sync::Notify;

use crate::lab::{FOUR_RANKS, Finished, Lab, Setup, layout};
use crate::resume::commits;

/// A kernel that does not come back before the test has ended.
const LONG_KERNEL: Duration = Duration::from_secs(10);

/// Less than the job waits for a rank that does not answer an abort: every rank must have answered.
const SOON: Duration = Duration::from_secs(4);

/// Calls `act` the first time that `is_it` holds.
fn once(
    is_it: impl Fn(&ProbePoint) -> bool + Send + Sync + 'static,
    act: impl Fn() + Send + Sync + 'static,
) -> Probe {
    let done = AtomicBool::new(false);
    Probe::new(move |point| {
        if is_it(&point) && !done.swap(true, Ordering::Relaxed) {
            act();
        }
    })
}

/// Cancels a run while one rank is in a long kernel.
fn cancel_during(lab: &Lab, is_it: impl Fn(&ProbePoint) -> bool + Send + Sync + 'static) {
    let in_kernel = Arc::new(Notify::new());
    let cancel = Some((in_kernel.clone(), "the user has seen enough"));
    let probe = once(is_it, move || {
        in_kernel.notify_one();
        std::thread::sleep(LONG_KERNEL);
    });
    let finished = lab.run(Setup { probe, cancel, ..lab.setup(FOUR_RANKS, &[]) });
    assert_eq!(finished.message(), "the user has seen enough");
    let took = finished.since_cancel.unwrap();
    assert!(took < LONG_KERNEL / 2, "the abort was answered after {took:?}");
}

#[test]
fn an_abort_is_answered_at_once_during_a_long_kernel() {
    let lab = Lab::new();
    for lane in [Lane::Compute, Lane::Expert] {
        cancel_during(
            &lab,
            move |point| matches!(point, ProbePoint::Op { rank: 1, step: 2, op } if op.lane == lane),
        );
    }
    cancel_during(&lab, |point| matches!(point, ProbePoint::Gradients { rank: 3, step: 2, .. }));
}

#[test]
fn an_abort_is_answered_before_the_ranks_have_a_model() {
    let lab = Lab::new();
    let at_once = Arc::new(Notify::new());
    at_once.notify_one();
    let finished =
        lab.run(Setup { cancel: Some((at_once, "changed my mind")), ..lab.setup(FOUR_RANKS, &[]) });
    assert_eq!(finished.message(), "changed my mind");
    assert!(finished.since_cancel.unwrap() < SOON);
}

#[test]
fn the_end_waits_for_a_rank_that_is_still_writing_its_part_of_a_checkpoint() {
    let (lab, run) = (Lab::new(), tempfile::tempdir().unwrap());
    let writes = Arc::new(Notify::new());
    let cancel = Some((writes.clone(), "no more of it"));
    let is_it = |point: &ProbePoint| matches!(point, ProbePoint::Actor { rank: 1, name: "checkpointer", .. });
    let setup = lab.setup(FOUR_RANKS, &["training.steps=1"]);
    let checkpoints = Some(commits(run.path(), &setup.recipe));
    let folder = CheckpointFolder::of_run(run.path());
    let shard = folder.make_unfinished(1).unwrap().join(shard_name(1));
    // Opening a pipe for writing waits for a reader.
    mkfifoat(CWD, &shard, Mode::RUSR | Mode::WUSR).unwrap();
    let is_read = Arc::new(AtomicBool::new(false));
    let probe = once(is_it, {
        let is_read = is_read.clone();
        move || {
            let (is_read, shard) = (is_read.clone(), shard.clone());
            std::thread::spawn(move || {
                // Gives an end that does not wait the time to come first; one that waits is right at any speed.
                std::thread::sleep(Duration::from_millis(500));
                is_read.store(true, Ordering::Relaxed);
                drop(std::fs::read(shard));
            });
            writes.notify_one();
        }
    });
    let finished = lab.run(Setup { probe, cancel, checkpoints, ..setup });
    assert_eq!(finished.message(), "no more of it");
    assert!(is_read.load(Ordering::Relaxed), "the run ended while rank 1 waited for the disk");
    folder.tidy(1, None).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// One message that contains each of these texts.
fn assert_reports(finished: &Finished, words: &[&str]) {
    let message = finished.message();
    assert!(finished.elapsed < SOON, "it took {:?} to say: {message}", finished.elapsed);
    assert_eq!(message.lines().count(), 1, "{message}");
    for word in words {
        assert_eq!(message.matches(word).count(), 1, "expected `{word}` once in: {message}");
    }
}

const CAUSE: &str = "the test pulls the plug";

#[test]
fn a_panic_in_the_metrics_actor_ends_the_run_with_one_message() {
    let lab = Lab::new();
    let subscriber: Option<Subscriber> = Some(Box::new(|record| assert!(record.step < 2, "{CAUSE}")));
    let finished = lab.run(Setup { subscriber, ..lab.setup(FOUR_RANKS, &["training.steps=1000"]) });
    assert_reports(&finished, &["the metrics actor failed", CAUSE]);
}

/// Whether a probe is to act on an operation.
type IsWanted = fn(&Op) -> bool;

#[test]
fn a_panic_on_any_lane_ends_the_run_with_one_message() {
    let lab = Lab::new();
    let ops: [(IsWanted, &str); 5] = [
        (|op| op.lane == Lane::Compute && op.action.is_some(), "action "),
        (|op| op.lane == Lane::Expert, "action "),
        (|op| matches!(op.lane, Lane::Send(_)), "action "),
        (|op| matches!(op.lane, Lane::Receive(_)), "action "),
        (|op| op.lane == Lane::Collective, "all-gather of bucket "),
    ];
    for (is_wanted, error_text) in ops {
        let is_it = move |point: &ProbePoint| matches!(point, ProbePoint::Op { rank: 2, step: 2, op } if is_wanted(op));
        let finished =
            lab.run(Setup { probe: once(is_it, || panic!("{CAUSE}")), ..lab.setup(FOUR_RANKS, &[]) });
        assert_reports(&finished, &[&format!("rank 2, {error_text}"), "panicked", CAUSE]);
    }
}

#[test]
fn the_message_names_the_action_that_panicked() {
    let lab = Lab::new();
    let is_it = |point: &ProbePoint| {
        let experts = |op: &Op| {
            matches!(op.work, Work::Component { component: Component::Experts, chunk, .. }
                if (chunk.stage, chunk.micro_batch) == (1, 2))
        };
        matches!(point, ProbePoint::Op { rank: 1, step: 1, op } if experts(op))
    };
    let one_way = layout("1f1b", (2, 1, 1));
    let finished = lab.run(Setup { probe: once(is_it, || panic!("{CAUSE}")), ..lab.setup(one_way, &[]) });
    assert_eq!(finished.message(), format!("rank 1, action F1.2: panicked: {CAUSE}"));
}

#[test]
fn a_panic_in_each_actor_ends_the_run_with_one_message() {
    let lab = Lab::new();
    for (actor, when, error_text) in [
        ("rank", 2, "in the rank actor itself"),
        ("pipeline", 2, "in the pipeline"),
        ("expert shard", 2, "in the expert shard"),
        ("loader", 2, "in the loader"),
        ("checkpointer", 0, "in the checkpointer"),
    ] {
        let is_it = move |point: &ProbePoint| matches!(point, ProbePoint::Actor { rank: 1, step, name } if *name == actor && *step == when);
        let dir = lab.path().join(actor);
        std::fs::create_dir(&dir).unwrap();
        let setup = lab.setup(FOUR_RANKS, &["training.steps=3"]);
        let probe = once(is_it, || panic!("{CAUSE}"));
        let finished = lab.run(Setup { probe, export_dir: Some(dir.clone()), ..setup });
        assert_reports(&finished, &["rank 1, ", error_text, CAUSE]);
        assert!(!dir.join("config.json").exists(), "the weights of a run that failed were committed");
    }
}

#[test]
fn a_panic_in_the_update_names_the_operation() {
    let lab = Lab::new();
    let is_it = |point: &ProbePoint| matches!(point, ProbePoint::Gradients { rank: 3, step: 2, .. });
    let finished = lab.run(Setup { probe: once(is_it, || panic!("{CAUSE}")), ..lab.setup(FOUR_RANKS, &[]) });
    assert_reports(&finished, &["rank 3, packing of the gradients of bucket 5", "panicked", CAUSE]);
}

#[test]
fn a_folder_that_is_gone_is_named() {
    let lab = Lab::new();
    let dir = lab.path().join("gone");
    let setup = lab.setup(FOUR_RANKS, &["training.steps=1"]);
    let finished = lab.run(Setup { export_dir: Some(dir.clone()), ..setup });
    assert_reports(&finished, &["writing the weights", &dir.display().to_string()]);
}

#[test]
fn a_frame_that_never_comes_is_named() {
    let lab = Lab::new();
    let is_it = |point: &ProbePoint| matches!(point, ProbePoint::Op { rank: 0, step: 2, op } if matches!(op.lane, Lane::Send(_)));
    let setup = lab.setup(layout("1f1b", (2, 1, 1)), &[]);
    let network = LocalOptions { timeout: Duration::from_secs(1), ..setup.network };
    let finished =
        lab.run(Setup { probe: once(is_it, || std::thread::sleep(LONG_KERNEL)), network, ..setup });
    // Any rank that depends on the frame may be the first to time out; each names what it waits for.
    assert_reports(&finished, &["action ", "waited 1 s for ", ", which never ", "stage "]);
    assert!(finished.message().starts_with("rank "), "{}", finished.message());
}
