//! What saves memory changes no bit, or is held to what it costs: values computed again, moments in BF16, stages by hand.

use std::sync::Arc;

use contraflow_workers::checkpoint::Checkpoint;

use crate::lab::{FOUR_RANKS, Lab, Layout, ONE_RANK, Setup, layout};
use crate::resume::{assert_rest_is_as_undisturbed, checkpoint, commits};

/// Loss, loss of multi-token prediction, balance loss and norm of each step, as bits.
fn bits(lab: &Lab, at: Layout, changes: &[&str]) -> Vec<[u64; 4]> {
    let finished = lab.run(lab.setup(at, &[&["training.steps=3"], changes].concat()));
    finished.losses();
    let of = |record: &contraflow_orchestrator::metrics::record::StepRecord| {
        [record.loss, record.mtp_loss.unwrap(), record.balance_loss, record.grad_norm].map(f64::to_bits)
    };
    finished.records.iter().map(of).collect()
}

#[test]
fn what_is_computed_again_has_the_bits_that_it_had() {
    let lab = Lab::new();
    // In FP8 the input of SwiGLU is kept in fewer bits than it was computed in: what follows from it follows from those.
    let precisions = ["recipe=f32", "recipe=bf16", "recipe=fp8"].map(|recipe| format!("precision.{recipe}"));
    let choices = [
        r#"["norms"]"#,
        r#"["mla-up-projections"]"#,
        r#"["swiglu"]"#,
        r#"["norms", "mla-up-projections", "swiglu"]"#,
    ];
    for precision in &precisions {
        for at in [ONE_RANK, FOUR_RANKS] {
            let kept = bits(&lab, at, &[precision, "memory.recompute=[]"]);
            for choice in choices {
                let again = bits(&lab, at, &[precision, &format!("memory.recompute={choice}")]);
                assert!(again == kept, "{precision}, {at:?}, {choice}");
            }
        }
    }
    let without_latent = ["model.q_lora_rank=null", "precision.recipe=fp8"];
    let kept = bits(&lab, ONE_RANK, &[&without_latent[..], &["memory.recompute=[]"]].concat());
    let all = format!("memory.recompute={}", choices[3]);
    assert!(bits(&lab, ONE_RANK, &[&without_latent[..], &[&all]].concat()) == kept);
}

#[test]
fn moments_rounded_at_random_belong_to_their_elements_and_survive_an_interruption() {
    let lab = Lab::new();
    let stochastic = ["precision.recipe=bf16", "precision.stochastic_rounding=true"];
    let one = bits(&lab, ONE_RANK, &stochastic);
    let norms = |bits: &[[u64; 4]]| bits.iter().map(|step| f64::from_bits(step[3])).collect::<Vec<_>>();
    // Only losses and squares are added up in another order.
    for (apart, one) in norms(&bits(&lab, layout("1f1b", (4, 1, 1)), &stochastic)).iter().zip(norms(&one)) {
        assert!((apart - one).abs() <= 1e-12 * one, "{apart} {one}");
    }
    assert!(bits(&lab, ONE_RANK, &stochastic[..1]) != one, "some moments are rounded the other way");
    assert_rest_is_as_undisturbed(&lab, FOUR_RANKS, "stochastic", &stochastic);
}

#[test]
fn a_run_goes_on_in_another_precision() {
    let lab = Lab::new();
    let run = |name: &str, from: Option<&str>, steps: u64, recipe: &str| {
        let dir = lab.path().join(name);
        let steps = format!("training.steps={steps}");
        let setup = lab.setup(FOUR_RANKS, &[&steps, "checkpoint.every=3", recipe]);
        let checkpoints = Some(commits(&dir, &setup.recipe));
        let from = from.map(|name| checkpoint(&lab.path().join(name), 3));
        let resume =
            from.map(|dir| Arc::new(Checkpoint::open(&dir).unwrap_or_else(|faults| panic!("{faults}"))));
        lab.run(Setup { checkpoints, resume, ..setup }).losses()
    };
    for (name, before) in [("f32", "precision.recipe=f32"), ("fp8", "precision.recipe=fp8")] {
        let whole = run(name, None, 6, before);
        for after in ["precision.recipe=f32", "precision.recipe=bf16", "precision.recipe=fp8"] {
            let rest = run(&format!("{name}-to-{after}"), Some(name), 6, after);
            for (rest, whole) in rest.iter().zip(&whole[3..]) {
                // As far as whole runs of two precisions are apart (`precision`): a twentieth of the first loss.
                assert!((rest - whole).abs() < 0.05 * whole, "{before}, then {after}: {rest} for {whole}");
            }
        }
    }
}

#[test]
fn stages_by_hand_train_what_balanced_ones_do() {
    let lab = Lab::new();
    let at = layout("dualpipe", (2, 1, 1));
    let balanced = bits(&lab, at, &[]);
    for stages in ["parallel.stages=[3, 5]", "parallel.stages=[7, 1]"] {
        for (by_hand, balanced) in bits(&lab, at, &[stages]).iter().zip(&balanced) {
            let [by_hand, balanced] = [by_hand, balanced].map(|step| step.map(f64::from_bits));
            // Shards are cut elsewhere, and the squares of each are added up in f32: what the norm is wrong by scales the update.
            for (by_hand, balanced) in by_hand.iter().zip(balanced) {
                assert!((by_hand - balanced).abs() <= 1e-6 * balanced, "{stages}: {by_hand} {balanced}");
            }
        }
    }
}
