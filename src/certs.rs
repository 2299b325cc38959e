//! `contraflow certs`: the cluster's own certificate authority, and what it issues: certificates and tokens.
//!
//! A folder appears whole under its name or not at all, and nothing is replaced unless that is asked for.

mod authority;
mod folder;
mod member;
mod server;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use contraflow_orchestrator::server::access::Role;
use time::OffsetDateTime;

use crate::failure::Failure;

const DAY: Duration = Duration::from_secs(86_400);

/// Arguments of `contraflow certs`.
#[derive(clap::Args, Debug)]
pub struct CertsArgs {
    #[command(subcommand)]
    command: CertsCommand,
}

#[derive(clap::Subcommand, Debug)]
enum CertsCommand {
    /// Create a CA, the orchestrator's certificate, and an empty list of tokens
    Init(Init),
    /// Issue a certificate for a client or worker, and print its token
    Issue(Issue),
    /// Renew the certificate of the orchestrator, or of a client or worker, whose token stays the same
    Renew(Renew),
    /// Revoke a certificate and its token: calls are refused at once, open streams end within seconds
    Revoke(Revoke),
}

#[derive(clap::Args, Debug)]
struct Init {
    /// The new folder
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Host name or address of the orchestrator, besides localhost; may be repeated
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Add a host to the orchestrator's certificate in a folder that is there; may be repeated
    #[arg(long = "add-host", value_name = "NAME", conflicts_with = "hosts")]
    added: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct Issue {
    /// Folder of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the client or worker; the certificate goes into DIR/NAME
    #[arg(long)]
    name: String,
    /// Role of the token: view, submit, admin or worker
    #[arg(long)]
    role: Role,
    /// Validity of certificate and token in days
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=3650))]
    expires: u64,
    /// Revoke the certificates and tokens that the name has
    #[arg(long)]
    replace: bool,
}

#[derive(clap::Args, Debug)]
struct Renew {
    /// Folder of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of a client or worker [default: the orchestrator and the CA]
    #[arg(long)]
    name: Option<String>,
    /// Validity of the client's or worker's certificate and token, from now on, in days
    #[arg(long, value_name = "DAYS", default_value_t = 365, requires = "name", value_parser = clap::value_parser!(u64).range(1..=3650))]
    expires: u64,
}

#[derive(clap::Args, Debug)]
struct Revoke {
    /// Folder of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the client or worker
    #[arg(long)]
    name: String,
}

/// Runs the command.
///
/// **Errors**: code 2; something is there already, or the folder cannot be read or written.
pub fn run(args: &CertsArgs) -> Result<(), Failure> {
    match &args.command {
        CertsCommand::Init(Init { dir, hosts, added }) if added.is_empty() => server::init(dir, hosts),
        CertsCommand::Init(Init { dir, added, .. }) => server::renew(dir, added),
        CertsCommand::Issue(args) => member::issue(args),
        CertsCommand::Renew(Renew { dir, name: None, .. }) => server::renew(dir, &[]),
        CertsCommand::Renew(Renew { dir, name: Some(name), expires }) => member::renew(dir, name, *expires),
        CertsCommand::Revoke(args) => member::revoke(args),
    }
}

/// A day of the calendar, UTC.
fn date(time: SystemTime) -> String {
    OffsetDateTime::from(time).date().to_string()
}
