//! The front: the services within this process, for whoever serves pages of them. A call passes the same guard as one from outside, with
//! the token and the address of whoever looks at the page. Knows no page.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use contraflow_proto::{LayerLoad, v1};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::JobId;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::service::Routes;

use super::acceptor::{Io, secure};
use super::auth::{AuthLayer, AuthService, Visitor};
use super::census::{Census, census};
use super::cluster_api::nodes;
use super::{Handle, bounds, refused, submission};

/// How long a connection may take to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// The services within this process.
#[derive(Clone)]
pub struct Front {
    pub(super) routes: Routes,
    pub(super) auth: AuthLayer,
    pub(super) hub: Handle,
}

impl Front {
    /// Whether connections are encrypted and calls need a token.
    pub fn is_secured(&self) -> bool {
        self.auth.acceptor().is_some()
    }

    /// Takes a connection in: through TLS where that is on, by the certificates of the cluster.
    ///
    /// **Errors**: the peer has no certificate of this cluster.
    pub async fn admit(&self, tcp: TcpStream, address: SocketAddr) -> Result<(Box<dyn Io>, Visitor), String> {
        let admitted = async {
            match self.auth.acceptor() {
                Some(tls) => secure(for_pages(&tls), tcp, &self.auth).await,
                None => Ok((Box::new(tcp) as Box<dyn Io>, None)),
            }
        };
        let admitted = tokio::time::timeout(HANDSHAKE, admitted).await;
        let admitted = admitted.unwrap_or_else(|_| Err("no handshake in time".into()));
        if let Err(why) = &admitted {
            self.auth.reject_connection(address, why);
        }
        let (io, certificate) = admitted?;
        Ok((io, Visitor { address, certificate }))
    }

    /// Completes when the hub, which decides everything, has answered. Waits for ever for one that hangs or has ended.
    pub async fn has_answered(&self) {
        if self.hub.ask(|_| ()).await.is_err() {
            std::future::pending().await
        }
    }

    /// The way to the services for a visitor.
    pub fn calls(&self, visitor: Visitor) -> Calls {
        Calls { inner: AuthService { auth: self.auth.clone(), inner: self.routes.clone() }, visitor }
    }

    /// What a submission would train, checked as one and with its bounds: no file of this machine is read for it. For a caller who was
    /// let in.
    ///
    /// **Errors**: those of a submission of a new job; what depends on workers and the queue is not looked at.
    pub async fn check(&self, request: v1::SubmitRequest) -> Result<Arc<Recipe>, Status> {
        bounds::submit(&request).map_err(|faults| refused(&faults))?;
        let spec = submission::check(request, None, String::new(), None).await?;
        Ok(spec.recipe)
    }

    /// All jobs, at most so many of the open ones one by one, and the members: for a caller who was let in, and for what this process
    /// itself tells of its cluster, to whom its operator wants.
    pub async fn census(&self, most: usize) -> Option<(Census, v1::NodesResponse)> {
        self.hub.ask(move |hub| (census(hub, most), nodes(hub))).await.ok()
    }

    /// The recipe of a job, for a caller who was let in to see the job.
    pub async fn recipe(&self, job: &str) -> Option<Arc<Recipe>> {
        let number = JobId::parse_number(job)?;
        let found = self.hub.ask(move |hub| {
            let jobs = hub.core().jobs();
            let id = jobs.of_number(number).ok()?;
            Some(jobs.all.get(&id)?.spec.recipe.clone())
        });
        found.await.ok().flatten()
    }

    /// The step of a job that was complete last since this process began, and the tokens of its experts, layer by layer.
    pub async fn loads(&self, job: &str) -> Option<(u64, Vec<LayerLoad>)> {
        let number = JobId::parse_number(job)?;
        let found = self.hub.ask(move |hub| {
            let id = hub.core().jobs().of_number(number).ok()?;
            let steps = hub.steps(id)?;
            (!steps.loads.is_empty()).then(|| (steps.last, steps.loads.clone()))
        });
        found.await.ok().flatten()
    }
}

/// The services for one visitor: what a generated client is made over.
#[derive(Clone)]
pub struct Calls {
    inner: AuthService<Routes>,
    visitor: Visitor,
}

impl Service<http::Request<Body>> for Calls {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        request.extensions_mut().insert(self.visitor.clone());
        self.inner.call(request)
    }
}

/// The same proof with the protocol of pages: clients of gRPC are offered HTTP/2 alone.
fn for_pages(tls: &TlsAcceptor) -> TlsAcceptor {
    let mut config = ServerConfig::clone(tls.config());
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}
