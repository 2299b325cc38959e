//! The way to an orchestrator: its public gRPC API, and nothing else of it. Every call has a deadline.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use contraflow_proto::v1;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use v1::cluster_service_client::ClusterServiceClient;
use v1::job_service_client::JobServiceClient;

use crate::trouble::{REACHABLE, SCALED, SUBMITTED, Trouble, describe};

/// Jobs that one page of a list asks for.
const PAGE: u32 = 1000;

/// An orchestrator, and as whom it is spoken to.
#[derive(Clone, PartialEq, Eq)]
pub struct Place {
    /// HOST:PORT.
    pub address: String,
    /// None: without TLS, which an orchestrator allows on its own machine alone.
    pub credentials: Option<Credentials>,
}

/// The files of `contraflow certs issue`, and the token.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The authority, PEM.
    pub ca: Vec<u8>,
    /// The client's certificate, PEM.
    pub certificate: Vec<u8>,
    /// Its key, PEM.
    pub key: Vec<u8>,
    /// Identifies the caller and its role.
    pub token: String,
}

/// Makes a connection, at its first call.
pub type Connect = Arc<dyn Fn(&Place) -> Result<Channel, Trouble> + Send + Sync>;

/// Over TCP.
///
/// **Errors**: the address or a file makes no sense.
pub fn connect(place: &Place) -> Result<Channel, Trouble> {
    let scheme = if place.credentials.is_some() { "https" } else { "http" };
    let unsound = |error: tonic::transport::Error| {
        Trouble::way("Misconfigured", format!("the way to {}: {}", place.address, describe(&error)))
    };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{}", place.address)).map_err(unsound)?;
    let endpoint = match &place.credentials {
        None => endpoint,
        Some(own) => {
            let identity = Identity::from_pem(&own.certificate, &own.key);
            let tls =
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&own.ca)).identity(identity);
            endpoint.tls_config(tls).map_err(unsound)?
        }
    };
    let limit = Duration::from_secs(10);
    Ok(endpoint
        .connect_timeout(limit)
        .http2_keep_alive_interval(limit)
        .keep_alive_timeout(limit)
        .connect_lazy())
}

#[derive(Clone)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// Connections, one to each orchestrator.
pub struct Links {
    connect: Connect,
    limit: Duration,
    open: Mutex<HashMap<String, (Place, Link)>>,
}

/// One of them.
#[derive(Clone)]
pub struct Link {
    channel: InterceptedService<Channel, Bearer>,
    limit: Duration,
}

impl Links {
    /// None is open yet. `limit` is that of each call.
    pub fn new(connect: Connect, limit: Duration) -> Self {
        Links { connect, limit, open: Mutex::default() }
    }

    /// The one to a place; a new one where its credentials have changed.
    ///
    /// **Errors**: the place makes no sense.
    pub fn to(&self, place: &Place) -> Result<Link, Trouble> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, link)) = open.get(&place.address)
            && known == place
        {
            return Ok(link.clone());
        }
        let token = place
            .credentials
            .as_ref()
            .map(|own| MetadataValue::try_from(format!("Bearer {}", own.token.trim())));
        let token = token.transpose().map_err(|_| {
            Trouble::way(
                "Misconfigured",
                "the token: expected one that `contraflow certs issue` printed, got other characters".into(),
            )
        })?;
        let bearer = Bearer(token.map(|mut token| {
            token.set_sensitive(true);
            token
        }));
        let link =
            Link { channel: InterceptedService::new((self.connect)(place)?, bearer), limit: self.limit };
        open.insert(place.address.clone(), (place.clone(), link.clone()));
        Ok(link)
    }
}

impl Link {
    fn jobs(&self) -> JobServiceClient<InterceptedService<Channel, Bearer>> {
        JobServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    async fn within<T>(
        &self,
        condition: &'static str,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Trouble> {
        match tokio::time::timeout(self.limit, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(Trouble::of_call(condition, &status)),
            Err(_) => {
                let words = format!("the orchestrator has not answered within {} s", self.limit.as_secs());
                Err(Trouble::way("Unreachable", words))
            }
        }
    }

    /// Submits a job; its id. Where the key is that of another job, which only a recipe that changed meanwhile can come to: none.
    ///
    /// **Errors**: it is refused, or nobody answers.
    pub async fn submit(&self, request: v1::SubmitRequest) -> Result<Option<String>, Trouble> {
        let mut jobs = self.jobs();
        let call = async {
            match jobs.submit(request).await {
                Ok(answer) => Ok(answer.map(|answer| Some(answer.job))),
                Err(status) if status.code() == Code::AlreadyExists => Ok(tonic::Response::new(None)),
                Err(status) => Err(status),
            }
        };
        self.within(SUBMITTED, call).await
    }

    /// A job by its id; none if there is none.
    ///
    /// **Errors**: nobody answers.
    pub async fn get(&self, job: &str) -> Result<Option<v1::Job>, Trouble> {
        let mut jobs = self.jobs();
        let call = async {
            match jobs.get(v1::GetRequest { job: job.to_owned(), ..v1::GetRequest::default() }).await {
                Ok(answer) => Ok(answer.map(|answer| answer.job)),
                Err(status) if status.code() == Code::NotFound => Ok(tonic::Response::new(None)),
                Err(status) => Err(status),
            }
        };
        self.within(REACHABLE, call).await
    }

    /// A job by its name; none if there is none.
    ///
    /// **Errors**: nobody answers.
    pub async fn find(&self, name: &str) -> Result<Option<v1::Job>, Trouble> {
        let mut before = String::new();
        loop {
            let mut jobs = self.jobs();
            let request = v1::ListRequest { limit: PAGE, before: before.clone() };
            let page = self.within(REACHABLE, jobs.list(request)).await?;
            let oldest = page.jobs.last().map(|job| job.job.clone());
            if let Some(job) = page.jobs.into_iter().find(|job| job.name == name) {
                return Ok(Some(job));
            }
            match oldest.filter(|oldest| page.more && *oldest != before) {
                Some(oldest) => before = oldest,
                None => return Ok(None),
            }
        }
    }

    /// Cancels a job; what it is then.
    ///
    /// **Errors**: nobody answers.
    pub async fn cancel(&self, job: &str, reason: &str) -> Result<Option<v1::Job>, Trouble> {
        let mut jobs = self.jobs();
        let request = v1::CancelRequest { job: job.to_owned(), reason: reason.to_owned() };
        Ok(self.within(REACHABLE, jobs.cancel(request)).await?.job)
    }

    /// Takes a job up again; what it is then.
    ///
    /// **Errors**: it has not ended, or nobody answers.
    pub async fn retry(&self, job: &str) -> Result<Option<v1::Job>, Trouble> {
        let mut jobs = self.jobs();
        Ok(self.within(SUBMITTED, jobs.retry(v1::RetryRequest { job: job.to_owned() })).await?.job)
    }

    /// Says how many ranks a job is to have at most; what it is then.
    ///
    /// **Errors**: it cannot be run on so few, or nobody answers.
    pub async fn scale(&self, job: &str, ranks: u32) -> Result<Option<v1::Job>, Trouble> {
        let mut jobs = self.jobs();
        Ok(self.within(SCALED, jobs.scale(v1::ScaleRequest { job: job.to_owned(), ranks })).await?.job)
    }

    /// The newest jobs, and the workers.
    ///
    /// **Errors**: nobody answers.
    pub async fn cluster(&self) -> Result<(Vec<v1::Job>, Vec<v1::Worker>), Trouble> {
        let mut jobs = self.jobs();
        let listed =
            self.within(REACHABLE, jobs.list(v1::ListRequest { limit: PAGE, before: String::new() })).await?;
        let mut cluster = ClusterServiceClient::new(self.channel.clone());
        let nodes = self.within(REACHABLE, cluster.nodes(v1::NodesRequest {})).await?;
        Ok((listed.jobs, nodes.workers))
    }
}
