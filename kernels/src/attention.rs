//! Causal softmax attention over (span, head) pairs, in blocks: the core of MLA in its direct form.
//!
//! Called between the up-projections and the output projection. No block of scores is kept: the forward pass carries
//! a running maximum and sum per query, the backward pass makes the probabilities again from the log-sum-exp. A block
//! stands with its keys down and its queries across, so each query is one vector lane and the softmax needs no
//! horizontal step. It knows neither latents nor rotary positions (see `latent` and `rope`), nor why a span is one: a
//! sequence, a document, a continuation of a prefix.
//!
//! Shape letters: Tq query rows, Tk key rows, H heads.

mod online;

use std::ops::Range;

use online::{Lanes, QUERY_BLOCK, Running, differentiate};
use parking_lot::Mutex;

use crate::{
    gemm::gemm_serial,
    math, par,
    tensor::Tensor,
    view::{Mat, Output},
};

/// Keys per block. Two blocks of scores (backward) take 256 KiB, inside a second-level cache, and sequences up to
/// this length need no rescaling at all.
const KEY_BLOCK: usize = 512;

/// Queries that see one run of keys, and nothing of other spans.
///
/// Query `i` of the span sees the keys up to `key_len - query_len + i`, that one included: the last query sees them
/// all. In training both ranges are the same; a cached prefix makes the keys longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First query row.
    pub query_start: usize,
    /// Number of query rows.
    pub query_len: usize,
    /// First key row.
    pub key_start: usize,
    /// Number of key rows, at least `query_len`.
    pub key_len: usize,
}

/// The spans of one call. Each query row is in one of them at most, and so is each key row that gets a gradient.
#[derive(Clone, Debug, Default)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// These spans.
    pub fn new(spans: Vec<Span>) -> Spans {
        Spans(spans)
    }

    /// Runs of rows one after another, each its own queries and keys: sequences or documents in training.
    pub fn of_runs(lengths: impl IntoIterator<Item = usize>) -> Spans {
        let mut start = 0;
        let span = |length: usize| {
            let span = Span { query_start: start, query_len: length, key_start: start, key_len: length };
            start += length;
            span
        };
        Spans(lengths.into_iter().map(span).collect())
    }
}

/// The head sizes of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// H.
    pub num_heads: usize,
    /// Columns of a head's queries and keys.
    pub qk_dim: usize,
    /// Columns of a head's values.
    pub v_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f32,
}

/// Result of the forward pass; the backward pass needs both parts.
#[derive(Clone)]
pub struct Attended {
    /// Attention output.
    ///
    /// **Shapes**: `[Tq, H * v_dim]`.
    pub out: Tensor,
    /// Logarithm of each query's softmax denominator.
    ///
    /// **Shapes**: `[Tq, H]`.
    pub lse: Tensor,
}

/// Gradients of the three inputs, each in its input's shape.
pub struct Gradients {
    /// Gradient of the queries.
    pub dq: Tensor,
    /// Gradient of the keys.
    pub dk: Tensor,
    /// Gradient of the values.
    pub dv: Tensor,
}

/// Attends every query to the keys its span lets it see. Rows that no span names come out as zeros.
///
/// **Shapes**: `q` `[Tq, H * qk_dim]`, `k` `[Tk, H * qk_dim]`, `v` `[Tk, H * v_dim]`.
/// **Errors**: panics if spans reach out of the tensors or if their query ranges overlap.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, spans: &Spans, heads: &Heads) -> Attended {
    let format = q.format();
    let (q, k, v) = (&q.widened(), &k.widened(), &v.widened());
    let inputs = Inputs::new(q, k, v, heads);
    let output = Mutex::new(Attended {
        out: blank(q.rows(), heads.num_heads * heads.v_dim, spans, Span::queries),
        lse: blank(q.rows(), heads.num_heads, spans, Span::queries),
    });
    for_each_head(&inputs, spans, |head| {
        let mut scratch = ForwardScratch {
            probs: Tensor::for_overwrite(&[KEY_BLOCK, QUERY_BLOCK]),
            out: Tensor::for_overwrite(&[QUERY_BLOCK, heads.v_dim]),
        };
        for queries in blocks(head.span.query_len, QUERY_BLOCK) {
            let lse = head.forward(&queries, &mut scratch);
            let first_row = head.span.query_start + queries.start;
            let mut output = output.lock();
            store(&mut output.out, first_row, head.id, scratch.out.mat().rows_range(0..queries.len()));
            store(&mut output.lse, first_row, head.id, Mat::new(&lse, queries.len(), 1));
        }
    });
    let Attended { out, lse } = output.into_inner();
    Attended { out: out.to(format), lse }
}

/// Gradients from that of the output. Rows that no span names have gradient zero.
///
/// **Shapes**: `dout` `[Tq, H * v_dim]`, the others as in [`forward`].
/// **Errors**: panics as [`forward`] does, and if key ranges overlap.
pub fn backward(
    dout: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Attended,
    spans: &Spans,
    heads: &Heads,
) -> Gradients {
    let format = q.format();
    let (q, k, v) = (&q.widened(), &k.widened(), &v.widened());
    let (dout, out) = (dout.widened(), output.out.widened());
    let inputs = Inputs::new(q, k, v, heads);
    assert_eq!(dout.shape(), output.out.shape(), "expected the gradient of the output in the output's shape");
    let gradients = Mutex::new(Gradients {
        dq: blank(q.rows(), q.cols(), spans, Span::queries),
        dk: blank(k.rows(), k.cols(), spans, Span::keys),
        dv: blank(v.rows(), v.cols(), spans, Span::keys),
    });
    for_each_head(&inputs, spans, |head| {
        let Span { query_start, query_len, key_start, key_len } = head.span;
        let mut scratch = BackwardScratch {
            probs: Tensor::for_overwrite(&[KEY_BLOCK, QUERY_BLOCK]),
            d_scores: Tensor::for_overwrite(&[KEY_BLOCK, QUERY_BLOCK]),
            dq: Tensor::for_overwrite(&[QUERY_BLOCK, heads.qk_dim]),
            dk: Tensor::zeros(&[key_len, heads.qk_dim]),
            dv: Tensor::zeros(&[key_len, heads.v_dim]),
        };
        let saved = Saved {
            dout: head.of_queries(dout.mat()),
            out: head.of_queries(out.mat()),
            lse: head.of_queries(output.lse.mat()),
        };
        for queries in blocks(query_len, QUERY_BLOCK) {
            head.backward(&queries, &saved, &mut scratch);
            let dq = scratch.dq.mat().rows_range(0..queries.len());
            let mut gradients = gradients.lock();
            store(&mut gradients.dq, query_start + queries.start, head.id, dq);
        }
        let mut gradients = gradients.lock();
        store(&mut gradients.dk, key_start, head.id, scratch.dk.mat());
        store(&mut gradients.dv, key_start, head.id, scratch.dv.mat());
    });
    let Gradients { dq, dk, dv } = gradients.into_inner();
    Gradients { dq: dq.to(format), dk: dk.to(format), dv: dv.to(format) }
}

impl Span {
    fn queries(&self) -> Range<usize> {
        self.query_start..self.query_start + self.query_len
    }

    fn keys(&self) -> Range<usize> {
        self.key_start..self.key_start + self.key_len
    }
}

/// A result to be filled by the spans: each of its rows has at most one writer, else results would depend on the
/// order of tasks, and rows without one are zero.
fn blank(num_rows: usize, width: usize, spans: &Spans, rows: impl Fn(&Span) -> Range<usize>) -> Tensor {
    let mut ranges: Vec<Range<usize>> = spans.0.iter().map(rows).filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        let (first, second) = (&pair[0], &pair[1]);
        assert!(first.end <= second.start, "expected spans of separate rows, got {first:?} and {second:?}");
    }
    let num_written: usize = ranges.iter().map(Range::len).sum();
    let shape = [num_rows, width];
    if num_written == num_rows { Tensor::for_overwrite(&shape) } else { Tensor::zeros(&shape) }
}

struct Inputs<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    heads: &'a Heads,
}

impl<'a> Inputs<'a> {
    fn new(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor, heads: &'a Heads) -> Self {
        assert_eq!(q.cols(), heads.num_heads * heads.qk_dim, "expected queries of every head side by side");
        assert_eq!(k.cols(), heads.num_heads * heads.qk_dim, "expected keys of every head side by side");
        assert_eq!(v.cols(), heads.num_heads * heads.v_dim, "expected values of every head side by side");
        assert_eq!(k.rows(), v.rows(), "expected as many rows of values as of keys");
        Inputs { q: q.mat(), k: k.mat(), v: v.mat(), heads }
    }

    fn head(&self, span: Span, id: usize) -> Head<'a> {
        assert!(
            span.query_len <= span.key_len,
            "expected at least one key per query, got {} keys for {} queries",
            span.key_len,
            span.query_len
        );
        let qk_columns = id * self.heads.qk_dim..(id + 1) * self.heads.qk_dim;
        let v_columns = id * self.heads.v_dim..(id + 1) * self.heads.v_dim;
        Head {
            q: self.q.rows_range(span.queries()).columns(qk_columns.clone()),
            k: self.k.rows_range(span.keys()).columns(qk_columns),
            v: self.v.rows_range(span.keys()).columns(v_columns),
            span,
            id,
            heads: self.heads,
        }
    }
}

/// Works on every head of every span, on the pool if there is one.
///
/// A task computes the same wherever it runs and sums nothing with another, so the schedule changes no bit.
fn for_each_head(inputs: &Inputs, spans: &Spans, work: impl Fn(Head) + Send + Sync) {
    let heads_of = |&span| (0..inputs.heads.num_heads).map(move |id| inputs.head(span, id));
    par::for_each(spans.0.iter().flat_map(heads_of).collect(), work);
}

/// Copies rows of one head into that head's columns of a tensor of all heads.
///
/// Heads are worked on in compact scratch and come here finished, under a lock: microseconds beside the work itself.
fn store(target: &mut Tensor, first_row: usize, head_id: usize, rows: Mat) {
    let (stride, width) = (target.cols(), rows.num_cols());
    let first = first_row * stride + head_id * width;
    for (row, target) in target.f32_mut()[first..].chunks_mut(stride).take(rows.num_rows()).enumerate() {
        target[..width].copy_from_slice(rows.row(row));
    }
}

/// One head of one span: the unit of work.
struct Head<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    span: Span,
    id: usize,
    heads: &'a Heads,
}

struct ForwardScratch {
    /// Scores, then exponentials: keys down, queries across.
    probs: Tensor,
    /// Output of one block of queries.
    out: Tensor,
}

struct BackwardScratch {
    /// Scores, then probabilities: keys down, queries across.
    probs: Tensor,
    /// Gradient of the probabilities, then of the scores.
    d_scores: Tensor,
    /// Gradient of one block of queries.
    dq: Tensor,
    /// Gradients of all keys and values of the span.
    dk: Tensor,
    dv: Tensor,
}

/// What the backward pass of one head reads besides its inputs, each with one row per query of the span.
struct Saved<'a> {
    dout: Mat<'a>,
    out: Mat<'a>,
    lse: Mat<'a>,
}

impl Head<'_> {
    /// The span's rows and this head's columns of a tensor of all heads.
    fn of_queries<'m>(&self, matrix: Mat<'m>) -> Mat<'m> {
        let width = matrix.num_cols() / self.heads.num_heads;
        matrix.rows_range(self.span.queries()).columns(self.id * width..(self.id + 1) * width)
    }

    /// Blocks of the keys that at least one of the queries sees.
    fn key_blocks(&self, queries: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        blocks(self.span.key_len - self.span.query_len + queries.end, KEY_BLOCK)
    }

    /// Leaves the output of a block of queries in `scratch.out`, returns their log-sum-exp.
    fn forward(&self, queries: &Range<usize>, scratch: &mut ForwardScratch) -> Lanes {
        let mut running = Running::START;
        for keys in self.key_blocks(queries) {
            self.scores(&mut scratch.probs, queries, &keys);
            let decay = running.absorb(lanes(&mut scratch.probs, &keys));
            let mode = if keys.start == 0 { Output::Overwrite } else { Output::Accumulate };
            if mode == Output::Accumulate {
                scale_rows(&mut scratch.out, &decay);
            }
            let out = scratch.out.mat_mut().rows_range(0..queries.len());
            let probs = block(&scratch.probs, queries, &keys);
            gemm_serial(out, mode, 1.0, probs.t(), self.v.rows_range(keys));
        }
        scale_rows(&mut scratch.out, &running.sum.map(|sum| 1.0 / sum));
        std::array::from_fn(|lane| running.max[lane] + math::ln(running.sum[lane]))
    }

    /// Leaves the gradient of a block of queries in `scratch.dq`, adds those of its keys and values to the others.
    fn backward(&self, queries: &Range<usize>, saved: &Saved, scratch: &mut BackwardScratch) {
        let BackwardScratch { probs, d_scores, dq, dk, dv } = scratch;
        let q = self.q.rows_range(queries.clone());
        let dout = saved.dout.rows_range(queries.clone());
        let (mut lse, mut delta) = ([0.0; QUERY_BLOCK], [0.0; QUERY_BLOCK]);
        for (lane, query) in queries.clone().enumerate() {
            lse[lane] = saved.lse.row(query)[0];
            delta[lane] = math::dot(saved.dout.row(query), saved.out.row(query));
        }
        for keys in self.key_blocks(queries) {
            let (k, v) = (self.k.rows_range(keys.clone()), self.v.rows_range(keys.clone()));
            self.scores(probs, queries, &keys);
            let d_probs = d_scores.mat_mut().rows_range(0..keys.len()).columns(0..queries.len());
            gemm_serial(d_probs, Output::Overwrite, 1.0, v, dout.t());
            differentiate(lanes(probs, &keys), lanes(d_scores, &keys), &lse, &delta, self.heads.scale);

            let (probs, d_scores) = (block(probs, queries, &keys), block(d_scores, queries, &keys));
            let dq = dq.mat_mut().rows_range(0..queries.len());
            let mode = if keys.start == 0 { Output::Overwrite } else { Output::Accumulate };
            gemm_serial(dq, mode, 1.0, d_scores.t(), k);
            gemm_serial(dk.mat_mut().rows_range(keys.clone()), Output::Accumulate, 1.0, d_scores, q);
            gemm_serial(dv.mat_mut().rows_range(keys), Output::Accumulate, 1.0, probs, dout);
        }
    }

    /// Scaled scores of a block; minus infinity where a query does not see a key.
    fn scores(&self, scores: &mut Tensor, queries: &Range<usize>, keys: &Range<usize>) {
        let (q, k) = (self.q.rows_range(queries.clone()), self.k.rows_range(keys.clone()));
        let target = scores.mat_mut().rows_range(0..keys.len()).columns(0..queries.len());
        gemm_serial(target, Output::Overwrite, self.heads.scale, k, q.t());
        // All queries of the block see the keys up to this one; each later key hides itself from one more query.
        let last_common = self.span.key_len - self.span.query_len + queries.start;
        for (key, row) in keys.clone().zip(lanes(scores, keys)) {
            let num_hidden = key.saturating_sub(last_common).min(QUERY_BLOCK);
            row[..num_hidden].fill(f32::NEG_INFINITY);
        }
    }
}

fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}

/// The part of a scratch block that is in use.
fn block<'t>(scratch: &'t Tensor, queries: &Range<usize>, keys: &Range<usize>) -> Mat<'t> {
    scratch.mat().rows_range(0..keys.len()).columns(0..queries.len())
}

/// The rows of a scratch block that are in use, in full vectors: lanes beyond the last query hold anything.
fn lanes<'t>(scratch: &'t mut Tensor, keys: &Range<usize>) -> &'t mut [Lanes] {
    &mut scratch.f32_mut().as_chunks_mut().0[..keys.len()]
}

/// Scales row `i` by `factors[i]`.
fn scale_rows(rows: &mut Tensor, factors: &Lanes) {
    let width = rows.cols();
    for (row, factor) in rows.f32_mut().chunks_exact_mut(width).zip(factors) {
        for value in row {
            *value *= factor;
        }
    }
}

#[cfg(test)]
mod tests;
