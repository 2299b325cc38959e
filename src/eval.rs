//! `contraflow eval`: what a trained model makes of a text.
//!
//! The text is cut into sequences as for training, the rest of it is a shorter one, and the forward pass is that of training, on
//! one rank.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use contraflow_kernels::par::Threads;
use contraflow_orchestrator::metrics::record::max_vio;
use contraflow_runtime::files::objects::fetch_all;
use contraflow_runtime::recipe::{Recipe, RecipeSource, path_override};
use contraflow_workers::data::batches::{self, Predicted};
use contraflow_workers::data::documents::DocumentEncoder;
use contraflow_workers::data::load::{Whole, WholeRequest, load_whole};
use contraflow_workers::data::model_tokenizer::ModelTokenizer;
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::data::shards::{Part, ShardIndex};
use contraflow_workers::data::{PackedDataset, Tokenizer};
use contraflow_workers::infer::evaluate::Evaluation;
use contraflow_workers::infer::generate::Generator;
use indicatif::ProgressBar;
use serde::Serialize;
use signal_hook::consts::SIGINT;

use crate::failure::{Failure, INTERRUPTED};
use crate::generate::{load, load_average};
use crate::output::{Format, count, print, say};
use crate::progress::Lines;
use crate::run_dir::{self, Wanted};

/// Tokens that go through the model at once, if a sequence has no more.
const BATCH_TOKENS: usize = 2048;

/// Longest default sequence length.
const DEFAULT_LENGTH: usize = 4096;

/// Arguments of `contraflow eval`.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    /// A run (its folder or its name), or an HF directory
    #[arg(default_value = "runs/latest")]
    pub model: String,
    /// Files or folders to measure on: text, JSONL, JSON, Parquet (also in gzip, zstd, bzip2), or prepared folders
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// The field of JSON objects, or the Parquet column, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub field: String,
    /// Part of the prepared folders to measure on [default: validation]
    #[arg(long, value_enum)]
    pub split: Option<Split>,
    /// Tokens per sequence; default: the run's recipe, or the model's context up to 4096
    #[arg(long, value_name = "TOKENS")]
    pub sequence_length: Option<usize>,
    /// Measure at most this many sequences, evenly spread over the text [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub sequences: Option<u64>,
    /// Measure the moving average of the weights, out of the newest checkpoint (training.ema_decay)
    #[arg(long)]
    pub ema: bool,
    /// Compute threads [default: all cores]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Also write token ids and logits of the first sequences, as safetensors
    #[arg(long, value_name = "FILE", hide = true)]
    pub logits: Option<PathBuf>,
}

/// Part of a prepared folder.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What was held back when it was prepared
    Validation,
    /// What runs train on
    Train,
    /// Both
    All,
}

impl Split {
    fn part(self) -> Part {
        match self {
            Split::Validation => Part::Validation,
            Split::Train => Part::Train,
            Split::All => Part::All,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Split::Validation => "the validation part",
            Split::Train => "the training part",
            Split::All => "both parts",
        }
    }
}

/// What the model made of the text, and how much text it was.
#[derive(Default)]
struct Measured {
    sequences: usize,
    evaluation: Evaluation,
    predicted: Predicted,
}

/// Output format.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// Whether it is the moving average of the weights.
    ema: bool,
    /// Of prepared folders; text is read whole.
    split: Option<Split>,
    sequence_length: usize,
    sequences: usize,
    tokens: u64,
    bytes: u64,
    loss: f64,
    bits_per_byte: Option<f64>,
    perplexity: f64,
    mean_max_vio: f64,
    max_vio: BTreeMap<usize, f64>,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of arguments, text or model.
pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let dir = run_dir::find_model(&args.model, Wanted::of(args.ema)).map_err(Failure::input)?;
    let (model, ModelTokenizer { tokenizer, .. }) = if args.ema { load_average(&dir)? } else { load(&dir)? };
    let recipe = recipe_of(&dir)?;
    let length = sequence_length(args, recipe.as_ref(), &model)?;
    let across = recipe.is_none_or(|recipe| recipe.data.attend_across_documents);
    let encoder = DocumentEncoder::plain(tokenizer.clone());
    let data = fetch_all(&args.data).map_err(|faults| Failure::faults("--data", &faults))?;
    let split = split(&data, args.split)?;
    let part = split.map_or(Part::All, Split::part);
    let wanted = WholeRequest { field: &args.field, encoder: &encoder, part };
    let loaded = load_whole(&data, wanted, length);
    let Whole { sequences: dataset, warnings, .. } =
        loaded.map_err(|faults| Failure::faults("--data", &faults))?;
    warnings.iter().for_each(|warning| say(format_args!("warning: {warning}")));
    let mut tails = batches::measured_tails(&dataset, across);
    if dataset.num_sequences() == 0 && tails.iter().all(|tail| tail.loss_weight() == 0.0) {
        let message =
            "--data: expected text of at least two tokens, of which one predicts the other, got less";
        return Err(Failure::input(message));
    }
    let threads = match args.threads {
        Some(0) => return Err(Failure::input("--threads: expected at least 1, got 0")),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let threads = Threads::new(threads);
    if let Some(path) = &args.logits {
        let first = match dataset.num_sequences() {
            0 => tails[0].clone(),
            whole => batches::measured(&dataset, 0..rows_at_once(length).min(whole), across),
        };
        let written = threads.run(|| model.write_logits(path, first));
        written.map_err(|error| Failure::run(error.to_string()))?;
    }
    let most = args.sequences.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    let taken = most.min(dataset.num_sequences());
    tails.truncate(most - taken);
    let wanted = taken + tails.len();
    // A second Ctrl-C ends the process.
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), stop.clone())
        .and_then(|_| signal_hook::flag::register(SIGINT, stop.clone()))
        .map_err(|error| Failure::run(format!("signals: {error}")))?;
    let measured = threads.run(|| measure(&model, &tokenizer, (&dataset, taken), tails, across, &stop));
    if measured.sequences == 0 {
        return Err(Failure::interrupted("interrupted before the first sequence"));
    }
    let report = Report { split, ema: args.ema, ..report(&dir, &dataset, &measured) };
    print_figures(args.format, &report, &args.data)?;
    if measured.sequences < wanted {
        let of = count(wanted, "sequence");
        return Err(Failure::interrupted(format!("interrupted: {} of {of} measured", measured.sequences)));
    }
    Ok(())
}

/// Which part of the prepared folders is read, if there are any.
fn split(data: &[PathBuf], wanted: Option<Split>) -> Result<Option<Split>, Failure> {
    match (data.iter().any(|path| ShardIndex::is_in(path)), wanted) {
        (true, split) => Ok(Some(split.unwrap_or(Split::Validation))),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(Failure::input(
            "--split: expected a prepared folder in --data, got text alone, which is read whole",
        )),
    }
}

/// The length of the sequences that the model was trained on, unless the user says another.
fn sequence_length(args: &EvalArgs, recipe: Option<&Recipe>, model: &Generator) -> Result<usize, Failure> {
    let longest = model.max_len();
    if let Some(length) = args.sequence_length {
        if length < 2 || length > longest {
            let message =
                format!("--sequence-length: expected 2 to {longest}, the model's context, got {length}");
            return Err(Failure::input(message));
        }
        return Ok(length);
    }
    Ok(recipe.map_or(DEFAULT_LENGTH, |recipe| recipe.training.sequence_length).min(longest))
}

/// The recipe of the run that a model's or a checkpoint's folder belongs to, if it belongs to one.
fn recipe_of(dir: &Path) -> Result<Option<Recipe>, Failure> {
    let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
    let Some(recipe) = run_dir::recipe_of(dir).map_err(failed)? else { return Ok(None) };
    // The configuration beside the weights: the one that the recipe was made with may have gone.
    let config = path_override("model.config", &dir.join("config.json"));
    Ok(Some(Recipe::load(&RecipeSource::File(recipe), &[config])?))
}

fn rows_at_once(length: usize) -> usize {
    (BATCH_TOKENS / length).max(1)
}

/// Goes on until all that are `taken` and the tails are measured or `stop` is set; says how far it is.
fn measure(
    model: &Generator,
    tokenizer: &Tokenizer,
    (dataset, taken): (&PackedDataset, usize),
    tails: Vec<Sequences>,
    across: bool,
    stop: &AtomicBool,
) -> Measured {
    let mut measured = Measured::default();
    let rows = rows_at_once(dataset.sequence_length());
    let wanted = taken + tails.len();
    let (bar, mut lines) = (ProgressBar::new(wanted as u64), Lines::new());
    say(format_args!("measuring {}", count(wanted, "sequence")));
    let whole = (0..taken).step_by(rows).map(|first| {
        let end = taken.min(first + rows);
        let ids = (first..end).map(|place| batches::validation_index(place, taken, dataset.num_sequences()));
        (batches::measured(dataset, ids, across), end - first)
    });
    for (sequences, size) in whole.chain(tails.into_iter().map(|tail| (tail, 1))) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        measured.predicted.add(&sequences, tokenizer);
        model.measure(sequences, &mut measured.evaluation);
        measured.sequences += size;
        let done = measured.sequences as u64;
        bar.set_position(done);
        lines.show("sequence", (done, wanted as u64), &format!("loss {:.3}", measured.evaluation.loss()));
    }
    bar.finish_and_clear();
    measured.predicted = measured.predicted.of_text(dataset, tokenizer);
    measured
}

fn report(dir: &Path, dataset: &PackedDataset, measured: &Measured) -> Report {
    let Measured { evaluation, predicted, .. } = measured;
    let max_vio: BTreeMap<usize, f64> =
        evaluation.expert_counts.iter().map(|(&layer, counts)| (layer, max_vio(counts))).collect();
    Report {
        model: dir.display().to_string(),
        ema: false,
        split: None,
        sequence_length: dataset.sequence_length(),
        sequences: measured.sequences,
        tokens: evaluation.num_tokens,
        bytes: predicted.bytes as u64,
        loss: evaluation.loss(),
        bits_per_byte: predicted.bits_per_byte(evaluation.loss()),
        perplexity: evaluation.loss().exp(),
        mean_max_vio: max_vio.values().sum::<f64>() / max_vio.len().max(1) as f64,
        max_vio,
    }
}

fn print_figures(format: Format, report: &Report, data: &[PathBuf]) -> Result<(), Failure> {
    if format == Format::Json {
        let text = serde_json::to_string_pretty(report).map_err(|error| Failure::run(error.to_string()))?;
        return print(&format!("{text}\n"));
    }
    let of_part = report.split.map_or_else(String::new, |split| {
        let dirs = data.iter().filter(|path| ShardIndex::is_in(path)).map(|path| path.display().to_string());
        format!(" of {} of {}", split.name(), dirs.collect::<Vec<_>>().join(", "))
    });
    let average = if report.ema { ", moving average," } else { "" };
    let mut text = format!(
        "{}{average} on {}{of_part} in {} of at most {}\n  loss           {:.4} nats per token\n  bits per byte  {}\n  \
         perplexity     {:.3}\n",
        report.model,
        count(report.bytes, "byte"),
        count(report.sequences, "sequence"),
        count(report.sequence_length, "token"),
        report.loss,
        report.bits_per_byte.map_or("-".into(), |bits| format!("{bits:.4}")),
        report.perplexity
    );
    if !report.max_vio.is_empty() {
        text += &format!("  MaxVio         {:.2}\n", report.mean_max_vio);
        for (layer, max_vio) in &report.max_vio {
            text += &format!("    layer {layer:<7} {max_vio:.2}\n");
        }
    }
    print(&text)
}
