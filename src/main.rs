//! The binary: reads the command line and hands over to the subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use contraflow::{bench, generate, plan, recipes, train};

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
    /// List the built-in recipes
    Recipes(recipes::Args),
    /// Measure this machine: training steps, prompts and tokens, balance of the experts
    #[command(after_long_help = LEGEND)]
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Recipes(args) => recipes::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.code)
        }
    }
}
