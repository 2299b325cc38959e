//! The HTTP client below the stores and webhooks: TLS by ring with the system's roots, and a deadline for every wait.
//!
//! Knows requests and bytes, no store.

use std::sync::OnceLock;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpResponseBody, HttpService,
};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(10);

/// Until the head of a response is there, once the body of the request is sent; and between two parts of its body.
const ANSWER: Duration = Duration::from_secs(30);

/// Slower than this nothing is sent. **Units**: bytes per second.
const SLOWEST: u64 = 64 << 10;

/// The one client of this process: its connections are used again.
#[derive(Clone, Debug)]
struct Service(Client<HttpsConnector<TcpConnector>, HttpRequestBody>);

impl Service {
    fn of_process() -> Service {
        static CLIENT: OnceLock<Service> = OnceLock::new();
        let make = || {
            let mut tcp = TcpConnector::new();
            tcp.enforce_http(false);
            tcp.set_connect_timeout(Some(CONNECT));
            let https = HttpsConnectorBuilder::new()
                .with_tls_config(tls())
                .https_or_http()
                .enable_http1()
                .wrap_connector(tcp);
            let mut client = Client::builder(TokioExecutor::new());
            Service(client.pool_timer(TokioTimer::new()).pool_idle_timeout(ANSWER).build(https))
        };
        CLIENT.get_or_init(make).clone()
    }
}

/// Sends a body to an address, and returns the status with which it was answered.
///
/// **Errors**: in words; the address or a header cannot be, or there was no answer within the time.
pub async fn post(url: &str, headers: &[(&'static str, String)], body: String) -> Result<u16, String> {
    let mut request = HttpRequest::new(HttpRequestBody::from(body));
    *request.method_mut() = "POST".parse().map_err(|error| format!("POST: {error}"))?;
    *request.uri_mut() = url.parse().map_err(|error| format!("{url:?} is no address: {error}"))?;
    for (name, value) in headers {
        let value = value.parse().map_err(|error| format!("header {name}: {error}"))?;
        request.headers_mut().insert(*name, value);
    }
    let answered = Service::of_process().call(request).await;
    answered.map(|answer| answer.status().as_u16()).map_err(|error| in_full(&error))
}

/// An error with what is behind it.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    words
}

/// Gives every store the client.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service::of_process()))
    }
}

/// Trusts what the system trusts; a system without certificates can still talk to a store in plain text.
fn tls() -> ClientConfig {
    let builder = || {
        ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .expect("ring has the default versions of TLS")
    };
    match builder().with_native_roots() {
        Ok(trusting) => trusting.with_no_client_auth(),
        Err(_) => builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth(),
    }
}

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let sending = Duration::from_secs(request.body().content_length() as u64 / SLOWEST);
        let answered = timeout(ANSWER + sending, self.0.request(request)).await;
        let response = answered.map_err(|late| HttpError::new(HttpErrorKind::Timeout, late))?;
        let response = response.map_err(|error| {
            let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Interrupted };
            HttpError::new(kind, error)
        })?;
        Ok(response.map(|body| {
            let frames = stream::unfold(body, |mut body| async move {
                let frame = match timeout(ANSWER, body.frame()).await {
                    Ok(frame) => frame?.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)),
                    Err(late) => Err(HttpError::new(HttpErrorKind::Timeout, late)),
                };
                Some((frame, body))
            });
            // Some readers poll once more after the end.
            HttpResponseBody::new(StreamBody::new(frames.fuse()))
        }))
    }
}
