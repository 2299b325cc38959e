//! A collector: takes what processes export over OTLP. Of spans it answers what belongs to what, of metrics the latest values.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::metrics::v1::{metric::Data, number_data_point};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A span as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub name: String,
    /// Of the process, as it calls itself.
    pub service: String,
    /// Which process.
    pub instance: String,
    pub trace: Vec<u8>,
    pub id: Vec<u8>,
    /// Empty: a root.
    pub parent: Vec<u8>,
    /// Trace and span of each link.
    pub links: Vec<(Vec<u8>, Vec<u8>)>,
    pub attributes: HashMap<String, String>,
}

impl Seen {
    /// A whole number among its attributes.
    pub fn number(&self, key: &str) -> u64 {
        self.attributes[key].parse().unwrap()
    }
}

/// Values by service, name and the value of the first label, empty without one.
pub type Values = HashMap<(String, String, String), f64>;

#[derive(Clone, Default)]
struct Taken(Arc<Mutex<Vec<Seen>>>);

#[derive(Clone, Default)]
struct Measured(Arc<Mutex<Values>>);

#[tonic::async_trait]
impl MetricsService for Measured {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let mut values = self.0.lock().unwrap();
        for of_process in request.into_inner().resource_metrics {
            let service = texts(of_process.resource.unwrap().attributes)["service.name"].clone();
            for metric in of_process.scope_metrics.into_iter().flat_map(|scope| scope.metrics) {
                let points = match metric.data.unwrap() {
                    Data::Gauge(gauge) => gauge.data_points,
                    Data::Sum(sum) => sum.data_points,
                    other => panic!("{other:?}"),
                };
                for point in points {
                    let Some(number_data_point::Value::AsDouble(value)) = point.value else { panic!() };
                    let first = point.attributes.into_iter().take(1).collect();
                    let label = texts(first).into_values().next().unwrap_or_default();
                    values.insert((service.clone(), metric.name.clone(), label), value);
                }
            }
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl TraceService for Taken {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut taken = self.0.lock().unwrap();
        for of_process in request.into_inner().resource_spans {
            let process = texts(of_process.resource.unwrap().attributes);
            for span in of_process.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                taken.push(Seen {
                    name: span.name,
                    service: process["service.name"].clone(),
                    instance: process["service.instance.id"].clone(),
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    links: span.links.into_iter().map(|link| (link.trace_id, link.span_id)).collect(),
                    attributes: texts(span.attributes),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn texts(attributes: Vec<KeyValue>) -> HashMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|pair| (pair.key, text(pair.value))).collect()
}

/// A collector on a port of its own.
pub struct Collector {
    taken: Taken,
    measured: Measured,
    pub endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl Collector {
    pub fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let taken = Taken::default();
        let service = TraceServiceServer::new(taken.clone());
        let measured = Measured::default();
        let metrics = MetricsServiceServer::new(measured.clone());
        let served = tonic::transport::Server::builder().add_service(service).add_service(metrics);
        runtime.spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
        Collector { taken, measured, endpoint, _runtime: runtime }
    }

    /// The latest values.
    pub fn values(&self) -> Values {
        self.measured.0.lock().unwrap().clone()
    }

    /// What has come so far.
    pub fn spans(&self) -> Spans {
        Spans(self.taken.0.lock().unwrap().clone())
    }
}

/// Spans of some processes.
pub struct Spans(pub Vec<Seen>);

impl Spans {
    pub fn named(&self, name: &str) -> Vec<&Seen> {
        self.0.iter().filter(|span| span.name == name).collect()
    }

    pub fn only(&self, name: &str) -> &Seen {
        let all = self.named(name);
        assert_eq!(all.len(), 1, "{name}: {all:?}");
        all[0]
    }

    pub fn get(&self, id: &[u8]) -> &Seen {
        self.0.iter().find(|span| span.id == id).unwrap()
    }

    pub fn parent(&self, span: &Seen) -> &Seen {
        self.get(&span.parent)
    }

    pub fn children(&self, span: &Seen) -> Vec<&Seen> {
        self.0.iter().filter(|child| child.parent == span.id).collect()
    }

    pub fn child(&self, span: &Seen, name: &str) -> &Seen {
        let all: Vec<_> = self.children(span).into_iter().filter(|child| child.name == name).collect();
        assert_eq!(all.len(), 1, "{name} of {span:?}: {all:?}");
        all[0]
    }
}
