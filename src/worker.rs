//! `contraflow worker`: a process that hosts ranks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;

use contraflow_runtime::files::Reloaded;
use contraflow_runtime::files::objects::{Location, Sources};
use contraflow_workers::host::{self, LogLevels, Settings};
use rustix::fs::Mode;
use tokio::sync::watch;
use tonic::transport::Endpoint;

use crate::access::Access;
use crate::failure::Failure;
use crate::interrupt::{self, Signals};
use crate::{machine, systemd, telemetry};

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
    /// Prefix in an object store below which recipes may name data and weights, as s3://BUCKET/PREFIX; may be given several times
    #[arg(long = "allow-source", value_name = "PREFIX")]
    pub allow_sources: Vec<String>,
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
    raise_file_limit();
    let log_levels = LogLevels::default();
    let (lines, _spans) = telemetry::init_worker("contraflow-worker", &log_levels)?;
    let settings = settings(args, log_levels)?;
    let runtime = interrupt::runtime()?;
    let ended = runtime.block_on(async {
        let (mut once, mut twice) = (Signals::listen()?, Signals::listen()?);
        let stop = async { _ = once.next().await };
        let (mut member, mut beats) = (settings.pulse.subscribe(), settings.pulse.subscribe());
        tokio::spawn(systemd::tell(
            async move { _ = member.wait_for(|&is_member| is_member).await },
            async move || _ = beats.changed().await,
        ));
        host::run(settings, lines, (stop, twice.twice())).await.map_err(Failure::input)
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

/// A crowd at the data port, or a large formation, needs more files than the 1,024 that many systems begin with.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    // What is refused here shows where a file is missing.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
}

/// The way to the orchestrator, once this worker may be a member of its cluster.
///
/// **Errors**: code 2, with every fault of the addresses and the credentials.
fn orchestrator(args: &WorkerArgs) -> Result<Reloaded<Endpoint>, Failure> {
    let listen = check_listen(&args.join, args.listen);
    match (args.access.reloaded("--join", &args.join), listen) {
        (Ok(endpoint), Ok(())) => Ok(endpoint),
        (Err(one), Err(other)) => Err(Failure::input(format!("{}\n{}", one.message, other.message))),
        (Err(failure), Ok(())) | (Ok(_), Err(failure)) => Err(failure),
    }
}

/// Refuses an address for data that workers on other hosts cannot reach, where the orchestrator is on a network: every worker
/// is told that address.
///
/// **Errors**: code 2, with the address of this host on the way to the orchestrator.
fn check_listen(join: &str, listen: SocketAddr) -> Result<(), Failure> {
    let ip = listen.ip();
    if is_on_this_machine(join) || !(ip.is_loopback() || ip.is_unspecified()) {
        return Ok(());
    }
    let port = listen.port();
    let example = match own_address(join) {
        Some(own) => SocketAddr::new(own, port).to_string(),
        None => format!("ADDRESS:{port}"),
    };
    Err(Failure::input(format!(
        "--listen {listen}: expected an address of this host that other workers can reach, since the orchestrator at \
         {join} is on a network; for example --listen {example}"
    )))
}

/// Whether an orchestrator, at HOST:PORT, is reached by loopback.
fn is_on_this_machine(join: &str) -> bool {
    let addresses = join.to_socket_addrs().map(Iterator::collect::<Vec<_>>).unwrap_or_default();
    !addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback())
}

/// The address from which this host would send to an orchestrator. Nothing is sent.
fn own_address(join: &str) -> Option<IpAddr> {
    let to = join.to_socket_addrs().ok()?.next()?;
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_unspecified() && !own.is_loopback()).then_some(own)
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
    let sources = Sources::parse(&args.allow_sources);
    let sources = sources.map_err(|faults| Failure::faults("--allow-source", &faults))?;
    let orchestrator = orchestrator(args)?;
    let cores = machine::cores();
    let absolute = |path: &PathBuf| match Location::is_path(path) {
        true => path.clone(),
        false => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
    };
    Ok(Settings {
        orchestrator: Arc::new(orchestrator),
        token: args.access.bearer()?.0,
        storage: absolute(&args.storage),
        data_root: args.data_root.as_ref().map(absolute),
        sources,
        slots: args.slots,
        name: format!("{host}-{}", std::process::id()),
        node,
        block,
        listen: args.listen,
        cores,
        // Before there are ranks: they would share the cores with the measurement.
        peak_flops: machine::peak(cores) as u64,
        log_levels,
        pulse: watch::Sender::new(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_joins_over_a_network_announces_an_address_that_others_reach() {
        let check = |join: &str, listen: &str| {
            check_listen(join, listen.parse().unwrap()).map_err(|failure| failure.to_string())
        };
        for join in ["127.0.0.1:7070", "localhost:7070", "[::1]:7070", "127.8.8.8:1"] {
            for listen in ["127.0.0.1:0", "0.0.0.0:0", "10.0.0.2:0"] {
                assert_eq!(check(join, listen), Ok(()), "{join} {listen}");
            }
        }
        for join in ["192.0.2.1:7070", "[2001:db8::1]:7070", "no-such-host.invalid:7070"] {
            for listen in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:4000", "[::]:0", "127.1.2.3:9"] {
                let words = check(join, listen).unwrap_err();
                let start = format!("error: --listen {listen}: expected an address of this host");
                assert!(words.starts_with(&start) && words.contains(join), "{words}");
                assert!(words.contains("for example --listen "), "{words}");
            }
            assert_eq!(check(join, "10.0.0.2:0"), Ok(()));
        }
    }
}
