//! Lines of a process that hosts ranks of several jobs: which job a line is of, whether it is wanted, and those about a rank
//! on their way to the orchestrator.
//!
//! A line is of the job that it names, or else of the job of the innermost span around it that names one.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use contraflow_proto::v1::LogLine;
use contraflow_runtime::recipe::LogLevel;
use contraflow_runtime::topology::JobId;
use contraflow_workers::host::LogLevels;
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::layer::{Context, Filter, Layer};
use tracing_subscriber::registry::LookupSpan;

/// Lets through of our lines what their job's recipe asks for, of those of libraries warnings.
pub(super) struct ByJob {
    pub(super) levels: LogLevels,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Filter<S> for ByJob {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        *metadata.level() <= if is_ours(metadata) { filter_of(self.levels.most()) } else { LevelFilter::WARN }
    }

    /// What is asked for of our lines changes with the jobs; of others' it never does.
    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        match (is_ours(metadata), *metadata.level() <= LevelFilter::WARN) {
            (true, _) => Interest::sometimes(),
            (false, true) => Interest::always(),
            (false, false) => Interest::never(),
        }
    }

    fn event_enabled(&self, event: &Event<'_>, context: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        !is_ours(metadata) || *metadata.level() <= filter_of(self.levels.of(Named::of(event, context).job))
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut named = Named::default();
        attributes.record(&mut named);
        if let Some(span) = context.span(id).filter(|_| named.job.is_some()) {
            // Another filter of this kind may have noted the same.
            span.extensions_mut().replace(named);
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(filter_of(self.levels.most()).max(LevelFilter::WARN))
    }
}

/// Targets of all crates of this workspace begin alike.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("contraflow")
}

fn filter_of(level: LogLevel) -> LevelFilter {
    LevelFilter::from_level(match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    })
}

/// Takes our lines about a rank of a job.
pub(super) struct RankLines {
    pub(super) sender: mpsc::UnboundedSender<LogLine>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for RankLines {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Named { job: Some(job), rank: Some(rank), message } = Named::of(event, &context) else { return };
        if !is_ours(event.metadata()) {
            return;
        }
        let unix_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let level = event.metadata().level().to_string();
        let line = LogLine { job: job.bits(), rank: rank as u32, unix_ms, level, message };
        // A closed receiver means that the worker is ending.
        drop(self.sender.send(line));
    }
}

/// Writes a field of a line: an id of a job as people write it.
pub(super) fn write_field(to: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    match field.name() {
        "message" => write!(to, "{value:?}"),
        "job" => {
            let value = format!("{value:?}");
            match value.parse() {
                Ok(bits) => write!(to, "job={}", JobId::of(bits)),
                Err(_) => write!(to, "job={value}"),
            }
        }
        name => write!(to, "{name}={value:?}"),
    }
}

/// The fields of a line or a span that matter here.
#[derive(Clone, Default)]
struct Named {
    job: Option<JobId>,
    rank: Option<u64>,
    message: String,
}

impl Named {
    fn of<S: Subscriber + for<'a> LookupSpan<'a>>(event: &Event<'_>, context: &Context<'_, S>) -> Self {
        let mut named = Named::default();
        event.record(&mut named);
        if named.job.is_none() {
            let around = context.event_scope(event).into_iter().flatten();
            let around = around.filter_map(|span| span.extensions().get::<Named>().cloned()).next();
            let Named { job, rank, .. } = around.unwrap_or_default();
            (named.job, named.rank) = (job, named.rank.or(rank));
        }
        named
    }
}

impl Visit for Named {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "job" => self.job = Some(JobId::of(value)),
            "rank" => self.rank = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}
