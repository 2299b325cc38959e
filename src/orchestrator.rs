//! `contraflow orchestrator`: the process that decides which ranks are where.

use std::net::SocketAddr;
use std::path::PathBuf;

use contraflow_orchestrator::server::{Orchestrator, Security};
use contraflow_runtime::recipe::LogLevel;

use crate::failure::Failure;
use crate::interrupt;
use crate::telemetry;

/// Arguments of `contraflow orchestrator`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Folder of its event log; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Where clients and workers connect
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub listen: SocketAddr,
    /// Folder from `certs init`: TLS on, and tokens asked for; needed where others than this machine can connect
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
}

/// Runs the command.
///
/// **Errors**: code 2 if the state, the certificates or the address cannot be had; code 1 if the state cannot be written any more.
pub fn run(args: &Args) -> Result<(), Failure> {
    let _spans = telemetry::init(LogLevel::Info, "contraflow-orchestrator")?;
    let security = security(args)?;
    interrupt::runtime()?.block_on(async {
        let orchestrator = Orchestrator::open(&args.state, args.listen).await.map_err(Failure::input)?;
        let orchestrator = match security {
            Some(security) => orchestrator.secured(security),
            None => orchestrator,
        };
        let address = orchestrator.address().map_err(|error| Failure::run(error.to_string()))?;
        eprintln!("orchestrator at {address}, incarnation {}", orchestrator.incarnation());
        let stop = async {
            // Without signals it can still be ended by force: its state is on the disk.
            drop(interrupt::signal().await);
        };
        orchestrator.serve(stop).await.map_err(Failure::run)
    })
}

fn security(args: &Args) -> Result<Option<Security>, Failure> {
    let Some(dir) = &args.tls else {
        if !args.listen.ip().is_loopback() {
            return Err(Failure::input(format!(
                "--listen {}: expected --tls DIR for an address that others than this machine can reach, got none; \
                 contraflow certs init --dir DIR --host NAME makes it",
                args.listen
            )));
        }
        eprintln!("no --tls: whoever is on this machine may do everything");
        return Ok(None);
    };
    Security::load(dir).map(Some).map_err(|faults| Failure::faults("--tls", &faults))
}
