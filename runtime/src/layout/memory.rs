//! What a layout asks of each rank's memory: weights, gradients, optimizer state, what waits for its backward pass
//! (`activations`), and what operations take while they run.

mod activations;

use activations::{Peak, Rows, peak};

use crate::cost::{self, BucketElements};
use crate::model_config::ModelConfig;
use crate::recipe::{MemorySection, NumberFormat, PrecisionSection};
use crate::schedule::program::{LayerKind, Program, StageLayout};
use crate::schedule::{Bucket, RankFigures, buckets};
use crate::topology::Topology;

/// What the memory of the ranks follows from.
#[derive(Clone, Copy, Debug)]
pub struct MemoryQuery<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// The axes.
    pub topology: Topology,
    /// Nodes that all-to-alls in two hops cross; 1 with one hop.
    pub expert_nodes: usize,
    /// The stages, as [`split_layers`](super::split_layers) makes them.
    pub stages: &'a [StageLayout],
    /// `placement[rank]` lists the stages of each pipeline rank.
    pub placement: &'a [Vec<usize>],
    /// Tokens of a micro-batch.
    pub micro_batch_tokens: usize,
    /// Micro-batches of a step that a pipeline works on.
    pub micro_batches: usize,
    /// What each pipeline rank runs in a step.
    pub programs: &'a [Program],
    /// In which formats it is computed.
    pub precision: &'a PrecisionSection,
    /// What is computed again.
    pub memory: &'a MemorySection,
    /// Whether there is a moving average of the weights.
    pub has_average: bool,
}

const F32_BYTES: u64 = 4;
const MOMENTS: u64 = 2;

/// Parameters and memory of each pipeline rank, in steady state; all ranks at one pipeline coordinate need
/// the same.
///
/// Weights lie in the format that they are computed with, gradients in f32. The optimizer's two moments take 8 bytes, and masters of
/// weights in a narrower format than f32 another 4, for the parameters that fall to the rank when every replica group shares its
/// own out evenly (ZeRO-1). Activations are the most that lies between two operations of the rank's program: what waits for a
/// backward pass or for a weight gradient, and gradients on their way to other ranks; working memory is what comes on top while an
/// operation runs, and the step's tokens. The peak is at most the sum of these: where a step has few micro-batches some gradients
/// are made only when activations have been freed. Not counted is what lies in the memory of the host: copies of the state, and a checkpoint
/// that is still being written when the next update begins; the moving average of the rank's shard has a figure of its own.
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
        let Peak { live, running, all } = self.peak(rank);
        let [gradients, optimizer] = [
            F32_BYTES * num_trained,
            MOMENTS * weight_bytes(self.precision.moments, shard) + F32_BYTES * masters,
        ];
        let working = running - live + self.batch_bytes();
        RankFigures {
            rank,
            stages: self.placement[rank].clone(),
            layers: stages().map(stage_text).collect::<Vec<_>>().join("; "),
            parameters: num_trained + gate_biases,
            weight_bytes: weights,
            gradient_bytes: gradients,
            optimizer_bytes: optimizer,
            activation_bytes: live,
            working_bytes: working,
            device_bytes: weights + optimizer + all + self.batch_bytes(),
            host_bytes: if self.has_average { F32_BYTES * (shard + gate_biases) } else { 0 },
        }
    }

    fn peak(&self, rank: usize) -> Peak {
        let rows = Rows {
            config: self.config,
            precision: self.precision,
            memory: self.memory,
            expert_ranks: self.topology.expert,
            expert_nodes: self.expert_nodes,
            micro_batch_tokens: self.micro_batch_tokens,
        };
        let held = &self.placement[rank];
        let buckets = buckets(self.placement, self.stages, &self.topology);
        let shared = |bucket: &&Bucket| bucket.copies > 1 && bucket.positions.contains(&rank);
        // A bucket of several stages goes with the first that is here.
        let goes_with =
            |bucket: &Bucket| bucket.stages.iter().copied().filter(|stage| held.contains(stage)).min();
        let elements = |bucket: &Bucket| {
            cost::bucket_elements(bucket, self.config, self.stages, &self.topology, self.precision).all()
        };
        // Once packed for the other ranks, once as they send it.
        let reduced = |stage: usize| {
            let buckets = buckets.iter().filter(shared).filter(|bucket| goes_with(bucket) == Some(stage));
            2 * F32_BYTES * buckets.map(elements).sum::<u64>()
        };
        peak(&self.programs[rank], &rows, self.stages, reduced)
    }

    /// Ids, targets and their weights for both losses, and the rotations of all micro-batches.
    fn batch_bytes(&self) -> u64 {
        let per_token = F32_BYTES * (5 + self.config.qk_rope_head_dim as u64);
        (self.micro_batches * self.micro_batch_tokens) as u64 * per_token
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
    use crate::recipe::Recomputed;
    use crate::schedule::{Mode, ScheduleKind, lower};

    fn memory(config: &ModelConfig, topology: Topology, schedule: ScheduleKind) -> Vec<RankFigures> {
        let stages = split_layers(config, schedule.stages(topology.pipeline), 256).unwrap();
        let (plan, _) = schedule.plan(topology.pipeline, 2 * topology.pipeline, Mode::Train).unwrap();
        rank_figures(&MemoryQuery {
            config,
            topology,
            expert_nodes: 1,
            stages: &stages,
            placement: &plan.placement,
            micro_batch_tokens: 512,
            micro_batches: plan.micro_batches,
            programs: &lower(&plan, Some(&stages), topology.expert),
            precision: &PrecisionSection::uniform(NumberFormat::F32),
            memory: &MemorySection { recompute: vec![Recomputed::Norms, Recomputed::Swiglu] },
            has_average: true,
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
                assert_eq!(rank.host_bytes, 4 * rank.parameters);
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
        // Per token when the head has run: attention 2 x 256 + 128 + 64 + 16 + 4 x (2 x 48 + 2 x 32 + 1) in 6 layers, one dense FFN of
        // 1280, five mixtures of one shared and four routed experts of 256, 16 scores, 8 ids and weights, 4 rows of 256, 4 x 3
        // numbers that order pairs and 4 + 4 that lead rows and pairs home; the head's input and gradient.
        let attention = 6 * (512 + 128 + 64 + 16 + 4 * 161);
        let mixtures = 5 * (2 * 256 + 16 + 8 + 4 * 256 + 8 * 256 + 12 + 8);
        let values = attention + 2 * 1280 + mixtures + 2 * 256;
        let rank = &memory(&config, topology, ScheduleKind::OneFOneB)[0];
        // What the gradients of the last layer's experts leave for their weights is more than what has been freed by then.
        let kept = 512 * 4 * values;
        assert!(
            rank.activation_bytes >= kept && rank.activation_bytes < kept + 512 * 4 * 8 * 1024,
            "{kept} {rank:?}"
        );
    }
}
