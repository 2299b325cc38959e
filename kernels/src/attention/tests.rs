//! Attention against an f64 twin that writes out every probability, over spans that cross block edges.

use super::*;
use crate::par::Threads;

/// Numbers in [-1, 1) from a multiplicative hash, different for each seed.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mix = |i: u64| {
        (i + 1 + seed * 7919)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29)
            .wrapping_mul(0xBF58_476D_1CE4_E5B9)
    };
    (0..len as u64).map(|i| (mix(i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    spans: Vec<Span>,
    heads: Heads,
}

impl Case {
    /// Spans of (queries, keys), laid out one behind the other with one unnamed row between them.
    fn new(lens: &[(usize, usize)], heads: Heads) -> Self {
        let (mut query_start, mut key_start, mut spans) = (0, 0, Vec::new());
        for &(query_len, key_len) in lens {
            spans.push(Span { query_start, query_len, key_start, key_len });
            query_start += query_len + 1;
            key_start += key_len + 1;
        }
        let tensor = |rows: usize, width: usize, seed: u64, size: f32| {
            let values =
                noise(rows * heads.num_heads * width, seed).iter().map(|value| value * size).collect();
            Tensor::from_vec(&[rows, heads.num_heads * width], values)
        };
        // Queries and keys of size 3 make scores of a spread that lets single keys dominate a softmax.
        Case {
            q: tensor(query_start, heads.qk_dim, 1, 3.0),
            k: tensor(key_start, heads.qk_dim, 2, 3.0),
            v: tensor(key_start, heads.v_dim, 3, 1.0),
            dout: tensor(query_start, heads.v_dim, 4, 1.0),
            spans,
            heads,
        }
    }

    fn run(&self) -> (Attended, Gradients) {
        let spans = Spans::new(self.spans.clone());
        let output = forward(&self.q, &self.k, &self.v, &spans, &self.heads);
        let inputs = (&self.q, &self.k, &self.v);
        let gradients = backward(&self.dout, inputs, &output, &spans, &self.heads);
        (output, gradients)
    }

    fn twin(&self) -> Twin {
        let wide = |tensor: &Tensor| tensor.f32().iter().map(|&value| f64::from(value)).collect::<Vec<f64>>();
        Twin { q: wide(&self.q), k: wide(&self.k), v: wide(&self.v), dout: wide(&self.dout) }
    }
}

struct Twin {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
}

struct TwinResult {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Twin {
    fn run(&self, spans: &[Span], heads: &Heads) -> TwinResult {
        let Heads { num_heads, qk_dim, v_dim, scale } = *heads;
        let scale = f64::from(scale);
        let mut result = TwinResult {
            out: vec![0.0; self.dout.len()],
            lse: vec![0.0; self.dout.len() / v_dim],
            dq: vec![0.0; self.q.len()],
            dk: vec![0.0; self.k.len()],
            dv: vec![0.0; self.v.len()],
        };
        for (span, head) in spans.iter().flat_map(|span| (0..num_heads).map(move |head| (span, head))) {
            for i in 0..span.query_len {
                let row = (span.query_start + i) * num_heads + head;
                let (q_at, o_at) = (row * qk_dim, row * v_dim);
                let key = |j: usize| (span.key_start + j) * num_heads + head;
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let q = &self.q[q_at..q_at + qk_dim];
                let k = |j: usize| &self.k[key(j) * qk_dim..][..qk_dim];
                let v = |j: usize| &self.v[key(j) * v_dim..][..v_dim];
                let dout = &self.dout[o_at..o_at + v_dim];
                let seen = span.key_len - span.query_len + i + 1;
                let scores: Vec<f64> = (0..seen).map(|j| scale * dot(q, k(j))).collect();
                let lse = scores.iter().map(|score| score.exp()).sum::<f64>().ln();
                let probs: Vec<f64> = scores.iter().map(|score| (score - lse).exp()).collect();
                let d_probs: Vec<f64> = (0..seen).map(|j| dot(dout, v(j))).collect();
                let mean = dot(&probs, &d_probs);
                result.lse[row] = lse;
                for j in 0..seen {
                    let d_score = probs[j] * (d_probs[j] - mean) * scale;
                    add_scaled(&mut result.out[o_at..][..v_dim], probs[j], v(j));
                    add_scaled(&mut result.dv[key(j) * v_dim..][..v_dim], probs[j], dout);
                    add_scaled(&mut result.dq[q_at..][..qk_dim], d_score, k(j));
                    add_scaled(&mut result.dk[key(j) * qk_dim..][..qk_dim], d_score, q);
                }
            }
        }
        result
    }

    /// The scalar whose gradient `dout` asks for.
    fn loss(&self, spans: &[Span], heads: &Heads) -> f64 {
        self.run(spans, heads).out.iter().zip(&self.dout).map(|(out, dout)| out * dout).sum()
    }
}

fn add_scaled(target: &mut [f64], factor: f64, source: &[f64]) {
    target.iter_mut().zip(source).for_each(|(target, source)| *target += factor * source);
}

fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    for (at, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= tolerance * most, "{what}[{at}]: {found} {expected}");
    }
}

fn check(lens: &[(usize, usize)], heads: Heads) {
    let case = Case::new(lens, heads);
    let (output, gradients) = case.run();
    let expected = case.twin().run(&case.spans, &case.heads);
    // Scores reach 3 * 3 * sqrt(qk_dim) / 3 with an f32 rounding of 6e-8 of that, and a probability takes the
    // score's absolute error as its relative one: a few 1e-6 of the largest entry.
    let what = format!("{lens:?}");
    assert_close(&format!("{what} out"), output.out.f32(), &expected.out, 2e-6);
    assert_close(&format!("{what} lse"), output.lse.f32(), &expected.lse, 1e-6);
    assert_close(&format!("{what} dq"), gradients.dq.f32(), &expected.dq, 4e-6);
    assert_close(&format!("{what} dk"), gradients.dk.f32(), &expected.dk, 4e-6);
    assert_close(&format!("{what} dv"), gradients.dv.f32(), &expected.dv, 4e-6);
}

fn heads(num_heads: usize, qk_dim: usize, v_dim: usize) -> Heads {
    Heads { num_heads, qk_dim, v_dim, scale: (qk_dim as f32).sqrt().recip() }
}

#[test]
fn every_length_around_the_block_edges_agrees_with_f64() {
    for len in [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130] {
        check(&[(len, len)], heads(2, 6, 5));
    }
}

#[test]
fn spans_see_only_their_own_keys() {
    check(&[(3, 3), (70, 70), (1, 1), (20, 20)], heads(3, 8, 4));
}

#[test]
fn runs_stand_one_behind_the_other() {
    let spans = Spans::of_runs([3, 3, 2]).0;
    let ranges: Vec<_> = spans.iter().map(|span| (span.queries(), span.keys())).collect();
    assert_eq!(ranges, [(0..3, 0..3), (3..6, 3..6), (6..8, 6..8)]);
}

#[test]
fn a_cached_prefix_is_seen_by_every_query() {
    check(&[(1, 40), (5, 70), (64, 65), (65, 200)], heads(2, 4, 7));
}

#[test]
fn more_keys_than_one_block_are_rescaled() {
    check(&[(3, KEY_BLOCK), (2, KEY_BLOCK + 1), (70, KEY_BLOCK + 34)], heads(1, 4, 3));
    check(&[(2 * KEY_BLOCK + 7, 2 * KEY_BLOCK + 7)], heads(1, 8, 4));
}

#[test]
fn the_twin_gradient_agrees_with_finite_differences() {
    let case = Case::new(&[(4, 4), (3, 6)], heads(2, 3, 2));
    let analytic = case.twin().run(&case.spans, &case.heads);
    check_field(&case, |twin| &mut twin.q, &analytic.dq);
    check_field(&case, |twin| &mut twin.k, &analytic.dk);
    check_field(&case, |twin| &mut twin.v, &analytic.dv);
}

fn check_field(case: &Case, field: fn(&mut Twin) -> &mut Vec<f64>, gradient: &[f64]) {
    for (at, expected) in gradient.iter().enumerate() {
        let moved = |step: f64| {
            let mut twin = case.twin();
            field(&mut twin)[at] += step;
            twin.loss(&case.spans, &case.heads)
        };
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!((difference - expected).abs() <= 1e-7, "{at}: {difference} {expected}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let rows =
        |scale: f32| Tensor::from_vec(&[3, 2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(|x| x * scale).to_vec());
    let spans = Spans::of_runs([3]);
    let one = Heads { num_heads: 1, qk_dim: 2, v_dim: 2, scale: 1.0 };

    let output = forward(&rows(1e3), &rows(1e3), &rows(1.0), &spans, &one);

    // Scores are millions apart: each query takes the value of the last key it sees, exactly.
    assert_eq!(output.out.f32(), rows(1.0).f32());
}

#[test]
fn threads_change_no_bit() {
    let case = Case::new(&[(130, 130), (70, 70), (1, 33)], heads(3, 8, 6));
    let (output, gradients) = case.run();
    for num_threads in [2, 3, 3] {
        let (pooled, pooled_gradients) = Threads::new(num_threads).run(|| case.run());
        assert_eq!(pooled.out.f32(), output.out.f32());
        assert_eq!(pooled.lse.f32(), output.lse.f32());
        assert_eq!(pooled_gradients.dq.f32(), gradients.dq.f32());
        assert_eq!(pooled_gradients.dk.f32(), gradients.dk.f32());
        assert_eq!(pooled_gradients.dv.f32(), gradients.dv.f32());
    }
}

#[test]
#[should_panic(expected = "expected spans of separate rows, got 0..2 and 1..3")]
fn overlapping_spans_are_refused() {
    let span = |start| Span { query_start: start, query_len: 2, key_start: start, key_len: 2 };
    let x = Tensor::zeros(&[3, 4]);
    forward(&x, &x, &x, &Spans::new(vec![span(1), span(0)]), &heads(1, 4, 4));
}
