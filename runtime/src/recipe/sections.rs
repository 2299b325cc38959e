//! The typed sections of a recipe. The one-line docs of the fields are those of [`KEYS`](super::KEYS): a test
//! holds them equal. Knows nothing of how they are read.

use serde::{Deserialize, Serialize};

use super::step_table::StepTable;
use crate::schedule::ScheduleKind;
use crate::topology::Topology;

/// `[model]`: what is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A built-in model (tiny, small, base, deepseek-v3, deepseek-v2-lite, moonlight) or the path of an HF config.json; other keys here replace its own.
    pub config: String,
    /// fresh: weights are drawn; or the HF directory whose weights training starts from.
    pub init: String,
}

/// What `model.init` is where weights are drawn.
pub const FRESH: &str = "fresh";

impl ModelSection {
    /// The directory that the weights come from, if they are not drawn.
    pub fn init_dir(&self) -> Option<&std::path::Path> {
        (self.init != FRESH).then(|| self.init.as_ref())
    }
}

/// `[parallel]`: over how many ranks, and in which order they work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParallelSection {
    /// Pipeline ranks.
    pub pipeline: usize,
    /// Expert ranks: the routed experts are spread over them.
    pub expert: usize,
    /// Expert ranks that share a node: all-to-alls of more of them go in two hops, across nodes and inside; all share one if 0.
    pub expert_ranks_per_node: usize,
    /// Data ranks: copies of everything else.
    pub data: usize,
    #[serde(serialize_with = "schedule_alone")]
    /// Order of the work in the pipeline: dualpipe, dualpipev, 1f1b, zb1p or interleaved.
    pub schedule: ScheduleKind,
    /// Stages of each pipeline rank under interleaved.
    pub virtual_stages: usize,
    /// A plan of one's own in place of the schedule's: a file in the text form of plans, or a table (.csv); none if empty.
    pub plan: String,
    /// How layers are spread over the pipeline stages: balanced by FLOP (head, MTP and dense layers counted), even, or a list of their numbers.
    pub stages: Stages,
    /// Whether exchanges, sends and the update's collectives run beside computations; the same bits without.
    pub overlap: bool,
    /// Threads of a rank's arithmetic.
    pub threads_per_rank: usize,
}

/// `[elastic]`: on which layouts a job of a cluster may run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ElasticSection {
    /// In a cluster: the only layouts a job may have, each [pipeline, expert, data], its own among them; none: all that the recipe can be run on.
    pub layouts: Vec<[usize; 3]>,
}

impl ElasticSection {
    /// The named layouts, in the order of the recipe.
    pub fn named(&self) -> impl Iterator<Item = Topology> + '_ {
        self.layouts.iter().map(|&[pipeline, expert, data]| Topology { pipeline, expert, data })
    }
}

/// How layers are spread over the pipeline stages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stages {
    /// By a rule.
    Rule(StageRule),
    /// Layers of each stage in order, embedding, head and multi-token prediction aside. None at all: balanced, as recipes had it first.
    Layers(Vec<usize>),
}

/// A rule by which layers are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageRule {
    /// So that the costliest stage is as cheap as can be.
    Balanced,
    /// As many layers in each stage as in any other, but for one.
    Even,
}

impl Stages {
    /// The layers of each stage, where the recipe lists them.
    pub fn layers(&self) -> &[usize] {
        match self {
            Stages::Rule(_) => &[],
            Stages::Layers(layers) => layers,
        }
    }
}

/// A recipe says in another key how many stages an interleaved schedule gives each rank.
fn schedule_alone<S: serde::Serializer>(schedule: &ScheduleKind, serializer: S) -> Result<S::Ok, S::Error> {
    let named = match schedule {
        ScheduleKind::Interleaved(_) => ScheduleKind::Interleaved(2),
        other => *other,
    };
    named.serialize(serializer)
}

/// `[training]`: how long and in which portions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSection {
    /// Optimizer updates.
    pub steps: usize,
    /// Tokens per sequence.
    pub sequence_length: usize,
    /// Sequences per step, over all ranks.
    pub global_batch_size: usize,
    /// Sequences per micro-batch. Their number: global / (micro x expert x data), with both directions.
    pub micro_batch_size: usize,
    /// Sequences per step at the start, when the batch ramps up.
    pub ramp_start_batch_size: usize,
    /// Tokens over which the batch grows to its full size; 0: no ramp.
    pub ramp_tokens: u64,
    /// Sequences a validation reads, at the end and with validate.every also before; 0: no validation.
    pub validation_sequences: usize,
    /// Standard deviation of fresh weights.
    pub init_std: f64,
    /// Decay per step of a moving average of the weights, in host memory and checkpoints (export --ema, eval --ema); 0: none.
    pub ema_decay: f64,
    /// Seed of the fresh weights and of the order of the sequences.
    pub seed: u64,
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
    /// What decays: all, or matrices (tensors of more than one dimension).
    pub decay: Decay,
    /// Largest global norm of the gradients; longer ones are scaled down to it.
    pub clip_norm: f64,
}

/// Which tensors decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Every tensor.
    All,
    /// Tensors of more than one dimension.
    Matrices,
}

/// `[precision]`: in which formats it is computed (report section 3.3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecisionSection {
    /// What the other keys here are by default: f32, bf16, or fp8, the mixture of the report.
    pub recipe: PrecisionRecipe,
    /// Factors of the products of linear layers, and what is kept of their inputs: f32, bf16 or fp8.
    pub linear: NumberFormat,
    /// Residual stream, attention, embedding, head, and what passes between pipeline ranks: f32 or bf16.
    pub activations: NumberFormat,
    /// Tokens' rows on their way to the experts: f32, bf16 or fp8.
    pub dispatch: NumberFormat,
    /// Experts' sums on their way back, and gradients either way: f32 or bf16.
    pub combine: NumberFormat,
    /// What is kept of the input of the projection behind attention: f32, bf16 or e5m6.
    pub attention_output: NumberFormat,
    /// What is kept of the input of SwiGLU: f32, bf16 or fp8.
    pub swiglu_input: NumberFormat,
    /// Both moments of AdamW: f32 or bf16.
    pub moments: NumberFormat,
    /// Whether moments in bf16 are rounded at random in proportion, by seed, step and element, and not to the nearest.
    pub stochastic_rounding: bool,
    /// How products of fp8 are added up: promoted to f32 every 128 values; or tensor-core, a slow study of 14 bits without promotion.
    pub accumulate: Accumulation,
    /// What shares a scale in gradients in fp8: a tile of 1 x 128; or a block of 128 x 128, a study of what the report warns of.
    pub gradient_scales: GradientScales,
}

impl PrecisionSection {
    /// Every key the same but `recipe` and `moments`, which are f32.
    pub fn uniform(format: NumberFormat) -> Self {
        PrecisionSection {
            recipe: PrecisionRecipe::F32,
            linear: format,
            activations: format,
            dispatch: format,
            combine: format,
            attention_output: format,
            swiglu_input: format,
            moments: NumberFormat::F32,
            stochastic_rounding: false,
            accumulate: Accumulation::Promoted,
            gradient_scales: GradientScales::Tile,
        }
    }

    /// The format of the products of linear layers: BF16 for all that is narrower.
    pub fn products(&self) -> NumberFormat {
        if self.linear == NumberFormat::F32 { NumberFormat::F32 } else { NumberFormat::Bf16 }
    }
}

/// How products of FP8 are added up (report section 3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accumulation {
    /// The sum of each 128 is scaled and added in F32.
    Promoted,
    /// As tensor cores do by themselves: 32 products at a time, with 14 bits.
    TensorCore,
}

/// What shares a scale in gradients in FP8 (report appendix B.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientScales {
    /// 1 x 128 values.
    Tile,
    /// 128 x 128 values.
    Block,
}

/// A precision recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionRecipe {
    /// All in single precision.
    F32,
    /// Activations and factors in BF16.
    Bf16,
    /// The report's: linear layers in FP8.
    Fp8,
}

/// How numbers of one kind are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NumberFormat {
    /// Single precision.
    F32,
    /// BF16.
    Bf16,
    /// E4M3 with a scale for each tile.
    Fp8,
    /// E5M6 with a power of two for each tile.
    E5m6,
}

/// `[memory]`: what is computed again instead of being kept (report section 3.2.3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySection {
    /// What the backward pass computes again, to the same bits: norms, mla-up-projections, swiglu.
    pub recompute: Vec<Recomputed>,
}

/// Outputs that need not be kept for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recomputed {
    /// Of all norms.
    Norms,
    /// Of the projections from MLA's latents to queries, keys and values.
    MlaUpProjections,
    /// Of SwiGLU.
    Swiglu,
}

/// `[lr]`: the learning rate. Linear warm-up by steps; then constant, half a cosine, constants by tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LrSection {
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of the linear warm-up.
    pub warmup_steps: usize,
    /// Tokens until which the peak is held, warm-up included.
    pub constant_tokens: u64,
    /// Tokens of the half cosine from the peak down to the floor.
    pub cosine_tokens: u64,
    /// Learning rate after the half cosine: a number, or a list of { from_tokens, value }.
    pub floor: StepTable,
}

/// `[balance]`: what keeps the routed experts evenly loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceSection {
    /// Change of a gate bias per step: a number, or a list of { from_tokens, value }; 0: none.
    pub bias_speed: StepTable,
    /// Weight of the sequence-wise balance loss; 0: none.
    pub sequence_alpha: f64,
    /// Weight of the balance loss over each micro-batch; 0: none.
    pub batch_alpha: f64,
}

/// `[mtp]`: multi-token prediction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MtpSection {
    /// Weight of its loss: a number, or a list of { from_tokens, value }.
    pub weight: StepTable,
}

/// `[data]`: what is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Text, JSONL, JSON and Parquet files (also in gzip, zstd, bzip2), folders of them, prepared folders; none: our dependencies' Rust source.
    pub paths: Vec<String>,
    /// The field of JSON objects, or the Parquet column, that holds the text.
    pub field: String,
    /// Files and folders to validate on, read whole; none: what is held back of data.paths.
    pub validation: Vec<String>,
    /// Share of the text held back where data.validation is empty; prepared folders have held back theirs.
    pub validation_share: f64,
    /// Shares of the paths in the order of training, one for each; none: all paths are one source.
    pub weights: Vec<u32>,
    /// Whether tokens see the documents before their own in a sequence.
    pub attend_across_documents: bool,
    /// Share of the documents rearranged to prefix, suffix, middle, to be filled in.
    pub fim_rate: f64,
}

/// `[tokenizer]`: how text becomes tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerSection {
    /// An HF tokenizer.json; empty: that of a prepared folder, or of model.init, or one token per byte.
    pub path: String,
    /// Its token that ends a document; empty: found among the names that published tokenizers have for it.
    pub end_of_document: String,
}

/// Token that separates documents under the byte tokenizer: the first id that is no byte.
pub const END_OF_DOCUMENT: usize = 256;

/// Number of tokens of the byte tokenizer.
pub const BYTE_TOKENS: usize = END_OF_DOCUMENT + 1;

/// `[validate]`: measuring on validation sequences while it trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidateSection {
    /// Steps between validations while it trains; 0: only at the end.
    pub every: u64,
    /// Validations in a row without a lower loss after which the run ends; 0: it makes all its steps.
    pub patience: u64,
}

/// `[sample]`: what the model writes, to see what it has learnt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSection {
    /// Steps between samples while it trains, each of a checkpoint of that step; 0: only at the end. In one process.
    pub every: u64,
    /// What samples begin with; empty: the first words of the text that is held out.
    pub prompt: String,
}

/// `[checkpoint]`: what is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 0: only where the run ends or is interrupted.
    pub every: u64,
    /// How many of the newest checkpoints are kept.
    pub keep: usize,
    /// Whether the checkpoint with the lowest validation loss is kept as well, where validate.every is set.
    pub keep_best: bool,
    /// A prefix in an object store where checkpoints are committed, as s3://BUCKET/RUN; empty: in the run's folder. In one process.
    pub store: String,
    /// Whether the run ends by writing the weights as an HF directory.
    pub save_model: bool,
    /// In a cluster: whether two workers hold a rank's latest two states in memory: 48 bytes per parameter, 32 with moments in bf16; 16 more with an average.
    pub in_memory: bool,
}

/// `[watch]`: the action on steps whose numbers are out of bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchSection {
    /// Action on a step that is not finite: stop, skip the batch, or rollback to the last checkpoint.
    pub on_nan: OnFault,
    /// Action on a spike of loss or gradient norm: off, warn, stop, skip or rollback.
    pub on_spike: OnSpike,
    /// A spike is more standard deviations than this above the median, both estimated robustly.
    pub spike_factor: f64,
    /// Updates in the window of the median; no spike is detected before it is full.
    pub spike_window: usize,
    /// Batches in a row that may be skipped; the next one stops the run.
    pub max_skips: u64,
    /// Warn when a gate leaves an expert without tokens for this many steps; 0: never.
    pub collapse_steps: u64,
}

/// The action taken on a step that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFault {
    /// The run ends.
    Stop,
    /// No update is made; the next batch follows.
    Skip,
    /// The run goes back to the last committed checkpoint.
    Rollback,
}

/// The action taken on a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnSpike {
    /// Nothing; spikes are not detected.
    Off,
    /// The update is made, with a warning.
    Warn,
    /// The run ends.
    Stop,
    /// No update is made; the next batch follows.
    Skip,
    /// The run goes back to the last committed checkpoint.
    Rollback,
}

/// `[log]`: what is said while it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSection {
    /// Least severe messages shown: error, warn, info, debug or trace.
    pub level: LogLevel,
    /// Whether a run of train writes event files of TensorBoard too, into its folder.
    pub tensorboard: bool,
}

/// Severity of a message: of the later ones there are more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// The run cannot continue.
    Error,
    /// Something the user should know.
    Warn,
    /// What happens.
    Info,
    /// How it happens.
    Debug,
    /// Every message.
    Trace,
}
