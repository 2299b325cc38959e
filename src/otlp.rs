//! Spans to a collector, over OTLP/gRPC, where the standard variables name one; without, there is no exporter and no span. Metrics go
//! there too, see [`metrics`].
//!
//! The one place that knows OpenTelemetry: everything else opens spans of `tracing` and passes on plain contexts. Exporting
//! runs beside the rest: its queue is bounded, what does not fit or does not arrive is counted and said once.

pub mod families;
pub mod metrics;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use contraflow_runtime::trace::{self, SPAN, TraceContext};
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use tonic::transport::{Certificate, ClientTlsConfig};
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::Registry;

use crate::failure::Failure;

/// How long the last spans may take when the process ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// The standard variables of one kind of telemetry; of two, the first is for it alone and counts before the one for everything.
struct Signal {
    /// Where a collector is.
    endpoints: [&'static str; 2],
    /// What is spoken with it.
    protocols: [&'static str; 2],
    /// Whose certificates it may have.
    certificates: [&'static str; 2],
    /// Which exporters are wanted, by name.
    exporter: &'static str,
}

const TRACES: Signal = Signal {
    endpoints: ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
    protocols: ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"],
    certificates: ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"],
    exporter: "OTEL_TRACES_EXPORTER",
};

/// How much is exported: steps and their parts, frames between stages too, or every operation.
const LEVEL: &str = "CONTRAFLOW_TRACE_LEVEL";

/// Spans on their way to a collector; the last of them go when this is dropped.
pub struct Exporting {
    provider: SdkTracerProvider,
    lost: Arc<AtomicU64>,
    /// The connection's own thread: no other work waits for it, and it for none.
    _runtime: tokio::runtime::Runtime,
}

/// A part of a subscriber, filter included.
pub type Listener = Box<dyn Layer<Registry> + Send + Sync>;

/// Begins to export, if a collector is named; `service` is what the process is called there unless the variables say more.
///
/// **Errors**: code 2; a variable makes no sense.
pub fn open(service: &'static str) -> Result<Option<(Exporting, Listener)>, Failure> {
    let Some((variable, endpoint)) = TRACES.endpoint()? else { return Ok(None) };
    let level = level()?;
    let failed = |error: std::io::Error| Failure::run(error.to_string());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(failed)?;
    let entered = runtime.enter();
    let lost = Arc::<AtomicU64>::default();
    let exporter = Counting { inner: exporter(variable, &endpoint)?, endpoint, lost: lost.clone() };
    drop(entered);
    let provider =
        SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource(service)).build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("contraflow"))
        .with_context_activation(false)
        .with_tracked_inactivity(false)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_filter(Targets::new().with_target(SPAN, level));
    trace::install(Bridge);
    Ok(Some((Exporting { provider, lost, _runtime: runtime }, layer.boxed())))
}

impl Drop for Exporting {
    fn drop(&mut self) {
        // What it could not do in time it says itself.
        drop(self.provider.shutdown_with_timeout(FAREWELL));
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!("{lost} spans have not reached the collector");
        }
    }
}

/// The first of these variables that is set, and its value.
fn first(variables: &[&'static str]) -> Option<(&'static str, String)> {
    let set = |&variable| Some((variable, std::env::var(variable).ok().filter(|value| !value.is_empty())?));
    variables.iter().find_map(set)
}

fn level() -> Result<Level, Failure> {
    let Some((_, word)) = first(&[LEVEL]) else { return Ok(Level::INFO) };
    match word.as_str() {
        "info" => Ok(Level::INFO),
        "debug" => Ok(Level::DEBUG),
        "trace" => Ok(Level::TRACE),
        _ => Err(Failure::input(format!("{LEVEL}: expected info, debug or trace, got {word:?}"))),
    }
}

impl Signal {
    /// The collector's address and the variable that names it, if one does and it is to have this.
    ///
    /// **Errors**: code 2; a variable makes no sense.
    fn endpoint(&self) -> Result<Option<(&'static str, String)>, Failure> {
        let is_disabled =
            first(&["OTEL_SDK_DISABLED"]).is_some_and(|(_, value)| value.eq_ignore_ascii_case("true"));
        let is_otlp = |name: &str| name.trim().eq_ignore_ascii_case("otlp");
        // Unless something is said, it is OTLP.
        let is_wanted = first(&[self.exporter]).is_none_or(|(_, names)| names.split(',').any(is_otlp));
        let Some((variable, endpoint)) = first(&self.endpoints).filter(|_| is_wanted && !is_disabled) else {
            return Ok(None);
        };
        if let Some((variable, protocol)) = first(&self.protocols).filter(|(_, protocol)| protocol != "grpc")
        {
            return Err(Failure::input(format!("{variable}: expected grpc, got {protocol:?}")));
        }
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Failure::input(format!(
                "{variable}: expected http://HOST:PORT or https://HOST:PORT, got {endpoint:?}"
            )));
        }
        Ok(Some((variable, endpoint)))
    }

    /// Whom a collector at this address is trusted by; none where it is not asked who it is.
    ///
    /// **Errors**: code 2; no CA is named, or it cannot be read.
    fn tls(&self, endpoint: &str) -> Result<Option<ClientTlsConfig>, Failure> {
        if !endpoint.starts_with("https://") {
            return Ok(None);
        }
        let Some((variable, path)) = first(&self.certificates) else {
            let [_, certificate] = self.certificates;
            return Err(Failure::input(format!(
                "{certificate}: expected the file of the collector's CA for {endpoint}, got none"
            )));
        };
        let pem =
            std::fs::read(&path).map_err(|error| Failure::input(format!("{variable}: {path}: {error}")))?;
        Ok(Some(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))))
    }
}

/// **Errors**: code 2; a variable makes no sense.
fn exporter(variable: &str, endpoint: &str) -> Result<opentelemetry_otlp::SpanExporter, Failure> {
    let mut builder = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint);
    if let Some(tls) = TRACES.tls(endpoint)? {
        builder = builder.with_tls_config(tls);
    }
    builder.build().map_err(|error| Failure::input(format!("{variable} {endpoint}: {error}")))
}

/// Who exports: what the standard variables say, and else the command and the process.
fn resource(service: &'static str) -> Resource {
    let builder = Resource::builder();
    let is_named = first(&["OTEL_SERVICE_NAME"]).is_some()
        || std::env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|list| list.contains("service.name="));
    let builder = if is_named { builder } else { builder.with_service_name(service) };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    builder
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", format!("{host}-{}", std::process::id())))
        .build()
}

/// Gives spans to the collector, counts those that it did not take, and says so the first time.
#[derive(Debug)]
struct Counting {
    inner: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    lost: Arc<AtomicU64>,
}

impl SpanExporter for Counting {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let num_spans = batch.len() as u64;
        if let Err(error) = self.inner.export(batch).await
            && self.lost.fetch_add(num_spans, Ordering::Relaxed) == 0
        {
            tracing::warn!(
                "the collector at {} accepts no spans, everything else continues: {error}",
                self.endpoint
            );
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Contexts between `tracing`, OpenTelemetry and the wire.
struct Bridge;

impl trace::Tracer for Bridge {
    fn context_of(&self, span: &Span) -> TraceContext {
        if span.is_none() {
            return TraceContext::default();
        }
        let context = span.context();
        let context = context.span().span_context().clone();
        TraceContext {
            trace_id: context.trace_id().to_bytes(),
            span_id: context.span_id().to_bytes(),
            flags: context.trace_flags().to_u8(),
        }
    }

    fn set_parent(&self, span: &Span, parent: TraceContext) {
        // A span that is not recorded has no parent either.
        drop(span.set_parent(Context::new().with_remote_span_context(remote(parent))));
    }

    fn add_link(&self, span: &Span, other: TraceContext) {
        span.add_link(remote(other));
    }
}

fn remote(context: TraceContext) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(context.trace_id),
        SpanId::from_bytes(context.span_id),
        TraceFlags::new(context.flags),
        true,
        Default::default(),
    )
}
