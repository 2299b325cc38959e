//! `contraflow doctor`: what is wrong with a run, from what its folder holds, or with a job, also from what its orchestrator says; and
//! an archive for a report about it. The checks are in `checks` and `job`, what goes into the archive in `archive`.

mod archive;
mod checks;
mod job;
mod redact;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use contraflow_proto::v1::LogsResponse;
use contraflow_runtime::files;
use contraflow_runtime::flight::{self, Analysis, RankRing, Verdict};
use contraflow_runtime::topology::JobId;
use serde::Serialize;
use serde_json::{Value, json};

use self::archive::Archive;
use self::checks::Examined;
use self::redact::redacted;
use crate::client::{Common, known};
use crate::failure::Failure;
use crate::output::{Format, count, escaped, print, quoted};
use crate::run_dir;

/// Arguments of `contraflow doctor`.
#[derive(clap::Args, Debug)]
pub struct DoctorArgs {
    /// A run, by folder or name; or a job of a cluster, by its id
    #[arg(value_name = "RUN|JOB", default_value = "runs/latest")]
    of: String,
    /// Also write what a report about it needs: recipe, plan, end of the metrics, what an orchestrator has logged, record of the ranks,
    /// versions, machine; no secret and no text that the run was trained on
    #[arg(long, value_name = "FILE.tar.gz")]
    archive: Option<PathBuf>,
    /// Connection to the job's orchestrator, and output format
    #[command(flatten)]
    common: Common,
}

/// What is examined, and what was found out about it.
struct Case {
    /// `run` or `job`.
    kind: &'static str,
    /// The run's folder, or the job's id.
    name: String,
    /// Its folder, if it is to be reached from here.
    folder: Option<PathBuf>,
    /// TOML.
    recipe: Option<String>,
    /// What the orchestrator has written into the job's log.
    lines: Vec<LogsResponse>,
    examined: Examined,
}

impl Case {
    /// A run here, or else a job.
    ///
    /// **Errors**: code 2 if there is neither; code 1 if the orchestrator is out of reach.
    fn of(args: &DoctorArgs) -> Result<Case, Failure> {
        let is_job = JobId::parse_number(&args.of).is_some();
        match run_dir::find_run(&args.of) {
            Ok(run) => Ok(Case::of_run(&run_dir::without_link(&run))),
            Err(_) if is_job => Ok(job::examine(known(&args.common, &args.of)?, SystemTime::now())),
            Err(words) => Err(Failure::input(format!("{words}; or expected a job's id, as job-1"))),
        }
    }

    fn of_run(run: &Path) -> Case {
        Case {
            kind: "run",
            name: run.display().to_string(),
            folder: Some(run.to_owned()),
            recipe: files::read_to_string(&run.join("recipe.toml")).ok(),
            lines: Vec::new(),
            examined: Examined::of(run, SystemTime::now()),
        }
    }
}

/// How a check has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warning,
    Failed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failed => "failed",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    says: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_do: Option<String>,
}

impl Check {
    fn ok(name: &'static str, says: impl Into<String>) -> Check {
        Check { name, status: Status::Ok, says: says.into(), to_do: None }
    }

    fn warning(name: &'static str, says: impl Into<String>, to_do: impl Into<String>) -> Check {
        Check { name, status: Status::Warning, says: says.into(), to_do: Some(to_do.into()) }
    }

    fn failed(name: &'static str, says: impl Into<String>, to_do: impl Into<String>) -> Check {
        Check { name, status: Status::Failed, says: says.into(), to_do: Some(to_do.into()) }
    }
}

/// Ranks that are shown one by one; more are in the JSON.
const SHOWN_RANKS: usize = 16;

/// Runs the command.
///
/// **Errors**: code 2 if there is no such run or job, or the archive cannot be written; code 1 if a check has failed, or the orchestrator is
/// out of reach.
pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let case = Case::of(args)?;
    if let Some(path) = &args.archive {
        let archive = Archive { case: &case, text: text(&case) };
        archive.write(path).map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    }
    print(&match args.common.format {
        Format::Text => {
            let written = args.archive.as_ref().map(|path| format!("written: {}\n", quoted(path.display())));
            text(&case) + &written.unwrap_or_default()
        }
        Format::Json => format!("{}\n", record(&case)),
    })?;
    let checks = &case.examined.checks;
    let failed = checks.iter().filter(|check| check.status == Status::Failed).count();
    match failed {
        0 => Ok(()),
        _ => Err(Failure::run(format!("{failed} of {} failed", count(checks.len(), "check")))),
    }
}

/// For people. What files say may hold anything: nothing of it acts on a terminal, and no secret is shown.
fn text(Case { name, examined, .. }: &Case) -> String {
    let mut text = format!("{name}\n");
    for Check { name, status, says, to_do } in &examined.checks {
        // The rest of several lines stands below the first.
        let says = says.replace('\n', "\n                       ");
        let _ = writeln!(text, "{:<8} {name:<13} {says}", status.name());
        if let Some(to_do) = to_do {
            let _ = writeln!(text, "{:22} -> {to_do}", "");
        }
    }
    if examined.analysis.verdict != Verdict::Finished {
        for state in examined.analysis.ranks.iter().take(SHOWN_RANKS) {
            let _ = writeln!(text, "rank {:<17} {state}", state.rank);
        }
        if let Some(more) = examined.analysis.ranks.len().checked_sub(SHOWN_RANKS + 1) {
            let _ = writeln!(text, "and {}", count(more + 1, "more rank"));
        }
    }
    escaped(&redacted(&text)).into_owned()
}

/// For programs.
fn record(Case { kind, name, examined, .. }: &Case) -> Value {
    let checks = examined.checks.iter().map(|check| {
        let to_do = check.to_do.as_deref().map(redacted);
        json!({"name": check.name, "status": check.status, "says": redacted(&check.says), "to_do": to_do})
    });
    let ranks = examined.analysis.ranks.iter().map(|state| {
        let last = state.last.map(|(work, step)| json!({"operation": work.to_string(), "step": step}));
        json!({
            "rank": state.rank, "doing": state.to_string(), "seconds": state.lasted as f64 / 1e9, "last": last,
            "unreadable": state.unreadable,
        })
    });
    json!({
        *kind: name,
        "checks": checks.collect::<Vec<_>>(),
        "flight": examined.analysis.to_string(),
        "is_stuck": examined.analysis.is_stuck(),
        "ranks": ranks.collect::<Vec<_>>(),
    })
}

/// The records of the formations of ranks in a folder, the latest first.
fn rings(run: &Path) -> Vec<(PathBuf, Vec<RankRing>)> {
    flight::read_all(run).unwrap_or_default()
}

/// Those of the latest formation.
fn latest(rings: &[(PathBuf, Vec<RankRing>)]) -> &[RankRing] {
    rings.first().map_or(&[], |(_, rings)| rings)
}

/// What a run that has failed adds to its last message: what held its ranks up, if that is known, and how to ask for more.
pub(crate) fn hint(run: &Path) -> String {
    let analysis = Analysis::of(latest(&rings(run)), Some(nanoseconds(SystemTime::now())));
    let is_told = analysis.is_stuck() || matches!(analysis.verdict, Verdict::Failed(..));
    let sentence = if is_told { format!("\n{analysis}") } else { String::new() };
    format!("{sentence}\nmore about it: contraflow doctor {}", quoted(run.display()))
}

/// **Units**: ns since 1970.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
