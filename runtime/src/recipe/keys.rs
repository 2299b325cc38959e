//! Every key of a recipe: its type and range, its default, and what it means, in the order they are written
//! down.
//!
//! The one table that checks, fills, documents and prints recipes. The sections hold the same keys as typed
//! fields.

use toml::Value;

/// One key of a recipe.
#[derive(Clone, Copy, Debug)]
pub struct KeyDoc {
    /// `section.key`.
    pub path: &'static str,
    /// What it may be.
    pub kind: KeyKind,
    /// What it is where the recipe does not say.
    pub default: KeyDefault,
    /// What it means, in one line.
    pub doc: &'static str,
}

/// Type and range of a value.
#[derive(Clone, Copy, Debug)]
pub enum KeyKind {
    /// A whole number from the first to the second.
    Count(u64, u64),
    /// A finite number in a range.
    Number(NumberRange),
    /// A number, 0 or more, or a table of them over tokens.
    Steps,
    /// True or false.
    Flag,
    /// One of a few names.
    Choice(&'static [&'static str]),
    /// A list of some of a few names, each once.
    Choices(&'static [&'static str]),
    /// Any text but the empty one.
    Text,
    /// Any text, the empty one too.
    OptionalText,
    /// A list of texts.
    Texts,
    /// A list of whole numbers from 1 to the bound.
    Counts(u64),
    /// One of a few names, or such a list.
    ChoiceOrCounts(&'static [&'static str], u64),
    /// A list of [pipeline, expert, data], each a whole number from 1 to the bound.
    Layouts(u64),
}

/// NumberRange of a number.
#[derive(Clone, Copy, Debug)]
pub enum NumberRange {
    /// Above 0.
    Positive,
    /// 0 or more.
    NonNegative,
    /// From 0 to below 1.
    BelowOne,
    /// From 0 to 1.
    Share,
}

/// What a key is where the recipe does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyDefault {
    /// The recipe must say.
    Required,
    /// A TOML value.
    Value(&'static str),
    /// Follows from other keys or from the model.
    Derived(&'static str),
}

/// Upper bounds beyond any run, low enough that steps x sequences x tokens stay within 64 bits.
const AXIS: u64 = 1 << 12;
const SEQUENCES: u64 = 1 << 20;
const TOKENS_PER_SEQUENCE: u64 = 1 << 20;
const STEPS: u64 = 1 << 23;
const ANY: u64 = i64::MAX as u64;

/// Most layouts that a recipe names: each is checked against the model.
const MAX_LAYOUTS: usize = 256;

use KeyDefault::{Derived, Required, Value as Fixed};
use KeyKind::{
    Choice, ChoiceOrCounts, Choices, Count, Counts, Flag, Layouts, Number, OptionalText, Steps, Text, Texts,
};
use NumberRange::{BelowOne, NonNegative, Positive, Share};

const fn key(path: &'static str, kind: KeyKind, default: KeyDefault, doc: &'static str) -> KeyDoc {
    KeyDoc { path, kind, default, doc }
}

/// The keys, section by section.
#[rustfmt::skip]
pub const KEYS: &[KeyDoc] = &[
    key("model.config", Text, Required,
        "A built-in model (tiny, small, base, deepseek-v3, deepseek-v2-lite, moonlight) or the path of an HF config.json; other keys here replace its own."),
    key("model.init", Text, Fixed("\"fresh\""),
        "fresh: weights are drawn; or the HF directory whose weights training starts from."),
    key("parallel.pipeline", Count(1, AXIS), Fixed("1"), "Pipeline ranks."),
    key("parallel.expert", Count(1, AXIS), Fixed("1"),
        "Expert ranks: the routed experts are spread over them."),
    key("parallel.expert_ranks_per_node", Count(0, AXIS), Fixed("0"),
        "Expert ranks that share a node: all-to-alls of more of them go in two hops, across nodes and inside; all share one if 0."),
    key("parallel.data", Count(1, AXIS), Fixed("1"), "Data ranks: copies of everything else."),
    key("parallel.schedule", Choice(&["dualpipe", "dualpipev", "1f1b", "zb1p", "interleaved"]), Fixed("\"1f1b\""),
        "Order of the work in the pipeline: dualpipe, dualpipev, 1f1b, zb1p or interleaved."),
    key("parallel.virtual_stages", Count(2, 1024), Fixed("2"), "Stages of each pipeline rank under interleaved."),
    key("parallel.plan", OptionalText, Fixed("\"\""),
        "A plan of one's own in place of the schedule's: a file in the text form of plans, or a table (.csv); none if empty."),
    key("parallel.stages", ChoiceOrCounts(&["balanced", "even"], AXIS), Fixed("\"balanced\""),
        "How layers are spread over the pipeline stages: balanced by FLOP (head, MTP and dense layers counted), even, or a list of their numbers."),
    key("parallel.overlap", Flag, Fixed("true"),
        "Whether exchanges, sends and the update's collectives run beside computations; the same bits without."),
    key("parallel.threads_per_rank", Count(1, 1024), Fixed("1"), "Threads of a rank's arithmetic."),
    key("elastic.layouts", Layouts(AXIS), Fixed("[]"),
        "In a cluster: the only layouts a job may have, each [pipeline, expert, data], its own among them; none: all that the recipe can be run on."),
    key("training.steps", Count(1, STEPS), Required, "Optimizer updates."),
    key("training.sequence_length", Count(2, TOKENS_PER_SEQUENCE), Required, "Tokens per sequence."),
    key("training.global_batch_size", Count(1, SEQUENCES), Required, "Sequences per step, over all ranks."),
    key("training.micro_batch_size", Count(1, SEQUENCES), Required,
        "Sequences per micro-batch. Their number: global / (micro x expert x data), with both directions."),
    key("training.ramp_start_batch_size", Count(0, SEQUENCES), Fixed("0"),
        "Sequences per step at the start, when the batch ramps up."),
    key("training.ramp_tokens", Count(0, ANY), Fixed("0"),
        "Tokens over which the batch grows to its full size; 0: no ramp."),
    key("training.validation_sequences", Count(0, SEQUENCES), Fixed("64"),
        "Sequences a validation reads, at the end and with validate.every also before; 0: no validation."),
    key("training.init_std", Number(NonNegative), Derived("the model's initializer_range"),
        "Standard deviation of fresh weights."),
    key("training.ema_decay", Number(BelowOne), Fixed("0.0"),
        "Decay per step of a moving average of the weights, in host memory and checkpoints (export --ema, eval --ema); 0: none."),
    key("training.seed", Count(0, ANY), Fixed("1"),
        "Seed of the fresh weights and of the order of the sequences."),
    key("optimizer.beta1", Number(BelowOne), Fixed("0.9"), "Decay of the first moment."),
    key("optimizer.beta2", Number(BelowOne), Fixed("0.95"), "Decay of the second moment."),
    key("optimizer.epsilon", Number(Positive), Fixed("1e-8"), "Added to the root of the second moment."),
    key("optimizer.weight_decay", Number(NonNegative), Fixed("0.1"),
        "Decoupled weight decay, per unit of learning rate."),
    key("optimizer.decay", Choice(&["all", "matrices"]), Fixed("\"matrices\""),
        "What decays: all, or matrices (tensors of more than one dimension)."),
    key("optimizer.clip_norm", Number(Positive), Fixed("1.0"),
        "Largest global norm of the gradients; longer ones are scaled down to it."),
    key("precision.recipe", Choice(&["f32", "bf16", "fp8"]), Fixed("\"f32\""),
        "What the other keys here are by default: f32, bf16, or fp8, the mixture of the report."),
    key("precision.linear", Choice(&["f32", "bf16", "fp8"]), Derived("precision.recipe"),
        "Factors of the products of linear layers, and what is kept of their inputs: f32, bf16 or fp8."),
    key("precision.activations", Choice(&["f32", "bf16"]), Derived("f32 with recipe f32, else bf16"),
        "Residual stream, attention, embedding, head, and what passes between pipeline ranks: f32 or bf16."),
    key("precision.dispatch", Choice(&["f32", "bf16", "fp8"]), Derived("precision.recipe"),
        "Tokens' rows on their way to the experts: f32, bf16 or fp8."),
    key("precision.combine", Choice(&["f32", "bf16"]), Derived("f32 with recipe f32, else bf16"),
        "Experts' sums on their way back, and gradients either way: f32 or bf16."),
    key("precision.attention_output", Choice(&["f32", "bf16", "e5m6"]), Derived("e5m6 with recipe fp8, else the recipe"),
        "What is kept of the input of the projection behind attention: f32, bf16 or e5m6."),
    key("precision.swiglu_input", Choice(&["f32", "bf16", "fp8"]), Derived("precision.recipe"),
        "What is kept of the input of SwiGLU: f32, bf16 or fp8."),
    key("precision.moments", Choice(&["f32", "bf16"]), Derived("f32 with recipe f32, else bf16"),
        "Both moments of AdamW: f32 or bf16."),
    key("precision.stochastic_rounding", Flag, Fixed("false"),
        "Whether moments in bf16 are rounded at random in proportion, by seed, step and element, and not to the nearest."),
    key("precision.accumulate", Choice(&["promoted", "tensor-core"]), Fixed("\"promoted\""),
        "How products of fp8 are added up: promoted to f32 every 128 values; or tensor-core, a slow study of 14 bits without promotion."),
    key("precision.gradient_scales", Choice(&["tile", "block"]), Fixed("\"tile\""),
        "What shares a scale in gradients in fp8: a tile of 1 x 128; or a block of 128 x 128, a study of what the report warns of."),
    key("memory.recompute", Choices(&["norms", "mla-up-projections", "swiglu"]), Fixed("[\"norms\", \"swiglu\"]"),
        "What the backward pass computes again, to the same bits: norms, mla-up-projections, swiglu."),
    key("lr.peak", Number(Positive), Required, "Highest learning rate."),
    key("lr.warmup_steps", Count(0, STEPS), Fixed("0"), "Steps of the linear warm-up."),
    key("lr.constant_tokens", Count(0, ANY), Fixed("0"),
        "Tokens until which the peak is held, warm-up included."),
    key("lr.cosine_tokens", Count(0, ANY), Fixed("0"),
        "Tokens of the half cosine from the peak down to the floor."),
    key("lr.floor", Steps, Derived("lr.peak: no decay"),
        "Learning rate after the half cosine: a number, or a list of { from_tokens, value }."),
    key("balance.bias_speed", Steps, Derived("0.001, or 0 where gates have no bias"),
        "Change of a gate bias per step: a number, or a list of { from_tokens, value }; 0: none."),
    key("balance.sequence_alpha", Number(NonNegative), Fixed("0.0001"),
        "Weight of the sequence-wise balance loss; 0: none."),
    key("balance.batch_alpha", Number(NonNegative), Fixed("0.0"),
        "Weight of the balance loss over each micro-batch; 0: none."),
    key("mtp.weight", Steps, Derived("0.3, or 0 where the model has no multi-token prediction"),
        "Weight of its loss: a number, or a list of { from_tokens, value }."),
    key("data.paths", Texts, Fixed("[]"),
        "Text, JSONL, JSON and Parquet files (also in gzip, zstd, bzip2), folders of them, prepared folders; none: our \
         dependencies' Rust source."),
    key("data.field", Text, Fixed("\"text\""), "The field of JSON objects, or the Parquet column, that holds the text."),
    key("data.validation", Texts, Fixed("[]"),
        "Files and folders to validate on, read whole; none: what is held back of data.paths."),
    key("data.validation_share", Number(BelowOne), Fixed("0.1"),
        "Share of the text held back where data.validation is empty; prepared folders have held back theirs."),
    key("data.weights", Counts(1000), Fixed("[]"),
        "Shares of the paths in the order of training, one for each; none: all paths are one source."),
    key("data.attend_across_documents", Flag, Fixed("true"),
        "Whether tokens see the documents before their own in a sequence."),
    key("data.fim_rate", Number(Share), Fixed("0.0"),
        "Share of the documents rearranged to prefix, suffix, middle, to be filled in."),
    key("tokenizer.path", OptionalText, Fixed("\"\""),
        "An HF tokenizer.json; empty: that of a prepared folder, or of model.init, or one token per byte."),
    key("tokenizer.end_of_document", OptionalText, Fixed("\"\""),
        "Its token that ends a document; empty: found among the names that published tokenizers have for it."),
    key("validate.every", Count(0, STEPS), Fixed("0"),
        "Steps between validations while it trains; 0: only at the end."),
    key("validate.patience", Count(0, STEPS), Fixed("0"),
        "Validations in a row without a lower loss after which the run ends; 0: it makes all its steps."),
    key("sample.every", Count(0, STEPS), Fixed("0"),
        "Steps between samples while it trains, each of a checkpoint of that step; 0: only at the end. In one process."),
    key("sample.prompt", OptionalText, Fixed("\"\""),
        "What samples begin with; empty: the first words of the text that is held out."),
    key("checkpoint.every", Count(0, STEPS), Fixed("100"),
        "Steps between checkpoints; 0: only where the run ends or is interrupted."),
    key("checkpoint.keep", Count(1, 1 << 20), Fixed("2"), "How many of the newest checkpoints are kept."),
    key("checkpoint.keep_best", Flag, Fixed("true"),
        "Whether the checkpoint with the lowest validation loss is kept as well, where validate.every is set."),
    key("checkpoint.store", OptionalText, Fixed("\"\""),
        "A prefix in an object store where checkpoints are committed, as s3://BUCKET/RUN; empty: in the run's folder. In one process."),
    key("checkpoint.save_model", Flag, Fixed("true"),
        "Whether the run ends by writing the weights as an HF directory."),
    key("checkpoint.in_memory", Flag, Fixed("true"),
        "In a cluster: whether two workers hold a rank's latest two states in memory: 48 bytes per parameter, 32 with moments in bf16; 16 more with an average."),
    key("watch.on_nan", Choice(&["stop", "skip", "rollback"]), Fixed("\"stop\""),
        "Action on a step that is not finite: stop, skip the batch, or rollback to the last checkpoint."),
    key("watch.on_spike", Choice(&["off", "warn", "stop", "skip", "rollback"]), Fixed("\"warn\""),
        "Action on a spike of loss or gradient norm: off, warn, stop, skip or rollback."),
    key("watch.spike_factor", Number(Positive), Fixed("20.0"),
        "A spike is more standard deviations than this above the median, both estimated robustly."),
    key("watch.spike_window", Count(2, 1 << 16), Fixed("32"),
        "Updates in the window of the median; no spike is detected before it is full."),
    key("watch.max_skips", Count(1, STEPS), Fixed("3"),
        "Batches in a row that may be skipped; the next one stops the run."),
    key("watch.collapse_steps", Count(0, STEPS), Fixed("50"),
        "Warn when a gate leaves an expert without tokens for this many steps; 0: never."),
    key("log.level", Choice(&["error", "warn", "info", "debug", "trace"]), Fixed("\"info\""),
        "Least severe messages shown: error, warn, info, debug or trace."),
    key("log.tensorboard", Flag, Fixed("false"),
        "Whether a run of train writes event files of TensorBoard too, into its folder."),
];

impl KeyDoc {
    /// Section and key.
    pub fn parts(&self) -> (&'static str, &'static str) {
        self.path.split_once('.').expect("a path is section.key")
    }

    /// A valid value: the default, or where there is none the least there is. Substitutes for a faulty value
    /// while the rest of a recipe is checked.
    pub(super) fn stand_in(&self) -> Value {
        match (self.default, self.kind) {
            (Fixed(text), _) => text.parse().expect("a default is a TOML value: a test reads them all"),
            (_, Count(least, _)) => Value::Integer(least as i64),
            (_, Number(_) | Steps) => Value::Float(0.0),
            (_, Flag) => Value::Boolean(false),
            (_, Choice(range_text) | ChoiceOrCounts(range_text, _)) => {
                Value::String(range_text[0].to_string())
            }
            (_, Text | OptionalText) => Value::String(String::new()),
            (_, Texts | Counts(_) | Choices(_) | Layouts(_)) => Value::Array(Vec::new()),
        }
    }
}

impl NumberRange {
    fn contains(self, value: f64) -> bool {
        value.is_finite()
            && match self {
                Positive => value > 0.0,
                NonNegative => value >= 0.0,
                BelowOne => (0.0..1.0).contains(&value),
                Share => (0.0..=1.0).contains(&value),
            }
    }
}

impl KeyKind {
    /// The type and range as text.
    pub fn range_text(self) -> String {
        match self {
            Count(least, ANY) => format!("a whole number, {least} or more"),
            Count(least, most) => format!("a whole number from {least} to {most}"),
            Number(Positive) => "a number above 0".to_string(),
            Number(NonNegative) => "a number, 0 or more".to_string(),
            Number(BelowOne) => "a number from 0 to below 1".to_string(),
            Number(Share) => "a number from 0 to 1".to_string(),
            Steps => "a number, 0 or more, or a list of { from_tokens, value } that starts at 0 and rises"
                .to_string(),
            Flag => "true or false".to_string(),
            Choice([only]) => format!("\"{only}\""),
            Choice(range_text) => format!("one of \"{}\"", range_text.join("\", \"")),
            Choices(names) => format!("a list of some of \"{}\", each once", names.join("\", \"")),
            Text | OptionalText => "a text".to_string(),
            Texts => "a list of texts".to_string(),
            Counts(most) => format!("a list of whole numbers from 1 to {most}"),
            ChoiceOrCounts(names, most) => {
                format!("{}, or {}", Choice(names).range_text(), Counts(most).range_text())
            }
            Layouts(_) => format!("a list of at most {MAX_LAYOUTS} layouts, each [pipeline, expert, data]"),
        }
    }

    /// Whether a value is of this type and range.
    pub(super) fn admits(self, value: &Value) -> bool {
        match self {
            Count(least, most) => value
                .as_integer()
                .and_then(|value| u64::try_from(value).ok())
                .is_some_and(|value| (least..=most).contains(&value)),
            Number(range) => number(value).is_some_and(|value| range.contains(value)),
            Steps => match value {
                Value::Array(steps) => are_steps(steps),
                other => Number(NonNegative).admits(other),
            },
            Flag => value.is_bool(),
            Choice(range_text) => value.as_str().is_some_and(|value| range_text.contains(&value)),
            Choices(names) => value.as_array().is_some_and(|list| {
                let is_first = |at: usize| !list[..at].contains(&list[at]);
                list.iter().enumerate().all(|(at, name)| Choice(names).admits(name) && is_first(at))
            }),
            Text => value.as_str().is_some_and(|value| !value.is_empty()),
            OptionalText => value.is_str(),
            Texts => value.as_array().is_some_and(|list| list.iter().all(|text| Text.admits(text))),
            Counts(most) => {
                value.as_array().is_some_and(|list| list.iter().all(|count| Count(1, most).admits(count)))
            }
            ChoiceOrCounts(names, most) => Choice(names).admits(value) || Counts(most).admits(value),
            Layouts(_) => value.as_array().is_some_and(|list| list.len() <= MAX_LAYOUTS),
        }
    }

    /// What each entry of a list has to be, where its faults are its own.
    pub(super) fn entry_text(self) -> Option<String> {
        let Layouts(most) = self else { return None };
        Some(format!("[pipeline, expert, data], each a whole number from 1 to {most}"))
    }

    /// Whether a value is such an entry.
    pub(super) fn admits_entry(self, entry: &Value) -> bool {
        let Layouts(most) = self else { return true };
        entry.as_array().is_some_and(|axes| axes.len() == 3) && Counts(most).admits(entry)
    }
}

/// Whole numbers are numbers too.
fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|value| value as f64))
}

fn are_steps(steps: &[Value]) -> bool {
    let begins: Option<Vec<i64>> = steps
        .iter()
        .map(|step| {
            let step = step.as_table().filter(|step| step.len() == 2)?;
            Number(NonNegative).admits(step.get("value")?).then_some(())?;
            step.get("from_tokens")?.as_integer()
        })
        .collect();
    begins.is_some_and(|begins| begins.first() == Some(&0) && begins.is_sorted_by(|a, b| a < b))
}

/// The documented reference of all keys, as TOML with every default.
pub fn reference() -> String {
    document(|key| {
        let name = key.parts().1;
        match key.default {
            Required => format!("# {name} = (required: {})", key.kind.range_text()),
            Fixed(value) => format!("{name} = {value}"),
            Derived(range_text) => format!("# {name} = ({range_text})"),
        }
    })
}

/// All sections and keys, each key under its doc, on the line that `line` makes of it.
pub(super) fn document(line: impl Fn(&KeyDoc) -> String) -> String {
    let mut text = String::new();
    let mut current = "";
    for key in KEYS {
        let (section, _) = key.parts();
        if section != current {
            let blank = if current.is_empty() { "" } else { "\n" };
            text += &format!("{blank}[{section}]\n");
            current = section;
        }
        text += &format!("# {}\n{}\n", key.doc, line(key));
    }
    text
}
