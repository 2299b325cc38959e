//! `contraflow data`: what is done with text before a run: training a tokenizer, tokenizing a large corpus once.

use std::path::{Path, PathBuf};

use contraflow_runtime::files::objects::{fetch, fetch_all};
use contraflow_runtime::model_config::builtin as models;
use contraflow_runtime::recipe::{Recipe, RecipeSource, builtin};
use contraflow_workers::data::Tokenizer;
use contraflow_workers::data::corpus::VALIDATION_SHARE;
use contraflow_workers::data::documents::DocumentEncoder;
use contraflow_workers::data::hf_tokenizer::{self, EndOfDocument, MIN_VOCAB_SIZE};
use contraflow_workers::data::prepare::{Preparation, Prepared, Progress, Rule, prepare};
use contraflow_workers::data::shards::{ShardIndex, ShardRecord, Shards};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::output::{count, print, quoted, say};

/// Arguments of `contraflow data`.
#[derive(clap::Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(clap::Subcommand, Debug)]
enum DataCommand {
    /// Tokenize files once, into checked shards that runs map into memory; an interrupted run continues where it stopped
    Prepare(PrepareArgs),
    /// Check every shard of a prepared folder
    Verify {
        /// The prepared folder
        dir: PathBuf,
    },
    /// Train a byte-level BPE tokenizer
    TrainTokenizer(TokenizerArgs),
}

#[derive(clap::Args, Debug)]
struct PrepareArgs {
    /// Text, JSONL, JSON and Parquet files (also in gzip, zstd, bzip2), or folders of them
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// The field of JSON objects, or the Parquet column, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Files or folders to validate on; without, a share of --data is held back
    #[arg(long, num_args = 1.., value_name = "PATH")]
    validation: Vec<PathBuf>,
    /// Share of the text that is held back for validation
    #[arg(long, default_value_t = VALIDATION_SHARE, value_name = "SHARE", conflicts_with = "validation")]
    validation_share: f64,
    /// bytes, or the path of a tokenizer.json
    #[arg(long, default_value = "bytes")]
    tokenizer: String,
    /// The tokenizer's end-of-document token, if it has none of the usual names
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TOKEN")]
    end_of_document: String,
    /// The folder to create
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Minimum number of training tokens per shard
    #[arg(long, default_value_t = 1 << 24, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    shard_tokens: u64,
    /// Share of the training documents rearranged to be filled in; the recipe's data.fim_rate must agree
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    fim_rate: f64,
}

#[derive(clap::Args, Debug)]
struct TokenizerArgs {
    /// Text, JSONL, JSON and Parquet files (also in gzip, zstd, bzip2), or folders of them
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// The field of JSON objects, or the Parquet column, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Maximum number of tokens
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of arguments and data, and where the system refuses to write.
pub fn run(args: &DataArgs) -> Result<(), Failure> {
    match &args.command {
        DataCommand::Prepare(args) => run_prepare(args),
        DataCommand::Verify { dir } => verify(dir),
        DataCommand::TrainTokenizer(args) => train_tokenizer(args),
    }
}

fn run_prepare(args: &PrepareArgs) -> Result<(), Failure> {
    let mut faults = Vec::new();
    if !(0.0..=1.0).contains(&args.fim_rate) {
        faults.push(format!("--fim-rate: expected a number from 0 to 1, got {}", args.fim_rate));
    }
    if !(0.0..1.0).contains(&args.validation_share) {
        let got = args.validation_share;
        faults.push(format!("--validation-share: expected a number from 0 to below 1, got {got}"));
    }
    if !faults.is_empty() {
        return Err(Failure::faults("arguments", &faults));
    }
    let refused = |fault| Failure::faults("--tokenizer", &[fault]);
    let tokenizer = match args.tokenizer.as_str() {
        "bytes" => Tokenizer::Bytes,
        path => {
            let end = EndOfDocument::named(&args.end_of_document, "--end-of-document");
            Tokenizer::load(&fetch(Path::new(path))?, &end).map_err(refused)?
        }
    };
    let [paths, validation] = [("--data", &args.data), ("--validation", &args.validation)]
        .map(|(name, paths)| fetch_all(paths).map_err(|faults| Failure::faults(name, &faults)));
    let preparation = Preparation {
        paths: paths?,
        validation: validation?,
        validation_share: args.validation_share,
        field: args.field.clone(),
        encoder: DocumentEncoder::with_fim(tokenizer, args.fim_rate)
            .map_err(|fault| Failure::input(fault.to_string().replacen("data.fim_rate", "--fim-rate", 1)))?,
        to: args.to.clone(),
        shard_tokens: usize::try_from(args.shard_tokens).unwrap_or(usize::MAX),
    };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {eta} {msg}") {
        bar.set_style(style);
    }
    let prepared = prepare(&preparation, &mut |progress: Progress| {
        match progress.bytes {
            0 => bar.set_message(format!("checking the text: {} MB", progress.bytes_checked / 1_000_000)),
            bytes => {
                bar.set_length(bytes);
                bar.set_position(progress.bytes_read);
                bar.set_message(format!(
                    "{}, {}",
                    count(progress.units, "shard"),
                    count(progress.tokens, "token")
                ));
            }
        }
        true
    });
    bar.finish_and_clear();
    let Prepared { index, skipped, rule } = prepared.map_err(|faults| Failure::faults("data", &faults))?;
    skipped.warnings().iter().for_each(|warning| say(format_args!("warning: {warning}")));
    rule.and_then(|rule| of_rule(rule, args)).iter().for_each(|note| say(format_args!("note: {note}")));
    print_figures(&args.to, &index)
}

/// What is said of how the text was split, where it is not by whole documents.
fn of_rule(rule: Rule, args: &PrepareArgs) -> Option<String> {
    match rule {
        Rule::Nothing if args.validation.is_empty() => Some("nothing is held back for validation".into()),
        Rule::Nothing | Rule::Below(_) => None,
        Rule::Ends(share) => Some(format!(
            "the documents are few, or of very different sizes: the last {:.1}% of each are held back for validation",
            100.0 * share
        )),
    }
}

fn print_figures(dir: &Path, index: &ShardIndex) -> Result<(), Failure> {
    let side = |name: &str, shards: &[ShardRecord]| {
        let tokens: u64 = shards.iter().map(|shard| shard.tokens).sum();
        let documents: u64 = shards.iter().map(|shard| shard.documents).sum();
        let [tokens, documents] = [count(tokens, "token"), count(documents, "document")];
        format!("{name}{tokens}, {documents}, {}\n", count(shards.len(), "shard"))
    };
    print(&format!(
        "{}: ids below {}, {} bytes each\n{}{}",
        dir.display(),
        index.id_limit,
        index.id_bytes,
        side("  training    ", &index.train),
        side("  validation  ", &index.validation)
    ))
}

fn verify(dir: &Path) -> Result<(), Failure> {
    let index = ShardIndex::read(dir).map_err(|fault| Failure::faults("data", &[fault]))?;
    let records = [index.train.as_slice(), &index.validation].concat();
    Shards::open(dir, &index, &records).map_err(|faults| Failure::faults("data", &faults))?;
    print_figures(dir, &index)
}

fn train_tokenizer(args: &TokenizerArgs) -> Result<(), Failure> {
    if args.vocab_size < MIN_VOCAB_SIZE {
        let got = args.vocab_size;
        return Err(Failure::input(format!("--vocab-size: expected at least {MIN_VOCAB_SIZE}, got {got}")));
    }
    let data = fetch_all(&args.data).map_err(|faults| Failure::faults("--data", &faults))?;
    let json = hf_tokenizer::train(&data, &args.field, args.vocab_size)
        .map_err(|faults| Failure::faults("data", &faults))?;
    let fresh = args.to.with_extension("partial");
    std::fs::write(&fresh, json)
        .and_then(|()| std::fs::rename(&fresh, &args.to))
        .map_err(|error| Failure::input(format!("{}: {error}", args.to.display())))?;
    let end = EndOfDocument::named("", "tokenizer.end_of_document");
    let tokenizer = Tokenizer::load(&args.to, &end).map_err(|fault| Failure::input(fault.to_string()))?;
    let (path, tokens) = (args.to.display(), tokenizer.id_limit());
    print(&format!("{path}: {}\nnext: {}\n", count(tokens, "token"), next(args, tokens)))
}

/// A command that trains with a tokenizer of so many tokens on the text that it is made of.
fn next(args: &TokenizerArgs, tokens: usize) -> String {
    let data: Vec<String> = args.data.iter().map(|path| quoted(path.display())).collect();
    let field =
        if args.field == "text" { String::new() } else { format!(" --set data.field={}", args.field) };
    let recipe = builtin::recipe_names().into_iter().find(|name| {
        let recipe = Recipe::load(&RecipeSource::Builtin((*name).to_owned()), &[]);
        recipe.is_ok_and(|recipe| recipe.model_config.vocab_size >= tokens)
    });
    let tokenizer = quoted(format_args!("tokenizer.path={}", args.to.display()));
    match recipe {
        Some(recipe) => {
            format!("contraflow train {recipe} --set {tokenizer} --data {}{field}", data.join(" "))
        }
        None => format!(
            "contraflow recipes --model {} > config.json, with a vocab_size of {tokens} or more; it is the model.config of a \
             recipe of your own",
            models::model_names().last().copied().unwrap_or_default()
        ),
    }
}
