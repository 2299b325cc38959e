//! A collector in this process, and what it is told beside what a scraper reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_proto::LayerLoad;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceResponse;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Response, Status};

use super::*;
use crate::dashboard::{Facts, Shown, Subject, exposition};

/// Name and labels of a sample, as the exposition format has them.
type Name = String;

/// Takes everything in, with the header of each request that a token is in.
#[derive(Clone, Default)]
struct Taken(Arc<Mutex<Vec<(String, ExportMetricsServiceRequest)>>>);

#[tonic::async_trait]
impl MetricsService for Taken {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let token = request.metadata().get("token").and_then(|token| token.to_str().ok());
        let token = token.unwrap_or_default().to_owned();
        self.0.lock().push((token, request.into_inner()));
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A collector on a port of its own, for as long as the runtime is there.
fn collector() -> (Taken, String, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = Taken::default();
    let served = tonic::transport::Server::builder().add_service(MetricsServiceServer::new(taken.clone()));
    runtime.spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
    (taken, address, runtime)
}

fn exporter(address: &str, every: Duration) -> Exporter {
    Exporter {
        endpoint: Endpoint::from_shared(address.to_owned()).unwrap().timeout(Duration::from_secs(10)),
        address: address.to_owned(),
        headers: vec![("token".parse().unwrap(), "a word".parse().unwrap())],
        resource: resource("contraflow-test"),
        every,
        began: UNIX_EPOCH + Duration::from_secs(1),
    }
}

/// Two runs with awkward names, one of which has made steps.
fn subject() -> Arc<Subject> {
    let run = |id: &str| Shown::starting(Facts { id: id.into(), steps: Some(9), ..Facts::default() });
    let made = run("a\"b\\c");
    for step in 1..=3 {
        made.step(&StepRecord {
            step,
            tokens: 1_000,
            tokens_per_second: 512.5,
            loss: 5.25,
            seconds: 0.5,
            sent_bytes: 1 << 20,
            mfu: Some(0.25),
            loads: vec![
                LayerLoad { layer: 1, counts: vec![3, 1] },
                LayerLoad { layer: 4, counts: vec![0, 4] },
            ],
            ..StepRecord::default()
        });
    }
    Subject::of_runs(vec![made, run("new")])
}

/// What an exporter asks.
fn source(subject: Arc<Subject>) -> impl AsyncFn() -> Option<Metrics> + Send {
    async move || subject.metrics(None).await.ok()
}

/// The samples of a text for scrapers, and the kind of each.
fn scraped(text: &str) -> BTreeMap<Name, (String, f64)> {
    let mut kind = String::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(of) = line.strip_prefix("# TYPE ") {
            kind = of.rsplit(' ').next().unwrap().to_owned();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            samples.insert(name.to_owned(), (kind.clone(), value.parse().unwrap()));
        }
    }
    samples
}

fn word(pair: &KeyValue) -> String {
    match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        other => panic!("expected a text, got {other:?}"),
    }
}

/// The same of what a collector was told; units by family.
fn told(request: &ExportMetricsServiceRequest) -> (BTreeMap<Name, (String, f64)>, BTreeMap<String, String>) {
    let (mut samples, mut units) = (BTreeMap::new(), BTreeMap::new());
    for metric in &request.resource_metrics[0].scope_metrics[0].metrics {
        units.insert(metric.name.clone(), metric.unit.clone());
        let (kind, points) = match metric.data.as_ref().unwrap() {
            metric::Data::Gauge(gauge) => ("gauge", &gauge.data_points),
            metric::Data::Sum(sum) => {
                assert!(
                    sum.is_monotonic && sum.aggregation_temporality() == AggregationTemporality::Cumulative
                );
                ("counter", &sum.data_points)
            }
            other => panic!("{other:?}"),
        };
        for point in points {
            assert!(point.start_time_unix_nano == 1_000_000_000 && point.time_unix_nano > 1_000_000_000);
            let quoted = |text: String| text.replace('\\', "\\\\").replace('"', "\\\"");
            let labels: Vec<String> = point
                .attributes
                .iter()
                .map(|pair| format!("{}=\"{}\"", pair.key, quoted(word(pair))))
                .collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let Some(number_data_point::Value::AsDouble(value)) = point.value else { panic!("{point:?}") };
            samples.insert(format!("{}{labels}", metric.name), (kind.to_owned(), value));
        }
    }
    (samples, units)
}

#[test]
fn a_collector_is_told_what_a_scraper_reads_with_the_base_units_and_once_more_at_the_end() {
    let (taken, address, _runtime) = collector();
    let subject = subject();
    // The first of them would come in an hour.
    drop(exporter(&address, Duration::from_secs(3_600)).start(source(subject.clone())).unwrap());
    let all = taken.0.lock().clone();
    let [(token, request)] = &all[..] else { panic!("{all:?}") };
    assert_eq!(token, "a word");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let text = exposition(&runtime.block_on(subject.metrics(None)).unwrap());
    let (samples, units) = told(request);
    assert_eq!(samples, scraped(&text));
    assert!(samples.len() >= 30, "{samples:?}");
    assert_eq!(samples["contraflow_run_tokens_total{run=\"a\\\"b\\\\c\"}"], ("counter".to_owned(), 3_000.0));
    assert_eq!(
        samples["contraflow_run_idle_experts{run=\"a\\\"b\\\\c\",layer=\"4\"}"],
        ("gauge".to_owned(), 1.0)
    );
    let unit = |name: &str| units[name].as_str();
    assert_eq!(
        [
            "contraflow_run_step_duration_seconds",
            "contraflow_run_sent_bytes",
            "contraflow_run_mfu_ratio",
            "contraflow_run_loss_nats",
            "contraflow_run_tokens_total",
            "contraflow_run_tokens_per_second",
            "contraflow_run_training_seconds_total",
            "contraflow_run_last_step_timestamp_seconds",
            "contraflow_run_step",
        ]
        .map(unit),
        ["s", "By", "1", "{nat}", "{token}", "{token}/s", "s", "s", ""]
    );
    let resource = request.resource_metrics[0].resource.as_ref().unwrap();
    let service = resource.attributes.iter().find(|pair| pair.key == "service.name").unwrap();
    assert_eq!(word(service), "contraflow-test");
}

#[test]
fn it_is_told_again_and_again_and_one_that_does_not_answer_holds_nobody_up() {
    let (taken, address, _runtime) = collector();
    let exporting = exporter(&address, Duration::from_millis(10)).start(source(subject())).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while taken.0.lock().len() < 3 {
        assert!(std::time::Instant::now() < deadline, "{} requests", taken.0.lock().len());
        std::thread::yield_now();
    }
    drop(exporting);
    // Connections are made and nothing is ever answered.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let exporting = exporter(&address, Duration::from_millis(1)).start(source(subject())).unwrap();
    let waiting = silent.accept().unwrap();
    let began = std::time::Instant::now();
    drop(exporting);
    assert!(began.elapsed() < FAREWELL + Duration::from_secs(2), "{:?}", began.elapsed());
    drop(waiting);
}
