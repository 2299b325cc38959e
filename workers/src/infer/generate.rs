//! Generation on one rank: a whole model out of an HF directory and a cache of latents.
//!
//! A prompt and each new token go through the same components as in training; only for a few new tokens the attention core is
//! the absorbed form against the cache (report section 2.1.1; per token and layer a latent and one rope key are kept). Knows
//! no actors.

use std::ops::Range;
use std::path::Path;

use contraflow_kernels::attention::{self, Span, Spans};
use contraflow_kernels::cross_entropy::logits;
use contraflow_kernels::dispatch::{self, Share};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::gate::{self, Routing};
use contraflow_kernels::latent::{LatentCache, decode};
use contraflow_kernels::rope::RopeTable;
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{embedding, linear, norm};
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
use crate::model::precision::Precision;
use crate::model::{Architecture, AttentionWeights, Layer, ffn};

/// A model that answers.
pub struct Generator {
    pub(crate) arch: Architecture,
    pub(crate) model: RankModel,
}

/// What has been read and written so far, layer by layer.
#[derive(Default)]
pub struct Cache {
    /// Latents and rope keys of each layer.
    pub layers: Vec<LatentCache>,
    /// Number of tokens.
    pub len: usize,
}

impl Generator {
    /// Reads `config.json` and the weights of a directory.
    ///
    /// **Errors**: a missing or damaged file, by name; every fault of the configuration.
    pub fn load(dir: &Path) -> Result<Self, RankError> {
        Self::of_weights(dir, HfWeights::open)
    }

    /// The same with the moving average of a checkpoint's weights.
    ///
    /// **Errors**: as [`Generator::load`]; the directory is no checkpoint with an average.
    pub fn load_average(dir: &Path) -> Result<Self, RankError> {
        Self::of_weights(dir, |dir| HfWeights::open(dir)?.averaged())
    }

    fn of_weights(
        dir: &Path,
        open: impl FnOnce(&Path) -> Result<HfWeights, RankError>,
    ) -> Result<Self, RankError> {
        let path = dir.join("config.json");
        let content = |message: String| RankError::Content { path: path.display().to_string(), message };
        let text = contraflow_runtime::files::read_to_string(&path)
            .map_err(|source| RankError::File { path: path.display().to_string(), source })?;
        let config = ModelConfig::from_hf_json(&text).map_err(|faults| content(faults.to_string()))?;
        // Before memory is taken for what the configuration says.
        check_against(&config, dir).map_err(|faults| RankError::Model { faults })?;
        let arch = Architecture::new(config, Precision::F32);
        let mut model = one_rank(&arch).map_err(content)?;
        let weights = open(dir)?;
        weights.fill(&mut model.dense)?;
        weights.fill(&mut model.experts)?;
        Ok(Generator { arch, model })
    }

    /// A model of fresh weights, as a training run would begin with it, computed with in a precision.
    ///
    /// **Errors**: if the model has no layers.
    pub fn fresh(
        config: ModelConfig,
        precision: Precision,
        seed: u64,
        deviation: f64,
    ) -> Result<Self, String> {
        let arch = Architecture::new(config, precision);
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
    /// **Shapes**: output `[1, V]`.
    pub fn read(&self, cache: &mut Cache, ids: &[u32]) -> Tensor {
        let stage = &self.model.stages[0];
        let empty = || LatentCache::new(self.arch.config.kv_lora_rank, &self.arch.latent_heads);
        cache.layers.resize_with(stage.layers.len(), empty);
        let dense = &self.model.dense;
        let table = stage.embedding.expect("the only stage has the embedding");
        let head = stage.head.as_ref().expect("the only stage has the head");
        let positions = cache.len..cache.len + ids.len();
        let ids = Tensor::from_vec(&[ids.len()], ids.to_vec());
        let mut x = embedding::forward(&ids, dense.weight(table));
        for (index, (layer, cached)) in stage.layers.iter().zip(&mut cache.layers).enumerate() {
            // Of the last layer's rows only the last one continues; the others leave their latents and that is all.
            let is_last = index + 1 == stage.layers.len();
            let wanted = if is_last { positions.end - 1..positions.end } else { positions.clone() };
            x = self.layer(layer, x, wanted, cached);
        }
        cache.len += ids.len();
        let last = x.slice_rows(x.rows() - 1..x.rows());
        let normed = norm::forward(&last, dense.weight(head.norm), self.arch.eps());
        logits(&normed, dense.weight(head.head))
    }

    /// The layer's output at the wanted positions, the last ones of those whose rows are given.
    ///
    /// **Shapes**: `x` `[n, D]`, output `[wanted, D]`.
    fn layer(&self, layer: &Layer, x: Tensor, wanted: Range<usize>, cache: &mut LatentCache) -> Tensor {
        let (arch, dense, weights) = (&self.arch, &self.model.dense, &layer.attention);
        let normed = norm::forward(&x, dense.weight(weights.input_norm), arch.eps());
        let kv_latent = linear::forward(&normed, dense.weight(weights.kv_down));
        let table = self.rope_table(wanted.end - x.rows()..wanted.end);
        cache.append(&kv_latents(arch, weights, dense, &kv_latent), &rope_keys(arch, &table, &kv_latent));

        let rows = x.rows() - wanted.len()..x.rows();
        let (mut q, _) = queries(weights, dense, &normed.slice_rows(rows.clone()));
        rotate_queries(arch, &self.rope_table(wanted), &mut q, false);
        let out = self.attend(weights, &q, cache);
        let residual = linear::forward_add(&out, dense.weight(weights.output), &x.slice_rows(rows));
        let normed = norm::forward(&residual, dense.weight(weights.post_norm), arch.eps());
        let (mut output, _) = ffn::forward(arch, &layer.ffn, dense, &normed, &residual);
        if let (Some(gate_weight), Some(experts)) = (weights.gate, &layer.experts) {
            let scores = linear::forward(&normed, dense.weight(gate_weight));
            let routing = gate::forward(&scores, dense.gate_biases.get(&layer.index), &arch.gate);
            let arrivals = arrivals(normed, &routing);
            let (routed, _) = experts::forward(arch, experts, &self.model.experts, arrivals);
            add_into(&mut output, &routed);
        }
        output
    }

    /// Attention of the cache's last positions, in the form that costs less.
    ///
    /// Per head and cached position the absorbed form works on 2 C columns for each query. The direct form first makes
    /// key and value of C columns each, and then needs `nope + v` of them for each query.
    ///
    /// **Shapes**: `q` `[n, H * qk]`, output `[n, H * v]`.
    fn attend(&self, weights: &AttentionWeights, q: &Tensor, cache: &LatentCache) -> Tensor {
        let (arch, heads) = (&self.arch, &self.arch.latent_heads);
        let kv_up = self.model.dense.weight(weights.kv_up);
        let (rank, width) = (kv_up.cols(), heads.nope_dim + heads.v_dim);
        if q.rows() * 2 * rank <= (rank + q.rows()) * width {
            // Products along both sides of a head's part: no narrow format lies well for both.
            let kv_up = self.model.dense.get(weights.kv_up).master();
            return decode(q, kv_up, cache, heads, arch.heads.scale);
        }
        let (k, v) = cache.keys_and_values(kv_up, heads);
        let span = Span { query_start: 0, query_len: q.rows(), key_start: 0, key_len: cache.len() };
        attention::forward(q, &k, &v, &Spans::new(vec![span]), &arch.heads).out
    }

    fn rope_table(&self, positions: Range<usize>) -> RopeTable {
        let positions: Vec<u32> = positions.map(|position| position as u32).collect();
        self.arch.rope.table(&Tensor::from_vec(&[positions.len()], positions))
    }
}

/// Every row stays where it is: one owner has all experts.
pub(crate) fn arrivals(rows: Tensor, routing: &Routing) -> Arrivals {
    let share = dispatch::by_owner(dispatch::choices_of(routing), 1, routing.scores.cols()).pop();
    let Share { pairs, weights, .. } = share.expect("one owner has one share");
    Arrivals { rows, pairs, weights }
}

/// The whole model on one rank, weights zero.
///
/// **Errors**: if the model has no layers.
pub fn one_rank(arch: &Architecture) -> Result<RankModel, String> {
    let layouts = split_layers(&arch.config, 1, 1)?;
    let topology = Topology { pipeline: 1, expert: 1, data: 1 };
    Ok(build(arch, &Placement { topology, stages_of: &[vec![0]], layouts: &layouts }, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use contraflow_kernels::host::HostValues;
    use contraflow_kernels::tensor::Format;
    use contraflow_runtime::model_config::builtin;

    #[test]
    fn a_prompt_read_at_once_is_the_prompt_read_token_by_token() {
        let config = builtin::model("tiny").unwrap();
        let ids: Vec<u32> = (0..150_u32).map(|i| i * 37 % config.vocab_size as u32).collect();
        let generator = Generator::fresh(config, Precision::F32, 1, 0.1).unwrap();
        let (mut at_once, mut in_parts, mut one_by_one) =
            (Cache::default(), Cache::default(), Cache::default());

        let direct = generator.read(&mut at_once, &ids);
        generator.read(&mut in_parts, &ids[..20]);
        let continued = generator.read(&mut in_parts, &ids[20..]);
        let absorbed = ids.iter().map(|&id| generator.read(&mut one_by_one, &[id])).last().unwrap();

        // Two ways to the same sums, each rounded a few hundred times along the layers: 2^-24 times that.
        let [direct, continued, absorbed] =
            [&direct, &continued, &absorbed].map(|logits| logits.values::<f32>());
        let largest = absorbed.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        for (logit, truth) in direct.iter().chain(continued).zip(absorbed.iter().cycle()) {
            assert!((logit - truth).abs() <= 1e-4 * largest, "{logit} {truth}");
        }
        assert_eq!([at_once.len, in_parts.len, one_by_one.len], [150; 3]);
    }

    #[test]
    fn in_bf16_the_logits_are_those_of_f32_but_for_its_rounding() {
        let config = builtin::model("tiny").unwrap();
        let ids: Vec<u32> = (0..50_u32).map(|i| i * 37 % config.vocab_size as u32).collect();
        let bf16 = Precision {
            linear: Format::BF16,
            activations: Format::BF16,
            dispatch: Format::BF16,
            combine: Format::BF16,
            attention_output: Format::BF16,
            swiglu_input: Format::BF16,
        };
        let generator = |precision| Generator::fresh(config.clone(), precision, 1, 0.02).unwrap();
        let (narrow, wide) = (generator(bf16), generator(Precision::F32));
        let at_once = narrow.read(&mut Cache::default(), &ids);
        let mut cache = Cache::default();
        let one_by_one = ids.iter().map(|&id| narrow.read(&mut cache, &[id])).last().unwrap();
        let truth = wide.read(&mut Cache::default(), &ids);

        let [at_once, one_by_one, truth] =
            [&at_once, &one_by_one, &truth].map(|logits| logits.values::<f32>());
        let size =
            |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
        let whole = size(&mut truth.iter().copied());
        for found in [at_once, one_by_one] {
            let error = size(&mut found.iter().zip(truth).map(|(found, truth)| found - truth));
            // Some six values of each of the four layers are rounded to eight bits, by half of the last one at most.
            assert!(error > 0.0 && error <= 24.0 * 2.0_f32.powi(-9) * whole, "{error} of {whole}");
        }
    }
}
