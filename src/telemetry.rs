//! Where log lines go: to stderr, ours at the recipe's level, those of libraries only from warnings on. A worker's lines about
//! a rank also go to the orchestrator. Spans go to a collector, if one is named.

use std::time::{SystemTime, UNIX_EPOCH};

use contraflow_proto::v1::LogLine;
use contraflow_runtime::recipe::LogLevel;
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::failure::Failure;
use crate::otlp::{self, Exporting};

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
    listen([to_stderr(ours).boxed()].into_iter().chain(layer));
    Ok(spans)
}

/// As [`init`] for a command that asks others: it has no log unless a collector is named, which may be out of reach.
///
/// **Errors**: code 2; see [`otlp::open`].
pub fn init_client(service: &'static str) -> Result<Spans, Failure> {
    let Some((spans, layer)) = otlp::open(service)? else { return Ok(None) };
    listen([to_stderr("warn").boxed(), layer]);
    Ok(Some(spans))
}

/// As [`init`] with what an operator wants to see; lines that name a job and a rank also come out of the channel.
///
/// **Errors**: code 2; see [`otlp::open`].
pub fn init_worker(service: &'static str) -> Result<(mpsc::UnboundedReceiver<LogLine>, Spans), Failure> {
    let (spans, layer) = otlp::open(service)?.unzip();
    let (sender, lines) = mpsc::unbounded_channel();
    let of_ranks = RankLines { sender }.with_filter(EnvFilter::new("off,contraflow=info"));
    listen([to_stderr("info").boxed(), of_ranks.boxed()].into_iter().chain(layer));
    Ok((lines, spans))
}

/// Hears all that is said in this process from now on. Every layer has a filter of its own.
fn listen(layers: impl IntoIterator<Item = otlp::Listener>) {
    // Whoever came first, a test for instance, has set it up already.
    let _ = tracing_subscriber::registry().with(Vec::from_iter(layers)).try_init();
}

fn to_stderr<S>(ours: &str) -> impl Layer<S>
where
    S: Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    // Targets are matched by prefix: all crates of this workspace begin alike.
    let filter = EnvFilter::new(format!("warn,contraflow={ours}"));
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::env::var_os("NO_COLOR").is_none());
    lines.with_filter(filter)
}

/// Takes lines that name a job and a rank.
struct RankLines {
    sender: mpsc::UnboundedSender<LogLine>,
}

impl<S: Subscriber> Layer<S> for RankLines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut named = Named::default();
        event.record(&mut named);
        let (Some(job), Some(rank)) = (named.job, named.rank) else { return };
        let unix_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let level = event.metadata().level().to_string();
        let line = LogLine { job, rank: rank as u32, unix_ms, level, message: named.message };
        // If nobody listens any more the worker is ending.
        drop(self.sender.send(line));
    }
}

/// The fields of a line that matter here.
#[derive(Default)]
struct Named {
    job: Option<u64>,
    rank: Option<u64>,
    message: String,
}

impl Visit for Named {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "job" => self.job = Some(value),
            "rank" => self.rank = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}
