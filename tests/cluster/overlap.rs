//! Where communication runs beside computation every number is as without: losses, norms, weights, checkpoints.
//!
//! Whoever reads weights reads them gathered: validation and export at the end, a run that resumes from a checkpoint.

use std::sync::Arc;

use contraflow_kernels::host::HostValuesMut;
use contraflow_workers::checkpoint::Checkpoint;
use contraflow_workers::engine::probe::{Probe, ProbePoint};

use crate::determinism::bits_of;
use crate::lab::{FOUR_RANKS, Lab, Setup, layout};
use crate::resume::{checkpoint, commits, shards};

/// The layouts of `topology`, and one with the smallest batch.
const LAYOUTS: [(&str, (usize, usize, usize), usize); 24] = [
    ("dualpipe", (2, 1, 1), 16),
    ("dualpipe", (2, 2, 1), 16),
    ("dualpipe", (4, 2, 1), 16),
    ("dualpipe", (2, 2, 2), 16),
    ("dualpipe", (4, 1, 1), 2),
    ("dualpipev", (1, 2, 1), 16),
    ("dualpipev", (2, 1, 1), 16),
    ("dualpipev", (2, 2, 1), 16),
    ("dualpipev", (4, 2, 1), 16),
    ("dualpipev", (2, 2, 2), 16),
    ("1f1b", (1, 1, 1), 16),
    ("1f1b", (1, 2, 1), 16),
    ("1f1b", (2, 1, 1), 16),
    ("1f1b", (2, 2, 1), 16),
    ("1f1b", (4, 2, 1), 16),
    ("1f1b", (2, 2, 2), 16),
    ("zb1p", (1, 2, 1), 16),
    ("zb1p", (2, 2, 1), 16),
    ("zb1p", (4, 2, 1), 16),
    ("zb1p", (2, 2, 2), 16),
    ("interleaved", (1, 2, 1), 16),
    ("interleaved", (2, 2, 1), 16),
    ("interleaved", (4, 2, 1), 16),
    ("interleaved", (2, 2, 2), 16),
];

/// Against a run in which no operation of a rank begins before all that the rank has sent or exchanged is there, the passes of a
/// pair run one after the other, and everything is reduced behind them, updated, and gathered.
#[test]
fn overlap_changes_no_bit_in_any_layout() {
    let lab = Lab::new();
    for (index, (schedule, axes, batch)) in LAYOUTS.into_iter().enumerate() {
        let changes = ["training.steps=3", &format!("training.global_batch_size={batch}")];
        let [overlapped, sequential] = [true, false].map(|overlap| {
            let setup = lab.setup(layout(schedule, axes), &[&changes[..], &[overlap_is(overlap)]].concat());
            bits_of(&lab, &format!("{index}-{overlap}"), setup)
        });
        assert!(overlapped == sequential, "{schedule} {axes:?} on {batch} sequences differs");
    }
}

fn overlap_is(on: bool) -> &'static str {
    if on { "parallel.overlap=true" } else { "parallel.overlap=false" }
}

/// What changes the operations of a pass: everything computed again, FP8, more than one sequence in a micro-batch, uneven stages,
/// and a head that makes a gradient of the table in the forward pass, beside a backward pass that makes one too.
#[test]
fn overlap_changes_no_bit_whatever_a_pass_consists_of() {
    let lab = Lab::new();
    let cases: [&[&str]; 5] = [
        &["memory.recompute=[\"norms\", \"mla-up-projections\", \"swiglu\"]"],
        &["precision.recipe=fp8"],
        &["training.micro_batch_size=2", "training.global_batch_size=32"],
        &["parallel.stages=[1, 3, 1, 3]", "model.n_routed_experts=16"],
        &["model.tie_word_embeddings=true"],
    ];
    for (index, changes) in cases.into_iter().enumerate() {
        let schedules = [
            ("dualpipe", (2, 2, 1)),
            ("dualpipev", (2, 2, 1)),
            ("interleaved", (2, 2, 1)),
            ("zb1p", (2, 2, 1)),
            ("1f1b", (1, 2, 1)),
        ];
        for (schedule, axes) in schedules {
            // Four stages by hand are those of two ranks with two each.
            let stages = index == 3 && !["dualpipev", "interleaved"].contains(&schedule);
            let changes: Vec<&str> =
                changes.iter().copied().filter(|change| !stages || !change.contains("stages")).collect();
            let [overlapped, sequential] = [true, false].map(|overlap| {
                let changes = [&changes[..], &["training.steps=2", overlap_is(overlap)]].concat();
                let setup = lab.setup(layout(schedule, axes), &changes);
                bits_of(&lab, &format!("{schedule}-{index}-{overlap}"), setup)
            });
            assert!(overlapped == sequential, "{schedule} with {changes:?} differs");
        }
    }
}

/// A batch that is skipped leaves nothing to be gathered; the one before it and the one behind it do. The fifth is the last.
#[test]
fn overlap_changes_no_bit_around_a_skipped_batch() {
    let lab = Lab::new();
    for skipped in [3, 5] {
        let [overlapped, sequential] = [true, false].map(|overlap| {
            let probe = Probe::new(move |point| {
                if let ProbePoint::Gradients { rank: 2, step, bucket, params } = point
                    && step == skipped
                {
                    params.in_bucket(bucket).for_each(|param| param.grad_mut().values_mut()[0] = f32::NAN);
                }
            });
            let setup = lab.setup(FOUR_RANKS, &["watch.on_nan=skip", overlap_is(overlap)]);
            bits_of(&lab, &format!("{skipped}-{overlap}"), Setup { probe, ..setup })
        });
        assert!(overlapped == sequential, "step {skipped}");
    }
}

/// Each step is saved before its update is gathered; what resumes from there ends where the run did that was not cut.
#[test]
fn a_checkpoint_is_the_same_and_either_goes_on_from_the_others() {
    let lab = Lab::new();
    let setup = |overlap: bool, name: &str| {
        let kept = ["training.steps=4", "checkpoint.every=1", "checkpoint.keep=4"];
        let setup = lab.setup(FOUR_RANKS, &[&kept[..], &[overlap_is(overlap)]].concat());
        let checkpoints = Some(commits(&lab.path().join(name), &setup.recipe));
        Setup { checkpoints, ..setup }
    };
    for (overlap, name) in [(true, "overlapped"), (false, "sequential")] {
        lab.run(setup(overlap, name)).losses();
    }
    let saved = |name: &str, step: u64| shards(&checkpoint(&lab.path().join(name), step));
    for step in 2..=4 {
        assert_eq!(saved("overlapped", step).len(), 4);
        assert!(saved("overlapped", step) == saved("sequential", step), "step {step}");
    }
    for (overlap, from) in [(true, "sequential"), (false, "overlapped")] {
        let resume = Checkpoint::open(&checkpoint(&lab.path().join(from), 2));
        let resume = Some(Arc::new(resume.unwrap_or_else(|faults| panic!("{faults}"))));
        let name = format!("from-{from}");
        lab.run(Setup { resume, ..setup(overlap, &name) }).losses();
        assert!(saved(&name, 4) == saved("overlapped", 4), "{name}");
    }
}
