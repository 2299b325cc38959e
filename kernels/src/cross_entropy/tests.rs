//! Loss and gradients against an f64 twin of the whole logits, over block edges and rows that do not count.

use super::*;
use crate::{par::Threads, tensor::Element, tests::noise};

fn vector<T: Element>(values: Vec<T>) -> Tensor {
    Tensor::from_vec(&[values.len()], values)
}

struct Case {
    h: Tensor,
    head: Tensor,
    ids: Tensor,
    weights: Tensor,
}

impl Case {
    fn new(num_rows: usize, width: usize, vocabulary: usize) -> Self {
        let large = |values: Vec<f32>| values.into_iter().map(|value| 3.0 * value).collect();
        Case {
            h: Tensor::from_vec(&[num_rows, width], large(noise(num_rows * width, 1))),
            head: Tensor::from_vec(&[vocabulary, width], noise(vocabulary * width, 2)),
            ids: vector((0..num_rows).map(|row| (row * 37 % vocabulary) as u32).collect()),
            weights: vector(
                (0..num_rows)
                    .map(|row| if row % 3 == 1 { 0.0 } else { 0.01 * (1 + row % 4) as f32 })
                    .collect(),
            ),
        }
    }

    fn targets(&self) -> Targets<'_> {
        Targets { ids: &self.ids, weights: &self.weights }
    }

    fn run(&self) -> (Loss, Tensor, Tensor) {
        let mut d_head = Tensor::zeros(self.head.shape());
        let (loss, dh) = forward_backward(&self.h, &self.head, &self.targets(), &mut d_head);
        (loss, dh, d_head)
    }

    /// (log-probabilities, dh, d_head) in f64.
    fn twin(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let (width, vocabulary) = (self.h.cols(), self.head.rows());
        let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
        let head = wide(self.head.f32());
        let (mut log_probs, mut dh, mut d_head) = (Vec::new(), Vec::new(), vec![0.0; head.len()]);
        for row in 0..self.h.rows() {
            let h = wide(self.h.row(row));
            let logit = |id: usize| (0..width).map(|c| h[c] * head[id * width + c]).sum::<f64>();
            let logits: Vec<f64> = (0..vocabulary).map(logit).collect();
            let lse = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            let target = self.ids.u32()[row] as usize;
            log_probs.push(logits[target] - lse);
            let mut dh_row = vec![0.0; width];
            for id in 0..vocabulary {
                let onehot = f64::from(u8::from(id == target));
                let d_logit = f64::from(self.weights.f32()[row]) * ((logits[id] - lse).exp() - onehot);
                for c in 0..width {
                    dh_row[c] += d_logit * head[id * width + c];
                    d_head[id * width + c] += d_logit * h[c];
                }
            }
            dh.extend(dh_row);
        }
        (log_probs, dh, d_head)
    }
}

fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    for (at, (&found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(found) - expected).abs() <= tolerance * most, "{what}[{at}]: {found} {expected}");
    }
}

#[test]
fn loss_and_gradients_agree_with_f64_over_block_edges() {
    for (num_rows, vocabulary) in
        [(1, 5), (MAX_ROWS - 1, 33), (MAX_ROWS, 16), (MAX_ROWS + 1, 40), (2 * MAX_ROWS + 7, 7)]
    {
        let case = Case::new(num_rows, 6, vocabulary);
        let (loss, dh, d_head) = case.run();
        let (log_probs, dh_twin, d_head_twin) = case.twin();

        let weighted = case
            .weights
            .f32()
            .iter()
            .zip(&log_probs)
            .map(|(&weight, log_prob)| -f64::from(weight) * log_prob);
        let sum: f64 = weighted.sum();
        assert!((loss.sum - sum).abs() <= 1e-6 * sum, "{num_rows} rows: {} {sum}", loss.sum);
        assert_close("log_probs", loss.log_probs.f32(), &log_probs, 1e-6);
        assert_close("dh", dh.f32(), &dh_twin, 2e-6);
        assert_close("d_head", d_head.f32(), &d_head_twin, 2e-6);
        let alone = forward(&case.h, &case.head, &case.targets());
        assert_eq!((alone.sum, alone.log_probs.f32()), (loss.sum, loss.log_probs.f32()));
    }
}

#[test]
fn the_twin_gradient_agrees_with_finite_differences() {
    let case = Case::new(5, 3, 7);
    let (_, dh, _) = case.twin();
    // Steps of 2^-8 are exact in f32 for these inputs; the third derivative leaves about 1e-6 of truncation.
    for (at, expected) in dh.iter().enumerate() {
        let loss = |step: f32| {
            let mut moved = Case {
                h: case.h.clone(),
                head: case.head.clone(),
                ids: case.ids.clone(),
                weights: case.weights.clone(),
            };
            moved.h.f32_mut()[at] += step;
            let log_probs = moved.twin().0;
            moved
                .weights
                .f32()
                .iter()
                .zip(log_probs)
                .map(|(&weight, log_prob)| -f64::from(weight) * log_prob)
                .sum::<f64>()
        };
        let step = 1.0 / 256.0;
        let difference = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
        assert!((difference - expected).abs() <= 5e-6, "{at}: {difference} {expected}");
    }
}

#[test]
fn rows_of_weight_zero_have_a_log_probability_but_no_gradient() {
    let mut case = Case::new(MAX_ROWS + 40, 4, 9);
    // A whole block, and a row in the next one whose logits overflow.
    case.weights.f32_mut()[..MAX_ROWS + 1].fill(0.0);
    case.h.f32_mut()[MAX_ROWS * 4..][..4].fill(f32::MAX);
    case.head.f32_mut()[..8].fill(2.0);

    let (loss, dh, d_head) = case.run();

    assert!(loss.sum.is_finite());
    assert!(loss.log_probs.f32()[MAX_ROWS].is_nan());
    assert!(loss.log_probs.f32()[..MAX_ROWS].iter().all(|log_prob| *log_prob < 0.0));
    assert!(dh.f32()[..(MAX_ROWS + 1) * 4].iter().all(|gradient| *gradient == 0.0));
    assert!(dh.f32()[(MAX_ROWS + 2) * 4..].iter().any(|gradient| *gradient != 0.0));
    assert!(dh.f32().iter().chain(d_head.f32()).all(|gradient| gradient.is_finite()));
}

#[test]
fn the_gradient_of_the_head_is_added() {
    let case = Case::new(3, 4, 6);
    let (_, _, fresh) = case.run();
    let mut d_head = Tensor::from_vec(&[6, 4], vec![1.0; 24]);

    forward_backward(&case.h, &case.head, &case.targets(), &mut d_head);

    for (found, fresh) in d_head.f32().iter().zip(fresh.f32()) {
        assert!((found - (1.0 + fresh)).abs() <= 2e-7, "{found} {fresh}");
    }
}

#[test]
fn equal_logits_give_the_logarithm_of_the_vocabulary() {
    let head = Tensor::zeros(&[64, 2]);
    let (ids, weights) = (vector(vec![63_u32, 0]), vector(vec![0.5, 0.5]));
    let targets = Targets { ids: &ids, weights: &weights };

    let loss = forward(&Tensor::from_vec(&[2, 2], vec![1.0; 4]), &head, &targets);

    assert!((loss.sum - 64_f64.ln()).abs() <= 1e-6);
}

#[test]
fn the_same_threads_give_the_same_bits() {
    let case = Case::new(300, 16, 200);
    let bits = |(loss, dh, d_head): (Loss, Tensor, Tensor)| {
        (loss.sum, [loss.log_probs, dh, d_head].map(|tensor| tensor.f32().to_vec()))
    };
    let serial = bits(case.run());
    for num_threads in [2, 3] {
        let pool = Threads::new(num_threads);
        let first = bits(pool.run(|| case.run()));
        assert!(first == bits(pool.run(|| case.run())), "{num_threads} threads");
        assert!((first.0 - serial.0).abs() <= 1e-6 * serial.0, "{num_threads} threads");
    }
}

#[test]
#[should_panic(expected = "expected a target id below 4, got 4")]
fn a_target_beyond_the_vocabulary_is_refused() {
    let (ids, weights) = (vector(vec![4_u32]), vector(vec![1.0]));
    let targets = Targets { ids: &ids, weights: &weights };
    forward(&Tensor::zeros(&[1, 2]), &Tensor::zeros(&[4, 2]), &targets);
}
