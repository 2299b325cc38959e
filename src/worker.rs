//! `contraflow worker`: a process that hosts ranks.

use std::net::SocketAddr;
use std::path::PathBuf;

use contraflow_workers::host::{self, LogLevels, Settings};
use rustix::fs::Mode;

use crate::access::Access;
use crate::failure::Failure;
use crate::interrupt::{self, Signals};
use crate::machine;
use crate::telemetry;

/// Arguments of `contraflow worker`.
#[derive(clap::Args, Debug)]
pub struct WorkerArgs {
    /// Where the orchestrator listens
    #[arg(long, value_name = "ADDR")]
    pub join: String,
    /// Folder for checkpoints and results, shared by all workers
    #[arg(long, value_name = "DIR")]
    pub storage: PathBuf,
    /// Folder that the data paths of recipes are looked up in
    #[arg(long, value_name = "DIR")]
    pub data_root: Option<PathBuf>,
    /// Ranks it can host at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub slots: u32,
    /// Topology labels: node=NAME,block=NAME
    #[arg(long, value_name = "KEY=VALUE,...", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// Where other workers connect to, for data
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Certificate and token
    #[command(flatten)]
    pub access: Access,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of the arguments, or the reason why the orchestrator refuses the worker.
pub fn run(args: &WorkerArgs) -> Result<(), Failure> {
    close_to_others();
    let log_levels = LogLevels::default();
    let (lines, _spans) = telemetry::init_worker("contraflow-worker", &log_levels)?;
    let settings = settings(args, log_levels)?;
    let runtime = interrupt::runtime()?;
    let ended = runtime.block_on(async {
        let (mut once, mut twice) = (Signals::listen()?, Signals::listen()?);
        let stop = once.next();
        let end = async {
            twice.next().await;
            twice.next().await;
        };
        host::run(settings, lines, (stop, end)).await.map_err(Failure::input)
    });
    // A rank may hang where it cannot be interrupted: the process does not wait for it.
    runtime.shutdown_background();
    ended
}

/// From now on what this process creates is closed to users outside of its group: checkpoints, models and the logs beside
/// them are a user's own. What the group may do is what the process's umask leaves it, as the users of one storage need it.
fn close_to_others() {
    use rustix::process::umask;
    let inherited = umask(Mode::RWXO);
    umask(inherited | Mode::RWXO);
}

fn settings(args: &WorkerArgs, log_levels: LogLevels) -> Result<Settings, Failure> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let (mut node, mut block) = (host.clone(), String::from("default"));
    let mut faults = Vec::new();
    for label in &args.labels {
        match label.split_once('=') {
            Some(("node", value)) if !value.is_empty() => node = value.to_owned(),
            Some(("block", value)) if !value.is_empty() => block = value.to_owned(),
            _ => faults.push(format!("expected node=NAME or block=NAME, got {label:?}")),
        }
    }
    if !faults.is_empty() {
        return Err(Failure::faults("--labels", &faults));
    }
    let cores = machine::cores();
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    Ok(Settings {
        orchestrator: args.access.endpoint("--join", &args.join)?,
        token: args.access.bearer()?.0,
        storage: absolute(&args.storage),
        data_root: args.data_root.as_ref().map(absolute),
        slots: args.slots,
        name: format!("{host}-{}", std::process::id()),
        node,
        block,
        listen: args.listen,
        cores,
        // Before there are ranks: they would share the cores with the measurement.
        peak_flops: machine::measure_peak(cores) as u64,
        log_levels,
    })
}
