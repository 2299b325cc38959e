//! What holds of a run in F32 holds in BF16 and in FP8: the same bits whatever the timing, the frames of the plan, the same losses
//! in every layout but for rounding, and the rest of a run as if it had not been interrupted.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow_runtime::fabric::{DelayInjection, LocalOptions};
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use contraflow_workers::hf::weights::HfWeights;

use crate::determinism::bits_of;
use crate::frames::run_and_hold_to_the_plan;
use crate::lab::{FOUR_RANKS, Lab, Layout, ONE_RANK, Setup, layout};
use crate::resume::{BEFORE, assert_rest_is_as_undisturbed, checkpoint, commits, run_with};

const RECIPES: [&str; 2] = ["precision.recipe=bf16", "precision.recipe=fp8"];

#[test]
fn the_same_run_gives_the_same_bits_in_every_precision() {
    let lab = Lab::new();
    for recipe in RECIPES {
        let run = |name: &str, delay_injection| {
            let setup = lab.setup(FOUR_RANKS, &["training.steps=3", recipe]);
            let network = LocalOptions { delay_injection, ..setup.network };
            bits_of(&lab, &format!("{name}-{recipe}"), Setup { network, ..setup })
        };
        let late = DelayInjection { seed: 1, max_delay: Duration::from_millis(2) };
        assert!(run("undisturbed", None) == run("disturbed", Some(late)), "{recipe}");
    }
}

#[test]
fn narrow_frames_are_those_of_the_plan() {
    let lab = Lab::new();
    for recipe in RECIPES {
        for layout in [FOUR_RANKS, layout("1f1b", (2, 4, 1))] {
            run_and_hold_to_the_plan(&lab, layout, &["training.steps=2", recipe]);
        }
    }
    let mixed = ["training.steps=2", "precision.linear=fp8", "precision.dispatch=bf16"];
    run_and_hold_to_the_plan(&lab, FOUR_RANKS, &mixed);
}

/// By step and name: of each rank that holds a weight, the bytes that it computes with and the masters that it keeps.
type Copies = BTreeMap<(u64, String), Vec<(Vec<u8>, Range<usize>)>>;

#[test]
fn every_copy_of_a_weight_has_the_same_bits_and_each_master_is_kept_once() {
    let lab = Lab::new();
    for recipe in RECIPES {
        let copies: Arc<Mutex<Copies>> = Arc::default();
        let seen = copies.clone();
        let probe = Probe::new(move |point| {
            let ProbePoint::Gradients { step, bucket, params, .. } = point else { return };
            for param in params.in_bucket(bucket).filter(|param| param.is_narrow()) {
                let bytes = param.compute().parts().flatten().copied().collect();
                let mut seen = seen.lock().unwrap();
                let of_weight = seen.entry((step, param.parts[0].name.clone())).or_default();
                of_weight.push((bytes, param.kept()));
            }
        });
        for layout in [FOUR_RANKS, layout("1f1b", (2, 2, 2))] {
            copies.lock().unwrap().clear();
            let setup = lab.setup(layout, &["training.steps=3", recipe]);
            lab.run(Setup { probe: probe.clone(), ..setup }).losses();
            let copies = copies.lock().unwrap();
            assert!(
                copies.len() > 3 * 60 && copies.values().any(|ranks| ranks.len() >= 4),
                "{}",
                copies.len()
            );
            for ((step, name), ranks) in &*copies {
                assert!(ranks.iter().all(|(bytes, _)| *bytes == ranks[0].0), "{recipe}, step {step}: {name}");
                let mut kept: Vec<_> = ranks.iter().map(|(_, kept)| (kept.start, kept.end)).collect();
                kept.sort();
                kept.retain(|(start, end)| start < end);
                assert!(kept.windows(2).all(|next| next[0].1 == next[1].0), "{name}: {kept:?}");
            }
        }
    }
}

#[test]
fn exported_weights_are_the_masters_of_all_ranks() {
    let lab = Lab::new();
    for (number, recipe) in RECIPES.into_iter().enumerate() {
        let (run, dir) =
            (lab.path().join(format!("run-{number}")), lab.path().join(format!("model-{number}")));
        std::fs::create_dir_all(&dir).unwrap();
        let setup = lab.setup(FOUR_RANKS, &["training.steps=2", recipe]);
        let checkpoints = Some(commits(&run, &setup.recipe));
        let config = setup.recipe.model_config.clone();
        lab.run(Setup { checkpoints, export_dir: Some(dir.clone()), ..setup }).losses();
        let (exported, saved) =
            (HfWeights::open(&dir).unwrap(), HfWeights::open(&checkpoint(&run, 2)).unwrap());
        let mut is_rounded = true;
        for weight in config.weights().iter().filter(|weight| weight.tied_to.is_none()) {
            let values = exported.read(&weight.name, &weight.shape).unwrap();
            assert!(values == saved.read(&weight.name, &weight.shape).unwrap(), "{recipe}: {}", weight.name);
            is_rounded &= values.iter().all(|value| value.to_bits() & 0xffff == 0);
        }
        assert!(!is_rounded, "masters have more digits than BF16");
    }
}

#[test]
fn the_rest_of_a_run_is_that_of_an_undisturbed_one_in_every_precision() {
    let lab = Lab::new();
    for (number, recipe) in RECIPES.into_iter().enumerate() {
        assert_rest_is_as_undisturbed(&lab, FOUR_RANKS, &format!("precision-{number}"), &[recipe]);
    }
}

/// Every precision, and how far the first loss may be from that of F32, as a share of it. In BF16 one rounding, 2^-8, in each of nine
/// layers, which add up as a random walk does; in FP8 what whole runs in it are held to below, as all later losses are.
const PRECISIONS: [(&str, f64); 3] =
    [("precision.recipe=f32", 0.0), ("precision.recipe=bf16", 3.0 / 256.0), ("precision.recipe=fp8", 0.05)];

/// The master weights are the same to the bit, so the first loss differs by what rounding does to one forward pass.
#[test]
fn a_checkpoint_of_any_precision_goes_on_in_any_other() {
    let lab = Lab::new();
    let steps = 2 * BEFORE;
    for (from, of_from) in PRECISIONS {
        let run = lab.path().join(format!("run-{from}"));
        run_with(&lab, (&run, FOUR_RANKS), None, BEFORE, &[from]);
        let on = |to: &str, name: &str| {
            let folder = lab.path().join(format!("{from}-{to}-{name}"));
            let at = checkpoint(&run, BEFORE);
            run_with(&lab, (&folder, FOUR_RANKS), Some(&at), steps, &[to]).losses()
        };
        let undisturbed = on(from, "undisturbed");
        for (to, of_to) in PRECISIONS.into_iter().filter(|(to, _)| *to != from) {
            let losses = on(to, "once");
            assert_eq!(losses, on(to, "twice"), "{from} {to}");
            let distances = losses.iter().zip(&undisturbed).map(|(got, right)| (got - right).abs() / right);
            let distances: Vec<f64> = distances.collect();
            println!("{from} on in {to}: {distances:?}");
            // It is another precision, and costs little.
            assert!(distances[0] > 1e-7 && distances[0] <= of_from.max(of_to), "{from} {to}: {distances:?}");
            assert!(distances.iter().all(|&distance| distance <= 0.05), "{from} {to}: {distances:?}");
        }
    }
}

/// Losses of five steps.
fn losses(lab: &Lab, layout: Layout, changes: &[&str]) -> Vec<f64> {
    lab.run(lab.setup(layout, changes)).losses()
}

fn largest_difference(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f64::max)
}

#[test]
fn every_layout_trains_what_one_rank_trains_but_for_rounding() {
    let lab = Lab::new();
    let exact = losses(&lab, ONE_RANK, &[]);
    for recipe in RECIPES {
        let one = losses(&lab, ONE_RANK, &[recipe]);
        let rounding = largest_difference(&one, &exact);
        println!("{recipe}: {rounding:e} from f32");
        // The formats are really in use, and cost little.
        assert!(rounding > 1e-5 && rounding < 0.05 * exact[0], "{recipe}: {one:?} beside {exact:?}");
        // Experts in one place round alike, whoever works on the layers and the sequences; only losses are added up in another order.
        let apart = losses(&lab, layout("1f1b", (4, 1, 2)), &[recipe]);
        assert!(largest_difference(&apart, &one) <= 1e-12 * one[0], "{recipe}: {apart:?} beside {one:?}");
        let two_hops = "parallel.expert_ranks_per_node=2";
        let one_hop = "parallel.expert_ranks_per_node=0";
        let layouts = [
            (FOUR_RANKS, one_hop),
            (layout("dualpipev", (1, 2, 1)), one_hop),
            (layout("1f1b", (1, 4, 1)), two_hops),
        ];
        for (layout, hops) in layouts {
            let found = losses(&lab, layout, &[recipe, hops]);
            let first = largest_difference(&found[..1], &one[..1]);
            println!("{recipe}, {layout:?}: {first:e} from one rank in the first step");
            // A row's sum comes from two ranks in parts that are rounded to 8 bits; over all tokens that is less than such a
            // rounding of the loss.
            assert!(first <= one[0] / 256.0, "{recipe}, {layout:?}: {found:?} beside {one:?}");
            assert!(
                largest_difference(&found, &one) <= rounding,
                "{recipe}, {layout:?}: {found:?} beside {one:?}"
            );
        }
    }
}

/// Studies of what FP8 needs: another arithmetic of the same recipe, so all that holds of a run holds of them.
const STUDIES: [&str; 2] = ["precision.accumulate=tensor-core", "precision.gradient_scales=block"];

#[test]
fn a_study_trains_alike_in_every_layout_and_goes_on_in_its_arithmetic() {
    let lab = Lab::new();
    let fp8 = "precision.recipe=fp8";
    let usual = losses(&lab, ONE_RANK, &[fp8]);
    for (number, study) in STUDIES.into_iter().enumerate() {
        let one = losses(&lab, ONE_RANK, &[fp8, study]);
        let effect = largest_difference(&one, &usual);
        println!("{study}: {effect:e} from fp8 as it is");
        assert!(effect > 1e-7 && effect < 0.05 * usual[0], "{study}: {one:?} beside {usual:?}");
        let apart = losses(&lab, layout("1f1b", (4, 1, 2)), &[fp8, study]);
        assert!(largest_difference(&apart, &one) <= 1e-12 * one[0], "{study}: {apart:?} beside {one:?}");
        assert_rest_is_as_undisturbed(&lab, FOUR_RANKS, &format!("study-{number}"), &[fp8, study]);
    }
}
