//! Twenty updates: the losses, the experts' loads and the weights of a whole trace through the rank's optimizer.

use contraflow_runtime::recipe::{Decay, OnFault, OnSpike, OptimizerSection, WatchSection};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::optimizer::totals::TotalsLayout;
use contraflow_workers::optimizer::update::{Moments, OptimizerSetup, OptimizerState, UpdateRates};
use contraflow_workers::rank::build::published_names;

use crate::findings::{Findings, LOSS, Mark};
use crate::fixture::{Fixture, Truth};
use crate::one_rank::{Batch, OneRank, PLAIN};

/// How far a gate bias moves in an update of the trace.
const BIAS_SPEED: f64 = 1e-3;
/// The global norm to which gradients are clipped in the trace.
const CLIP_NORM: f64 = 1.0;
/// Adam divides tiny gradients by themselves: rounding in them becomes a sizeable part of an update. What f32 does to
/// the truth's own weights was seen to reach 1e-4.
const FINAL: Mark = Mark::Absolute(3e-4);
/// A gradient may differ by 1e-5 of its maximum in the first update; ten times that leaves room for what weights that
/// have drifted apart add until the last one.
const NORM: Mark = Mark::Relative(1e-4);

pub fn check(fixture: &Fixture, findings: &mut Findings) {
    let Some(batches) = fixture.optim.get("batches") else { return };
    for (variant, decay) in [("decay_all", Decay::All), ("decay_2d", Decay::Matrices)] {
        if fixture.optim.contains_key(&format!("{variant}.lr")) {
            trace(fixture, findings, batches, (variant, decay));
        }
    }
    let known = |key: &str| key == "batches" || key.starts_with("decay_all.") || key.starts_with("decay_2d.");
    fixture.optim.keys().filter(|key| !known(key)).for_each(|key| findings.unknown(key));
}

fn setup(rank: &OneRank, decay: Decay) -> OptimizerSetup {
    let recipe = OptimizerSection {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        decay,
        clip_norm: CLIP_NORM,
    };
    OptimizerSetup {
        recipe,
        watch: WatchSection {
            on_nan: OnFault::Stop,
            on_spike: OnSpike::Off,
            spike_factor: 10.0,
            spike_window: 32,
            max_skips: 3,
            collapse_steps: 50,
        },
        names: published_names(&rank.arch.config),
        rank: 0,
        layout: TotalsLayout::of(&rank.arch.config),
        moments: Moments::F32,
    }
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn trace(fixture: &Fixture, findings: &mut Findings, batches: &Truth, (variant, decay): (&str, Decay)) {
    let mut rank = OneRank::load(fixture.main_config(), &fixture.dir, PLAIN.schedule);
    let mut optimizer = Some(OptimizerState::new(setup(&rank, decay), &mut rank.params));
    let prefix = format!("{variant}.");
    let values: Vec<(&str, &Truth)> =
        fixture.optim.iter().filter_map(|(key, truth)| Some((key.strip_prefix(&prefix)?, truth))).collect();
    let rates = &fixture.optim[&format!("{variant}.lr")].values;
    let rows = batches.sequences();
    let (mut losses, mut norms, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    let mut last_gradients = Vec::new();
    for (index, (rows, &learning_rate)) in rows.chunks(rows.len() / rates.len()).zip(rates).enumerate() {
        let step = index as u64 + 1;
        let totals = rank.run(TaskKind::Train, step, &Batch::new(rows, PLAIN, 0.0), |_, _| {});
        if index + 1 == rates.len() {
            let names = values.iter().filter_map(|(key, _)| key.strip_prefix("last_clipped_grad_norm."));
            last_gradients =
                names.map(|name| (name, rank.gradient(name).map(|gradient| norm(&gradient)))).collect();
        }
        let rates = UpdateRates { step, learning_rate, bias_speed: BIAS_SPEED };
        let global = rank.update(&mut optimizer, rates, totals);
        losses.push(global.loss as f32);
        norms.push(global.grad_norm as f32);
        counts.extend(global.expert_counts.values().flatten().map(|&count| count as f32));
    }
    let last_norm = norms.last().copied().map_or(1.0, f64::from);
    let clip = (CLIP_NORM / (last_norm + 1e-6)).min(1.0);
    for (name, truth) in values {
        let (key, values) = (format!("{prefix}{name}"), &truth.values);
        let mut tensor = |kind: &str, found: Option<Vec<f32>>, mark: Mark| match found {
            Some(found) => findings.compare(kind, &key, values, &found, mark),
            None => findings.check(false, || format!("{key}: the model has no such tensor")),
        };
        if let Some(weight) = name.strip_prefix("final.") {
            tensor("final weights", rank.weight(weight), FINAL);
        } else if let Some(weight) = name.strip_prefix("final_norm.") {
            tensor(
                "norms of final weights",
                rank.weight(weight).map(|weight| vec![norm(&weight) as f32]),
                FINAL,
            );
        } else if let Some(weight) = name.strip_prefix("last_clipped_grad_norm.") {
            let found = last_gradients.iter().find(|(name, _)| *name == weight).and_then(|(_, norm)| *norm);
            tensor("norms of last gradients", found.map(|norm| vec![(norm * clip) as f32]), NORM);
        } else {
            match name {
                "lr" => {}
                "loss" | "loss_f64" => findings.compare("losses", &key, values, &losses, LOSS),
                "grad_norm_before_clip" => findings.compare("gradient norms", &key, values, &norms, NORM),
                "expert_counts" => {
                    findings.compare("expert counts", &key, values, &counts, Mark::Absolute(0.0))
                }
                _ => findings.unknown(&key),
            }
        }
    }
}
