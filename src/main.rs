//! The binary: reads the command line and hands over to the subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use contraflow::output::say;
use contraflow::{
    bench, certs, checkpoint, client, dashboard, data, eval, export, generate, import, orchestrator, plan,
    recipes, runs, train, worker,
};

/// Frees and hands out faster than the system's allocator where many threads do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Meaning of the terms in the output.
const LEGEND: &str = "\
Terms in the output:
  bubble   share of the step in which a rank's compute thread was blocked on a message; with more ranks than
           cores this includes the sender's wait for a core
  MaxVio   imbalance of the experts' load: (largest load - mean) / mean, averaged over the layers; 0 is even
  MFU      FLOP of the model's matrix products per second (forward, twice that backward, nothing recomputed),
           as a share of what a core reached in a large product, the best so far on such a machine, times the threads";

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
    Train(train::TrainArgs),
    /// Print what a run would do (layout, actions, messages, memory) without starting it
    Plan(plan::PlanArgs),
    /// Continue a text with a trained model
    Generate(generate::GenerateArgs),
    /// Measure a trained model on a text: loss, bits per byte, perplexity, balance of the experts
    Eval(eval::EvalArgs),
    /// Write a trained model as a Hugging Face directory
    Export(export::ExportArgs),
    /// Import a Hugging Face directory as a run, checking every file and tensor
    Import(import::ImportArgs),
    /// List the runs of this folder; compare, measure and remove them
    Runs(runs::RunsArgs),
    /// Show runs in a browser, several over one another: curves, pipeline, experts, layers
    Dashboard(dashboard::DashboardArgs),
    /// Show runs and jobs in the terminal: loss, ranks, pipeline, experts, incidents
    Top(dashboard::top::TopArgs),
    /// Draw the curves of runs over one another: loss, validation, gradient norm
    Plot(runs::plot::PlotArgs),
    /// Say what is wrong with a run or a job: program, machine, disk, checkpoints, what its ranks were about
    Doctor(runs::doctor::DoctorArgs),
    /// List the built-in recipes and models
    Recipes(recipes::RecipesArgs),
    /// Benchmark this machine: training steps, prompts and tokens, balance of the experts
    #[command(after_long_help = LEGEND)]
    Bench(bench::BenchArgs),
    /// Prepare text for training: train a tokenizer, tokenize a large corpus once
    Data(data::DataArgs),
    /// Check checkpoints for damage
    Checkpoint(checkpoint::CheckpointArgs),
    /// Run the orchestrator of a cluster: accepts jobs and places their ranks
    Orchestrator(orchestrator::OrchestratorArgs),
    /// Run a worker of a cluster: hosts ranks of jobs
    Worker(worker::WorkerArgs),
    /// Submit a job to a cluster's queue
    Submit(client::submit::Arguments),
    /// List the jobs of a cluster, or remove some
    Jobs(client::Jobs),
    /// Show the status of a job
    Status(client::OfJob),
    /// Follow a job step by step, from the first step
    Watch(client::OfJob),
    /// Print the log of a job
    Logs(client::Logs),
    /// Cancel a job
    Cancel(client::OfJob),
    /// Take a job up again that has failed or was cancelled, from its newest checkpoint
    Retry(client::OfJob),
    /// Say how many ranks a job is to have
    Scale(client::scale::Arguments),
    /// List the workers of a cluster
    Nodes(client::Common),
    /// Drain a node: its ranks move to other nodes; or undo it
    Drain(client::Drain),
    /// Create the certificates and tokens of a cluster
    Certs(certs::CertsArgs),
}

fn main() -> ExitCode {
    contraflow_runtime::failpoint::set_up();
    // A file that grows beyond the system's limit is an error of that file, not the end of the process.
    let file_too_large = std::sync::Arc::default();
    if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, file_too_large) {
        say(format_args!("warning: SIGXFSZ cannot be caught: {error}"));
    }
    let outcome = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Runs(args) => runs::run(&args),
        Command::Dashboard(args) => dashboard::run(&args),
        Command::Top(args) => dashboard::top::run(&args),
        Command::Plot(args) => runs::plot::run(&args),
        Command::Doctor(args) => runs::doctor::run(&args),
        Command::Recipes(args) => recipes::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Checkpoint(args) => checkpoint::run(&args),
        Command::Orchestrator(args) => orchestrator::run(&args),
        Command::Worker(args) => worker::run(&args),
        Command::Submit(args) => client::submit::run(&args),
        Command::Jobs(args) => client::of_jobs(&args),
        Command::Status(args) => client::status(&args),
        Command::Watch(args) => client::watch(&args),
        Command::Logs(args) => client::logs(&args),
        Command::Cancel(args) => client::cancel(&args),
        Command::Retry(args) => client::retry(&args),
        Command::Scale(args) => client::scale::run(&args),
        Command::Nodes(common) => client::nodes(&common),
        Command::Drain(args) => client::drain(&args),
        Command::Certs(args) => certs::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure);
            ExitCode::from(failure.code)
        }
    }
}
