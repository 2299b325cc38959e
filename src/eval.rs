//! `contraflow eval`: what a trained model makes of a text.
//!
//! The text is cut into sequences as for training, and the forward pass is that of training, on one rank.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use contraflow_kernels::par::Threads;
use contraflow_orchestrator::metrics::record::max_vio;
use contraflow_runtime::recipe::{Recipe, RecipeSource, path_override};
use contraflow_workers::data::batches::{self, Predicted};
use contraflow_workers::data::documents::DocumentEncoder;
use contraflow_workers::data::load::load_whole;
use contraflow_workers::data::model_tokenizer::ModelTokenizer;
use contraflow_workers::data::{PackedDataset, Tokenizer};
use contraflow_workers::infer::evaluate::Evaluation;
use contraflow_workers::infer::generate::Generator;
use indicatif::ProgressBar;
use serde::Serialize;
use signal_hook::consts::SIGINT;

use crate::failure::{Failure, INTERRUPTED};
use crate::generate::load;
use crate::output::{Format, count, print, say};
use crate::progress::Lines;
use crate::run_dir;

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
    /// Text files or folders to measure on
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// Tokens per sequence; default: the run's recipe, or the model's context up to 4096
    #[arg(long, value_name = "TOKENS")]
    pub sequence_length: Option<usize>,
    /// Measure at most this many sequences, evenly spread over the text [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub sequences: Option<u64>,
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
    let dir = run_dir::find_model(&args.model).map_err(Failure::input)?;
    let (model, ModelTokenizer { tokenizer, .. }) = load(&dir)?;
    let recipe = recipe_of(&dir)?;
    let length = sequence_length(args, recipe.as_ref(), &model)?;
    let across = recipe.is_none_or(|recipe| recipe.data.attend_across_documents);
    let encoder = DocumentEncoder::plain(tokenizer.clone());
    let dataset =
        load_whole(&args.data, &encoder, length).map_err(|faults| Failure::faults("--data", &faults))?;
    if dataset.num_sequences() == 0 {
        let got = dataset.num_tokens();
        let message = format!("--data: expected more than {length} tokens, one sequence, got {got}");
        return Err(Failure::input(message));
    }
    let threads = match args.threads {
        Some(0) => return Err(Failure::input("--threads: expected at least 1, got 0")),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let threads = Threads::new(threads);
    if let Some(path) = &args.logits {
        let first = batches::measured(&dataset, 0..rows_at_once(length).min(dataset.num_sequences()), across);
        let written = threads.run(|| model.write_logits(path, first));
        written.map_err(|error| Failure::run(error.to_string()))?;
    }
    let taken = args.sequences.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    let taken = taken.min(dataset.num_sequences());
    // A second Ctrl-C ends the process.
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), stop.clone())
        .and_then(|_| signal_hook::flag::register(SIGINT, stop.clone()))
        .map_err(|error| Failure::run(format!("signals: {error}")))?;
    let measured = threads.run(|| measure(&model, &tokenizer, (&dataset, taken), across, &stop));
    if measured.sequences == 0 {
        return Err(Failure::interrupted("interrupted before the first sequence"));
    }
    print_figures(args.format, &report(&dir, &dataset, &measured))?;
    if measured.sequences < taken {
        let of = count(taken, "sequence");
        return Err(Failure::interrupted(format!("interrupted: {} of {of} measured", measured.sequences)));
    }
    Ok(())
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

/// Goes on until all that are `taken` are measured or `stop` is set; says how far it is.
fn measure(
    model: &Generator,
    tokenizer: &Tokenizer,
    (dataset, taken): (&PackedDataset, usize),
    across: bool,
    stop: &AtomicBool,
) -> Measured {
    let mut measured = Measured::default();
    let rows = rows_at_once(dataset.sequence_length());
    let (bar, mut lines) = (ProgressBar::new(taken as u64), Lines::new());
    say(format_args!("measuring {}", count(taken, "sequence")));
    for first in (0..taken).step_by(rows) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let end = taken.min(first + rows);
        let ids = (first..end).map(|place| batches::validation_index(place, taken, dataset.num_sequences()));
        let sequences = batches::measured(dataset, ids, across);
        measured.predicted.add(&sequences, tokenizer);
        model.measure(sequences, &mut measured.evaluation);
        measured.sequences = end;
        bar.set_position(end as u64);
        lines.show(
            "sequence",
            (end as u64, taken as u64),
            &format!("loss {:.3}", measured.evaluation.loss()),
        );
    }
    bar.finish_and_clear();
    measured
}

fn report(dir: &Path, dataset: &PackedDataset, measured: &Measured) -> Report {
    let Measured { evaluation, predicted, .. } = measured;
    let max_vio: BTreeMap<usize, f64> =
        evaluation.expert_counts.iter().map(|(&layer, counts)| (layer, max_vio(counts))).collect();
    Report {
        model: dir.display().to_string(),
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

fn print_figures(format: Format, report: &Report) -> Result<(), Failure> {
    if format == Format::Json {
        let text = serde_json::to_string_pretty(report).map_err(|error| Failure::run(error.to_string()))?;
        return print(&format!("{text}\n"));
    }
    let mut text = format!(
        "{} on {} in {} of {}\n  loss           {:.4} nats per token\n  bits per byte  {}\n  \
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
