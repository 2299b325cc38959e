//! The same run gives the same bits whatever the timing, and costs the memory that the plan says.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow_orchestrator::job::Outcome;
use contraflow_runtime::fabric::{DelayInjection, LocalOptions};
use contraflow_runtime::schedule::{Chunk, Pass, Work};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::Plans;
use contraflow_workers::engine::probe::{Probe, ProbePoint};

use crate::lab::{FOUR_RANKS, Lab, ONE_RANK, Setup, layout};

/// Every number a run leaves, as bits: losses and norms by step, the loss of the validation, the exported weights by file.
#[derive(PartialEq)]
pub struct Bits {
    numbers: Vec<[u64; 4]>,
    validation: u64,
    files: BTreeMap<String, Vec<u8>>,
}

fn bits_of_a_run(lab: &Lab, name: &str, delay_injection: Option<DelayInjection>) -> Bits {
    let setup = lab.setup(FOUR_RANKS, &["training.steps=3"]);
    let network = LocalOptions { delay_injection, ..setup.network };
    bits_of(lab, name, Setup { network, ..setup })
}

/// Of a run with enough sequences for a validation.
pub fn bits_of(lab: &Lab, name: &str, setup: Setup) -> Bits {
    let dir = lab.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    let steps = setup.recipe.training.steps;
    let finished = lab.run(Setup { export_dir: Some(dir.clone()), ..setup });
    assert_eq!(finished.losses().len(), steps);
    assert_eq!(finished.num_waiting, 0, "frames that nobody took");
    let numbers = finished.records.iter().map(|record| {
        [record.loss, record.mtp_loss.unwrap(), record.balance_loss, record.grad_norm].map(f64::to_bits)
    });
    let Outcome::Done { validation: Some((validation, _)) } = finished.outcome else {
        panic!("expected a validation, got {:?}", finished.outcome);
    };
    let (numbers, validation) = (numbers.collect(), validation.to_bits());
    Bits { numbers, validation, files: files_of(&dir) }
}

fn files_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
    };
    std::fs::read_dir(dir).unwrap().map(read).collect()
}

#[test]
fn the_same_run_gives_the_same_bits_however_late_its_frames_are() {
    let lab = Lab::new();
    let expected = bits_of_a_run(&lab, "undisturbed", None);
    let weights = expected.files.keys().filter(|name| name.ends_with(".safetensors")).count();
    assert!(weights > 1, "the ranks share the writing: {:?}", expected.files.keys());
    assert!(bits_of_a_run(&lab, "again", None) == expected, "the second run differs");
    for seed in 1..=3 {
        let delay_injection = DelayInjection { seed, max_delay: Duration::from_millis(2) };
        let disturbed = bits_of_a_run(&lab, &format!("disturbed-{seed}"), Some(delay_injection));
        assert!(disturbed == expected, "the run with delays of seed {seed} differs");
    }
}

#[test]
fn no_schedule_and_no_hop_depends_on_when_frames_arrive() {
    let lab = Lab::new();
    let cases = [
        (layout("dualpipev", (2, 2, 1)), "parallel.overlap=true"),
        (layout("1f1b", (2, 2, 1)), "parallel.overlap=true"),
        (layout("zb1p", (2, 2, 1)), "parallel.overlap=true"),
        (layout("interleaved", (2, 2, 1)), "parallel.overlap=true"),
        (layout("dualpipev", (2, 4, 1)), "parallel.expert_ranks_per_node=2"),
    ];
    for (number, (layout, change)) in cases.into_iter().enumerate() {
        let run = |name: &str, delay_injection| {
            let setup = lab.setup(layout, &["training.steps=2", change]);
            let network = LocalOptions { delay_injection, ..setup.network };
            bits_of(&lab, &format!("{number}-{name}"), Setup { network, ..setup })
        };
        let undisturbed = run("undisturbed", None);
        let delays = DelayInjection { seed: 1, max_delay: Duration::from_millis(2) };
        assert!(run("disturbed", Some(delays)) == undisturbed, "{layout:?}, {change}");
    }
}

/// Per rank, what its compute lane ran on, in order.
type Trace = BTreeMap<usize, Vec<(Chunk, Pass)>>;

/// The most chunks between the first operation of their forward and the last of their input gradient.
fn peak(trace: &[(Chunk, Pass)]) -> usize {
    let mut lives: BTreeMap<Chunk, (usize, usize)> = BTreeMap::new();
    for (at, &(chunk, pass)) in trace.iter().enumerate() {
        let life = lives.entry(chunk).or_insert((at, at));
        if pass == Pass::BackwardInput {
            life.1 = at;
        }
    }
    let alive = |at: usize| lives.values().filter(|(first, last)| (first..=last).contains(&&at)).count();
    (0..trace.len()).map(alive).max().unwrap_or(0)
}

#[test]
fn the_peak_of_live_activations_is_the_plans() {
    let lab = Lab::new();
    // With a second expert rank neighbours run beside each other.
    let alone = [
        ("dualpipe", 2, 4),
        ("dualpipe", 2, 10),
        ("dualpipe", 4, 8),
        ("dualpipe", 4, 12),
        ("dualpipev", 1, 3),
        ("dualpipev", 2, 7),
        ("dualpipev", 4, 8),
        ("1f1b", 2, 1),
        ("1f1b", 4, 3),
        ("1f1b", 4, 8),
        ("zb1p", 2, 5),
        ("zb1p", 4, 8),
        ("interleaved", 2, 4),
        ("interleaved", 4, 8),
    ];
    let of_two = [
        ("dualpipe", 2, 4),
        ("dualpipe", 2, 10),
        ("dualpipev", 2, 7),
        ("1f1b", 1, 4),
        ("zb1p", 1, 4),
        ("zb1p", 2, 8),
        ("interleaved", 2, 8),
        ("interleaved", 4, 8),
    ];
    let cases = alone.map(|case| (case, 1)).into_iter().chain(of_two.map(|case| (case, 2)));
    for ((schedule, pipeline, micro_batches), expert) in cases {
        let traces: Arc<Mutex<Trace>> = Arc::default();
        let seen = traces.clone();
        let probe = Probe::new(move |point| {
            if let ProbePoint::Op { rank, step: 1, op } = point
                && let Work::Component { pass, chunk, .. } = op.work
                && op.lane == contraflow_runtime::schedule::Lane::Compute
            {
                seen.lock().unwrap().entry(rank).or_default().push((chunk, pass));
            }
        });
        let batch = micro_batches * expert;
        let changes = ["training.steps=1", &format!("training.global_batch_size={batch}")];
        let setup = lab.setup(layout(schedule, (pipeline, expert, 1)), &changes);
        let topology = setup.recipe.topology();
        let mut plans = Plans::new(&setup.recipe).unwrap();
        let finished = lab.run(Setup { probe, ..setup });
        assert_eq!(finished.losses().len(), 1);
        let planned = plans.get(micro_batches, TaskKind::Train).unwrap().report.peak_activations.clone();
        for (rank, trace) in traces.lock().unwrap().iter() {
            let expected = planned[topology.coordinates(*rank).pipeline];
            let what =
                format!("{schedule}, {pipeline} ranks, {micro_batches} micro-batches, {expert} expert ranks");
            assert_eq!(peak(trace), expected, "{what}: rank {rank}");
        }
        let largest = *planned.iter().max().unwrap();
        assert_eq!(finished.records[0].peak_live_chunks as usize, largest, "{schedule} on {pipeline} ranks");
    }
}

#[test]
fn a_batch_too_small_for_the_schedule_trains_by_the_fallback_plan() {
    let lab = Lab::new();
    // Batches of 2, 4 and then 8 sequences of 6 tokens; DualPipe on two ranks needs four micro-batches.
    let changes = [
        "training.steps=4",
        "training.global_batch_size=8",
        "training.ramp_start_batch_size=2",
        "training.ramp_tokens=36",
    ];
    let setup = lab.setup(layout("dualpipe", (2, 1, 1)), &changes);
    let mut plans = Plans::new(&setup.recipe).unwrap();
    let reason = plans.get(2, TaskKind::Train).unwrap().fallback.clone();
    assert!(reason.is_some_and(|reason| reason.contains("at least 4 micro-batches, got 2")));
    let finished = lab.run(setup);
    let expected = lab.run(lab.setup(ONE_RANK, &changes));
    let tokens: Vec<u64> = finished.records.iter().map(|record| record.tokens).collect();
    assert_eq!(tokens, [12, 24, 48, 48]);
    for (loss, expected) in finished.losses().iter().zip(expected.losses()) {
        assert!((loss - expected).abs() <= 1e-5 * expected, "loss {loss}, on one rank {expected}");
    }
}
