//! The watch against histories and findings made by hand.

use super::evidence::{BadTensor, Evidence, Found};
use super::*;

fn rules(on_nan: OnFault, on_spike: OnSpike) -> WatchSection {
    WatchSection { on_nan, on_spike, spike_factor: 6.0, spike_window: 5, max_skips: 2, collapse_steps: 0 }
}

fn seen(step: u64, loss: f64) -> Seen {
    Seen { step, loss, grad_norm: 1.0 }
}

/// Five updates with median 3.0 and a median absolute deviation of 0.5.
fn history(rules: &WatchSection) -> StabilityWatch {
    let mut watch = StabilityWatch::default();
    for (step, loss) in [4.0, 3.5, 3.0, 2.5, 2.9].into_iter().enumerate() {
        let seen = seen(step as u64 + 1, loss);
        assert_eq!(watch.judge(rules, &seen, None), Verdict { action: StepAction::Update, why: None });
        watch.note(rules, &seen, StepAction::Update);
    }
    watch
}

/// 3.0 + 6 x 0.5 / 0.67448975: the mad of a normal distribution is 0.67448975 of its standard deviation.
const BOUND: f64 = 7.447_807;

#[test]
fn a_spike_is_what_lies_above_the_median_by_the_factor() {
    let rules = rules(OnFault::Stop, OnSpike::Warn);
    let watch = history(&rules);
    assert_eq!(watch.judge(&rules, &seen(6, BOUND - 1e-5), None).why, None);
    let verdict = watch.judge(&rules, &seen(6, BOUND + 1e-5), None);
    assert_eq!(verdict.action, StepAction::Update);
    let words = "step 6: the loss has a spike: 7.4478, where the 5 updates before have a median of 3.0000 and allow 7.4478";
    assert_eq!(verdict.why.as_deref(), Some(words));
}

#[test]
fn the_gradient_norm_is_watched_too_and_a_constant_one_may_grow_a_little() {
    let rules = rules(OnFault::Stop, OnSpike::Stop);
    let watch = history(&rules);
    // All norms are 1: the spread counts as 0.01.
    let norm = |grad_norm| watch.judge(&rules, &Seen { grad_norm, ..seen(6, 3.0) }, None);
    assert_eq!(norm(1.059).action, StepAction::Update);
    assert_eq!(norm(1.061).action, StepAction::Stop);
    assert!(norm(1.061).why.unwrap().starts_with("step 6: the gradient norm has a spike: 1.0610"));
}

#[test]
fn the_policy_decides_the_action() {
    for (on_spike, action) in [
        (OnSpike::Off, StepAction::Update),
        (OnSpike::Warn, StepAction::Update),
        (OnSpike::Stop, StepAction::Stop),
        (OnSpike::Skip, StepAction::Skip),
        (OnSpike::Rollback, StepAction::RollBack),
    ] {
        let rules = rules(OnFault::Stop, on_spike);
        let verdict = history(&rules).judge(&rules, &seen(6, 100.0), None);
        assert_eq!((verdict.action, verdict.why.is_some()), (action, on_spike != OnSpike::Off));
    }
    for (on_nan, action) in [
        (OnFault::Stop, StepAction::Stop),
        (OnFault::Skip, StepAction::Skip),
        (OnFault::Rollback, StepAction::RollBack),
    ] {
        let rules = rules(on_nan, OnSpike::Off);
        let verdict = StabilityWatch::default().judge(&rules, &seen(1, f64::NAN), Some("step 1: NaN".into()));
        assert_eq!(
            verdict,
            Verdict { action, why: Some("step 1: NaN; no rank has updated its weights".into()) }
        );
    }
}

#[test]
fn no_spike_is_seen_before_the_window_is_full_and_the_window_moves() {
    let rules = rules(OnFault::Stop, OnSpike::Stop);
    let mut watch = StabilityWatch::default();
    for step in 1..=4 {
        watch.note(&rules, &seen(step, 1.0), StepAction::Update);
        assert_eq!(watch.judge(&rules, &seen(step, 1e9), None).why, None);
    }
    watch.note(&rules, &seen(5, 1.0), StepAction::Update);
    assert_eq!(watch.judge(&rules, &seen(6, 5.0), None).action, StepAction::Stop);
    // A new level is the norm once it holds most of the window.
    (6..=8).for_each(|step| watch.note(&rules, &seen(step, 5.0), StepAction::Update));
    assert_eq!(watch.judge(&rules, &seen(9, 5.0), None).why, None);
    assert_eq!(watch.losses, [1.0, 1.0, 5.0, 5.0, 5.0]);
}

#[test]
fn more_skips_in_a_row_than_allowed_stop_the_run() {
    let rules = rules(OnFault::Skip, OnSpike::Off);
    let mut watch = history(&rules);
    let before = watch.losses.clone();
    let judge = |watch: &StabilityWatch| watch.judge(&rules, &seen(6, f64::NAN), Some("fault".into()));
    for _ in 0..2 {
        assert_eq!(judge(&watch).action, StepAction::Skip);
        watch.note(&rules, &seen(6, f64::NAN), StepAction::Skip);
    }
    let verdict = judge(&watch);
    assert_eq!(verdict.action, StepAction::Stop);
    let words = "fault; 2 batches in a row were skipped (watch.max_skips); no rank has updated its weights";
    assert_eq!(verdict.why.as_deref(), Some(words));
    assert_eq!((watch.losses.clone(), watch.updates_at(8)), (before, 6));
    // An update in between restarts the count.
    watch.note(&rules, &seen(8, 3.0), StepAction::Update);
    assert_eq!(judge(&watch).action, StepAction::Skip);
}

#[test]
fn what_is_remembered_survives_a_checkpoint_to_the_bit() {
    let rules = rules(OnFault::Stop, OnSpike::Warn);
    let mut watch = history(&rules);
    watch.note(&rules, &seen(6, 0.1 + 0.2), StepAction::Update);
    watch.note(&rules, &seen(7, f64::INFINITY), StepAction::Skip);
    let text = serde_json::to_string(&watch).unwrap();
    assert_eq!(serde_json::from_str::<StabilityWatch>(&text).unwrap(), watch);
}

fn names() -> Vec<String> {
    let names =
        ["model.embed_tokens.weight", "model.layers.3.mlp.experts.5.up_proj.weight", "model.norm.weight"];
    names.map(str::to_owned).to_vec()
}

fn tensor(place: usize, num_values: u64) -> Option<BadTensor> {
    Some(BadTensor { place, num_values })
}

fn words(found: &[Found]) -> String {
    Evidence::new(12, (f64::NAN, f64::INFINITY), found, &names()).to_string()
}

#[test]
fn findings_survive_the_way_as_numbers() {
    let found = Found {
        weight: tensor(0, 3),
        micro_batch: Some(0),
        first_gradient: tensor(1, 1 << 40),
        last_gradient: tensor(2, 4),
        num_gradients: 7,
    };
    for found in [found, Found::default()] {
        assert_eq!(Found::from_numbers(found.to_numbers()), found);
    }
}

#[test]
fn the_first_in_the_published_list_is_named_whatever_its_rank() {
    let gradient =
        |place, num_values| Found { first_gradient: tensor(place, num_values), ..Found::default() };
    assert_eq!(
        words(&[Found::default(), gradient(2, 4), gradient(1, 17), gradient(1, 1)]),
        "step 12: gradient of model.layers.3.mlp.experts.5.up_proj.weight on rank 2 (layer 3) has 17 values that are not \
         finite"
    );
    let weight = Found { weight: tensor(2, 1), ..Found::default() };
    assert_eq!(
        words(&[gradient(0, 2), weight]),
        "step 12: weight model.norm.weight on rank 1 has 1 value that is not finite; gradient of \
         model.embed_tokens.weight on rank 0 has 2 values that are not finite"
    );
}

#[test]
fn a_loss_is_named_by_micro_batch_and_a_norm_that_overflows_by_itself() {
    let loss = |micro_batch| Found { micro_batch: Some(micro_batch), ..Found::default() };
    assert_eq!(words(&[loss(3), loss(1)]), "step 12: the loss of micro-batch 1 on rank 1 is not finite");
    assert_eq!(
        words(&[Found::default()]),
        "step 12: the gradient norm is inf and the loss NaN, though every tensor of every rank is finite"
    );
}
