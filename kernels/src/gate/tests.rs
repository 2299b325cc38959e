//! The gate against an f64 twin that sorts instead of selecting, and its gradients against finite differences.

use super::*;
use proptest::prelude::*;

/// Scores, chosen experts and weights of one token, by sorting, in f64.
fn twin(logits: &[f64], bias: &[f32], spec: &GateSpec) -> (Vec<f64>, Vec<usize>, Vec<f64>) {
    let scores = scores_twin(logits, spec);
    let biased: Vec<f64> = scores.iter().zip(bias).map(|(score, &bias)| score + f64::from(bias)).collect();
    let size = spec.num_experts / spec.num_groups;
    let descending = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        order
    };
    let best = if spec.group_score == GroupScore::Best { 1 } else { 2 };
    let group_score = |group: &[f64]| descending(group).iter().take(best).map(|&i| group[i]).sum::<f64>();
    let groups = descending(&biased.chunks(size).map(group_score).collect::<Vec<_>>());
    let kept = &groups[..spec.top_groups];
    let ids: Vec<usize> =
        descending(&biased).into_iter().filter(|id| kept.contains(&(id / size))).take(spec.top_k).collect();
    let weights = weights_twin(&scores, &ids, spec);
    (scores, ids, weights)
}

fn scores_twin(logits: &[f64], spec: &GateSpec) -> Vec<f64> {
    match spec.scoring {
        Scoring::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        Scoring::Softmax => {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            logits.iter().map(|logit| logit.exp() / sum).collect()
        }
    }
}

fn weights_twin(scores: &[f64], ids: &[usize], spec: &GateSpec) -> Vec<f64> {
    let sum: f64 = ids.iter().map(|&id| scores[id]).sum();
    let unit = f64::from(spec.scale) / if spec.normalise { sum } else { 1.0 };
    ids.iter().map(|&id| scores[id] * unit).collect()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_vec(&[values.len()], values.to_vec())
}

fn close(found: f32, expected: f64, relative: f64) -> bool {
    (f64::from(found) - expected).abs() <= relative * expected.abs() + 1e-30
}

fn spec(num_experts: usize, top_k: usize, num_groups: usize, top_groups: usize) -> GateSpec {
    GateSpec {
        scoring: Scoring::Sigmoid,
        group_score: GroupScore::TopTwo,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        normalise: true,
        scale: 2.5,
    }
}

fn specs() -> impl Strategy<Value = GateSpec> {
    (1_usize..5, 1_usize..5).prop_flat_map(|(num_groups, size)| {
        (1..=num_groups).prop_flat_map(move |top_groups| {
            let rules = prop::sample::select(vec![
                (Scoring::Sigmoid, GroupScore::TopTwo),
                (Scoring::Softmax, GroupScore::Best),
            ]);
            (1..=top_groups * size, any::<bool>(), rules).prop_map(move |(top_k, normalise, rules)| {
                GateSpec {
                    scoring: rules.0,
                    group_score: rules.1,
                    normalise,
                    ..spec(num_groups * size, top_k, num_groups, top_groups)
                }
            })
        })
    })
}

/// A spec, a bias (all of one sign in two cases of three) and logits of `num_tokens` tokens.
fn cases(num_tokens: usize) -> impl Strategy<Value = (GateSpec, Vec<f32>, Vec<f32>)> {
    (specs(), prop::sample::select(vec![-2.0_f32, 0.0, 2.0])).prop_flat_map(move |(spec, shift)| {
        // A gate with softmax has no bias.
        let spread = if spec.scoring == Scoring::Softmax { 0.0..=0.0 } else { shift - 0.5..=shift + 0.5 };
        let bias = prop::collection::vec(spread, spec.num_experts);
        let logits = prop::collection::vec(-6.0_f32..6.0, num_tokens * spec.num_experts);
        (Just(spec), bias, logits)
    })
}

proptest! {
    #[test]
    fn forward_agrees_with_sorting_in_f64((spec, bias, logits) in cases(5)) {
        let routing = forward(&Tensor::from_vec(&[5, spec.num_experts], logits.clone()), Some(&vector(&bias)), &spec);

        for (token, logits) in logits.chunks(spec.num_experts).enumerate() {
            let wide: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
            let (scores, ids, weights) = twin(&wide, &bias, &spec);
            for (&found, &expected) in routing.scores.row(token).iter().zip(&scores) {
                prop_assert!(close(found, expected, 1e-6), "score {found} {expected}");
            }
            for k in 0..spec.top_k {
                let at = token * spec.top_k + k;
                prop_assert_eq!(routing.expert_ids.u32()[at] as usize, ids[k]);
                let found = routing.weights.f32()[at];
                prop_assert!(close(found, weights[k], 1e-6), "{found} {}", weights[k]);
            }
        }
        let total: u32 = counts(&routing).u32().iter().sum();
        prop_assert_eq!(total as usize, 5 * spec.top_k);
    }

    #[test]
    fn logits_gradient_agrees_with_finite_differences((spec, bias, logits) in cases(2)) {
        let routing = forward(&Tensor::from_vec(&[2, spec.num_experts], logits.clone()), Some(&vector(&bias)), &spec);
        let d_weights: Vec<f32> = (0..2 * spec.top_k).map(|i| (i * 7 % 5) as f32 - 1.7).collect();

        let mut gradient = backward(&vector(&d_weights).reshape(&[2, spec.top_k]), &routing, &spec);
        logits_gradient(&mut gradient, &routing, spec.scoring);

        // The choice is held fixed: the loss is that of the weights alone, in f64.
        let loss = |token: usize, logits: &[f64]| -> f64 {
            let scores = scores_twin(logits, &spec);
            let range = token * spec.top_k..(token + 1) * spec.top_k;
            let ids: Vec<usize> = routing.expert_ids.u32()[range.clone()].iter().map(|&id| id as usize).collect();
            let weights = weights_twin(&scores, &ids, &spec);
            weights.iter().zip(&d_weights[range]).map(|(weight, &d)| weight * f64::from(d)).sum()
        };
        check_rows(&gradient, &logits, loss)?;
    }

    #[test]
    fn balance_gradient_agrees_with_finite_differences((spec, bias, logits) in cases(6)) {
        let routing = forward(&Tensor::from_vec(&[6, spec.num_experts], logits.clone()), Some(&vector(&bias)), &spec);
        let mut gradient = Tensor::from_vec(routing.scores.shape(), vec![0.25; logits.len()]);

        let value = balance_loss(&routing, 3, &spec, 0.5, Some(&mut gradient));

        prop_assert!((value - balance_loss(&routing, 3, &spec, 0.0, None)).abs() == 0.0);
        for entry in gradient.f32_mut() {
            *entry -= 0.25;
        }
        let wide: Vec<f64> = routing.scores.f32().iter().map(|&score| f64::from(score)).collect();
        prop_assert!(close(value as f32, balance_twin(&wide, routing.expert_ids.u32(), 3, &spec), 1e-6));
        for (at, &found) in gradient.f32().iter().enumerate() {
            let moved = |step: f64| {
                let mut scores = wide.clone();
                scores[at] += step;
                balance_twin(&scores, routing.expert_ids.u32(), 3, &spec)
            };
            // A step of 1e-4 of the score keeps the relative truncation error near 1e-8.
            let step = 1e-4 * wide[at];
            let expected = 0.5 * (moved(step) - moved(-step)) / (2.0 * step);
            // The gradient was added to 0.25, so it carries an absolute rounding of 0.25 eps on top of its own.
            let tolerance = 1e-5 * expected.abs() + 1e-6;
            prop_assert!((f64::from(found) - expected).abs() <= tolerance, "{at}: {found} {expected}");
        }
    }
}

/// Compares `gradient` with central differences of a loss that is a sum over tokens.
fn check_rows(
    gradient: &Tensor,
    point: &[f32],
    loss: impl Fn(usize, &[f64]) -> f64,
) -> Result<(), TestCaseError> {
    let width = gradient.cols();
    for (at, &found) in gradient.f32().iter().enumerate() {
        let token = at / width;
        let moved = |step: f64| {
            let mut row: Vec<f64> =
                point[token * width..][..width].iter().map(|&value| f64::from(value)).collect();
            row[at % width] += step;
            loss(token, &row)
        };
        let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        // f32 rounding of terms of size up to 2.5 * 2.3 that may cancel, about 10 operations deep.
        prop_assert!((f64::from(found) - expected).abs() <= 5e-6, "{at}: {found} {expected}");
    }
    Ok(())
}

/// The balance loss straight from its definition: f and P per sequence, then their product.
fn balance_twin(scores: &[f64], expert_ids: &[u32], sequence_len: usize, spec: &GateSpec) -> f64 {
    let (num_experts, len) = (spec.num_experts, sequence_len as f64);
    let sequences =
        scores.chunks(sequence_len * num_experts).zip(expert_ids.chunks(sequence_len * spec.top_k));
    let mut total = 0.0;
    for (scores, ids) in sequences {
        for expert in 0..num_experts {
            let taken = ids.iter().filter(|&&id| id as usize == expert).count() as f64;
            let f = taken * num_experts as f64 / (spec.top_k as f64 * len);
            let share = |token: &[f64]| token[expert] / token.iter().sum::<f64>();
            total += f * scores.chunks(num_experts).map(share).sum::<f64>() / len;
        }
    }
    total
}

#[test]
fn ties_fall_to_the_lower_group_and_expert() {
    let logits = Tensor::zeros(&[3, 12]);

    let routing = forward(&logits, Some(&vector(&[0.0; 12])), &spec(12, 4, 4, 2));

    assert_eq!(routing.expert_ids.u32(), [0, 1, 2, 3].repeat(3));
    assert_eq!(routing.weights.f32(), [0.625; 12]);
}

#[test]
fn dropped_groups_stay_dropped_when_every_biased_score_is_negative() {
    // Group 1 wins by its two good experts; its third is the worst of all and must still beat the other group's.
    let logits = Tensor::from_vec(&[1, 6], vec![0.0, 0.0, 0.0, 1.0, 1.0, -3.0]);

    let routing = forward(&logits, Some(&vector(&[-5.0; 6])), &spec(6, 3, 2, 1));

    assert_eq!(routing.expert_ids.u32(), [3, 4, 5]);
}

#[test]
fn groups_are_chosen_by_their_best_expert_or_by_their_two_best() {
    // Group 0 has the best expert, group 1 the best two.
    let logits = Tensor::from_vec(&[1, 4], vec![2.0, -3.0, 1.5, 1.0]);
    let by = |group_score| GateSpec { group_score, ..spec(4, 1, 2, 1) };

    assert_eq!(forward(&logits, None, &by(GroupScore::Best)).expert_ids.u32(), [0]);
    assert_eq!(forward(&logits, None, &by(GroupScore::TopTwo)).expert_ids.u32(), [2]);
}

#[test]
fn softmax_scores_are_shares_and_survive_large_logits() {
    let gate = GateSpec { scoring: Scoring::Softmax, normalise: false, scale: 1.0, ..spec(4, 2, 1, 1) };

    let routing = forward(&Tensor::from_vec(&[1, 4], vec![1000.0, 1000.0, -1000.0, 0.0]), None, &gate);

    assert_eq!(routing.scores.f32(), [0.5, 0.5, 0.0, 0.0]);
    assert_eq!(routing.weights.f32(), [0.5, 0.5]);
}

#[test]
fn bias_moves_the_choice_but_not_the_weights() {
    let logits = Tensor::from_vec(&[1, 4], vec![2.0, 1.0, 0.0, -1.0]);
    let gate = GateSpec { normalise: false, scale: 1.0, ..spec(4, 2, 1, 1) };

    let routing = forward(&logits, Some(&vector(&[0.0, -1.0, 0.0, 1.0])), &gate);

    assert_eq!(routing.expert_ids.u32(), [3, 0]);
    assert_eq!(routing.weights.f32(), [routing.scores.row(0)[3], routing.scores.row(0)[0]]);
}

#[test]
fn non_finite_logits_still_name_distinct_experts() {
    let logits =
        Tensor::from_vec(&[1, 6], vec![f32::NAN, 1.0, f32::NAN, f32::INFINITY, 0.0, f32::NEG_INFINITY]);
    for all in [logits, Tensor::from_vec(&[1, 6], vec![f32::NAN; 6])] {
        let mut ids = forward(&all, Some(&vector(&[0.0; 6])), &spec(6, 3, 3, 2)).expert_ids.u32().to_vec();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 3);
    }
}

#[test]
fn balance_loss_is_one_per_sequence_when_the_load_is_even() {
    let logits = Tensor::zeros(&[8, 4]);
    let mut routing = forward(&logits, Some(&vector(&[0.0; 4])), &spec(4, 1, 1, 1));
    assert_eq!(balance_loss(&routing, 4, &spec(4, 1, 1, 1), 0.0, None), 2.0);

    // Equal scores make P flat, so the loss does not see who was chosen; the counts do.
    assert_eq!(counts(&routing).u32(), [8, 0, 0, 0]);
    routing.expert_ids = Tensor::from_vec(&[8, 1], vec![0_u32, 1, 2, 3, 0, 1, 2, 3]);
    assert_eq!(counts(&routing).u32(), [2; 4]);
}

#[test]
#[should_panic(expected = "top_k: expected 1 to 4, the experts of 2 groups, got 5")]
fn more_choices_than_eligible_experts_are_refused() {
    forward(&Tensor::zeros(&[1, 8]), Some(&vector(&[0.0; 8])), &spec(8, 5, 4, 2));
}
