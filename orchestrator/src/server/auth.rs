//! The guard before all services: no call passes that its caller may not make, or makes too often. What it refuses it logs.
//!
//! The decisions are in [`super::access`] and [`super::rate`]; here are clock, file and headers.
//! A call that passes has a span.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use contraflow_runtime::control::text::tidy;
use contraflow_runtime::trace::{self, SPAN, TraceContext};
use parking_lot::{Mutex, MutexGuard};
use tokio_rustls::TlsAcceptor;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, http};
use tower::Service;
use tracing::Instrument;

use super::acceptor::Peer;
use super::access::{self, Credentials, SUBMIT, Token};
use super::audit::{Audit, Call};
use super::hub::now_ms;
use super::rate::{Buckets, Rate};
use super::security::Security;
use super::unix_seconds;
use super::withdrawal::{self, until_withdrawn};

/// Submissions of one address, where tokens are asked for.
const SUBMITS: Rate = Rate { burst: 200, per_second: 50 };

/// Refusals of one address that are logged and answered with their reason.
const FAILURES: Rate = Rate { burst: 20, per_second: 1 };

/// How often the credentials behind an open stream are looked at again.
const RECHECK: Duration = Duration::from_secs(1);

/// What is logged of a method. **Units**: bytes.
const MAX_METHOD: usize = 128;

/// What the audit log has of a text. **Units**: bytes.
const MAX_AUDITED: usize = 256;

/// Who makes calls through a front; found among a request's extensions.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// Where they are.
    pub address: SocketAddr,
    /// Fingerprint of their certificate; none without TLS.
    pub certificate: Option<blake3::Hash>,
}

struct Shared {
    /// None: every client has full access.
    security: Option<Arc<Security>>,
    submits: Mutex<Buckets>,
    failures: Mutex<Buckets>,
    audit: Audit,
    /// From when on credentials are looked at again, every [`RECHECK`].
    began: tokio::time::Instant,
    /// The tokens by which a caller was judged last, and a signal to open streams that there are others now.
    tokens: Mutex<Option<Arc<Vec<Token>>>>,
    changed: tokio::sync::Notify,
}

/// The guard. Clones are the same.
#[derive(Clone)]
pub(super) struct AuthLayer {
    shared: Arc<Shared>,
}

fn lock(buckets: &Mutex<Buckets>) -> MutexGuard<'_, Buckets> {
    buckets.lock()
}

impl AuthLayer {
    pub(super) fn new(security: Option<Arc<Security>>, audit: Audit) -> Self {
        let (submits, failures) = (Mutex::new(Buckets::new(SUBMITS)), Mutex::new(Buckets::new(FAILURES)));
        let began = tokio::time::Instant::now();
        let (tokens, changed) = Default::default();
        AuthLayer { shared: Arc::new(Shared { security, submits, failures, audit, began, tokens, changed }) }
    }

    /// What takes connections in; none without TLS.
    pub(super) fn acceptor(&self) -> Option<TlsAcceptor> {
        self.shared.security.as_ref().map(|security| security.acceptor())
    }

    /// A connection came to nothing.
    pub(super) fn reject_connection(&self, peer: SocketAddr, why: &str) {
        if lock(&self.shared.failures).take(peer.ip(), Instant::now()) {
            tracing::warn!(%peer, "refused a connection: {why}");
        }
    }

    /// **Errors**: its certificate is revoked.
    pub(super) fn check_certificate(&self, certificate: Option<blake3::Hash>) -> Result<(), String> {
        let Some(security) = &self.shared.security else { return Ok(()) };
        let judged = access::judge_certificate(&security.revoked.current(), certificate);
        judged.map_err(|refused| refused.message().to_owned())
    }

    /// **Errors**: `UNAUTHENTICATED`, `PERMISSION_DENIED` or `RESOURCE_EXHAUSTED`, with a message.
    fn check(&self, head: &http::request::Parts) -> Result<Session, Status> {
        let peer = head.extensions.get::<Peer>().map(|peer| (peer.address, peer.certificate));
        let visitor = head.extensions.get::<Visitor>().map(|visitor| (visitor.address, visitor.certificate));
        let (address, certificate) = match peer.or(visitor) {
            Some((address, certificate)) => (address.ip(), certificate),
            None => (IpAddr::from([0; 4]), None),
        };
        // A header that is no text is no token.
        let authorization = head.headers.get(http::header::AUTHORIZATION);
        let authorization = authorization.map(|value| value.to_str().unwrap_or("").to_owned());
        let credentials = Credentials { authorization, certificate };
        let method = head.uri.path();
        let mut session = Session {
            shared: self.shared.clone(),
            credentials,
            method: method.to_owned(),
            user: String::new(),
            expires: None,
            address,
        };
        match session.judge() {
            Ok(token) => {
                session.expires = token.as_ref().map(|token| token.expires);
                session.user = token.map_or_else(String::new, |token| token.name);
            }
            Err(refused) => return Err(self.refuse(session, refused)),
        }
        let is_limited = self.shared.security.is_some() && method == SUBMIT;
        if is_limited && !lock(&self.shared.submits).take(address, Instant::now()) {
            let Rate { burst, per_second } = SUBMITS;
            return Err(Status::resource_exhausted(format!(
                "submissions: expected at most {per_second} a second from {address} after the first {burst}, got more"
            )));
        }
        Ok(session)
    }

    /// What a refused caller is told: the reason, unless there are too many of them.
    fn refuse(&self, session: Session, refused: Status) -> Status {
        let Session { address, method, .. } = &session;
        let address = *address;
        if !lock(&self.shared.failures).take(address, Instant::now()) {
            let Rate { per_second, .. } = FAILURES;
            return Status::resource_exhausted(format!(
                "token: expected at most {per_second} refused call a second from {address}, got more"
            ));
        }
        let mut method = method.to_owned();
        tidy(&mut method, MAX_METHOD);
        tracing::warn!(%address, method, code = ?refused.code(), "refused a call: {}", refused.message());
        let (words, audited) = (refused.message().to_owned(), session.clone());
        tokio::task::spawn_blocking(move || audited.audit(&method, "", &words));
        refused
    }
}

/// Who makes a call, and whether they still may; found among a request's extensions.
#[derive(Clone)]
pub(super) struct Session {
    shared: Arc<Shared>,
    credentials: Credentials,
    method: String,
    user: String,
    expires: Option<u64>,
    address: IpAddr,
}

impl Session {
    /// Of a call that has passed the guard.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        let session = request.extensions().get::<Session>();
        session.cloned().expect("the guard is before every service")
    }

    /// Whose token it is; empty where none is needed.
    pub(super) fn user(&self) -> String {
        self.user.clone()
    }

    /// Until when the caller's token is good with its certificate; none where no token is needed. **Units**: seconds since 1970.
    pub(super) fn expires(&self) -> Option<u64> {
        self.expires
    }

    /// Notes a call that changes something, what it was about, and what came of it.
    pub(super) async fn note<T>(&self, call: &'static str, target: &str, result: &Result<T, Status>) {
        let result = result.as_ref().map_or_else(|refused| refused.message().to_owned(), |_| "ok".to_owned());
        let (session, target) = (self.clone(), target.to_owned());
        // It is written before the caller has the answer.
        drop(tokio::task::spawn_blocking(move || session.audit(call, &target, &result)).await);
    }

    fn audit(&self, call: &str, target: &str, result: &str) {
        let Session { user, address, .. } = self;
        let (mut target, mut result) = (target.to_owned(), result.to_owned());
        tidy(&mut target, MAX_AUDITED);
        tidy(&mut result, MAX_AUDITED);
        let call =
            Call { unix_ms: now_ms(), user, address: *address, call, target: &target, result: &result };
        self.shared.audit.write(&call);
    }

    /// Completes once the caller may not make this call any more, with the refusal: a stream may outlive its token.
    pub(super) async fn withdrawn(&self) -> Status {
        // For all streams at the same times: those of one token end together.
        let mut times = tokio::time::interval_at(self.shared.began, RECHECK);
        times.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = times.tick() => {}
                () = self.shared.changed.notified() => {}
            }
            if let Err(refused) = self.judge() {
                return refused;
            }
        }
    }

    /// The caller's token as the files have it now; none where none is needed.
    ///
    /// **Errors**: `UNAUTHENTICATED` or `PERMISSION_DENIED`.
    fn judge(&self) -> Result<Option<Token>, Status> {
        let Some(security) = &self.shared.security else { return Ok(None) };
        access::judge_certificate(&security.revoked.current(), self.credentials.certificate)?;
        let tokens = security.tokens.current();
        let before = self.shared.tokens.lock().replace(tokens.clone());
        if before.is_some_and(|before| !Arc::ptr_eq(&before, &tokens)) {
            self.shared.changed.notify_waiters();
        }
        Ok(access::judge(&tokens, &self.credentials, &self.method, unix_seconds())?.cloned())
    }
}

/// The span of a call, below that of its caller.
fn span_of(head: &http::request::Parts) -> tracing::Span {
    let method = head.uri.path().trim_start_matches('/');
    let span = tracing::info_span!(
        target: SPAN, parent: None, "call", otel.name = method, otel.kind = "server", rpc.system = "grpc"
    );
    let caller = head.headers.get("traceparent").and_then(|header| header.to_str().ok());
    trace::below(caller.map(TraceContext::parse).unwrap_or_default(), span)
}

/// A service behind the guard.
#[derive(Clone)]
pub(super) struct AuthService<S> {
    pub(super) auth: AuthLayer,
    pub(super) inner: S,
}

impl<S> Service<http::Request<Body>> for AuthService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (mut head, body) = request.into_parts();
        match self.auth.check(&head) {
            Ok(session) => {
                let span = span_of(&head);
                let foreign = withdrawal::is_foreign(head.uri.path()).then(|| session.clone());
                head.extensions.insert(session);
                let answer = self.inner.call(http::Request::from_parts(head, body)).instrument(span);
                let Some(session) = foreign else { return Box::pin(answer) };
                let withdrawn = async move { session.withdrawn().await };
                Box::pin(async move { Ok(until_withdrawn(answer.await?, withdrawn)) })
            }
            Err(refused) => Box::pin(std::future::ready(Ok(refused.into_http()))),
        }
    }
}
