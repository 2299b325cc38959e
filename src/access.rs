//! How clients and workers reach an orchestrator: where it is, how it proves itself, and with what they do.

use std::net::IpAddr;
use std::path::PathBuf;

use contraflow_orchestrator::server::files;
use contraflow_runtime::files::{Reloaded, Stamp, stamps};
use contraflow_runtime::trace;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

use crate::failure::Failure;

/// Client certificate and token. On this machine alone none of it is needed.
#[derive(clap::Args, Clone, Debug)]
pub struct Access {
    /// Folder with the cluster's CA and the client's certificate, from `certs issue`; required unless the orchestrator is on
    /// loopback
    #[arg(long, value_name = "DIR", env = "CONTRAFLOW_TLS")]
    pub tls: Option<PathBuf>,
    /// Token printed by `certs issue`: identifies the caller and its role
    #[arg(long, env = "CONTRAFLOW_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

/// Adds the token to every call, and the span it is made in.
#[derive(Clone)]
pub struct Bearer(pub Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        if let Ok(traceparent) = trace::current().to_string().parse::<MetadataValue<Ascii>>()
            && !traceparent.is_empty()
        {
            request.metadata_mut().insert("traceparent", traceparent);
        }
        Ok(request)
    }
}

impl Access {
    /// The way to `address`, which was given as `flag`.
    ///
    /// **Errors**: code 2; the address or a file makes no sense, or it is off this machine and there is no `--tls`.
    pub fn endpoint(&self, flag: &str, address: &str) -> Result<Endpoint, Failure> {
        let place = address.split_once("://").map_or(address, |(_, place)| place);
        let failed = |error: &dyn std::fmt::Display| {
            Failure::input(format!("{flag} {address}: expected HOST:PORT, got: {error}"))
        };
        let Some(dir) = &self.tls else {
            if !is_this_machine(place) {
                return Err(Failure::input(format!(
                    "{flag} {address}: expected --tls DIR for an address off this machine, got none; \
                     where the cluster's CA is: contraflow certs issue --dir DIR --name NAME --role ROLE"
                )));
            }
            return Endpoint::from_shared(format!("http://{place}")).map_err(|error| failed(&error));
        };
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let (ca, own, key) = match (read(files::CA), read(files::CLIENT), read(files::CLIENT_KEY)) {
            (Ok(ca), Ok(own), Ok(key)) => (ca, own, key),
            (ca, own, key) => {
                let faults: Vec<String> = [ca.err(), own.err(), key.err()].into_iter().flatten().collect();
                return Err(Failure::faults("--tls", &faults));
            }
        };
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(ca))
            .identity(Identity::from_pem(own, key));
        let endpoint = Endpoint::from_shared(format!("https://{place}")).map_err(|error| failed(&error))?;
        let unsound = |error| {
            Failure::input(format!("--tls {}: {}", dir.display(), contraflow_workers::host::describe(&error)))
        };
        endpoint.tls_config(tls).map_err(unsound)
    }

    /// The same, made anew when the certificate is renewed.
    ///
    /// **Errors**: as [`Access::endpoint`].
    pub fn reloaded(&self, flag: &'static str, address: &str) -> Result<Reloaded<Endpoint>, Failure> {
        let (access, address) = (self.clone(), address.to_owned());
        let read = move || access.endpoint(flag, &address).map_err(|failure| vec![failure.message]);
        let opened = Reloaded::open("certificates", self.files(), read);
        opened.map_err(|faults| Failure::input(faults.join("\n")))
    }

    /// The versions of the certificate's files: others once it is renewed.
    pub fn stamps(&self) -> Vec<Stamp> {
        stamps(&self.files())
    }

    fn files(&self) -> Vec<PathBuf> {
        let names = [files::CA, files::CLIENT, files::CLIENT_KEY];
        self.tls.iter().flat_map(|dir| names.map(|name| dir.join(name))).collect()
    }

    /// What goes with every call.
    ///
    /// **Errors**: code 2; a token is a line of plain characters.
    pub fn bearer(&self) -> Result<Bearer, Failure> {
        // A variable that is empty is as good as none.
        let Some(token) = self.token.as_ref().filter(|token| !token.is_empty()) else {
            return Ok(Bearer(None));
        };
        let value = MetadataValue::try_from(format!("Bearer {token}"));
        let mut value = value.map_err(|_| {
            Failure::input(
                "--token: expected a token printed by `contraflow certs issue`, got other characters",
            )
        })?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

/// Whether `place`, HOST:PORT, is reachable from this machine only.
fn is_this_machine(place: &str) -> bool {
    let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_this_machine() {
        for place in ["127.0.0.1:7070", "127.3.2.1:1", "[::1]:7070", "localhost:7070"] {
            assert!(is_this_machine(place), "{place}");
        }
        for place in
            ["10.0.0.1:7070", "0.0.0.0:7070", "[::]:1", "localhost.example:1", "127.0.0.1.example:1", ""]
        {
            assert!(!is_this_machine(place), "{place}");
        }
    }
}
