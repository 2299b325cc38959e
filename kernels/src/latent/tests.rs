//! Joining and splitting as transposes of each other, and the absorbed form against the direct one.

use super::*;
use crate::{
    attention::{self, Heads, Span, Spans},
    linear, tests,
};

const HEADS: LatentHeads = LatentHeads { num_heads: 3, nope_dim: 4, rope_dim: 2, v_dim: 5 };

fn noise(shape: &[usize], seed: u32) -> Tensor {
    Tensor::from_vec(shape, tests::noise(shape.iter().product(), seed))
}

#[test]
fn keys_are_content_then_the_shared_rotary_part() {
    let heads = LatentHeads { num_heads: 2, nope_dim: 2, rope_dim: 1, v_dim: 1 };
    let kv = Tensor::from_vec(&[1, 6], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);

    let (k, v) = join_keys(&kv, &Tensor::from_vec(&[1, 1], vec![9.0]), &heads);

    assert_eq!(k.f32(), [1.0, 2.0, 9.0, 4.0, 5.0, 9.0]);
    assert_eq!(v.f32(), [3.0, 6.0]);
}

#[test]
fn splitting_gradients_is_the_transpose_of_joining() {
    let (kv, k_rope) = (noise(&[4, 27], 1), noise(&[4, 2], 2));
    let (dk, dv) = (noise(&[4, 18], 3), noise(&[4, 15], 4));

    let (k, v) = join_keys(&kv, &k_rope, &HEADS);
    let (d_kv, d_k_rope) = split_key_gradients(&dk, &dv, &HEADS);

    let inner = |a: &Tensor, b: &Tensor| -> f64 {
        a.f32().iter().zip(b.f32()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let (joined, split) = (inner(&k, &dk) + inner(&v, &dv), inner(&kv, &d_kv) + inner(&k_rope, &d_k_rope));
    // The sum over three heads rounds in f32; everything else is exact.
    assert!((joined - split).abs() <= 1e-6, "{joined} {split}");
}

#[test]
fn the_absorbed_form_agrees_with_the_direct_one() {
    let (len, latent_dim, scale) = (37, 6, 0.4);
    let (latents, rope_keys) = (noise(&[len, latent_dim], 1), noise(&[len, 2], 2));
    let kv_b = noise(&[27, latent_dim], 3);
    let mut cache = LatentCache::new(latent_dim, &HEADS);
    for rows in [0..1, 1..20, 20..20, 20..len] {
        cache.append(&latents.slice_rows(rows.clone()), &rope_keys.slice_rows(rows));
    }
    let (k, v) = join_keys(&linear::forward(&latents, &kv_b), &rope_keys, &HEADS);
    let (cached_k, cached_v) = cache.keys_and_values(&kv_b, &HEADS);
    assert_eq!((cached_k.f32(), cached_v.f32()), (k.f32(), v.f32()));
    for num_new in [1, 5, len] {
        let q = noise(&[num_new, 18], 4);
        let heads = Heads { num_heads: 3, qk_dim: 6, v_dim: 5, scale };
        let span = Span { query_start: 0, query_len: num_new, key_start: 0, key_len: len };
        let direct = attention::forward(&q, &k, &v, &Spans::new(vec![span]), &heads).out;

        let absorbed = decode(&q, &kv_b, &cache, &HEADS, scale);

        for (found, expected) in absorbed.f32().iter().zip(direct.f32()) {
            // Values below 3, reached by sums in another order.
            assert!((found - expected).abs() <= 3e-6, "{num_new} new positions: {found} {expected}");
        }
    }
}
