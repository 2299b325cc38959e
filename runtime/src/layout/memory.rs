//! What a layout asks of each rank's memory: weights, gradients, optimizer state and what waits for its
//! backward pass.
//!
//! Shape letters: D hidden, K top-k, E experts, F expert hidden, H heads, C latent.

use crate::cost::{self, BucketElements, bytes_of_rows};
use crate::model_config::ModelConfig;
use crate::recipe::{NumberFormat, PrecisionSection};
use crate::schedule::program::{LayerKind, StageLayout};
use crate::schedule::{RankFigures, buckets};
use crate::topology::Topology;

/// What the memory of the ranks follows from.
#[derive(Clone, Copy, Debug)]
pub struct MemoryQuery<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// The axes.
    pub topology: Topology,
    /// The stages, as [`split_layers`](super::split_layers) makes them.
    pub stages: &'a [StageLayout],
    /// `placement[rank]` lists the stages of each pipeline rank.
    pub placement: &'a [Vec<usize>],
    /// Tokens of a micro-batch.
    pub micro_batch_tokens: usize,
    /// `peak_live_chunks[rank]`: forward chunks of a pipeline rank that wait for their backward at most.
    pub peak_live_chunks: &'a [usize],
    /// In which formats it is computed.
    pub precision: &'a PrecisionSection,
}

const F32_BYTES: u64 = 4;
const MOMENTS: u64 = 2;

/// Parameters and memory of each pipeline rank, in steady state; all ranks at one pipeline coordinate need
/// the same.
///
/// Weights lie in the format that they are computed with, gradients in f32. The optimizer's two moments take 8 bytes, and masters of
/// weights in a narrower format than f32 another 4, for the parameters that fall to the rank when every replica group shares its
/// own out evenly (ZeRO-1). Activations are live chunks x tokens x the largest of the rank's stages.
///
/// Replica groups are those of [`buckets`].
pub fn rank_figures(query: &MemoryQuery) -> Vec<RankFigures> {
    (0..query.placement.len()).map(|rank| query.one_rank(rank)).collect()
}

/// A bucket on a rank, and how many ranks hold the same.
struct Holding {
    elements: BucketElements,
    copies: usize,
}

impl Holding {
    /// Elements of the largest shard.
    fn shard(&self) -> u64 {
        self.elements.all().div_ceil(self.copies as u64)
    }

    /// Masters beside the weights on the rank that keeps most: narrow weights come last in a bucket.
    fn masters(&self) -> u64 {
        self.shard().min(self.elements.narrow())
    }
}

impl MemoryQuery<'_> {
    fn one_rank(&self, rank: usize) -> RankFigures {
        let trained = self.holdings(rank);
        let elements = trained.iter().fold(BucketElements::default(), |sum, held| sum + held.elements);
        let num_trained = elements.all();
        let shard: u64 = trained.iter().map(Holding::shard).sum();
        let masters: u64 = trained.iter().map(Holding::masters).sum();
        let stages = || self.placement[rank].iter().map(|&stage| &self.stages[stage]);
        let gate_biases: u64 = stages().map(|stage| self.gate_biases(stage)).sum();
        let weights = F32_BYTES * (elements.wide + gate_biases)
            + weight_bytes(self.precision.linear, elements.linear)
            + weight_bytes(self.precision.activations, elements.tables);
        let largest_chunk = stages().map(|stage| self.chunk_bytes(stage)).max().unwrap_or(0);
        RankFigures {
            rank,
            stages: self.placement[rank].clone(),
            layers: stages().map(stage_text).collect::<Vec<_>>().join("; "),
            parameters: num_trained + gate_biases,
            weight_bytes: weights,
            gradient_bytes: F32_BYTES * num_trained,
            optimizer_bytes: MOMENTS * F32_BYTES * shard + F32_BYTES * masters,
            activation_bytes: self.peak_live_chunks[rank] as u64 * largest_chunk,
        }
    }

    fn holdings(&self, rank: usize) -> Vec<Holding> {
        let Self { config, topology, stages, placement, precision, .. } = self;
        let buckets = buckets(placement, stages, topology).into_iter();
        let held = buckets.filter(|bucket| bucket.positions.contains(&rank));
        held.map(|bucket| Holding {
            elements: cost::bucket_elements(&bucket, config, stages, topology, precision),
            copies: bucket.copies,
        })
        .collect()
    }

    fn gate_biases(&self, stage: &StageLayout) -> u64 {
        let layers = stage.layers.iter().copied().chain(stage.mtp_layer.map(|_| LayerKind::Moe));
        layers.map(|kind| cost::layer_parameters(self.config, kind).gate_bias).sum()
    }

    /// What one chunk of a stage keeps for its backward pass.
    fn chunk_bytes(&self, stage: &StageLayout) -> u64 {
        let hidden = self.rows(self.precision.activations, self.config.hidden_size);
        let mut bytes: u64 = stage.layers.iter().map(|&kind| self.kept_by_layer(kind)).sum();
        // A head keeps its input and the gradient behind its norm; multi-token prediction has one more of both, and
        // keeps the embedding and the hidden state that it joins.
        if stage.head {
            bytes += 2 * hidden;
        }
        if stage.mtp_layer.is_some() {
            bytes += self.kept_by_layer(LayerKind::Moe) + 4 * hidden;
        }
        bytes
    }

    /// Bytes of a row for each token of a micro-batch.
    fn rows(&self, format: NumberFormat, width: usize) -> u64 {
        bytes_of_rows(format, self.micro_batch_tokens as u64, width)
    }

    /// What a layer keeps: its input, the residual after attention and the same normed (3 D); both
    /// latents with the rope key (C_q + C + rope); queries, keys, values and output of every head with a log-sum
    /// (H (2 qk + 2 v + 1)); the inner values of the FFN every token passes, gate and up (2 F each); in a mixture also
    /// E scores, 2 K ids and weights, and, with balanced routing, the rows that come from the expert group
    /// (min(K, expert ranks) D) and their inner values (2 K F). Norms and SwiGLU are computed again.
    fn kept_by_layer(&self, kind: LayerKind) -> u64 {
        let c = self.config;
        let PrecisionSection { activations, dispatch, attention_output, .. } = *self.precision;
        let (products, heads) = (self.precision.products(), c.num_attention_heads);
        let latents = [c.q_lora_rank.unwrap_or(0), c.kv_lora_rank + c.qk_rope_head_dim];
        let of_heads = [c.qk_head_dim(), c.qk_head_dim(), c.v_head_dim].map(|dim| heads * dim);
        let attention = 3 * self.rows(activations, c.hidden_size)
            + latents.into_iter().chain(of_heads).map(|width| self.rows(products, width)).sum::<u64>()
            + self.rows(attention_output, heads * c.v_head_dim)
            + self.rows(NumberFormat::F32, heads);
        let ffn = match kind {
            LayerKind::Dense => self.rows(products, 2 * c.intermediate_size),
            LayerKind::Moe => {
                let top_k = c.num_experts_per_tok;
                self.rows(products, 2 * c.shared_intermediate_size())
                    + self.rows(NumberFormat::F32, c.n_routed_experts + 2 * top_k)
                    + top_k.min(self.topology.expert) as u64 * self.rows(dispatch, c.hidden_size)
                    + top_k as u64 * self.rows(products, 2 * c.moe_intermediate_size)
            }
        };
        attention + ffn
    }
}

/// Bytes of this many weights; scales of blocks are a quarter of a thousandth of it.
fn weight_bytes(format: NumberFormat, weights: u64) -> u64 {
    match format {
        NumberFormat::F32 => F32_BYTES * weights,
        NumberFormat::Bf16 => 2 * weights,
        NumberFormat::Fp8 | NumberFormat::E5m6 => weights + weights.div_ceil(128 * 128) * F32_BYTES,
    }
}

/// A stage as text: `embedding, 0 dense, 1-3 moe` or `4-6 moe, head, mtp`.
fn stage_text(stage: &StageLayout) -> String {
    let mut parts = Vec::new();
    if stage.embedding {
        parts.push("embedding".to_string());
    }
    let mut first = stage.first_layer;
    for run in stage.layers.chunk_by(|a, b| a == b) {
        let last = first + run.len() - 1;
        let kind = if run[0] == LayerKind::Moe { "moe" } else { "dense" };
        let layers = if first == last { format!("{first}") } else { format!("{first}-{last}") };
        parts.push(format!("{layers} {kind}"));
        first = last + 1;
    }
    if stage.head {
        parts.push("head".to_string());
    }
    if stage.mtp_layer.is_some() {
        parts.push("mtp".to_string());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::split_layers;
    use crate::model_config::builtin;
    use crate::schedule::ScheduleKind;

    fn memory(config: &ModelConfig, topology: Topology, schedule: ScheduleKind) -> Vec<RankFigures> {
        let stages = split_layers(config, schedule.stages(topology.pipeline), 256).unwrap();
        rank_figures(&MemoryQuery {
            config,
            topology,
            stages: &stages,
            placement: &schedule.placement(topology.pipeline),
            micro_batch_tokens: 512,
            peak_live_chunks: &vec![3; topology.pipeline],
            precision: &PrecisionSection::uniform(NumberFormat::F32),
        })
    }

    #[test]
    fn one_rank_holds_everything_once() {
        for name in ["tiny", "small"] {
            let config = builtin::model(name).unwrap();
            let one = Topology { pipeline: 1, expert: 1, data: 1 };
            for schedule in [ScheduleKind::OneFOneB, ScheduleKind::Dualpipev] {
                let ranks = memory(&config, one, schedule);
                let [rank] = ranks.as_slice() else { panic!("one rank") };
                let counted = cost::parameters(&config);
                let biases =
                    config.weights().into_iter().filter(|w| w.name.ends_with("e_score_correction_bias"));
                let biases: u64 = biases.map(|w| w.num_elements()).sum();
                assert_eq!(rank.parameters, counted.total + counted.mtp);
                assert_eq!(rank.weight_bytes, 4 * rank.parameters);
                assert_eq!(rank.gradient_bytes, 4 * (rank.parameters - biases));
                assert_eq!(rank.optimizer_bytes, 2 * rank.gradient_bytes);
            }
        }
    }

    #[test]
    fn layers_are_named() {
        let config = builtin::model("tiny").unwrap();
        let topology = Topology { pipeline: 2, expert: 2, data: 1 };
        let ranks = memory(&config, topology, ScheduleKind::Dualpipe);
        assert_eq!(ranks[0].layers, "embedding, 0 dense, 1-2 moe; 3 moe, head, mtp");
        assert_eq!(ranks[1].layers, "3 moe, head, mtp; embedding, 0 dense, 1-2 moe");
        assert_eq!((ranks[1].rank, &ranks[1].stages), (1, &vec![1, 0]));
    }

    /// Over all ranks of the world the moments of each trained parameter exist once, up to the rounding of
    /// shards.
    #[test]
    fn moments_exist_once_in_the_world() {
        let config = builtin::model("tiny").unwrap();
        let one = memory(&config, Topology { pipeline: 1, expert: 1, data: 1 }, ScheduleKind::OneFOneB);
        for (pipeline, expert, data) in [(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2), (2, 4, 3)] {
            for schedule in ScheduleKind::ALL {
                if schedule.stages(pipeline) > config.num_hidden_layers {
                    continue;
                }
                let topology = Topology { pipeline, expert, data };
                let ranks = memory(&config, topology, schedule);
                let dp_size = topology.dp_size() as u64;
                let world: u64 = ranks.iter().map(|rank| rank.optimizer_bytes * dp_size).sum();
                let rounding = 8 * 16 * topology.world() as u64;
                let exact = one[0].optimizer_bytes;
                assert!(
                    world >= exact && world <= exact + rounding,
                    "{topology:?} {schedule}: {world} {exact}"
                );
            }
        }
    }

    /// The published layout, 16 x 64 x 2 ranks: 3.27e9 parameters per rank of four layers twice, 13.1 GB of
    /// f32 gradients, 2.9 GB of optimizer state at 8 bytes, experts over 4 copies and the rest over 256.
    #[test]
    fn deepseek_v3_needs_what_was_derived_for_its_layout() {
        let config = builtin::model("deepseek-v3").unwrap();
        let topology = Topology { pipeline: 16, expert: 64, data: 2 };
        let rank = &memory(&config, topology, ScheduleKind::Dualpipe)[7];
        let common = 8 * cost::layer_parameters(&config, LayerKind::Moe).common;
        let routed = 8 * 4 * 3 * 7168 * 2048;
        assert_eq!(rank.parameters, common + routed + 8 * 256);
        assert_eq!(rank.optimizer_bytes, 8 * (common / 256 + routed / 4));
        assert_eq!([rank.gradient_bytes / 10_u64.pow(8), rank.optimizer_bytes / 10_u64.pow(7)], [130, 287]);
    }

    #[test]
    fn activations_follow_the_shapes() {
        let config = builtin::model("small").unwrap();
        let topology = Topology { pipeline: 1, expert: 4, data: 1 };
        // Per token: attention 3 x 256 + 128 + 64 + 16 + 4 x (2 x 48 + 2 x 32 + 1) in 6 layers, one dense FFN of
        // 1280, five mixtures of one shared and four routed experts of 256, 16 scores, 4 rows of 256; the head's
        // input and gradient.
        let attention = 6 * (768 + 128 + 64 + 16 + 4 * 161);
        let mixtures = 5 * (2 * 256 + 16 + 8 + 4 * 256 + 8 * 256);
        let values = attention + 2 * 1280 + mixtures + 2 * 256;
        let rank = &memory(&config, topology, ScheduleKind::OneFOneB)[0];
        assert_eq!(rank.activation_bytes, 3 * 512 * 4 * values);
    }
}
