//! From requests to views: the routes of the table in `openapi`, the page and its files, metrics, logging in. Every request passes the guard,
//! every answer has its headers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use contraflow_orchestrator::server::Visitor;
use serde::Serialize;
use serde_json::{Value, json};

use super::cluster::{self, Cluster, Viewer, api};
use super::guard::{ACTION, Asked, COOKIE, HEADERS, Refusal, Token, judge, shown_token};
use super::openapi::{Answers, document, routes};
use super::prometheus::exposition;
use super::shown::Shown;
use super::subject::{MAX_VIEWERS, Source, Subject};
use super::views::SeriesQuery;
use super::{assets, folder, pipeline, placement, stream, views};

/// Longest body of a request. **Units**: bytes.
const MAX_BODY: usize = 1 << 20;

/// Beginnings of the addresses of pages.
const PAGES: [&str; 7] = ["run", "runs", "compare", "jobs", "nodes", "incidents", "logs"];

/// What is served, and to whom.
pub struct Served {
    /// Where it listens.
    address: SocketAddr,
    /// What a viewer of runs has to show, if anything; a cluster has tokens of its own.
    token: Option<Token>,
    subject: Arc<Subject>,
}

impl Served {
    /// At this address, to whoever has the token.
    pub fn new(address: SocketAddr, token: Option<Token>, subject: Arc<Subject>) -> Arc<Self> {
        Arc::new(Served { address, token, subject })
    }

    fn is_cluster(&self) -> bool {
        matches!(self.subject.source, Source::Cluster(_))
    }

    /// A run that the viewer may see.
    async fn find(&self, viewer: &Viewer, id: &str) -> Result<Arc<Shown>, Response> {
        match &self.subject.source {
            Source::Runs(runs) => runs
                .iter()
                .find(|run| run.facts.id == id)
                .cloned()
                .ok_or_else(|| not_found(&format!("run: expected one that is shown here, got {id:?}"))),
            Source::Cluster(cluster) => cluster.find(viewer, id).await.map_err(|status| refused_by(&status)),
        }
    }
}

fn refused_by(status: &tonic::Status) -> Response {
    let (code, faults) = cluster::refusal(status);
    refused(StatusCode::from_u16(code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE), &faults)
}

type Shared = State<Arc<Served>>;
type Query = BTreeMap<String, String>;

/// Every route, behind the guard.
pub fn router(served: Arc<Served>) -> Router {
    let mut router = Router::new().route("/metrics", get(scraped)).route("/login", get(page).post(log_in));
    for route in routes(served.is_cluster()) {
        let answers = route.answers;
        let handler = move |served: Shared, path: Path<Query>, request: Request| async move {
            answer(answers, &served, &path, request).await
        };
        let method = if answers.is_action() { post(handler) } else { get(handler) };
        router = router.route(route.path, method);
    }
    let router = router.route("/assets/{*name}", get(asset)).fallback(get(page));
    router.layer(from_fn_with_state(served.clone(), guarded)).with_state(served)
}

/// Who asks for what, as the guard judges it.
fn judged(served: &Served, request: &Request) -> Result<(), Refusal> {
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let path = request.uri().path();
    let asked = Asked {
        host: text("host"),
        origin: text("origin"),
        authorization: text("authorization"),
        cookie: text("cookie"),
        is_action: !matches!(*request.method(), Method::GET | Method::HEAD),
        has_action_header: request.headers().contains_key(ACTION),
        is_public: !(path.starts_with("/api/") || path == "/metrics"),
    };
    judge(&asked, served.address, served.token.as_ref())
}

async fn guarded(State(served): Shared, request: Request, next: Next) -> Response {
    let judged = judged(&served, &request);
    let mut response = match judged {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let (status, words) = refusal.answer();
            refused(StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN), &[words.to_owned()])
        }
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn query(request: &Request) -> Query {
    form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes()).into_owned().collect()
}

/// An answer of this media type, which nobody keeps.
pub fn with_type(media: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An answer in JSON.
pub fn as_json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => with_type("application/json", bytes),
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &[error.to_string()]),
    }
}

/// A refusal with its reasons.
pub fn refused(status: StatusCode, faults: &[String]) -> Response {
    let mut response = as_json(&json!({"faults": faults}));
    *response.status_mut() = status;
    response
}

fn not_found(what: &str) -> Response {
    refused(StatusCode::NOT_FOUND, &[what.to_owned()])
}

/// Who sends a request.
fn viewer_of(request: &Request) -> Viewer {
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let asked = Asked { authorization: text("authorization"), cookie: text("cookie"), ..Asked::default() };
    let nowhere = || Visitor { address: SocketAddr::from(([0; 4], 0)), certificate: None };
    Viewer {
        visitor: request.extensions().get::<Visitor>().cloned().unwrap_or_else(nowhere),
        token: shown_token(&asked).map(str::to_owned),
    }
}

/// What a request brings: JSON, or nothing at all.
async fn body_of(request: Request) -> Result<Value, Response> {
    let body = to_bytes(request.into_body(), MAX_BODY).await;
    let body = body.map_err(|_| {
        let fault = format!("body: expected at most {MAX_BODY} bytes, and all of them, got more or fewer");
        refused(StatusCode::PAYLOAD_TOO_LARGE, &[fault])
    })?;
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body)
        .map_err(|error| refused(StatusCode::BAD_REQUEST, &[format!("body: expected JSON, got {error}")]))
}

/// The answer to a request of the table.
async fn answer(answers: Answers, served: &Served, path: &Query, request: Request) -> Response {
    let (viewer, query) = (viewer_of(&request), query(&request));
    if answers == Answers::OpenApi {
        return as_json(&document(served.is_cluster()));
    }
    match &served.subject.source {
        Source::Cluster(cluster) if path.get("run").is_none() => {
            let body = match body_of(request).await {
                Ok(body) => body,
                Err(refused) => return refused,
            };
            match of_cluster(answers, cluster, &viewer, (path, &query, &body)).await {
                Ok(value) => as_json(&value),
                Err(status) => refused_by(&status),
            }
        }
        Source::Runs(runs) if path.get("run").is_none() => {
            let runs: Vec<Value> = runs.iter().map(|run| views::entry(run)).collect();
            as_json(&json!({"version": env!("CARGO_PKG_VERSION"), "kind": "runs", "runs": runs}))
        }
        _ => {
            let name = path.get("run").map(String::as_str).unwrap_or_default();
            match served.find(&viewer, name).await {
                Ok(shown) => of_run(answers, served, &shown, &query),
                Err(refused) => refused,
            }
        }
    }
}

async fn of_cluster(
    answers: Answers,
    cluster: &Arc<Cluster>,
    viewer: &Viewer,
    (path, query, body): (&Query, &Query, &Value),
) -> Result<Value, tonic::Status> {
    let of = |key: &str| path.get(key).map(String::as_str).unwrap_or_default();
    match answers {
        Answers::Jobs => api::jobs(cluster, viewer).await,
        Answers::Job => api::job(cluster, viewer, of("job")).await,
        Answers::Nodes => api::nodes(cluster, viewer).await,
        Answers::Incidents => api::incidents_of(cluster, viewer, of("job")).await,
        Answers::Log => {
            let rank = query.get("rank").and_then(|rank| rank.parse().ok());
            api::log(cluster, viewer, of("job"), rank).await
        }
        Answers::Check => api::check(cluster, viewer, body).await,
        Answers::Submit => api::submit(cluster, viewer, body).await,
        Answers::Cancel => api::cancel(cluster, viewer, of("job"), body).await,
        Answers::Retry => api::retry(cluster, viewer, of("job")).await,
        Answers::Scale => api::scale(cluster, viewer, of("job"), body).await,
        Answers::Drain => api::drain(cluster, viewer, of("node"), body).await,
        _ => api::about(cluster, viewer).await,
    }
}

fn of_run(answers: Answers, served: &Served, shown: &Arc<Shown>, query: &Query) -> Response {
    match answers {
        Answers::Overview => {
            let checkpoints = folder::checkpoints(shown.facts.folder.as_deref());
            as_json(&views::overview(shown, &checkpoints))
        }
        Answers::Series => match SeriesQuery::parse(query) {
            Ok(query) => as_json(&views::series(shown, &query)),
            Err(faults) => refused(StatusCode::BAD_REQUEST, &faults),
        },
        Answers::Csv => with_type("text/csv; charset=utf-8", stream::csv(shown.clone())),
        Answers::Experts => {
            let mut faults = Vec::new();
            let layer = number(query, "layer", &mut faults);
            let step = number(query, "step", &mut faults);
            if !faults.is_empty() {
                return refused(StatusCode::BAD_REQUEST, &faults);
            }
            as_json(&views::experts(shown, layer.and_then(|layer| u32::try_from(layer).ok()), step))
        }
        Answers::Placement => as_json(&placement::of_run(shown)),
        Answers::Layers => as_json(&views::layers(shown)),
        Answers::Pipeline | Answers::Trace => {
            let view = query.get("view").map_or("actions", String::as_str);
            match pipeline::of_run(shown, view) {
                Ok(timed) if answers == Answers::Pipeline => as_json(&timed.drawn()),
                Ok(timed) => {
                    let mut response = with_type("application/json", timed.trace());
                    let named = HeaderValue::from_static("attachment; filename=\"pipeline.trace.json\"");
                    response.headers_mut().insert(header::CONTENT_DISPOSITION, named);
                    response
                }
                Err(why) => not_found(&why),
            }
        }
        Answers::Samples => as_json(&json!({"samples": views::samples(shown)})),
        _ => match served.subject.viewers.clone().try_acquire_owned() {
            Ok(permit) => {
                let after = query.get("after").and_then(|after| after.parse().ok()).unwrap_or(0);
                with_type("text/event-stream", stream::live(shown.clone(), after, permit))
            }
            Err(_) => refused(
                StatusCode::SERVICE_UNAVAILABLE,
                &[format!("live: expected at most {MAX_VIEWERS} viewers at once, got more")],
            ),
        },
    }
}

fn number(query: &Query, key: &str, faults: &mut Vec<String>) -> Option<u64> {
    let text = query.get(key).filter(|text| !text.is_empty())?;
    let parsed = text.parse().ok();
    if parsed.is_none() {
        faults.push(format!("{key}: expected a whole number, got {text:?}"));
    }
    parsed
}

async fn scraped(State(served): Shared, request: Request) -> Response {
    match served.subject.metrics(Some(&viewer_of(&request))).await {
        Ok(metrics) => with_type("text/plain; version=0.0.4; charset=utf-8", exposition(&metrics)),
        Err(status) => refused_by(&status),
    }
}

async fn asset(Path(name): Path<String>) -> Response {
    match assets::find(&name) {
        Some(asset) => {
            let mut response = with_type(assets::media_type(asset.name), asset.bytes);
            // They change with the binary, behind one address.
            response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            response
        }
        None => not_found("there is no such file"),
    }
}

/// The page, which knows by its address what it shows.
async fn page(request: Request) -> Response {
    let mut parts = request.uri().path().trim_start_matches('/').split('/');
    let first = parts.next().unwrap_or_default();
    let mut response = with_type("text/html; charset=utf-8", assets::PAGE);
    if !first.is_empty() && first != "login" && !PAGES.contains(&first) {
        *response.status_mut() = StatusCode::NOT_FOUND;
    }
    response
}

/// Takes a token and gives the cookie that holds it: the dashboard's own, or one of the cluster's that may look.
async fn log_in(State(served): Shared, request: Request) -> Response {
    let mut viewer = viewer_of(&request);
    let body = match body_of(request).await {
        Ok(body) => body,
        Err(refused) => return refused,
    };
    let shown = body["token"].as_str().unwrap_or_default().to_owned();
    let mut is_secure = false;
    match (&served.subject.source, &served.token) {
        (Source::Cluster(cluster), _) => {
            is_secure = cluster.front().is_secured();
            viewer.token = Some(shown.clone());
            if let Err(status) = api::nodes(cluster, &viewer).await {
                return refused_by(&status);
            }
        }
        (_, Some(token)) if !token.is(&shown) => {
            return refused(
                StatusCode::UNAUTHORIZED,
                &["token: expected the dashboard's, got another".into()],
            );
        }
        _ => {}
    }
    let mut response = as_json(&json!({}));
    let secure = if is_secure { "; Secure" } else { "" };
    // What makes no header is no token that anybody could have been given.
    if let Ok(cookie) =
        HeaderValue::from_str(&format!("{COOKIE}={shown}; Path=/; HttpOnly; SameSite=Strict{secure}"))
    {
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    response
}
