//! A connection to a dashboard: HTTP, through TLS with the cluster's certificates where the address says so. Every request has a deadline and
//! an answer a bound. Knows no page.

use std::sync::Arc;
use std::time::Duration;

use contraflow_orchestrator::server::files;
use contraflow_workers::host::{closed, describe};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::answers::{Refused, Text};
use crate::access::Access;
use crate::failure::Failure;

/// How long a connection, and an answer, may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// The longest answer: a timeline of 40,000 operations is one of a few MB. **Units**: bytes.
const MAX_ANSWER: usize = 32 << 20;

/// The port of an address that names none.
const PORT: u16 = 7080;

/// Where a dashboard is, and what it is shown.
#[derive(Debug)]
pub struct Link {
    /// The host as a request names it.
    authority: Authority,
    /// Present where it is reached through TLS.
    tls: Option<Access>,
    token: Option<header::HeaderValue>,
    open: Option<SendRequest<Empty<Bytes>>>,
    /// How long an answer may take, its connection included.
    deadline: Duration,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The other side is out of reach, or says nothing that makes sense.
    Away(Text),
    /// It has refused: there is nothing of the kind, or the token is not good for it.
    Refused {
        /// Of HTTP.
        status: u16,
        /// Why.
        why: Text,
    },
}

fn away(why: impl std::fmt::Display) -> Trouble {
    Trouble::Away(why.to_string().into())
}

impl Link {
    /// To `url`: through TLS with the cluster's certificates and token, or to a run with the token of its dashboard. An address without a
    /// scheme is one with TLS if there are certificates.
    ///
    /// **Errors**: code 2; the address, the certificates or the token make no sense.
    pub fn new(url: &str, access: &Access, dashboard_token: Option<&str>) -> Result<Self, Failure> {
        let failed = |what: &str| Failure::input(format!("--url {url}: {what}"));
        let scheme = if access.tls.is_some() { "https" } else { "http" };
        let whole = if url.contains("://") { url.to_owned() } else { format!("{scheme}://{url}") };
        let uri: Uri = whole.parse().map_err(|error| {
            failed(&format!("expected http://HOST:PORT/ or https://HOST:PORT/, got: {error}"))
        })?;
        let is_secured = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(failed("expected http:// or https://, got another scheme")),
        };
        let named = uri
            .authority()
            .filter(|authority| !authority.host().is_empty() && !authority.as_str().contains('@'));
        let authority = named.ok_or_else(|| failed("expected a host, got none"))?;
        let authority = match authority.port() {
            Some(_) => authority.clone(),
            None => Authority::try_from(format!("{authority}:{PORT}"))
                .map_err(|error| failed(&error.to_string()))?,
        };
        let tls = match (is_secured, &access.tls) {
            (true, Some(_)) => Some(access.clone()),
            (true, None) => return Err(failed("expected --tls DIR for an address with https://, got none")),
            (false, _) => None,
        };
        // The cluster's token goes through TLS alone.
        let token = if is_secured { access.token.as_deref() } else { dashboard_token };
        let token = token.filter(|token| !token.is_empty()).map(|token| {
            let mut value = header::HeaderValue::from_str(&format!("Bearer {token}"));
            value.iter_mut().for_each(|value| value.set_sensitive(true));
            value.map_err(|_| Failure::input("token: expected a line of plain characters, got others"))
        });
        let link = Link { authority, tls, token: token.transpose()?, open: None, deadline: TIMEOUT };
        // Certificates that cannot be read are the user's to fix, and said at once.
        link.tls.iter().try_for_each(|access| {
            client_config(access).map(drop).map_err(|faults| Failure::faults("--tls", &faults))
        })?;
        Ok(link)
    }

    /// As it is typed into a browser.
    pub fn url(&self) -> String {
        format!("{}://{}/", if self.tls.is_some() { "https" } else { "http" }, self.authority)
    }

    /// Asks for `path` and reads the answer.
    ///
    /// # Errors
    /// See [`Trouble`]; no answer within ten seconds.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Trouble> {
        let answered = tokio::time::timeout(self.deadline, self.ask(path)).await;
        // A connection on which something is left to be read is not used again: `ask` has taken it and not put it back.
        let bytes = answered.unwrap_or_else(|_| {
            Err(away(format!("{path}: no answer within {} s", self.deadline.as_secs())))
        })?;
        serde_json::from_slice(&bytes)
            .map_err(|error| away(format!("{path}: expected the answer of a dashboard, got {error}")))
    }

    async fn ask(&mut self, path: &str) -> Result<Bytes, Trouble> {
        let mut open = match self.open.take() {
            Some(open) if open.is_ready() => open,
            _ => self.connect().await?,
        };
        let mut request = Request::get(path).header(header::HOST, self.authority.as_str());
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token.clone());
        }
        let request = request.body(Empty::new()).map_err(away)?;
        let broken = |error: hyper::Error| away(closed(&error, self.tls.is_some()));
        let (head, body) = open.send_request(request).await.map_err(broken)?.into_parts();
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| away(describe(&*error)))?
            .to_bytes();
        self.open = Some(open);
        if head.status == StatusCode::OK {
            return Ok(body);
        }
        let refused: Refused = serde_json::from_slice(&body).unwrap_or_default();
        let faults: Vec<&str> = refused.faults.iter().map(|fault| &**fault).collect();
        let why = if faults.is_empty() { head.status.to_string() } else { faults.join("; ") };
        let status = head.status.as_u16();
        Err(if head.status.is_client_error() {
            Trouble::Refused { status, why: why.into() }
        } else {
            away(why)
        })
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, Trouble> {
        let host = self.authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = self.authority.port_u16().unwrap_or(PORT);
        let tcp = TcpStream::connect((host, port)).await.map_err(away)?;
        // Requests are small and follow each other.
        tcp.set_nodelay(true).map_err(away)?;
        match &self.tls {
            None => opened(tcp).await,
            Some(access) => {
                // Read anew: certificates are renewed while this runs.
                let config = client_config(access).map_err(|faults| away(faults.join("; ")))?;
                let name = ServerName::try_from(host.to_owned()).map_err(away)?;
                let io = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(away)?;
                opened(io).await
            }
        }
    }
}

async fn opened(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<SendRequest<Empty<Bytes>>, Trouble> {
    let (sender, connection) = handshake(TokioIo::new(io)).await.map_err(away)?;
    // Ends with the sender, or the other side.
    tokio::spawn(connection);
    Ok(sender)
}

/// **Errors**: every file that is missing or makes no sense.
fn client_config(access: &Access) -> Result<ClientConfig, Vec<String>> {
    let Some(dir) = &access.tls else { return Err(vec!["expected a folder, got none".into()]) };
    let reason = |name: &str, error: &dyn std::fmt::Display| format!("{}: {error}", dir.join(name).display());
    let chain = |name: &str| {
        let read =
            CertificateDer::pem_file_iter(dir.join(name)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        read.map_err(|error| reason(name, &error))
    };
    let key = PrivateKeyDer::from_pem_file(dir.join(files::CLIENT_KEY));
    let key = key.map_err(|error| reason(files::CLIENT_KEY, &error));
    let (authority, own, key) = match (chain(files::CA), chain(files::CLIENT), key) {
        (Ok(authority), Ok(own), Ok(key)) => (authority, own, key),
        (authority, own, key) => {
            return Err([authority.err(), own.err(), key.err()].into_iter().flatten().collect());
        }
    };
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(certificate).map_err(|error| vec![reason(files::CA, &error)])?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| vec![error.to_string()])?
        .with_root_certificates(roots)
        .with_client_auth_cert(own, key)
        .map_err(|error| vec![reason(files::CLIENT, &error)])?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::super::answers::About;
    use super::*;

    const NONE: Access = Access { tls: None, token: None };

    fn url(url: &str, access: &Access) -> Result<String, String> {
        Link::new(url, access, None).map(|link| link.url()).map_err(|failure| failure.message)
    }

    #[test]
    fn an_address_is_taken_as_a_browser_shows_it_or_without_what_goes_without_saying() {
        for (given, shown) in [
            ("http://127.0.0.1:7080/", "http://127.0.0.1:7080/"),
            ("127.0.0.1:9", "http://127.0.0.1:9/"),
            ("localhost", "http://localhost:7080/"),
            ("http://[::1]:80/run/tiny", "http://[::1]:80/"),
        ] {
            assert_eq!(url(given, &NONE), Ok(shown.to_owned()));
        }
        for (given, expected) in [
            ("ftp://x/", "expected http:// or https://"),
            ("http://", "expected http://HOST:PORT/"),
            ("http://user@x/", "expected a host"),
            ("https://x/", "expected --tls DIR"),
        ] {
            let refused = url(given, &NONE).unwrap_err();
            assert!(
                refused.starts_with(&format!("--url {given}: ")) && refused.contains(expected),
                "{refused}"
            );
        }
    }

    #[test]
    fn certificates_that_are_not_there_are_named_at_once_where_they_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let access = Access { tls: Some(dir.path().to_owned()), token: None };
        let refused = url("node0:7080", &access).unwrap_err();
        for name in [files::CA, files::CLIENT, files::CLIENT_KEY] {
            assert!(refused.contains(name), "{refused}");
        }
        assert_eq!(url("http://node0:7080", &access), Ok("http://node0:7080/".to_owned()));
    }

    #[tokio::test]
    async fn a_dashboard_that_never_answers_is_not_waited_for_and_none_at_all_is_said_at_once() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut link = Link::new(&address, &NONE, None).unwrap();
        link.deadline = Duration::from_millis(20);
        // The system takes the connection in; nobody reads from it.
        let silent = link.get::<About>("/api/v1").await.unwrap_err();
        assert_eq!(silent, Trouble::Away("/api/v1: no answer within 0 s".into()));
        drop(listener);
        link.deadline = TIMEOUT;
        let Err(Trouble::Away(why)) = link.get::<About>("/api/v1").await else { panic!("nobody is there") };
        assert!(why.contains("refused"), "{why}");
    }

    #[test]
    fn the_clusters_token_is_not_sent_in_the_clear() {
        let access = Access { tls: None, token: Some("secret".into()) };
        assert_eq!(Link::new("http://node0:7080", &access, None).unwrap().token, None);
        let own = Link::new("http://node0:7080", &access, Some("of the dashboard")).unwrap().token;
        assert_eq!(own.unwrap(), "Bearer of the dashboard");
    }
}
