//! Generation on one rank: a whole model out of an HF directory, a cache of latents, and a rule to choose tokens.
//!
//! A prompt and each new token go through the same components as in training; only for a few new tokens the attention core is
//! the absorbed form against the cache (report section 2.1.1; per token and layer a latent and one rope key are kept). Knows
//! no actors.

use std::ops::Range;
use std::path::Path;

use contraflow_kernels::attention::{self, Span};
use contraflow_kernels::cross_entropy::logits;
use contraflow_kernels::gate::{self, Routing};
use contraflow_kernels::gemm::{Into, Mat};
use contraflow_kernels::latent::{LatentCache, decode, join_keys};
use contraflow_kernels::math::add_into;
use contraflow_kernels::rope::RopeTable;
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{embedding, linear, math, norm};
use contraflow_runtime::layout::split_layers;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::topology::Topology;

use crate::error::RankError;
use crate::hf::check::check_against;
use crate::hf::weights::HfWeights;
use crate::model::attention::{kv_latents, queries, rope_keys, rotate_queries};
use crate::model::build::{Placement, RankModel, build};
use crate::model::experts::{self, Arrivals};
use crate::model::init::initialise;
use crate::model::{Architecture, AttentionWeights, Layer, ffn};

/// A model that answers.
pub struct Generator {
    pub(crate) arch: Architecture,
    pub(crate) model: RankModel,
}

/// What has been read and written so far, layer by layer.
#[derive(Default)]
pub struct Cache {
    /// Normed latents and rotated rope keys of each layer. **Shapes**: `[len * C]` and `[len * rope]`.
    pub layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// Number of tokens.
    pub len: usize,
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest token; 1: as the model says; more: flatter.
    pub temperature: f32,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: f32,
}

impl Generator {
    /// Reads `config.json` and the weights of a directory.
    ///
    /// **Errors**: a missing or damaged file, by name; every fault of the configuration.
    pub fn load(dir: &Path) -> Result<Self, RankError> {
        let path = dir.join("config.json");
        let content = |message: String| RankError::Content { path: path.display().to_string(), message };
        let text = std::fs::read_to_string(&path)
            .map_err(|source| RankError::File { path: path.display().to_string(), source })?;
        let config = ModelConfig::from_hf_json(&text).map_err(|faults| content(faults.to_string()))?;
        // Before memory is taken for what the configuration says.
        check_against(&config, dir).map_err(|faults| RankError::Model { faults })?;
        let arch = Architecture::new(config);
        let mut model = one_rank(&arch).map_err(content)?;
        let weights = HfWeights::open(dir)?;
        weights.fill(&mut model.dense)?;
        weights.fill(&mut model.experts)?;
        Ok(Generator { arch, model })
    }

    /// A model of fresh weights, as a training run would begin with it.
    ///
    /// **Errors**: in words, if the model has no layers.
    pub fn fresh(config: ModelConfig, seed: u64, deviation: f64) -> Result<Self, String> {
        let arch = Architecture::new(config);
        let mut model = one_rank(&arch)?;
        initialise(&mut model.dense, seed, deviation);
        initialise(&mut model.experts, seed, deviation);
        Ok(Generator { arch, model })
    }

    /// Largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        self.arch.config.vocab_size
    }

    /// Longest text the model was configured for.
    pub fn max_len(&self) -> usize {
        self.arch.config.max_position_embeddings
    }

    /// Reads more tokens and returns the logits of the last one.
    ///
    /// **Shapes**: output `[V]`.
    pub fn read(&self, cache: &mut Cache, ids: &[u32]) -> Vec<f32> {
        let stage = &self.model.stages[0];
        cache.layers.resize_with(stage.layers.len(), Default::default);
        let dense = &self.model.dense;
        let table = stage.embedding.expect("the only stage has the embedding");
        let head = stage.head.as_ref().expect("the only stage has the head");
        let positions = cache.len..cache.len + ids.len();
        let mut x = embedding::forward(ids, dense.weight(table));
        for (index, (layer, kept)) in stage.layers.iter().zip(&mut cache.layers).enumerate() {
            // Of the last layer's rows only the last one goes on; the others leave their latents and that is all.
            let is_last = index + 1 == stage.layers.len();
            let wanted = if is_last { positions.end - 1..positions.end } else { positions.clone() };
            x = self.layer(layer, x, wanted, kept);
        }
        cache.len += ids.len();
        let last = x.slice_rows(x.rows() - 1..x.rows());
        let normed = norm::forward(&last, dense.weight(head.norm), self.arch.eps());
        logits(&normed, dense.weight(head.head)).f32().to_vec()
    }

    /// The layer's output at the wanted positions, the last ones of those whose rows are given.
    ///
    /// **Shapes**: `x` `[n, D]`, output `[wanted, D]`.
    fn layer(
        &self,
        layer: &Layer,
        x: Tensor,
        wanted: Range<usize>,
        kept: &mut (Vec<f32>, Vec<f32>),
    ) -> Tensor {
        let (arch, dense, weights) = (&self.arch, &self.model.dense, &layer.attention);
        let normed = norm::forward(&x, dense.weight(weights.input_norm), arch.eps());
        let kv_latent = linear::forward(&normed, dense.weight(weights.kv_down));
        kept.0.extend_from_slice(kv_latents(arch, weights, dense, &kv_latent).f32());
        let table = self.rope_table(wanted.end - x.rows()..wanted.end);
        kept.1.extend_from_slice(rope_keys(arch, &table, &kv_latent).f32());

        let rows = x.rows() - wanted.len()..x.rows();
        let (mut q, _) = queries(weights, dense, &normed.slice_rows(rows.clone()));
        rotate_queries(arch, &self.rope_table(wanted), &mut q, false);
        let out = self.attend(weights, &q, LatentCache { latents: &kept.0, rope_keys: &kept.1 });
        let residual = linear::forward_add(&out, dense.weight(weights.output), &x.slice_rows(rows));
        let normed = norm::forward(&residual, dense.weight(weights.post_norm), arch.eps());
        let (mut output, _) = ffn::forward(&layer.ffn, dense, normed.clone(), &residual);
        if let (Some(gate_weight), Some(experts)) = (weights.gate, &layer.experts) {
            let scores = linear::forward(&normed, dense.weight(gate_weight));
            let routing = gate::forward(&scores, &dense.gate_biases[&layer.index], &arch.gate);
            let arrivals = arrivals(normed, &routing, arch.gate.top_k);
            let (routed, _) = experts::forward(experts, &self.model.experts, arrivals);
            add_into(output.f32_mut(), routed.f32());
        }
        output
    }

    /// Attention of the cache's last positions, in the form that costs less.
    ///
    /// Per head and cached position the absorbed form works on 2 C columns for each query. The direct form first makes
    /// key and value of C columns each, and then needs `nope + v` of them for each query.
    ///
    /// **Shapes**: `q` `[n, H * qk]`, output `[n, H * v]`.
    fn attend(&self, weights: &AttentionWeights, q: &Tensor, cache: LatentCache) -> Tensor {
        let (arch, heads) = (&self.arch, &self.arch.latent_heads);
        let kv_up = self.model.dense.weight(weights.kv_up);
        let (rank, width) = (kv_up.cols(), heads.nope_dim + heads.v_dim);
        if q.rows() * 2 * rank <= (rank + q.rows()) * width {
            return decode(q, kv_up, cache, heads, arch.heads.scale);
        }
        let len = cache.latents.len() / rank;
        let mut kv = Tensor::for_overwrite(&[len, kv_up.rows()]);
        linear::forward_into(kv.mat_mut(), Into::Overwrite, Mat::new(cache.latents, len, rank), kv_up.mat());
        let (k, v) = join_keys(&kv, Mat::new(cache.rope_keys, len, heads.rope_dim), heads);
        let span = Span { query_start: 0, query_len: q.rows(), key_start: 0, key_len: len };
        attention::forward(q, &k, &v, &[span], &arch.heads).out
    }

    fn rope_table(&self, positions: Range<usize>) -> RopeTable {
        let positions: Vec<u32> = positions.map(|position| position as u32).collect();
        self.arch.rope.table(&positions)
    }
}

/// Every row stays where it is.
pub(crate) fn arrivals(rows: Tensor, routing: &Routing, top_k: usize) -> Arrivals {
    let pair = |(slot, &expert): (usize, &u32)| ((slot / top_k) as u32, expert);
    let pairs = routing.expert_ids.iter().enumerate().map(pair).collect();
    Arrivals { rows, pairs, weights: routing.weights.clone() }
}

/// The whole model on one rank, weights zero.
///
/// **Errors**: in words, if the model has no layers.
pub fn one_rank(arch: &Architecture) -> Result<RankModel, String> {
    let layouts = split_layers(&arch.config, 1, 1)?;
    let topology = Topology { pipeline: 1, expert: 1, data: 1 };
    Ok(build(arch, &Placement { topology, stages_of: &[vec![0]], layouts: &layouts }, 0))
}

/// Chooses a token. `uniform` is a random number in [0, 1).
pub fn choose(logits: &[f32], sampling: Sampling, uniform: f64) -> u32 {
    let likelier_first =
        |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if sampling.temperature <= 0.0 {
        let likeliest = (0..logits.len() as u32).min_by(likelier_first);
        return likeliest.expect("a vocabulary has at least one token");
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(likelier_first);
    let largest = logits[order[0] as usize];
    let weight = |&id: &u32| f64::from(math::exp((logits[id as usize] - largest) / sampling.temperature));
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let kept_until = |limit: f64| {
        let mut sum = 0.0;
        weights.iter().position(|weight| {
            sum += weight;
            sum >= limit
        })
    };
    let num_kept = kept_until(total * f64::from(sampling.top_p)).map_or(weights.len(), |last| last + 1);
    let kept: f64 = weights[..num_kept].iter().sum();
    let chosen = kept_until(kept * uniform).unwrap_or(0).min(num_kept - 1);
    order[chosen]
}

#[cfg(test)]
mod tests {
    use super::*;
    use contraflow_runtime::model_config::builtin;

    const LOGITS: [f32; 4] = [0.0, 3.0, 1.0, 2.0];

    #[test]
    fn a_prompt_read_at_once_is_the_prompt_read_token_by_token() {
        let config = builtin::model("tiny").unwrap();
        let ids: Vec<u32> = (0..150_u32).map(|i| i * 37 % config.vocab_size as u32).collect();
        let generator = Generator::fresh(config, 1, 0.1).unwrap();
        let (mut at_once, mut in_parts, mut one_by_one) =
            (Cache::default(), Cache::default(), Cache::default());

        let direct = generator.read(&mut at_once, &ids);
        generator.read(&mut in_parts, &ids[..20]);
        let continued = generator.read(&mut in_parts, &ids[20..]);
        let absorbed = ids.iter().map(|&id| generator.read(&mut one_by_one, &[id])).last().unwrap();

        // Two ways to the same sums, each rounded a few hundred times along the layers: 2^-24 times that.
        let largest = absorbed.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        for (logit, truth) in direct.iter().chain(&continued).zip(absorbed.iter().cycle()) {
            assert!((logit - truth).abs() <= 1e-4 * largest, "{logit} {truth}");
        }
        assert_eq!([at_once.len, in_parts.len, one_by_one.len], [150; 3]);
    }

    #[test]
    fn temperature_zero_is_greedy_and_ties_go_to_the_lower_id() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0 };
        assert_eq!(choose(&LOGITS, greedy, 0.99), 1);
        assert_eq!(choose(&[1.0, 2.0, 2.0], greedy, 0.5), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_and_top_p_cuts_the_tail() {
        let draw = |top_p: f32| {
            let sampling = Sampling { temperature: 1.0, top_p };
            let mut counts = [0_usize; 4];
            (0..1000)
                .for_each(|i| counts[choose(&LOGITS, sampling, (f64::from(i) + 0.5) / 1000.0) as usize] += 1);
            counts
        };
        let sum: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        for (id, count) in draw(1.0).into_iter().enumerate() {
            assert!((count as f32 - 1000.0 * LOGITS[id].exp() / sum).abs() <= 1.5, "{id}: {count}");
        }
        // 3 alone has 64 %, 3 and 2 together 88 %.
        assert_eq!(draw(0.5), [0, 1000, 0, 0]);
        assert_eq!(draw(0.8).iter().filter(|&&count| count > 0).count(), 2);
    }
}
