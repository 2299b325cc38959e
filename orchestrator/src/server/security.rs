//! What an orchestrator reads from the folder of its certificates: who it is, whom it lets in, the tokens, and the certificates that were
//! revoked. All of it is read again when it changes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::files::Reloaded;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use tracing::Level;

use super::access::{Revoked, Token, fingerprint, parse_revoked, parse_tokens};
use super::expiry::{self, Ending, Notices};
use super::lists::list;
use super::x509::CertificateInfo;
use super::{Handle, unix_seconds};

/// The files of a folder of certificates, as the command `certs` makes them.
pub mod files {
    /// Certificate of the cluster's own authority.
    pub const CA: &str = "ca.pem";
    /// Its key: what issues certificates.
    pub const CA_KEY: &str = "ca.key";
    /// The orchestrator's certificate.
    pub const SERVER: &str = "server.pem";
    /// Its key.
    pub const SERVER_KEY: &str = "server.key";
    /// Hashes of the tokens.
    pub const TOKENS: &str = "tokens";
    /// Certificates that are not accepted any more.
    pub const REVOKED: &str = "revoked";
    /// A client's or a worker's certificate, in a folder of its own.
    pub const CLIENT: &str = "client.pem";
    /// Its key.
    pub const CLIENT_KEY: &str = "client.key";
}

/// How often files are looked at and ends are thought of, where nobody connects.
const LOOK: Duration = Duration::from_secs(60);

/// How an orchestrator proves itself, and who may talk to it.
pub struct Security {
    tls: Reloaded<Tls>,
    pub(super) tokens: Reloaded<Vec<Token>>,
    pub(super) revoked: Reloaded<Vec<Revoked>>,
}

/// What is made of the orchestrator's certificate and that of the authority.
struct Tls {
    acceptor: TlsAcceptor,
    endings: [Ending; 2],
}

impl Security {
    /// Reads the folder.
    ///
    /// **Errors**: every missing or invalid file.
    pub fn load(dir: &Path) -> Result<Self, Vec<String>> {
        let files = [files::CA, files::SERVER, files::SERVER_KEY].map(|name| dir.join(name));
        let of_folder = dir.to_owned();
        let tls = Reloaded::open("certificates", files.to_vec(), move || tls(&of_folder));
        let (tokens, revoked) = (dir.join(files::TOKENS), dir.join(files::REVOKED));
        let tokens = list("tokens", tokens, parse_tokens, false);
        let revoked = list("revoked certificates", revoked, parse_revoked, true);
        match (tls, tokens, revoked) {
            (Ok(tls), Ok(tokens), Ok(revoked)) => Ok(Security { tls, tokens, revoked }),
            (tls, tokens, revoked) => {
                let faults = [tls.err(), tokens.err(), revoked.err()];
                Err(faults.into_iter().flatten().flatten().collect())
            }
        }
    }

    /// What takes connections in, with the certificates as they are now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.tls.current().acceptor.clone()
    }

    /// The end of the orchestrator's certificate. **Units**: seconds since 1970.
    pub(super) fn expires(&self) -> u64 {
        self.tls.current().endings[0].expires
    }

    /// Logs what ends soon, in time and once a day, until the hub has ended.
    pub(super) async fn tell_endings(self: Arc<Self>, hub: Handle) {
        let mut notices = Notices::default();
        while let Ok(shown) =
            hub.ask(|hub| hub.links.values().filter_map(|link| link.shown.clone()).collect::<Vec<_>>()).await
        {
            let now = unix_seconds();
            let tokens = self.tokens.current();
            let mut endings = self.tls.current().endings.to_vec();
            endings.extend(expiry::of_tokens(&tokens, now));
            endings.extend(expiry::of_links(&shown, &tokens));
            for (level, line) in notices.due(&endings, now) {
                match level {
                    Level::ERROR => tracing::error!("{line}"),
                    _ => tracing::warn!("{line}"),
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn tls(dir: &Path) -> Result<Tls, Vec<String>> {
    let reason = |name: &str, error: &dyn std::fmt::Display| format!("{}: {error}", dir.join(name).display());
    let certificates = |name: &str| -> Result<(Vec<CertificateDer<'static>>, u64), String> {
        let read =
            CertificateDer::pem_file_iter(dir.join(name)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let chain = read.map_err(|error| reason(name, &error))?;
        let info = chain.first().and_then(|first| CertificateInfo::of(first));
        let expires = info.ok_or_else(|| reason(name, &"expected a certificate"))?.expires;
        Ok((chain, expires))
    };
    let key = PrivateKeyDer::from_pem_file(dir.join(files::SERVER_KEY));
    let key = key.map_err(|error| reason(files::SERVER_KEY, &error));
    match (certificates(files::CA), certificates(files::SERVER), key) {
        (Ok((ca, ca_expires)), Ok((own, expires)), Ok(key)) => {
            let acceptor =
                acceptor(ca, own, key).map_err(|error| vec![format!("{}: {error}", dir.display())])?;
            let ending = |whose: &str, expires| Ending {
                what: format!("the certificate of the {whose}"),
                remedy: "contraflow certs renew".into(),
                expires,
                is_vital: true,
            };
            let endings = [ending("orchestrator", expires), ending("authority", ca_expires)];
            Ok(Tls { acceptor, endings })
        }
        (ca, own, key) => Err([ca.err(), own.err(), key.err()].into_iter().flatten().collect()),
    }
}

/// TLS 1.3 alone, and no client without a certificate of the authority.
fn acceptor(
    ca: Vec<CertificateDer<'static>>,
    own: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<TlsAcceptor, String> {
    let reason = |error: rustls::Error| error.to_string();
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in ca {
        roots.add(certificate).map_err(reason)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(reason)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own, key)
        .map_err(reason)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Reads the first certificate of a PEM file.
///
/// **Errors**: there is none.
pub fn certificate_info(path: &Path) -> Result<CertificateInfo, String> {
    let certificate = CertificateDer::from_pem_file(path).map_err(|error| error.to_string());
    let info =
        certificate.and_then(|der| CertificateInfo::of(&der).ok_or_else(|| "expected a certificate".into()));
    info.map_err(|error| format!("{}: {error}", path.display()))
}

/// [`fingerprint`] of the certificate in a PEM file.
///
/// **Errors**: there is none.
pub fn fingerprint_of(path: &Path) -> Result<blake3::Hash, String> {
    let certificate = CertificateDer::from_pem_file(path);
    certificate.map(|der| fingerprint(&der)).map_err(|error| format!("{}: {error}", path.display()))
}
