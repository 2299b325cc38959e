//! What an orchestrator reads from the folder of its certificates: who it is, whom it lets in, the tokens, and the certificates that were
//! revoked.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

use super::access::{Revoked, Token, fingerprint, parse_revoked, parse_tokens};

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

/// Largest file of tokens or revoked certificates that is read. **Units**: bytes.
const MAX_LIST: u64 = 4 << 20;

/// How an orchestrator proves itself, and who may talk to it.
pub struct Security {
    pub(super) tls: TlsAcceptor,
    pub(super) grants: Grants,
}

/// Whom an orchestrator serves.
pub(super) struct Grants {
    pub(super) tokens: ListFile<Token>,
    pub(super) revoked: ListFile<Revoked>,
}

impl Security {
    /// Reads the folder.
    ///
    /// **Errors**: every missing or invalid file.
    pub fn load(dir: &Path) -> Result<Self, Vec<String>> {
        let tokens = ListFile::open(dir.join(files::TOKENS), parse_tokens);
        let revoked = ListFile::open_or_empty(dir.join(files::REVOKED), parse_revoked);
        match (tls(dir), tokens, revoked) {
            (Ok(tls), Ok(tokens), Ok(revoked)) => Ok(Security { tls, grants: Grants { tokens, revoked } }),
            (tls, tokens, revoked) => {
                let faults = [tls.err(), tokens.err(), revoked.err()];
                Err(faults.into_iter().flatten().flatten().collect())
            }
        }
    }
}

fn tls(dir: &Path) -> Result<TlsAcceptor, Vec<String>> {
    let reason = |name: &str, error: &dyn std::fmt::Display| format!("{}: {error}", dir.join(name).display());
    let certificates = |name: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_file_iter(dir.join(name)).and_then(Iterator::collect);
        read.map_err(|error| reason(name, &error))
    };
    let key = PrivateKeyDer::from_pem_file(dir.join(files::SERVER_KEY));
    let key = key.map_err(|error| reason(files::SERVER_KEY, &error));
    match (certificates(files::CA), certificates(files::SERVER), key) {
        (Ok(ca), Ok(own), Ok(key)) => {
            acceptor(ca, own, key).map_err(|error| vec![format!("{}: {error}", dir.display())])
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

/// Identifies a version of a file: its modification time and length.
type Stamp = (Option<SystemTime>, u64);

/// What the lines of a file are.
type Parse<T> = fn(&str) -> Result<Vec<T>, Vec<String>>;

/// A list in a file; read again when the file changes, so that tokens can be issued and certificates revoked while the cluster
/// runs.
pub(super) struct ListFile<T> {
    path: PathBuf,
    parse: Parse<T>,
    read: Mutex<(Stamp, Arc<Vec<T>>)>,
}

impl<T> ListFile<T> {
    fn open(path: PathBuf, parse: Parse<T>) -> Result<Self, Vec<String>> {
        let stamp = stamp(&path).map_err(|fault| vec![fault])?;
        let read = Mutex::new((stamp, Arc::new(read(&path, parse)?)));
        Ok(ListFile { path, parse, read })
    }

    /// A list that may not have been begun.
    fn open_or_empty(path: PathBuf, parse: Parse<T>) -> Result<Self, Vec<String>> {
        if path.exists() {
            return Self::open(path, parse);
        }
        Ok(ListFile { path, parse, read: Mutex::new((Stamp::default(), Arc::default())) })
    }

    /// The list as the file has it now; as it had it last if it makes no sense any more, which is logged.
    pub(super) fn current(&self) -> Arc<Vec<T>> {
        let mut known = self.read.lock();
        let stamp = stamp(&self.path).unwrap_or_default();
        if stamp != known.0 {
            known.0 = stamp;
            match read(&self.path, self.parse) {
                Ok(list) => known.1 = Arc::new(list),
                Err(faults) => tracing::warn!("the list stays as it was: {}", faults.join("; ")),
            }
        }
        known.1.clone()
    }
}

fn stamp(path: &Path) -> Result<Stamp, String> {
    let found = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok((found.modified().ok(), found.len()))
}

fn read<T>(path: &Path, parse: Parse<T>) -> Result<Vec<T>, Vec<String>> {
    let fault = |what: &dyn std::fmt::Display| vec![format!("{}: {what}", path.display())];
    let (_, length) = stamp(path).map_err(|fault| vec![fault])?;
    if length > MAX_LIST {
        return Err(fault(&format!("expected at most {MAX_LIST} bytes, got {length}")));
    }
    let text = fs::read_to_string(path).map_err(|error| fault(&error))?;
    parse(&text).map_err(|faults| faults.into_iter().flat_map(|line| fault(&line)).collect())
}

/// [`fingerprint`] of the certificate in a PEM file.
///
/// **Errors**: there is none.
pub fn fingerprint_of(path: &Path) -> Result<blake3::Hash, String> {
    let certificate = CertificateDer::from_pem_file(path);
    certificate.map(|der| fingerprint(&der)).map_err(|error| format!("{}: {error}", path.display()))
}
