//! Where log lines go: to stderr, ours at the recipe's level, those of libraries only from warnings on. A worker logs of each
//! job what its recipe asks for, and its lines about a rank also go to the orchestrator. Spans go to a collector, if one is
//! named, and notices of a run to an address of its user.

mod by_job;
pub mod webhook;

use contraflow_proto::v1::LogLine;
use contraflow_runtime::recipe::LogLevel;
use contraflow_workers::host::LogLevels;
use tokio::sync::mpsc;
use tracing::Subscriber;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use self::by_job::{ByJob, RankLines};
use crate::failure::Failure;
use crate::otlp::{self, Exporting};
use crate::output::is_coloured;

/// Spans on their way, if any are: to be kept as long as the command runs.
pub type Spans = Option<Exporting>;

/// Sends log lines to stderr from now on, and spans to the collector, if one is named, as those of `service`; a second call
/// in a process changes nothing.
///
/// **Errors**: code 2; see [`otlp::open`].
pub fn init(level: LogLevel, service: &'static str) -> Result<Spans, Failure> {
    let ours = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    let (spans, layer) = otlp::open(service)?.unzip();
    listen([to_stderr().with_filter(ours_from(ours)).boxed()].into_iter().chain(layer));
    Ok(spans)
}

/// As [`init`] for a command that asks others: it has no log unless a collector is named, which may be out of reach.
///
/// **Errors**: code 2; see [`otlp::open`].
pub fn init_client(service: &'static str) -> Result<Spans, Failure> {
    let Some((spans, layer)) = otlp::open(service)? else { return Ok(None) };
    listen([to_stderr().with_filter(ours_from("warn")).boxed(), layer]);
    Ok(Some(spans))
}

/// As [`init`] for a worker: of each job what `levels` say, and what an operator wants to see; lines about a rank of a job also
/// come out of the channel.
///
/// **Errors**: code 2; see [`otlp::open`].
pub fn init_worker(
    service: &'static str,
    levels: &LogLevels,
) -> Result<(mpsc::UnboundedReceiver<LogLine>, Spans), Failure> {
    let (spans, layer) = otlp::open(service)?.unzip();
    let (sender, lines) = mpsc::unbounded_channel();
    let of_ranks = RankLines { sender }.with_filter(ByJob { levels: levels.clone() });
    let to_stderr = to_stderr().with_filter(ByJob { levels: levels.clone() });
    listen([to_stderr.boxed(), of_ranks.boxed()].into_iter().chain(layer));
    Ok((lines, spans))
}

/// Installs the subscriber of this process. Every layer has a filter of its own.
fn listen(layers: impl IntoIterator<Item = otlp::Listener>) {
    // It may have been installed already, by a test for instance.
    let _ = tracing_subscriber::registry().with(Vec::from_iter(layers)).try_init();
}

fn to_stderr<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    let fields = fmt::format::debug_fn(by_job::write_field).delimited(" ");
    fmt::layer()
        .fmt_fields(fields)
        .with_writer(std::io::stderr)
        .with_ansi(is_coloured())
        // It would say so on stderr, which is what is gone, and end the process.
        .log_internal_errors(false)
}

/// Our lines from this level on. Targets are matched by prefix: all crates of this workspace begin alike.
fn ours_from(level: &str) -> EnvFilter {
    EnvFilter::new(format!("warn,contraflow={level}"))
}
