//! `contraflow data`: what is done with text before a run: training a tokenizer, tokenizing a large corpus once.

use std::path::{Path, PathBuf};

use contraflow_workers::data::Tokenizer;
use contraflow_workers::data::documents::DocumentEncoder;
use contraflow_workers::data::hf_tokenizer::{self, EndOfDocument, MIN_VOCAB_SIZE};
use contraflow_workers::data::prepare::{Preparation, Progress, prepare};
use contraflow_workers::data::shards::{ShardIndex, ShardRecord, Shards};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::output::{count, print};

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
    /// Text, JSONL and Parquet files, or folders of them
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    data: Vec<PathBuf>,
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
    /// Text, JSONL and Parquet files, or folders of them
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    data: Vec<PathBuf>,
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
    if !(0.0..=1.0).contains(&args.fim_rate) {
        return Err(Failure::input(format!(
            "--fim-rate: expected a number from 0 to 1, got {}",
            args.fim_rate
        )));
    }
    let refused = |fault| Failure::faults("--tokenizer", &[fault]);
    let tokenizer = match args.tokenizer.as_str() {
        "bytes" => Tokenizer::Bytes,
        path => {
            let end = EndOfDocument::named(&args.end_of_document, "--end-of-document");
            Tokenizer::load(Path::new(path), &end).map_err(refused)?
        }
    };
    let preparation = Preparation {
        paths: args.data.clone(),
        encoder: DocumentEncoder::with_fim(tokenizer, args.fim_rate).map_err(refused)?,
        to: args.to.clone(),
        shard_tokens: usize::try_from(args.shard_tokens).unwrap_or(usize::MAX),
    };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {eta} {msg}") {
        bar.set_style(style);
    }
    let index = prepare(&preparation, &mut |progress: Progress| {
        bar.set_length(progress.bytes);
        bar.set_position(progress.bytes_read);
        bar.set_message(format!("{}, {}", count(progress.units, "shard"), count(progress.tokens, "token")));
        true
    });
    bar.finish_and_clear();
    print_figures(&args.to, &index.map_err(|faults| Failure::faults("data", &faults))?)
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
    let json = hf_tokenizer::train(&args.data, args.vocab_size)
        .map_err(|faults| Failure::faults("data", &faults))?;
    let fresh = args.to.with_extension("partial");
    std::fs::write(&fresh, json)
        .and_then(|()| std::fs::rename(&fresh, &args.to))
        .map_err(|error| Failure::input(format!("{}: {error}", args.to.display())))?;
    let end = EndOfDocument::named("", "tokenizer.end_of_document");
    let tokenizer = Tokenizer::load(&args.to, &end).map_err(|fault| Failure::input(fault.to_string()))?;
    let path = args.to.display();
    print(&format!(
        "{path}: {}\nnext: contraflow train --set tokenizer.path={path}\n",
        count(tokenizer.id_limit(), "token")
    ))
}
