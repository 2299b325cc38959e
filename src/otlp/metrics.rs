//! Metrics to a collector, over OTLP/gRPC: the families that `/metrics` gives, under the same names, now and then and once more at the
//! end. Nothing is measured for it: it asks for what is there.

use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric,
    number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use tokio::sync::oneshot;
use tonic::Request;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Endpoint;

use super::families::{Family, Labels, Metrics};
use super::{FAREWELL, Signal, first};
use crate::failure::Failure;

/// The standard variables of metrics.
const METRICS: Signal = Signal {
    endpoints: ["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
    protocols: ["OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"],
    certificates: ["OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"],
    exporter: "OTEL_METRICS_EXPORTER",
};

/// What goes with every request.
const HEADERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_METRICS_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];

/// How long a request may take, and what it may if nothing is said. **Units**: milliseconds.
const TIMEOUTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
const TIMEOUT: u64 = 10_000;

/// How long between two requests, and what it is if nothing is said. **Units**: milliseconds.
const INTERVAL: [&str; 1] = ["OTEL_METRIC_EXPORT_INTERVAL"];
const EVERY: u64 = 60_000;

/// Units of UCUM by how the name of a family ends. The first that fits.
const UNITS: [(&str, &str); 6] = [
    ("_tokens_per_second", "{token}/s"),
    ("_tokens_total", "{token}"),
    ("_seconds", "s"),
    ("_bytes", "By"),
    ("_nats", "{nat}"),
    ("_ratio", "1"),
];

/// Goes with every request.
type Header = (AsciiMetadataKey, AsciiMetadataValue);

/// The way to a collector.
pub struct Exporter {
    endpoint: Endpoint,
    address: String,
    headers: Vec<Header>,
    resource: Resource,
    every: Duration,
    began: SystemTime,
}

impl Exporter {
    /// None unless a collector is named that is to have metrics. `service`: see [`super::open`].
    ///
    /// **Errors**: code 2; a variable makes no sense.
    pub fn open(service: &'static str) -> Result<Option<Self>, Failure> {
        let Some((variable, address)) = METRICS.endpoint()? else { return Ok(None) };
        let invalid =
            |error: tonic::transport::Error| Failure::input(format!("{variable} {address}: {error}"));
        let mut endpoint = Endpoint::from_shared(address.clone()).map_err(invalid)?;
        if let Some(tls) = METRICS.tls(&address)? {
            endpoint = endpoint.tls_config(tls).map_err(invalid)?;
        }
        let timeout = Duration::from_millis(milliseconds(&TIMEOUTS, TIMEOUT)?);
        Ok(Some(Exporter {
            endpoint: endpoint.connect_timeout(timeout).timeout(timeout),
            address,
            headers: headers()?,
            resource: resource(service),
            every: Duration::from_millis(milliseconds(&INTERVAL, EVERY)?),
            began: SystemTime::now(),
        }))
    }

    /// Tells what `source` has now and then, and a last time once `stopped` is over.
    pub async fn run(mut self, source: impl AsyncFn() -> Option<Metrics>, stopped: impl Future<Output = ()>) {
        let headers = std::mem::take(&mut self.headers);
        let with_headers = move |mut request: Request<()>| {
            for (name, value) in &headers {
                request.metadata_mut().insert(name.clone(), value.clone());
            }
            Ok(request)
        };
        let mut client = MetricsServiceClient::with_interceptor(self.endpoint.connect_lazy(), with_headers);
        let mut tell = async |metrics: Metrics| {
            let request = request(&metrics, self.resource.clone(), self.began, SystemTime::now());
            client.export(request).await.map(drop).map_err(|status| status.message().to_owned())
        };
        let mut has_failed = false;
        let mut note = |sent: Result<(), String>| {
            if let Err(why) = sent
                && !std::mem::replace(&mut has_failed, true)
            {
                let at = &self.address;
                tracing::warn!("the collector at {at} accepts no metrics, everything else continues: {why}");
            }
        };
        let mut stopped = std::pin::pin!(stopped);
        loop {
            let told = async {
                tokio::time::sleep(self.every).await;
                if let Some(metrics) = source().await { tell(metrics).await } else { Ok(()) }
            };
            tokio::select! {
                sent = told => note(sent),
                () = &mut stopped => break,
            }
        }
        let Some(metrics) = source().await else { return };
        let told = tokio::time::timeout(FAREWELL, tell(metrics)).await;
        note(told.unwrap_or_else(|_| Err("no answer in time".to_owned())));
    }

    /// Does so on a thread of its own until what it returns is dropped.
    ///
    /// **Errors**: code 1; the system gives no thread.
    pub fn start(
        self,
        source: impl AsyncFn() -> Option<Metrics> + Send + 'static,
    ) -> Result<Exporting, Failure> {
        let failed = |error: std::io::Error| Failure::run(format!("metrics: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            runtime.block_on(self.run(source, async { drop(stopped.await) }));
            // A name that is still being looked up is not waited for.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("metrics".into()).spawn(run).map_err(failed)?;
        Ok(Exporting { stop: Some(stop), thread: Some(thread) })
    }
}

/// Metrics on their way to a collector; the last of them go when this is dropped.
pub struct Exporting {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Exporting {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It is over in as long as a farewell may take; a panic there has been reported.
        drop(self.thread.take().map(std::thread::JoinHandle::join));
    }
}

/// **Errors**: code 2; it is no number of milliseconds.
fn milliseconds(variables: &[&'static str], otherwise: u64) -> Result<u64, Failure> {
    let Some((variable, text)) = first(variables) else { return Ok(otherwise) };
    let number = text.parse().ok().filter(|ms| (1..=86_400_000).contains(ms));
    number.ok_or_else(|| {
        Failure::input(format!("{variable}: expected 1 to 86400000 milliseconds, got {text:?}"))
    })
}

/// **Errors**: code 2; they are no list of names and values.
fn headers() -> Result<Vec<Header>, Failure> {
    let Some((variable, list)) = first(&HEADERS) else { return Ok(Vec::new()) };
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        // Percent signs are those of addresses; plus and ampersand mean themselves.
        let value = format!("value={}", value.trim().replace('+', "%2B").replace('&', "%26"));
        let (_, value) = form_urlencoded::parse(value.as_bytes()).next()?;
        Some((name.trim().to_lowercase().parse().ok()?, value.parse().ok()?))
    };
    let pairs = list.split(',').filter(|pair| !pair.trim().is_empty());
    // Values are secrets: they are not shown.
    let invalid = || Failure::input(format!("{variable}: expected NAME=VALUE,NAME=VALUE"));
    pairs.map(|pair| header(pair).ok_or_else(invalid)).collect()
}

/// Who exports, as spans say it.
fn resource(service: &'static str) -> Resource {
    let known = super::resource(service);
    let attributes = known.iter().map(|(key, value)| text(key.as_str(), value.to_string())).collect();
    Resource { attributes, ..Resource::default() }
}

fn text(key: &str, value: String) -> KeyValue {
    let value = Some(AnyValue { value: Some(any_value::Value::StringValue(value)) });
    KeyValue { key: key.to_owned(), value, ..KeyValue::default() }
}

/// All families as one request. Counters count since `began` as far as a collector can tell.
fn request(
    metrics: &Metrics,
    from: Resource,
    began: SystemTime,
    now: SystemTime,
) -> ExportMetricsServiceRequest {
    let nanoseconds = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    };
    let (began, now) = (nanoseconds(began), nanoseconds(now));
    let point = |(labels, value): &(Labels, f64)| NumberDataPoint {
        attributes: labels.iter().map(|(name, value)| text(name, value.clone())).collect(),
        start_time_unix_nano: began,
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsDouble(*value)),
        ..NumberDataPoint::default()
    };
    let metric = |(family, samples): &(&Family, Vec<(Labels, f64)>)| {
        let data_points = samples.iter().map(point).collect();
        let data = match family.kind {
            "counter" => metric::Data::Sum(Sum {
                data_points,
                aggregation_temporality: AggregationTemporality::Cumulative.into(),
                is_monotonic: true,
            }),
            _ => metric::Data::Gauge(Gauge { data_points }),
        };
        Metric {
            name: family.name.to_owned(),
            description: family.help.to_owned(),
            unit: unit(family.name).to_owned(),
            data: Some(data),
            ..Metric::default()
        }
    };
    let scope = InstrumentationScope {
        name: "contraflow".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let metrics = metrics.families.iter().map(metric).collect();
    let scope_metrics = vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }];
    let resource_metrics =
        vec![ResourceMetrics { resource: Some(from), scope_metrics, ..ResourceMetrics::default() }];
    ExportMetricsServiceRequest { resource_metrics }
}

/// The unit of a family; empty where it counts things.
fn unit(name: &str) -> &'static str {
    let plain = name.strip_suffix("_total").unwrap_or(name);
    let ends = |end: &str| name.ends_with(end) || plain.ends_with(end);
    UNITS.iter().find(|(end, _)| ends(end)).map_or("", |(_, unit)| unit)
}

#[cfg(test)]
mod tests;
