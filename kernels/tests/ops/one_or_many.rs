//! Operations whose work is cut so that sums keep their order: one thread and three give the same bits.

use contraflow_kernels::{
    elementwise::sum_squares,
    gate::{self, GateSpec, GroupScore, Scoring},
    host::HostValues,
    latent::{LatentHeads, join_keys, split_key_gradients},
    linear,
    par::Threads,
    permute::{gather, scatter_add},
    tensor::Tensor,
};

use crate::twin::Random;

/// Enough rows of [`COLS`] for three threads to have their share of every operation here: 2^14 values each, and more.
const ROWS: usize = 1200;
const COLS: usize = 96;

#[track_caller]
fn assert_same_bits(work: impl Fn() -> Vec<f32> + Send + Sync) {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let alone = bits(work());
    assert_eq!(bits(Threads::new(3).run(work)), alone);
}

#[test]
fn one_row_by_a_matrix() {
    let mut random = Random::new(1);
    let (x, w) = (random.tensor(&[1, COLS]), random.tensor(&[ROWS, COLS]));
    assert_same_bits(|| linear::forward(&x, &w).values::<f32>().to_vec());
}

#[test]
fn rows_gathered_and_scattered() {
    let mut random = Random::new(2);
    let x = random.tensor(&[ROWS, COLS]);
    let rows = (0..2 * ROWS).map(|_| (random.bits() % ROWS as u64) as u32).collect();
    let rows = Tensor::from_vec::<u32>(&[2 * ROWS], rows);
    assert_same_bits(|| {
        let mut sums = x.clone();
        scatter_add(&gather(&x, &rows), &rows, &mut sums);
        sums.values::<f32>().to_vec()
    });
}

#[test]
fn the_choice_of_experts() {
    let mut random = Random::new(3);
    let (logits, bias) = (random.tensor(&[ROWS, COLS]), random.tensor(&[COLS]));
    let spec = GateSpec {
        scoring: Scoring::Sigmoid,
        group_score: GroupScore::TopTwo,
        num_experts: COLS,
        top_k: 6,
        num_groups: 8,
        top_groups: 3,
        normalise: true,
        scale: 2.5,
    };
    assert_same_bits(|| {
        let routing = gate::forward(&logits, Some(&bias), &spec);
        let ids: Vec<f32> = routing.expert_ids.values::<u32>().iter().map(|&id| id as f32).collect();
        [routing.weights.values(), routing.scores.values(), &ids[..]].concat()
    });
}

#[test]
fn keys_joined_and_their_gradients_split() {
    let heads = LatentHeads { num_heads: 2, nope_dim: 32, rope_dim: 8, v_dim: 16 };
    let mut random = Random::new(4);
    let (kv, k_rope) = (random.tensor(&[ROWS, COLS]), random.tensor(&[ROWS, 8]));
    assert_same_bits(|| {
        let (k, v) = join_keys(&kv, &k_rope, &heads);
        let (d_kv, d_rope) = split_key_gradients(&k, &v, &heads);
        [k, v, d_kv, d_rope].iter().flat_map(|tensor| tensor.values::<f32>().to_vec()).collect()
    });
}

#[test]
fn sums_of_squares() {
    let values = Random::new(5).tensor(&[ROWS * COLS + 1]);
    assert_same_bits(|| {
        let sum = sum_squares(values.view(0..values.len())).to_bits();
        vec![f32::from_bits(sum as u32), f32::from_bits((sum >> 32) as u32)]
    });
}
