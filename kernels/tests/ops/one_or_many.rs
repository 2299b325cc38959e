//! Operations whose work is cut so that sums keep their order: one thread and three give the same bits.

use contraflow_kernels::{
    gate::{self, GateSpec},
    gemm::{Into, gemm},
    latent::{LatentHeads, join_keys, split_key_gradients},
    math::sum_squares,
    par::{Threads, partition},
    permute::{gather, scatter_add},
    tensor::Tensor,
};

use crate::twin::Random;

/// Enough rows of [`COLS`] for three threads to have their share of every operation here.
const ROWS: usize = 1200;
const COLS: usize = 96;

#[track_caller]
fn assert_same_bits(work: impl Fn() -> Vec<f32> + Send + Sync) {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let alone = bits(work());
    let shared = Threads::new(3).run(|| {
        assert_eq!(partition(ROWS, (1 << 14) / COLS).len(), 3, "too small to be shared");
        work()
    });
    assert_eq!(bits(shared), alone);
}

#[test]
fn one_row_by_a_matrix() {
    let mut random = Random::new(1);
    let (x, w) = (random.tensor(&[1, COLS]), random.tensor(&[ROWS, COLS]));
    assert_same_bits(|| {
        let mut out = Tensor::zeros(&[1, ROWS]);
        gemm(out.mat_mut(), Into::Overwrite, 1.0, x.mat(), w.mat().t());
        out.f32().to_vec()
    });
}

#[test]
fn rows_gathered_and_scattered() {
    let mut random = Random::new(2);
    let x = random.tensor(&[ROWS, COLS]);
    let rows: Vec<u32> = (0..2 * ROWS).map(|_| (random.bits() % ROWS as u64) as u32).collect();
    assert_same_bits(|| {
        let mut sums = x.clone();
        scatter_add(&gather(&x, &rows), &rows, &mut sums);
        sums.f32().to_vec()
    });
}

#[test]
fn the_choice_of_experts() {
    let mut random = Random::new(3);
    let (logits, bias) = (random.tensor(&[ROWS, COLS]), random.values(COLS));
    let spec =
        GateSpec { num_experts: COLS, top_k: 6, num_groups: 8, top_groups: 3, normalise: true, scale: 2.5 };
    assert_same_bits(|| {
        let routing = gate::forward(&logits, &bias, &spec);
        let ids = routing.expert_ids.iter().map(|&id| id as f32);
        routing.weights.iter().copied().chain(routing.scores.f32().iter().copied()).chain(ids).collect()
    });
}

#[test]
fn keys_joined_and_their_gradients_split() {
    let heads = LatentHeads { num_heads: 2, nope_dim: 32, rope_dim: 8, v_dim: 16 };
    let mut random = Random::new(4);
    let (kv, k_rope) = (random.tensor(&[ROWS, COLS]), random.tensor(&[ROWS, 8]));
    assert_same_bits(|| {
        let (k, v) = join_keys(&kv, k_rope.mat(), &heads);
        let (d_kv, d_rope) = split_key_gradients(&k, &v, &heads);
        [k, v, d_kv, d_rope].iter().flat_map(|tensor| tensor.f32().to_vec()).collect()
    });
}

#[test]
fn sums_of_squares() {
    let values = Random::new(5).values(ROWS * COLS + 1);
    assert_same_bits(|| {
        let sum = sum_squares(&values).to_bits();
        vec![f32::from_bits(sum as u32), f32::from_bits((sum >> 32) as u32)]
    });
}
