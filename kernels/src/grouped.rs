//! One linear layer per expert over rows sorted by expert, and both gradients: the routed experts' GEMMs.
//!
//! Rows of expert `e` are `offsets[e]..offsets[e + 1]`; an expert may have none. It knows neither tokens nor routing
//! weights. Within a pool the tasks are blocks of rows, or of an expert's outputs for the weights' gradient, so that
//! one busy expert does not hold up the others.
//!
//! Shape letters: R routed rows, E experts; `in` and `out` are each expert's widths.

use std::ops::Range;

use crate::{
    gemm::{
        gemm_serial,
        narrow::{Factor, product},
    },
    linear, par,
    tensor::{Format, Tensor},
    view::{Mat, MatMut, Output},
};

/// Minimum number of rows of a task. Each task packs its expert's weights again, which pays off from this many rows.
const MIN_BLOCK: usize = 128;
/// Tasks per thread, if the rows suffice: enough that a thread which finishes early finds another one.
const BLOCKS_PER_THREAD: usize = 8;

/// `x w_e^T` for the rows of each expert `e`, in BF16 unless the weights are F32.
///
/// **Shapes**: `x` `[R, in]`, `offsets` `[E + 1]` in U32, `w` `[E, out, in]`, result `[R, out]`.
/// **Errors**: panics if the offsets do not cut R rows into E parts.
pub fn forward(x: &Tensor, offsets: &Tensor, w: &Tensor) -> Tensor {
    let ([_, out, _], offsets) = checked(w, offsets, x.rows());
    let mut y = Tensor::for_overwrite(&[x.rows(), out]);
    let x = linear::input(x, w);
    if w.format() != Format::F32 {
        for_each_expert(y.f32_mut(), &offsets, |expert_id, rows, y| {
            let outs = expert_id * out..(expert_id + 1) * out;
            product(y, Output::Overwrite, &Factor::rows(&x, rows), &Factor::rows(w, outs));
        });
        return y.to(linear::of_products(w));
    }
    for_each_block(y.f32_mut(), &offsets, |expert_id, rows, y| {
        gemm_serial(y, Output::Overwrite, 1.0, x.mat().rows_range(rows), expert(w, expert_id).t());
    });
    y
}

/// The gradient of `x`: `dy w_e` for the rows of each expert `e`, in BF16 unless the weights are F32.
///
/// **Shapes**: `dy` `[R, out]`, `offsets` `[E + 1]` in U32, `w` `[E, out, in]`, result `[R, in]`.
/// **Errors**: panics if the offsets do not cut R rows into E parts.
pub fn backward_input(dy: &Tensor, offsets: &Tensor, w: &Tensor) -> Tensor {
    let ([_, out, input], offsets) = checked(w, offsets, dy.rows());
    let mut dx = Tensor::for_overwrite(&[dy.rows(), input]);
    if w.format() != Format::F32 {
        let has_blocks = w.format().study().gradient_blocks;
        // Rows with scales of their own are no part of a tensor by themselves.
        let whole = if has_blocks { dy.widened() } else { linear::input(dy, w) };
        for_each_expert(dx.f32_mut(), &offsets, |expert_id, rows, dx| {
            let outs = expert_id * out..(expert_id + 1) * out;
            if has_blocks {
                // Blocks begin with an expert's rows, as they do in the product for its weights.
                let dy = linear::gradient(&whole.slice_rows(rows.clone()), w);
                product(dx, Output::Overwrite, &Factor::rows(&dy, 0..rows.len()), &Factor::columns(w, outs));
            } else {
                product(dx, Output::Overwrite, &Factor::rows(&whole, rows), &Factor::columns(w, outs));
            }
        });
        return dx.to(linear::of_products(w));
    }
    let dy = linear::input(dy, w);
    for_each_block(dx.f32_mut(), &offsets, |expert_id, rows, dx| {
        gemm_serial(dx, Output::Overwrite, 1.0, dy.mat().rows_range(rows), expert(w, expert_id));
    });
    dx
}

/// Adds the gradient of each `w_e` to `dw`: `dy^T x` over the rows of expert `e`, tiled anew as [`linear::backward_weight`] does.
///
/// **Shapes**: `dy` `[R, out]`, `x` `[R, in]`, `offsets` `[E + 1]` in U32, `dw` `[E, out, in]`.
/// **Errors**: panics if the offsets do not cut R rows into E parts.
pub fn backward_weight(dy: &Tensor, x: &Tensor, offsets: &Tensor, dw: &mut Tensor) {
    let ([num_experts, out, _], offsets) = checked(dw, offsets, x.rows());
    assert_eq!(dy.shape(), [x.rows(), out], "expected one output gradient per row and output");
    if x.format() != Format::F32 {
        let shape = [out, x.cols()];
        let experts = dw.f32_mut().chunks_exact_mut(out * x.cols()).zip(offsets.windows(2)).collect();
        return par::for_each(experts, |(dw, rows): (&mut [f32], &[usize])| {
            linear::add_weight_product(MatMut::new(dw, shape[0], shape[1]), dy, x, rows[0]..rows[1]);
        });
    }
    // Stacked, the weights have out rows per expert whatever its load: cut them as if those were the routed rows.
    let out_offsets: Vec<usize> = (0..=num_experts).map(|expert_id| expert_id * out).collect();
    for_each_block(dw.f32_mut(), &out_offsets, |expert_id, outs, dw| {
        let rows = offsets[expert_id]..offsets[expert_id + 1];
        if rows.is_empty() {
            return;
        }
        let first = expert_id * out;
        let dy = dy.mat().rows_range(rows.clone()).columns(outs.start - first..outs.end - first);
        gemm_serial(dw, Output::Accumulate, 1.0, dy.t(), x.mat().rows_range(rows));
    });
}

/// The three dims of the weights and the offsets, once they are known to fit.
fn checked(w: &Tensor, offsets: &Tensor, num_rows: usize) -> ([usize; 3], Vec<usize>) {
    let &[num_experts, out, input] = w.shape() else {
        panic!("expected weights [E, out, in], got {:?}", w.shape());
    };
    let offsets: Vec<usize> = offsets.u32().iter().map(|&offset| offset as usize).collect();
    assert_eq!(offsets.len(), num_experts + 1, "expected one offset per expert and one more");
    assert!(
        offsets[0] == 0 && offsets[num_experts] == num_rows && offsets.is_sorted(),
        "expected ascending offsets from 0 to {num_rows}, got {offsets:?}"
    );
    ([num_experts, out, input], offsets)
}

/// The weights of one expert.
fn expert(w: &Tensor, expert_id: usize) -> Mat<'_> {
    let out = w.shape()[1];
    w.mat().rows_range(expert_id * out..(expert_id + 1) * out)
}

/// Cuts the rows of `data` by expert and works on each part given its rows.
fn for_each_expert(
    data: &mut [f32],
    offsets: &[usize],
    work: impl Fn(usize, Range<usize>, MatMut) + Send + Sync,
) {
    let rows: Vec<Range<usize>> = offsets.windows(2).map(|bounds| bounds[0]..bounds[1]).collect();
    let width = data.len() / offsets[offsets.len() - 1].max(1);
    let parts = par::split(data, width, &rows).into_iter().zip(rows).enumerate();
    let tasks = parts.filter(|(_, (_, rows))| !rows.is_empty()).collect();
    par::for_each(tasks, |(expert_id, (part, rows)): (usize, (&mut [f32], Range<usize>))| {
        let num_rows = rows.len();
        work(expert_id, rows, MatMut::new(part, num_rows, width));
    });
}

/// Cuts the rows of `data` by expert, within a pool into blocks too, and works on each part given its rows.
fn for_each_block(
    data: &mut [f32],
    offsets: &[usize],
    work: impl Fn(usize, Range<usize>, MatMut) + Send + Sync,
) {
    let num_rows = offsets[offsets.len() - 1];
    if num_rows == 0 {
        return;
    }
    let width = data.len() / num_rows;
    let step = match par::num_threads() {
        1 => num_rows,
        num_threads => MIN_BLOCK.max(num_rows.div_ceil(num_threads * BLOCKS_PER_THREAD)),
    };
    let (mut expert_ids, mut blocks) = (Vec::new(), Vec::new());
    for (expert_id, bounds) in offsets.windows(2).enumerate() {
        // Equal blocks: a rest of a few rows would pack the weights for next to nothing.
        let (start, len) = (bounds[0], bounds[1] - bounds[0]);
        let num_blocks = if len == 0 { 0 } else { ((len + step / 2) / step).max(1) };
        for block in 0..num_blocks {
            expert_ids.push(expert_id);
            blocks.push(start + block * len / num_blocks..start + (block + 1) * len / num_blocks);
        }
    }
    let parts = par::split(data, width, &blocks);
    let tasks = expert_ids.into_iter().zip(blocks).zip(parts).collect();
    par::for_each(tasks, |((expert_id, rows), part): ((usize, Range<usize>), &mut [f32])| {
        let num_rows = rows.len();
        work(expert_id, rows, MatMut::new(part, num_rows, width));
    });
}
