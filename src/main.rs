//! The binary: reads the command line and hands over to the subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use contraflow::{
    bench, certs, client, data, eval, export, generate, import, orchestrator, plan, recipes, train, worker,
};

/// Frees and hands out faster than the system's allocator where many threads do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the words in the output mean.
const LEGEND: &str = "\
Words in the output:
  bubble   share of the step in which a rank's compute thread was blocked on a message; with more ranks than
           cores it also holds the wait for a core
  MaxVio   how uneven the experts' load is: (largest load - mean) / mean, averaged over the layers; 0 is even
  MFU      FLOP of the model's matrix products per second (forward, twice that backward, nothing recomputed),
           as a share of what this machine's matrix multiplication was measured to reach";

/// Trains DeepSeek-V3-class mixture-of-experts language models
#[derive(Parser)]
#[command(name = "contraflow", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model on a cluster of ranks in this process
    #[command(after_long_help = LEGEND)]
    Train(train::Args),
    /// Print what a run would do: layout, actions, messages, memory; nothing is started
    Plan(plan::Args),
    /// Continue a text with a trained model
    Generate(generate::Args),
    /// Measure a trained model on a text: loss, bits per byte, perplexity, balance of the experts
    Eval(eval::Args),
    /// Write a trained model as a Hugging Face directory
    Export(export::Args),
    /// Make a run of a Hugging Face directory, every file and tensor of it checked
    Import(import::Args),
    /// List the built-in recipes
    Recipes(recipes::Args),
    /// Measure this machine: training steps, prompts and tokens, balance of the experts
    #[command(after_long_help = LEGEND)]
    Bench(bench::Args),
    /// Prepare text for training: train a tokenizer, tokenize a large corpus once
    Data(data::Args),
    /// Run the orchestrator of a cluster: takes jobs, and decides which ranks are where
    Orchestrator(orchestrator::Args),
    /// Run a worker of a cluster: hosts ranks of jobs
    Worker(worker::Args),
    /// Put a job into a cluster's queue
    Submit(client::Submit),
    /// List the jobs of a cluster
    Jobs(client::Common),
    /// Tell where a job stands
    Status(client::OfJob),
    /// Follow a job step by step, from its first
    Watch(client::OfJob),
    /// Print the log of a job
    Logs(client::Logs),
    /// End a job
    Cancel(client::OfJob),
    /// List the workers of a cluster
    Nodes(client::Common),
    /// Take a node out of use: its ranks move
    Drain(client::Drain),
    /// Make the certificates and tokens of a cluster
    Certs(certs::Args),
}

fn main() -> ExitCode {
    contraflow_runtime::failpoint::set_up();
    // A file that grows beyond the system's limit is an error of that file, not the end of the process.
    let file_too_large = std::sync::Arc::default();
    if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, file_too_large) {
        eprintln!("warning: SIGXFSZ cannot be caught: {error}");
    }
    let outcome = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Recipes(args) => recipes::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Orchestrator(args) => orchestrator::run(&args),
        Command::Worker(args) => worker::run(&args),
        Command::Submit(args) => client::submit(&args),
        Command::Jobs(common) => client::list(&common),
        Command::Status(args) => client::status(&args),
        Command::Watch(args) => client::watch(&args),
        Command::Logs(args) => client::logs(&args),
        Command::Cancel(args) => client::cancel(&args),
        Command::Nodes(common) => client::nodes(&common),
        Command::Drain(args) => client::drain(&args),
        Command::Certs(args) => certs::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.code)
        }
    }
}
