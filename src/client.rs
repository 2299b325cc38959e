//! The commands that talk to an orchestrator: submit, jobs, status, watch, logs, cancel, retry, scale, nodes, drain.

mod following;
pub mod goodput;
mod known;
mod nodes;
mod removal;
pub mod scale;
pub mod submit;

use std::time::{Duration, Instant};

use contraflow_orchestrator::server::files;
use contraflow_proto::{StepRecord, v1};
use contraflow_runtime::control::text::printable;
use contraflow_workers::host::{closed, describe};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::cluster_service_client::ClusterServiceClient;
use v1::job_service_client::JobServiceClient;

use self::following::{Broken, Place, go_on};
pub use self::known::{Known, known};
pub use self::nodes::{drain, nodes};
use crate::access::{Access, Bearer};
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{Format, print, say, table};
use crate::progress::{figures, hms};

/// How long reaching the orchestrator, and an answer that is not a stream, may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long `watch` waits for an orchestrator that is away.
const AWAY: Duration = Duration::from_secs(60);

/// A connection, and what goes with every call.
type AuthChannel = InterceptedService<Channel, Bearer>;

/// What all these commands have.
#[derive(clap::Args, Debug)]
pub struct Common {
    /// Where the orchestrator listens
    #[arg(long, value_name = "ADDR", env = "CONTRAFLOW_ORCHESTRATOR", default_value = "127.0.0.1:7070")]
    pub orchestrator: String,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Client certificate and token
    #[command(flatten)]
    pub access: Access,
}

/// Arguments of `contraflow jobs`.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Jobs {
    #[command(subcommand)]
    command: Option<JobsCommand>,
    #[command(flatten)]
    list: List,
}

#[derive(clap::Subcommand, Debug)]
enum JobsCommand {
    /// Remove jobs that have ended, with their folders in the storage and every checkpoint in them
    Rm(removal::Remove),
}

/// Which jobs are listed.
#[derive(clap::Args, Debug)]
pub struct List {
    /// Only jobs submitted before this one: the way to the next page
    #[arg(long, value_name = "JOB", default_value = "", hide_default_value = true)]
    pub before: String,
    /// List at most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: u32,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of commands about one job.
#[derive(clap::Args, Debug)]
pub struct OfJob {
    /// Id of the job
    pub job: String,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `contraflow logs`.
#[derive(clap::Args, Debug)]
pub struct Logs {
    /// Id of the job
    pub job: String,
    /// Only lines of this rank
    #[arg(long)]
    pub rank: Option<u32>,
    /// Keep following new lines until the job ends
    #[arg(long)]
    pub follow: bool,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `contraflow drain`.
#[derive(clap::Args, Debug)]
pub struct Drain {
    /// Label of the node
    pub node: String,
    /// Take the node back into use
    #[arg(long)]
    pub undo: bool,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

impl Common {
    /// What a call that is not answered means for the user.
    fn refused(&self, status: &tonic::Status) -> Failure {
        // Line ends are those between faults.
        let lines: Vec<String> = status.message().lines().map(|line| printable(line).into_owned()).collect();
        let words = lines.join("\n  ");
        match status.code() {
            tonic::Code::InvalidArgument
            | tonic::Code::NotFound
            | tonic::Code::FailedPrecondition
            | tonic::Code::Unauthenticated
            | tonic::Code::PermissionDenied
            | tonic::Code::AlreadyExists => Failure::input(words),
            // The client's own time limit.
            tonic::Code::Cancelled | tonic::Code::DeadlineExceeded if words == "Timeout expired" => {
                Failure::run(format!("the orchestrator has not answered within {} s", TIMEOUT.as_secs()))
            }
            code => match std::error::Error::source(status) {
                Some(cause) => Failure::run(closed(cause, self.access.tls.is_some())),
                None => Failure::run(format!("{words} ({code:?})")),
            },
        }
    }
}

async fn reach(common: &Common) -> Result<AuthChannel, Failure> {
    let bearer = common.access.bearer()?;
    let endpoint = common.access.endpoint("--orchestrator", &common.orchestrator)?;
    let expected = match &common.access.tls {
        Some(dir) => format!(
            "an orchestrator with --tls and a certificate that {} vouches for",
            dir.join(files::CA).display()
        ),
        None => "an orchestrator".to_owned(),
    };
    let failed = |error: &dyn std::fmt::Display| {
        Failure::run(format!("--orchestrator {}: expected {expected}, got: {error}", common.orchestrator))
    };
    // The limit holds for the beginning of an answer; a stream ends when the other side is gone.
    let endpoint = endpoint
        .connect_timeout(TIMEOUT)
        .timeout(TIMEOUT)
        .http2_keep_alive_interval(TIMEOUT)
        .keep_alive_timeout(TIMEOUT);
    let channel = endpoint.connect().await.map_err(|error| {
        failed(&std::error::Error::source(&error).map_or_else(|| error.to_string(), describe))
    })?;
    Ok(InterceptedService::new(channel, bearer))
}

async fn jobs(common: &Common) -> Result<JobServiceClient<AuthChannel>, Failure> {
    Ok(JobServiceClient::new(reach(common).await?).max_decoding_message_size(64 << 20))
}

async fn cluster(common: &Common) -> Result<ClusterServiceClient<AuthChannel>, Failure> {
    Ok(ClusterServiceClient::new(reach(common).await?))
}

fn show(common: &Common, json: &Value, text: &str) -> Result<(), Failure> {
    match common.format {
        Format::Json => print(&format!("{json}\n")),
        Format::Text => print(&lines_of(text)),
    }
}

/// A text for a terminal: line ends are ours, all other control characters are somebody else's.
fn lines_of(text: &str) -> String {
    text.split_inclusive('\n')
        .flat_map(|line| match line.strip_suffix('\n') {
            Some(line) => [printable(line), "\n".into()],
            None => [printable(line), "".into()],
        })
        .collect()
}

/// Runs `contraflow jobs`.
///
/// **Errors**: code 2 if a job is not there or cannot be removed; code 1 if the orchestrator is out of reach.
pub fn of_jobs(args: &Jobs) -> Result<(), Failure> {
    match &args.command {
        Some(JobsCommand::Rm(args)) => removal::remove(args),
        None => list(&args.list),
    }
}

/// A page, and where the next one begins.
///
/// **Errors**: code 2 if there is no job to begin before; code 1 if the orchestrator is out of reach.
fn list(args: &List) -> Result<(), Failure> {
    let List { before, limit, common } = args;
    interrupt::runtime()?.block_on(async {
        let request = v1::ListRequest { before: before.clone(), limit: *limit };
        let answer = jobs(common).await?.list(request).await.map_err(|status| common.refused(&status))?;
        let v1::ListResponse { jobs: all, more } = answer.into_inner();
        let json: Vec<Value> = all.iter().map(job_json).collect();
        let rows = all.iter().map(|job| {
            let loss = job.loss.map_or_else(String::new, |loss| format!("{loss:.4}"));
            let (step, generation) = (format!("{}/{}", job.step, job.steps), job.generation.to_string());
            let left = job.eta_seconds.map_or_else(String::new, hms);
            [job.job.clone(), job.name.clone(), state_of(job), step, left, generation, loss]
        });
        let text = table(["JOB", "NAME", "STATE", "STEP", "LEFT", "GEN", "LOSS"], 3..7, rows);
        show(common, &json!({"jobs": json}), &text)?;
        if let Some(last) = all.last().filter(|_| more && common.format == Format::Text) {
            say(format_args!("older ones: contraflow jobs --before {}", printable(&last.job)));
        }
        Ok(())
    })
}

/// Runs `contraflow status`.
///
/// **Errors**: code 2 if there is no such job; code 1 if the orchestrator is out of reach.
pub fn status(args: &OfJob) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let request = v1::GetRequest { job: args.job.clone(), with_recipe: false };
        let answer =
            jobs(&args.common).await?.get(request).await.map_err(|status| args.common.refused(&status))?;
        let job = answer.into_inner().job.unwrap_or_default();
        show(&args.common, &job_json(&job), &job_text(&job))
    })
}

/// Runs `contraflow watch`: a line a step with its whole record, those before first, until the job ends. A break of the
/// connection is waited out: the orchestrator may be started again.
///
/// **Errors**: code 2 if there is no such job; code 1 if it failed or was cancelled, or the orchestrator stays away.
pub fn watch(args: &OfJob) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let job = go_on(&args.common, 1, async |place| watch_once(args, place).await).await?;
        ended(&job)
    })
}

async fn watch_once(args: &OfJob, place: &mut Place) -> Result<v1::Job, Broken> {
    let mut client = jobs(&args.common).await?;
    let request = v1::WatchRequest { job: args.job.clone(), from_step: place.next };
    let mut steps = client.watch(request).await.map_err(|status| args.common.refused(&status))?.into_inner();
    place.opened = Some(Instant::now());
    while let Some(answer) = steps.message().await.map_err(|status| args.common.refused(&status))? {
        let record = answer.record.unwrap_or_default();
        place.shows(record.step);
        match args.common.format {
            // The bytes of a line of metrics.jsonl: a JSON value would have its fields in another order.
            Format::Json => {
                let line = serde_json::to_string(&record);
                let line = line.map_err(|error| Broken::Output(Failure::run(error.to_string())))?;
                print(&format!("{line}\n")).map_err(Broken::Output)?;
            }
            Format::Text => {
                let warn = |warning: &String| say(format_args!("warning: {}", printable(warning)));
                record.warnings.iter().for_each(warn);
                let StepRecord { step, seconds, generation, .. } = record;
                let figures = figures(&record, "");
                print(&format!("step {step:>6}  {figures}  {seconds:.2} s  generation {generation}\n"))
                    .map_err(Broken::Output)?;
            }
        }
    }
    Ok(has_ended(&mut client, (&args.job, &args.common)).await?)
}

/// The job whose stream has come to its end.
///
/// **Errors**: code 1 if the job goes on.
async fn has_ended(
    client: &mut JobServiceClient<AuthChannel>,
    (job, common): (&str, &Common),
) -> Result<v1::Job, Failure> {
    let request = v1::GetRequest { job: job.to_owned(), with_recipe: false };
    let answer = client.get(request).await.map_err(|status| common.refused(&status))?;
    let job = answer.into_inner().job.unwrap_or_default();
    if job.outcome.is_empty() { Err(Failure::run("the stream has ended before the job")) } else { Ok(job) }
}

fn ended(job: &v1::Job) -> Result<(), Failure> {
    match job.state() {
        v1::JobState::Done => {
            say(format_args!("{}: {}", printable(&job.job), printable(&job.outcome)));
            Ok(())
        }
        _ => {
            let outcome = printable(&job.outcome);
            Err(Failure::run(format!("{} {}: {outcome}", printable(&job.job), state_of(job))))
        }
    }
}

/// Runs `contraflow logs`; with `--follow`, until the job ends, and a break of the connection is waited out.
///
/// **Errors**: code 2 if there is no such job; code 1 if the orchestrator is out of reach.
pub fn logs(args: &Logs) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        match args.follow {
            true => go_on(&args.common, 0, async |place| follow_once(args, place).await).await,
            false => match logs_once(args, &mut Place::default()).await {
                Err(Broken::Link(failure) | Broken::Output(failure)) => Err(failure),
                Ok(_) => Ok(()),
            },
        }
    })
}

async fn follow_once(args: &Logs, place: &mut Place) -> Result<(), Broken> {
    let mut client = logs_once(args, place).await?;
    has_ended(&mut client, (&args.job, &args.common)).await?;
    Ok(())
}

async fn logs_once(args: &Logs, place: &mut Place) -> Result<JobServiceClient<AuthChannel>, Broken> {
    let mut client = jobs(&args.common).await?;
    let &Logs { rank, follow, .. } = args;
    let request = v1::LogsRequest { job: args.job.clone(), rank, follow, from_line: place.next };
    let mut lines = client.logs(request).await.map_err(|status| args.common.refused(&status))?.into_inner();
    place.opened = Some(Instant::now());
    while let Some(line) = lines.message().await.map_err(|status| args.common.refused(&status))? {
        place.shows(line.number);
        let json = json!({
            "unix_ms": line.unix_ms, "level": line.level, "ranks": line.ranks, "message": line.message,
        });
        let from = match &line.ranks[..] {
            [] => "orchestrator".to_owned(),
            [rank] => format!("rank {rank}"),
            ranks => format!("x{} ranks", ranks.len()),
        };
        let text = format!("{} {:<5} {from:<12} {}\n", clock(line.unix_ms), line.level, line.message);
        show(&args.common, &json, &text).map_err(Broken::Output)?;
    }
    Ok(client)
}

/// Runs `contraflow cancel`.
///
/// **Errors**: code 2 if there is no such job; code 1 if the orchestrator is out of reach.
pub fn cancel(args: &OfJob) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let request = v1::CancelRequest { job: args.job.clone(), reason: "cancelled by the user".into() };
        let answer =
            jobs(&args.common).await?.cancel(request).await.map_err(|status| args.common.refused(&status))?;
        let job = answer.into_inner().job.unwrap_or_default();
        show(&args.common, &job_json(&job), &format!("{} {}: {}\n", job.job, state_of(&job), job.outcome))
    })
}

/// Runs `contraflow retry`.
///
/// **Errors**: code 2 if there is no such job, or it has not failed and was not cancelled; code 1 if the orchestrator is out of
/// reach.
pub fn retry(args: &OfJob) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let request = v1::RetryRequest { job: args.job.clone() };
        let answer =
            jobs(&args.common).await?.retry(request).await.map_err(|status| args.common.refused(&status))?;
        let job = answer.into_inner().job.unwrap_or_default();
        show(&args.common, &job_json(&job), &format!("{} {}\n", job.job, state_of(&job)))
    })
}

/// The name of a job's state.
pub fn state_of(job: &v1::Job) -> String {
    name_of(job.state())
}

/// The name of a state.
pub fn name_of(state: v1::JobState) -> String {
    state.as_str_name().trim_start_matches("JOB_STATE_").to_lowercase()
}

/// A job as `--format json` prints it.
pub fn job_json(job: &v1::Job) -> Value {
    let ranks: Vec<Value> = job
        .ranks
        .iter()
        .map(|rank| {
            json!({
                "rank": rank.rank, "worker": rank.worker, "node": rank.node, "step": rank.step,
                "busy_seconds": rank.busy_seconds, "waited_seconds": rank.waited_seconds,
                "link_seconds": rank.link_seconds, "slow": rank.slow, "memory_bytes": rank.memory_bytes,
            })
        })
        .collect();
    json!({
        "job": job.job, "name": job.name, "priority": job.priority, "state": state_of(job), "step": job.step,
        "steps": job.steps, "generation": job.generation, "loss": job.loss, "validation_loss": job.validation_loss,
        "ranks": ranks, "waiting_for": job.waiting_for, "outcome": job.outcome, "losses": job.losses,
        "submitted_unix_ms": job.submitted_unix_ms, "ended_unix_ms": job.ended_unix_ms,
        "warning": job.warning, "min_ranks": job.min_ranks, "max_ranks": job.max_ranks, "is_scaled": job.is_scaled,
        "layout": job.layout, "eta_seconds": job.eta_seconds, "goodput": goodput::json(job.goodput.as_ref()), "queued_seconds": job.queued_seconds,
    })
}

fn job_text(job: &v1::Job) -> String {
    let mut text = format!(
        "{} {}: {}, step {} of {}, generation {}\n",
        job.job,
        job.name,
        state_of(job),
        job.step,
        job.steps,
        job.generation
    );
    for (what, value) in
        [("waiting for", &job.waiting_for), ("outcome", &job.outcome), ("warning", &job.warning)]
    {
        if !value.is_empty() {
            text += &format!("  {what}: {value}\n");
        }
    }
    if job.min_ranks < job.max_ranks || job.is_scaled {
        let (least, most, now) = (job.min_ranks, job.max_ranks, job.ranks.len());
        let why = if job.is_scaled { ", as it was scaled" } else { "" };
        text += &format!("  ranks: {now} of {least} to {most}{why}\n");
    }
    if !job.layout.is_empty() {
        text += &format!("  layout: {}\n", job.layout);
    }
    if let Some(seconds) = job.eta_seconds {
        text += &format!("  left: {}\n", hms(seconds));
    }
    if let Some(words) = job.goodput.as_ref().and_then(goodput::words) {
        text += &format!("  goodput: {words}\n");
    }
    if job.queued_seconds >= 1.0 {
        text += &format!("  queued: {}\n", hms(job.queued_seconds));
    }
    if let Some(loss) = job.loss {
        text += &format!("  loss: {loss:.4}\n");
    }
    for rank in &job.ranks {
        let (busy, waited, link) = (rank.busy_seconds, rank.waited_seconds, rank.link_seconds);
        let slow = if rank.slow { "  slow" } else { "" };
        text += &format!(
            "  rank {:>3}  step {:>6}  busy {busy:>6.2} s  waits {waited:>6.2} s  links {link:>6.2} s  {} on {}{slow}\n",
            rank.rank, rank.step, rank.worker, rank.node
        );
    }
    text
}

/// Date and time of day, UTC.
pub fn clock(unix_ms: u64) -> String {
    /// The end of the year 9999.
    const LAST: u64 = 253_402_300_799_999;
    let time = OffsetDateTime::UNIX_EPOCH + Duration::from_millis(unix_ms.min(LAST));
    format!("{} {:02}:{:02}:{:02}", time.date(), time.hour(), time.minute(), time.second())
}
