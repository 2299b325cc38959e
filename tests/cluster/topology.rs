//! Every layout trains the same model: first-step gradients and losses equal those of one rank.

use std::sync::{Arc, Mutex};

use contraflow_runtime::recipe::Recipe;
use contraflow_workers::data::Sampler;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::engine::probe::{Probe, ProbePoint};

use crate::lab::{Finished, Lab, Layout, ONE_RANK, Setup, Tensors, add_gradients, layout};
use crate::margins;

/// What is compared.
struct Trained {
    gradients: Tensors,
    finished: Finished,
}

/// Runs a layout and keeps the gradients of its first step, summed over the ranks.
fn train(lab: &Lab, layout: Layout, changes: &[&str]) -> Trained {
    let gradients: Arc<Mutex<Tensors>> = Arc::default();
    let sums = gradients.clone();
    let probe = Probe::new(move |point| {
        if let ProbePoint::Gradients { step: 1, bucket, params, .. } = point {
            add_gradients(&mut sums.lock().unwrap(), params, bucket);
        }
    });
    let finished = lab.run(Setup { probe, ..lab.setup(layout, changes) });
    let gradients = std::mem::take(&mut *gradients.lock().unwrap());
    Trained { gradients, finished }
}

/// The sequences of a step's global batch as one micro-batch.
fn global_batch(recipe: &Recipe, datasets: &Datasets, step: u64) -> Sequences {
    let size = recipe.training.global_batch_size;
    let sampler = Sampler::new(datasets.train.num_sequences(), recipe.training.seed);
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for index in sampler.batch((step - 1) * size as u64, size) {
        let (more_ids, more_targets) = datasets.train.sequence(index);
        ids.extend(more_ids);
        targets.extend(more_targets);
    }
    Sequences::new(ids, targets, recipe.training.sequence_length)
}

/// The smallest routing margin of each step of the run on one rank.
fn margins_of_one_rank(lab: &Lab, changes: &[&str]) -> Vec<f64> {
    let setup = lab.setup(ONE_RANK, changes);
    let (recipe, datasets) = (setup.recipe.clone(), setup.datasets.clone());
    let margins: Arc<Mutex<Vec<f64>>> = Arc::default();
    let found = margins.clone();
    let probe = Probe::new(move |point| {
        if let ProbePoint::Gradients { step, bucket: 0, params, .. } = point {
            let sequences = global_batch(&recipe, &datasets, step);
            found.lock().unwrap().push(margins::smallest(&recipe, params, sequences));
        }
    });
    lab.run(Setup { probe, ..setup }).losses();
    std::mem::take(&mut *margins.lock().unwrap())
}

/// `max|d| <= 1e-5 max|g| + 1e-7` in every tensor.
fn assert_same_gradients(layout: Layout, gradients: &Tensors, expected: &Tensors) {
    let names = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(gradients), names(expected), "{layout:?}");
    for ((name, gradient), expected) in gradients.iter().zip(expected.values()) {
        let largest = |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).fold(0.0, f64::max);
        let difference = largest(&mut gradient.iter().zip(expected).map(|(got, expected)| got - expected));
        let bound = 1e-5 * largest(&mut expected.iter().copied()) + 1e-7;
        assert!(
            difference <= bound,
            "{layout:?}: {name} differs by {difference:e}, at most {bound:e} may be"
        );
    }
}

/// One table for embedding and head.
const TIED: [&str; 1] = ["model.tie_word_embeddings=true"];

fn assert_same_training(schedule: &'static str, axes: &[(usize, usize, usize)], changes: &[&str]) {
    assert_same_training_with(&[], schedule, axes, changes);
}

/// `only` is changed in the layouts that are compared with one rank, and not there.
fn assert_same_training_with(
    only: &[&str],
    schedule: &'static str,
    axes: &[(usize, usize, usize)],
    changes: &[&str],
) {
    let lab = &Lab::new();
    let one = train(lab, ONE_RANK, changes);
    let expected = one.finished.losses();
    assert_eq!(expected.len(), 5);
    for &axes in axes {
        let layout = layout(schedule, axes);
        let trained = train(lab, layout, &[changes, only].concat());
        assert_same_gradients(layout, &trained.gradients, &one.gradients);
        for (step, (loss, expected)) in trained.finished.losses().iter().zip(&expected).enumerate() {
            let difference = (loss - expected).abs();
            assert!(
                difference <= 1e-5 * expected,
                "{layout:?}, step {}: loss {loss}, not {expected}",
                step + 1
            );
        }
        let (got, expected) = (&trained.finished.records, &one.finished.records);
        for (got, expected) in got.iter().zip(expected) {
            assert_eq!(got.max_vio, expected.max_vio, "{layout:?}, step {}: expert loads", got.step);
            assert_eq!(got.tokens, expected.tokens);
            let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-5 * expected.abs();
            assert_eq!(got.mtp_loss.is_some(), expected.mtp_loss.is_some(), "{layout:?}: MTP loss");
            let mtp_losses = got.mtp_loss.zip(expected.mtp_loss);
            assert!(mtp_losses.is_none_or(|(got, expected)| close(got, expected)), "{layout:?}: MTP loss");
            assert!(close(got.balance_loss, expected.balance_loss), "{layout:?}: balance loss");
            assert!(close(got.grad_norm, expected.grad_norm), "{layout:?}: gradient norm");
        }
    }
}

#[test]
fn no_token_of_the_comparison_is_near_a_tie_between_experts() {
    for changes in [&[][..], &TIED] {
        let margins = margins_of_one_rank(&Lab::new(), changes);
        assert_eq!(margins.len(), 5);
        assert!(margins.iter().all(|&margin| margin > 1e-4), "another seed is needed: {margins:?}");
    }
}

#[test]
fn dualpipe_trains_what_one_rank_trains() {
    assert_same_training("dualpipe", &[(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)], &[]);
}

#[test]
fn dualpipev_trains_what_one_rank_trains() {
    assert_same_training("dualpipev", &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)], &[]);
}

#[test]
fn one_f_one_b_trains_what_one_rank_trains() {
    assert_same_training("1f1b", &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)], &[]);
}

#[test]
fn zb1p_trains_what_one_rank_trains() {
    assert_same_training("zb1p", &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)], &[]);
}

/// Two stages on each rank, and three.
#[test]
fn interleaved_trains_what_one_rank_trains() {
    assert_same_training("interleaved", &[(1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)], &[]);
    assert_same_training_with(&["parallel.virtual_stages=3"], "interleaved", &[(2, 2, 1)], &[]);
}

/// Tokens go to two nodes of two expert ranks each, and are passed on there; under two schedules, as the ranks of a pipeline overlap.
#[test]
fn two_hops_train_what_one_rank_trains() {
    let nodes = ["parallel.expert_ranks_per_node=2"];
    assert_same_training_with(&nodes, "1f1b", &[(1, 4, 1), (2, 4, 1)], &[]);
    assert_same_training_with(&nodes, "dualpipev", &[(2, 4, 1)], &[]);
}

/// One that no generator makes, as a table: all forward passes, then the backward passes, on each rank two stages that are no neighbours,
/// with the weight parts of the first one at the end.
#[test]
fn a_plan_of_ones_own_trains_what_one_rank_trains() {
    let actions = |stages: [usize; 2]| {
        let all = |letter: char, stage: usize| (0..8).map(move |batch| format!("{stage}{letter}{batch}"));
        let [first, second] = stages;
        let passes = all('F', first).chain(all('F', second)).chain(all('B', second)).chain(all('I', first));
        passes.chain(all('W', first)).collect::<Vec<_>>().join(",")
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.csv");
    std::fs::write(&path, format!("{}\n{}\n", actions([0, 2]), actions([1, 3]))).unwrap();
    let plan = format!("parallel.plan={:?}", path.to_str().unwrap());
    assert_same_training_with(&[&plan], "1f1b", &[(2, 2, 1)], &[]);
}

/// Under 1F1B embedding and head are on different ranks, under DualPipe on one and on its mirror, under DualPipeV on one. Without
/// multi-token prediction nothing but the head makes the last stage hold the table.
#[test]
fn a_tied_model_is_trained_alike_wherever_its_head_is() {
    let alone = [&TIED[..], &["model.num_nextn_predict_layers=0", "mtp.weight=0"]].concat();
    for changes in [&TIED[..], &alone] {
        assert_same_training("1f1b", &[(2, 1, 1), (4, 2, 1), (2, 2, 2)], changes);
        assert_same_training("dualpipe", &[(2, 1, 1), (4, 2, 1)], changes);
        assert_same_training("dualpipev", &[(2, 2, 1)], changes);
    }
}
