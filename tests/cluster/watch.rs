//! The stability watch in whole clusters: what is not finite is named and stops, skips or ends a step on all ranks before
//! any update; spikes and starving experts are reported; the gradient is measured layer by layer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use contraflow_kernels::host::{HostValues, HostValuesMut};
use contraflow_kernels::tensor::Tensor;
use contraflow_orchestrator::job::Outcome;
use contraflow_runtime::stability::evidence::{NamedTensor, RankEvidence, layer_of};
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use contraflow_workers::model::params::RankParams;

use crate::lab::{FOUR_RANKS, Finished, Lab, ONE_RANK, Setup, Tensors, add_gradients, layout, parts};

/// Spoils the gradients of the ranks and steps that `when` names, bucket by bucket.
fn spoil(
    when: impl Fn(usize, u64) -> bool + Send + Sync + 'static,
    how: impl Fn(&mut RankParams, usize) + Send + Sync + 'static,
) -> Probe {
    Probe::new(move |point| {
        if let ProbePoint::Gradients { rank, step, bucket, params } = point
            && when(rank, step)
        {
            how(params, bucket);
        }
    })
}

/// Sets the first values of a tensor's gradient, if it is in the bucket.
fn set_gradient((params, bucket): (&mut RankParams, usize), name: &str, count: usize, value: f32) {
    for param in params.in_bucket(bucket) {
        let part = param.parts.iter().find(|part| part.name == name);
        if let Some(offset) = part.map(|part| part.offset) {
            param.grad_mut().values_mut()[offset..offset + count].fill(value);
        }
    }
}

fn multiply_gradients((params, bucket): (&mut RankParams, usize), factor: f32) {
    for param in params.in_bucket(bucket) {
        param.grad_mut().values_mut::<f32>().iter_mut().for_each(|value| *value *= factor);
    }
}

fn divergence(finished: &Finished) -> &Divergence {
    match &finished.outcome {
        Outcome::Diverged { divergence, .. } => divergence,
        outcome => panic!("{outcome:?}"),
    }
}

/// Held by ranks 2 and 3 alone: pipeline rank 1 has the later layers.
const GATE: &str = "model.layers.4.mlp.gate.weight";
/// Of the eight experts rank 3 holds the last four.
const EXPERT: &str = "model.layers.4.mlp.experts.5.up_proj.weight";

#[test]
fn the_first_bad_tensor_is_named_with_step_rank_and_layer() {
    let lab = Lab::new();
    let probe = spoil(
        |rank, step| rank == 3 && step == 3,
        |params, bucket| {
            set_gradient((params, bucket), EXPERT, 17, f32::NAN);
            set_gradient((params, bucket), "model.layers.5.self_attn.o_proj.weight", 1, f32::INFINITY);
        },
    );
    let finished = lab.run(Setup { probe, ..lab.setup(FOUR_RANKS, &[]) });
    let divergence = divergence(&finished);
    assert_eq!(
        divergence.why,
        format!(
            "step 3: gradient of {EXPERT} on rank 3 (layer 4) has 17 values that are not finite; no rank has updated its weights"
        )
    );
    let named = |name: &str, layer, num_values| {
        Some(NamedTensor { name: name.into(), layer: Some(layer), num_values })
    };
    let evidence = divergence.evidence.as_ref().unwrap();
    assert_eq!((evidence.step, evidence.grad_norm.as_str()), (3, "NaN"));
    assert_eq!(
        evidence.ranks,
        [RankEvidence {
            rank: 3,
            weight: None,
            micro_batch: None,
            first_gradient: named(EXPERT, 4, 17),
            last_gradient: named("model.layers.5.self_attn.o_proj.weight", 5, 1),
            num_gradients: 2,
        }]
    );
    assert_eq!(finished.records.len(), 2);
}

#[test]
fn of_two_ranks_with_one_tensor_the_lower_one_is_named() {
    let lab = Lab::new();
    let probe = spoil(
        |rank, step| rank >= 2 && step == 1,
        |params, bucket| set_gradient((params, bucket), GATE, 1, f32::NEG_INFINITY),
    );
    let finished = lab.run(Setup { probe, ..lab.setup(FOUR_RANKS, &[]) });
    let words = format!("step 1: gradient of {GATE} on rank 2 (layer 4) has 1 value that is not finite");
    assert!(finished.message().starts_with(&words), "{}", finished.message());
}

#[test]
fn an_absurd_learning_rate_stops_the_run_before_the_second_update() {
    let lab = Lab::new();
    let finished = lab.run(lab.setup(FOUR_RANKS, &["lr.peak=1e30"]));
    let message = finished.message();
    assert!(message.starts_with("step 2: gradient of model.embed_tokens.weight on rank 0 has "), "{message}");
    assert!(message.ends_with(" values that are not finite; no rank has updated its weights"), "{message}");
    assert_eq!(finished.records.len(), 1);
}

#[test]
fn a_weight_that_is_not_finite_is_named_before_what_comes_of_it() {
    let lab = Lab::new();
    let probe = spoil(
        |rank, step| rank == 2 && step == 1,
        |params, _| {
            let head = params.dense.iter_mut().find(|param| param.parts[0].name == "lm_head.weight");
            set_all(head.unwrap().master_mut(), f32::NAN);
        },
    );
    let finished = lab.run(Setup { probe, ..lab.setup(FOUR_RANKS, &[]) });
    let message = finished.message();
    let at = |words: &str| message.find(words).unwrap_or_else(|| panic!("expected `{words}` in: {message}"));
    let weight = at("step 2: weight lm_head.weight on rank 0 has ");
    // The first half of the micro-batches ends on the second pipeline rank.
    let loss = at("; the loss of micro-batch 0 on rank 2 is not finite; ");
    let gradient = at("; gradient of model.embed_tokens.weight on rank 0 has ");
    assert!(weight < loss && loss < gradient, "{message}");
    assert_eq!(divergence(&finished).evidence.as_ref().unwrap().loss, "NaN");
    assert_eq!(finished.records.len(), 1);
}

#[test]
fn a_rollback_ends_the_formation() {
    let lab = Lab::new();
    let probe = spoil(
        |rank, step| rank == 2 && step == 2,
        |params, bucket| set_gradient((params, bucket), GATE, 1, f32::NAN),
    );
    let setup = lab.setup(FOUR_RANKS, &["watch.on_nan=rollback"]);
    let finished = lab.run(Setup { probe, ..setup });
    assert_eq!(divergence(&finished).action, StepAction::RollBack);
    assert!(finished.message().ends_with("; no rank has updated its weights"), "{}", finished.message());
}

/// Weights and gate biases of every rank before the update of every step, by published name, as bits.
type History = BTreeMap<(u64, usize), Bits>;

/// Of one rank.
pub type Bits = Vec<(String, Vec<u32>)>;

pub fn bits(params: &RankParams) -> Bits {
    let as_bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    let weights = parts(params).map(|(param, part)| (part.name.clone(), as_bits(param.master().values())));
    let biases = params
        .dense
        .gate_biases
        .iter()
        .map(|(layer, biases)| (format!("bias {layer}"), as_bits(biases.values())));
    weights.chain(biases).collect()
}

#[test]
fn a_skipped_batch_changes_nothing_on_any_rank_and_the_run_continues() {
    let lab = Lab::new();
    let history: Arc<Mutex<History>> = Arc::default();
    let shared = history.clone();
    let probe = Probe::new(move |point| {
        if let ProbePoint::Gradients { rank, step, bucket, params } = point {
            shared.lock().unwrap().insert((step, rank), bits(params));
            if (rank, step) == (2, 3) {
                set_gradient((params, bucket), GATE, 2, f32::NAN);
            }
        }
    });
    let finished = lab.run(Setup { probe, ..lab.setup(FOUR_RANKS, &["watch.on_nan=skip"]) });
    assert!(matches!(finished.outcome, Outcome::Done { .. }), "{:?}", finished.outcome);
    let history = history.lock().unwrap();
    for rank in 0..4 {
        let at = |step| &history[&(step, rank)];
        assert!(at(3) == at(4), "rank {rank} has changed in the step that was skipped");
        assert!(at(2) != at(3) && at(4) != at(5), "rank {rank} does not learn");
    }
    let skipped: Vec<u64> =
        finished.records.iter().filter(|record| record.skipped).map(|record| record.step).collect();
    assert_eq!((skipped, finished.records.len()), (vec![3], 5));
    let words = format!(
        "step 3: gradient of {GATE} on rank 2 (layer 4) has 2 values that are not finite; no rank has updated its weights"
    );
    assert_eq!(finished.records[2].warnings, [words]);
}

#[test]
fn too_many_skips_in_a_row_stop_the_run() {
    let lab = Lab::new();
    let probe = spoil(
        |rank, step| rank == 1 && step >= 2,
        |params, bucket| multiply_gradients((params, bucket), f32::NAN),
    );
    let setup = lab.setup(FOUR_RANKS, &["watch.on_nan=skip", "watch.max_skips=2"]);
    let finished = lab.run(Setup { probe, ..setup });
    assert_eq!(divergence(&finished).step, 4);
    let error_text = "; 2 batches in a row were skipped (watch.max_skips); no rank has updated its weights";
    assert!(finished.message().ends_with(error_text), "{}", finished.message());
}

#[test]
fn a_spike_is_reported_or_stops_the_run_as_the_recipe_says() {
    let lab = Lab::new();
    let run = |policy: &str| {
        let probe = spoil(|_, step| step == 4, |params, bucket| multiply_gradients((params, bucket), 1e4));
        let policy = format!("watch.on_spike={policy}");
        lab.run(Setup {
            probe,
            ..lab.setup(FOUR_RANKS, &["watch.spike_window=3", "watch.spike_factor=100", &policy])
        })
    };
    let words = "step 4: the gradient norm has a spike: ";
    let warned = run("warn");
    let reported: Vec<usize> = warned.records.iter().map(|record| record.warnings.len()).collect();
    assert_eq!(reported, [0, 0, 0, 1, 0]);
    assert!(warned.records[3].warnings[0].starts_with(words), "{:?}", warned.records[3].warnings);
    let stopped = run("stop");
    assert!(stopped.message().starts_with(words), "{}", stopped.message());
    // Every tensor is finite; the batch is what there is to look at.
    let evidence = divergence(&stopped).evidence.as_ref().unwrap();
    assert_eq!((stopped.records.len(), evidence.ranks.len()), (3, 0));
    assert!(!evidence.sequences.is_empty());
    let skipped = run("skip");
    assert_eq!(skipped.losses().len(), 5);
    assert!(skipped.records[3].skipped && !skipped.records[4].skipped);
}

#[test]
fn a_collapsed_gate_is_reported_once_and_a_healthy_one_never() {
    let lab = Lab::new();
    let run = |probe| {
        let setup = lab.setup(FOUR_RANKS, &["balance.bias_speed=0", "watch.collapse_steps=2"]);
        let finished = lab.run(Setup { probe, ..setup });
        finished.records.into_iter().map(|record| record.warnings).collect::<Vec<_>>()
    };
    // No score reaches the bias: from the second step on all tokens go to the first two experts.
    let collapse = spoil(
        |_, step| step == 1,
        |params, _| {
            if let Some(biases) = params.dense.gate_biases.get_mut(&4) {
                biases.values_mut()[..2].fill(100.0_f32);
            }
        },
    );
    let words = "layer 4: its gate collapses: for 2 steps 6 of 8 experts (2, 3, 4, 5, 6, 7) have had less than 1% of an \
                 even share of the tokens";
    assert_eq!(run(collapse), [vec![], vec![], vec![words.to_owned()], vec![], vec![]]);
    assert!(run(Probe::default()).iter().all(Vec::is_empty));
}

#[test]
fn the_norms_of_the_parts_are_those_of_the_summed_gradient() {
    let lab = Lab::new();
    for layout in [ONE_RANK, FOUR_RANKS, layout("dualpipev", (2, 1, 2))] {
        let sums: Arc<Mutex<BTreeMap<u64, Tensors>>> = Arc::default();
        let shared = sums.clone();
        let probe = Probe::new(move |point| {
            if let ProbePoint::Gradients { step, bucket, params, .. } = point {
                add_gradients(shared.lock().unwrap().entry(step).or_default(), params, bucket);
            }
        });
        let finished = lab.run(Setup { probe, ..lab.setup(layout, &[]) });
        for (record, tensors) in finished.records.iter().zip(sums.lock().unwrap().values()) {
            let mut expected = [0.0; 11];
            for (name, values) in tensors {
                let embedding_or_head = if name == "model.embed_tokens.weight" { 0 } else { 10 };
                let place = layer_of(name).map_or(embedding_or_head, |layer| layer + 1);
                expected[place] += values.iter().map(|value| value * value).sum::<f64>();
            }
            let norms = record.gradient_norms.as_ref().unwrap();
            let reported: Vec<f64> =
                [norms.embedding].iter().chain(&norms.layers).chain([&norms.head]).copied().collect();
            assert_eq!(reported.len(), expected.len());
            for (reported, expected) in reported.iter().zip(expected.map(f64::sqrt)) {
                // 128 additions in a lane of f32, 2^-24 each, are 8e-6 of the square.
                assert!((reported - expected).abs() <= 1e-5 * expected, "{reported} and {expected}");
            }
            let square: f64 = reported.iter().map(|norm| norm * norm).sum();
            assert!((square - record.grad_norm.powi(2)).abs() <= 1e-14 * square, "{square}");
        }
        assert_eq!(finished.losses().len(), 5);
    }
}

pub fn set_all(tensor: &mut Tensor, value: f32) {
    tensor.values_mut().fill(value);
}
