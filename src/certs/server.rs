//! The authority's and the orchestrator's certificates: made, renewed, and with more hosts.

use std::net::IpAddr;
use std::path::Path;
use std::time::SystemTime;

use contraflow_orchestrator::server::{certificate_info, files};

use super::authority::{Authority, Issued, YEARS_10};
use super::{date, folder};
use crate::failure::Failure;
use crate::output::print;

/// Runs `contraflow certs init`.
///
/// **Errors**: code 2; the folder is there already, or a host is none.
pub(super) fn init(dir: &Path, hosts: &[String]) -> Result<(), Failure> {
    let until = SystemTime::now() + YEARS_10;
    let failed = |error: rcgen::Error| Failure::input(format!("--host: {error}"));
    let authority = Authority::new().map_err(failed)?;
    let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let (ca, server) = issue(&authority, with(local.to_vec(), hosts), until).map_err(failed)?;
    let tokens = "# NAME ROLE EXPIRES HASH FINGERPRINT; removing a line revokes its token\n";
    let contents = [
        (files::CA, 0o644, ca),
        (files::CA_KEY, 0o600, authority.key()),
        (files::SERVER, 0o644, server.certificate.pem()),
        (files::SERVER_KEY, 0o600, server.key),
        (files::TOKENS, 0o600, tokens.into()),
    ];
    folder::create(dir, &contents).map_err(|error| folder::is_taken(dir, "--dir", &error))?;
    let dir = dir.display();
    print(&format!(
        "{dir}: a new authority. The orchestrator: contraflow orchestrator --tls {dir} ...\n\
         Everybody else: contraflow certs issue --dir {dir} --name NAME --role view|submit|admin|worker\n"
    ))
}

/// Renews the certificates of the orchestrator and of the authority, which keeps its key: what it has issued stays good. The
/// orchestrator gets more hosts if some are named.
///
/// **Errors**: code 2; the folder is none of an authority, or a host is none.
pub(super) fn renew(dir: &Path, more_hosts: &[String]) -> Result<(), Failure> {
    let _lock = folder::lock(dir)?;
    let [key] = folder::read(dir, [files::CA_KEY])?;
    let before = certificate_info(&dir.join(files::SERVER))
        .map_err(|fault| Failure::input(format!("--dir: {fault}")))?;
    let unsound = |error| Failure::input(format!("{}: {error}", dir.join(files::CA_KEY).display()));
    let authority = Authority::of(&key).map_err(unsound)?;
    let until = SystemTime::now() + YEARS_10;
    let hosts = with(before.hosts, more_hosts);
    let failed = |error| Failure::input(format!("--add-host: {error}"));
    let (ca, server) = issue(&authority, hosts.clone(), until).map_err(failed)?;
    let contents = [
        (files::CA, 0o644, ca),
        (files::SERVER, 0o644, server.certificate.pem()),
        (files::SERVER_KEY, 0o600, server.key),
    ];
    folder::exchange(dir, &contents)?;
    print(&format!(
        "{}: the orchestrator's certificate is renewed until {}, for {}\n",
        dir.display(),
        date(until),
        hosts.join(", ")
    ))
}

/// The certificate of the authority, as PEM, and that of the orchestrator.
fn issue(
    authority: &Authority,
    hosts: Vec<String>,
    until: SystemTime,
) -> Result<(String, Issued), rcgen::Error> {
    Ok((authority.certificate(until)?.pem(), authority.server(hosts, until)?))
}

/// The hosts and those that are new, each once.
fn with(mut hosts: Vec<String>, more: &[String]) -> Vec<String> {
    for host in more {
        let host = host.parse::<IpAddr>().map_or_else(|_| host.clone(), |address| address.to_string());
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}
