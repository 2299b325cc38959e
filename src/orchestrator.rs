//! `contraflow orchestrator`: the process that decides which ranks are where.

use std::net::SocketAddr;
use std::path::PathBuf;

use contraflow_orchestrator::core::{BEAT_MS, RETAINED_JOBS, Times};
use contraflow_orchestrator::server::{Front, Orchestrator, Security, Settings};
use contraflow_runtime::recipe::LogLevel;
use contraflow_runtime::schedule::parse_bytes;
use rustix::fs::Mode;

use crate::dashboard::{Door, DoorArgs, Subject};
use crate::failure::Failure;
use crate::interrupt::{self, Signals};
use crate::otlp::metrics::Exporter;
use crate::output::say;
use crate::telemetry::webhook::WebhookArgs;
use crate::{machine, systemd, telemetry};

/// Arguments of `contraflow orchestrator`.
#[derive(clap::Args, Debug)]
pub struct OrchestratorArgs {
    /// Folder of its event log; created if missing
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Where clients and workers connect
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub listen: SocketAddr,
    /// Folder from `certs init`: turns TLS on and requires tokens; mandatory unless it listens on loopback only
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// Finished jobs to retain, with their steps and logs; the oldest are removed first
    #[arg(long, value_name = "N", default_value_t = RETAINED_JOBS as u64, value_parser = clap::value_parser!(u64).range(1..))]
    pub keep_jobs: u64,
    /// How often workers say that they are alive
    #[arg(long, value_name = "MS", default_value_t = BEAT_MS)]
    pub beat_ms: u64,
    /// A worker that is silent for so long is lost [default: three beats]
    #[arg(long, value_name = "MS")]
    pub lease_ms: Option<u64>,
    /// Where the cluster can be looked at.
    #[command(flatten)]
    pub dashboard: DoorArgs,
    /// What the folder of a job in the storage may hold, as 50GB; without it, as much as there is room for
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub job_quota: Option<u64>,
    /// Who is told what happens to jobs.
    #[command(flatten)]
    pub webhook: WebhookArgs,
}

/// Runs the command.
///
/// **Errors**: code 2 if the state, the certificates or the address cannot be had; code 1 if the state is damaged, or
/// older than what a worker has seen.
pub fn run(args: &OrchestratorArgs) -> Result<(), Failure> {
    let _spans = telemetry::init(LogLevel::Info, "contraflow-orchestrator")?;
    let metrics = Exporter::open("contraflow-orchestrator")?;
    let security = security(args)?;
    let is_secured = security.is_some();
    let webhook = args.webhook.open()?;
    let door = Door::open_cluster(&args.dashboard, is_secured)?;
    let settings = Settings {
        retained_jobs: usize::try_from(args.keep_jobs).unwrap_or(usize::MAX),
        times: Times::new(args.beat_ms, args.lease_ms).map_err(Failure::input)?,
        job_quota: args.job_quota,
    };
    // What is kept here is for its user alone.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    interrupt::runtime_of_orchestrator()?.block_on(async {
        let orchestrator =
            Orchestrator::open(&args.state, args.listen, &settings).await.map_err(Failure::input)?;
        let orchestrator = match machine::raise_file_limit() {
            Some(files) => orchestrator.with_files(files),
            None => orchestrator,
        };
        let orchestrator = match security {
            Some(security) => orchestrator.secured(security),
            None => orchestrator,
        };
        let orchestrator = match webhook {
            Some(webhook) => orchestrator.telling(webhook),
            None => orchestrator,
        };
        let mut signals = Signals::listen()?;
        let address = orchestrator.address().map_err(|error| Failure::run(error.to_string()))?;
        say(format_args!("orchestrator at {address}, incarnation {}", orchestrator.incarnation()));
        if let Some(door) = &door {
            say(format_args!("dashboard: {}", door.url(is_secured)));
        }
        let serve_pages = |front: Front| {
            let hub = front.clone();
            // Both end with the runtime.
            tokio::spawn(systemd::tell(std::future::ready(()), async move || hub.has_answered().await));
            let subject = Subject::of_cluster(front.clone());
            if let Some(exporter) = metrics {
                let shown = subject.clone();
                let source = async move || shown.metrics(None).await.ok();
                drop(tokio::spawn(exporter.run(source, std::future::pending())));
            }
            drop(door.map(|door| tokio::spawn(door.serve_cluster(subject, front))));
        };
        orchestrator
            .serve_with(async move { _ = signals.next().await }, serve_pages)
            .await
            .map_err(Failure::run)
    })
}

fn security(args: &OrchestratorArgs) -> Result<Option<Security>, Failure> {
    let Some(dir) = &args.tls else {
        if !args.listen.ip().is_loopback() {
            return Err(Failure::input(format!(
                "--listen {}: expected --tls DIR for an address that others than this machine can reach, got none; \
                 contraflow certs init --dir DIR --host NAME makes it",
                args.listen
            )));
        }
        say("no --tls: any local user has full access");
        return Ok(None);
    };
    Security::load(dir).map(Some).map_err(|faults| Failure::faults("--tls", &faults))
}
