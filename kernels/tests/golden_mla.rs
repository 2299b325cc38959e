//! A whole attention layer, assembled from the operations, against the published reference: direct and absorbed form.
#![allow(clippy::unwrap_used, missing_docs)]

use contraflow_kernels::{
    attention::{self, Heads, Spans},
    host::HostValues,
    latent::{self, LatentCache, LatentHeads},
    linear, norm,
    rope::{self, Rope, RopeSpec, RopeTable, Yarn},
    tensor::Tensor,
};
use serde_json::Value;

/// The reference's norms of the latents use this whatever the model says.
const LATENT_EPS: f32 = 1e-6;

fn vector(value: &Value) -> Tensor {
    let numbers: Vec<f32> = value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    Tensor::from_vec(&[numbers.len()], numbers)
}

fn matrix(value: &Value) -> Tensor {
    let rows: Vec<Tensor> = value.as_array().unwrap().iter().map(vector).collect();
    let numbers = rows.iter().flat_map(|row| row.values::<f32>().to_vec()).collect();
    Tensor::from_vec(&[rows.len(), rows[0].len()], numbers)
}

struct Layer<'a> {
    case: &'a Value,
    heads: LatentHeads,
    latent_dim: usize,
    scale: f32,
}

/// What comes before the two forms part ways: rotated queries, normalised latents, rotated keys.
struct Projected {
    q: Tensor,
    latents: Tensor,
    rope_keys: Tensor,
}

impl<'a> Layer<'a> {
    fn new(case: &'a Value) -> Self {
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let heads = LatentHeads {
            num_heads: size("heads"),
            nope_dim: size("qk_nope"),
            rope_dim: size("qk_rope"),
            v_dim: size("v_head"),
        };
        let scale = rope::softmax_scale(heads.qk_dim(), yarn(case).as_ref());
        let expected = case["softmax_scale"].as_f64().unwrap();
        assert!((f64::from(scale) / expected - 1.0).abs() <= 1e-6, "softmax_scale: {scale} {expected}");
        Layer { case, heads, latent_dim: size("kv_lora_rank"), scale }
    }

    fn weight(&self, name: &str) -> Tensor {
        matrix(&self.case["params"][name])
    }

    fn norm(&self, name: &str) -> Tensor {
        vector(&self.case["params"][name])
    }

    fn angles(&self, len: usize) -> RopeTable {
        let theta = self.case["rope_theta"].as_f64().unwrap();
        let rope = Rope::new(&RopeSpec { dim: self.heads.rope_dim, theta, yarn: yarn(self.case) });
        rope.table(&Tensor::from_vec(&[len], (0..len as u32).collect()))
    }

    fn project(&self, x: &Tensor) -> Projected {
        let LatentHeads { num_heads, nope_dim, rope_dim, .. } = self.heads;
        let table = self.angles(x.rows());
        let mut q = if self.case["q_lora_rank"] == 0 {
            linear::forward(x, &self.weight("wq.weight"))
        } else {
            let latent = linear::forward(x, &self.weight("wq_a.weight"));
            let latent = norm::forward(&latent, &self.norm("q_norm.weight"), LATENT_EPS);
            linear::forward(&latent, &self.weight("wq_b.weight"))
        };
        rope::rotate(&table, &mut q, num_heads, nope_dim, false);
        let kv_a = linear::forward(x, &self.weight("wkv_a.weight"));
        let latents = norm::forward_cols(&kv_a, 0..self.latent_dim, &self.norm("kv_norm.weight"), LATENT_EPS);
        let mut rope_keys = kv_a.slice_cols(self.latent_dim..self.latent_dim + rope_dim);
        rope::rotate(&table, &mut rope_keys, 1, 0, false);
        Projected { q, latents, rope_keys }
    }

    fn direct(&self, x: &Tensor) -> Tensor {
        let Projected { q, latents, rope_keys } = self.project(x);
        let kv = linear::forward(&latents, &self.weight("wkv_b.weight"));
        let (k, v) = latent::join_keys(&kv, &rope_keys, &self.heads);
        let LatentHeads { num_heads, v_dim, .. } = self.heads;
        let heads = Heads { num_heads, qk_dim: self.heads.qk_dim(), v_dim, scale: self.scale };
        let out = attention::forward(&q, &k, &v, &Spans::of_runs([x.rows()]), &heads).out;
        linear::forward(&out, &self.weight("wo.weight"))
    }

    /// The last `num_new` positions only.
    fn absorbed(&self, x: &Tensor, num_new: usize) -> Tensor {
        let Projected { q, latents, rope_keys } = self.project(x);
        let q = q.slice_rows(x.rows() - num_new..x.rows());
        let mut cache = LatentCache::new(self.latent_dim, &self.heads);
        cache.append(&latents, &rope_keys);
        let out = latent::decode(&q, &self.weight("wkv_b.weight"), &cache, &self.heads, self.scale);
        linear::forward(&out, &self.weight("wo.weight"))
    }
}

fn yarn(case: &Value) -> Option<Yarn> {
    let number = |key: &str| case[key].as_f64().unwrap();
    (number("max_seq_len") > number("original_seq_len")).then(|| Yarn {
        factor: number("rope_factor"),
        beta_fast: number("beta_fast"),
        beta_slow: number("beta_slow"),
        mscale: Some(number("mscale")),
        mscale_all_dim: Some(number("mscale")),
        original_max_position_embeddings: number("original_seq_len") as usize,
    })
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= 1e-5, "{what}[{at}]: {found} {expected}");
    }
}

#[test]
fn golden_mla_direct_and_absorbed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/mla/cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for (number, case) in cases.iter().enumerate() {
        let layer = Layer::new(case);
        let sequences = case["x"].as_array().unwrap().iter().zip(case["y"].as_array().unwrap());
        for (x, y) in sequences.map(|(x, y)| (matrix(x), matrix(y))) {
            let (len, width) = (x.rows(), y.cols());
            assert_close(
                &format!("case {number}, direct"),
                layer.direct(&x).values::<f32>(),
                y.values::<f32>(),
            );
            for num_new in [1, 2, len] {
                let expected = &y.values::<f32>()[(len - num_new) * width..];
                let found = layer.absorbed(&x, num_new);
                assert_close(
                    &format!("case {number}, absorbed, {num_new} new"),
                    found.values::<f32>(),
                    expected,
                );
            }
        }
    }
}
