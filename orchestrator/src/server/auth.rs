//! The guard before all services: no call passes that its caller may not make, or makes too often. What it refuses it logs.
//!
//! The decisions are in [`super::access`] and [`super::rate`]; here are clock, file and headers.
//! A call that passes has a span.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use contraflow_runtime::trace::{self, SPAN, TraceContext};
use parking_lot::{Mutex, MutexGuard};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, http};
use tower::Service;
use tracing::Instrument;

use super::acceptor::Peer;
use super::access::{self, SUBMIT};
use super::rate::{Buckets, Rate};
use super::security::TokenFile;

/// Submissions of one address, where tokens are asked for.
const SUBMITS: Rate = Rate { burst: 200, per_second: 50 };

/// Refusals of one address that are logged and answered with their reason.
const FAILURES: Rate = Rate { burst: 20, per_second: 1 };

struct Shared {
    /// None: every client has full access.
    tokens: Option<TokenFile>,
    submits: Mutex<Buckets>,
    failures: Mutex<Buckets>,
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
    pub(super) fn new(tokens: Option<TokenFile>) -> Self {
        let (submits, failures) = (Mutex::new(Buckets::new(SUBMITS)), Mutex::new(Buckets::new(FAILURES)));
        AuthLayer { shared: Arc::new(Shared { tokens, submits, failures }) }
    }

    /// A connection came to nothing.
    pub(super) fn reject_connection(&self, peer: SocketAddr, why: &str) {
        if lock(&self.shared.failures).take(peer.ip(), Instant::now()) {
            tracing::warn!(%peer, "refused a connection: {why}");
        }
    }

    /// **Errors**: `UNAUTHENTICATED`, `PERMISSION_DENIED` or `RESOURCE_EXHAUSTED`, with a message.
    fn check(&self, head: &http::request::Parts) -> Result<(), Status> {
        let Some(tokens) = &self.shared.tokens else { return Ok(()) };
        let method = head.uri.path();
        let peer = head.extensions.get::<Peer>().map(|Peer(peer)| *peer);
        let address = peer.map_or(IpAddr::from([0; 4]), |peer| peer.ip());
        // A header that is no text is no token.
        let authorization = head.headers.get(http::header::AUTHORIZATION);
        let authorization = authorization.map(|value| value.to_str().unwrap_or(""));
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if let Err(refused) = access::judge(&tokens.current(), authorization, method, unix) {
            if !lock(&self.shared.failures).take(address, Instant::now()) {
                let Rate { per_second, .. } = FAILURES;
                return Err(Status::resource_exhausted(format!(
                    "token: expected at most {per_second} refused call a second from {address}, got more"
                )));
            }
            tracing::warn!(%address, method, code = ?refused.code(), "refused a call: {}", refused.message());
            return Err(refused);
        }
        if method == SUBMIT && !lock(&self.shared.submits).take(address, Instant::now()) {
            let Rate { burst, per_second } = SUBMITS;
            return Err(Status::resource_exhausted(format!(
                "submissions: expected at most {per_second} a second from {address} after the first {burst}, got more"
            )));
        }
        Ok(())
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
        let (head, body) = request.into_parts();
        match self.auth.check(&head) {
            Ok(()) => {
                let span = span_of(&head);
                Box::pin(self.inner.call(http::Request::from_parts(head, body)).instrument(span))
            }
            Err(refused) => Box::pin(std::future::ready(Ok(refused.into_http()))),
        }
    }
}
