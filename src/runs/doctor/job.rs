//! The checks of a job: its state, its latest incident, and what its folder in the storage holds if that is to be reached from here.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::{CheckpointFolder, JobFolder};
use contraflow_runtime::flight::Analysis;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use v1::JobState;

use super::super::survey::{RunState, age};
use super::checks::{Examined, Patient, newest_manifest};
use super::{Case, Check, latest, nanoseconds, rings};
use crate::client::{Known, state_of};
use crate::dashboard::cluster::incidents::incidents;
use crate::run_dir;

/// A job, and what was found out about it.
pub(super) fn examine(known: Known, now: SystemTime) -> Case {
    let place = place(&known);
    let (state, is_at_work) = state(&known.job);
    let checks = vec![of_job(&known.job), incident(&known, now), storage(&place)];
    let newest = known.lines.last().map_or(0, |line| line.unix_ms);
    let newest = SystemTime::UNIX_EPOCH + Duration::from_millis(newest);
    let resume = format!("contraflow retry {} takes it up again once it has failed", known.job.job);
    // What a rank needs of memory, and where the data is, is for the machines of the workers.
    let recipe = None;
    let folder = place.ok();
    let examined = match &folder {
        Some(run) => {
            let checkpoints = CheckpointFolder::of_run(run);
            let patient =
                Patient { run, state, now, recipe, manifest: newest_manifest(&checkpoints), resume };
            let rings = rings(run);
            let analysis = Analysis::of_job(latest(&rings), is_at_work.then(|| nanoseconds(now)));
            let of_recipe = check_recipe(&known, patient.manifest.as_ref().map(|manifest| &manifest.model));
            let mut checks = checks;
            checks.extend([patient.program(&rings), patient.machine(), patient.disk()]);
            checks.push(patient.clock(newest.max(run_dir::last_change(run))));
            checks.extend([of_recipe, patient.checkpoints(&checkpoints), patient.metrics()]);
            checks.extend(patient.evidence());
            checks.push(patient.flight(&analysis));
            Examined { checks, analysis, rings }
        }
        None => {
            let patient = Patient { run: Path::new(""), state, now, recipe, manifest: None, resume };
            let mut checks = checks;
            checks.extend([patient.program(&[]), patient.machine(), patient.clock(newest)]);
            checks.push(check_recipe(&known, None));
            Examined { checks, analysis: Analysis::of_job(&[], None), rings: Vec::new() }
        }
    };
    let Known { job, recipe, lines, .. } = known;
    Case { kind: "job", name: job.job, folder, recipe: Some(recipe), lines, examined }
}

/// Its folder, or why it is not to be read here. The path is that of a worker: here it may be somebody else's.
fn place(known: &Known) -> Result<PathBuf, String> {
    let Some(folder) = &known.folder else { return Err("it has no folder in the storage yet".into()) };
    let path = PathBuf::from(folder);
    // Several orchestrators count their jobs from 1: a job of this number may be another one's.
    match known.owner.map_or(Ok(false), |owner| JobFolder::is_of(&path, owner)) {
        Ok(true) => Ok(path),
        Ok(false) => {
            Err(format!("{folder}: not to be reached from here; run this where the workers' storage is"))
        }
        Err(error) => Err(format!("{folder}: {error}")),
    }
}

/// As the checks of a folder know it, and whether its processes are at work.
fn state(job: &v1::Job) -> (RunState, bool) {
    match job.state() {
        JobState::Running => (RunState::Training, true),
        JobState::Forming | JobState::Recovering | JobState::Queued | JobState::Unspecified => {
            (RunState::Training, false)
        }
        JobState::Done => (RunState::Done, false),
        JobState::Failed | JobState::Cancelled => (RunState::Stopped, false),
    }
}

fn of_job(job: &v1::Job) -> Check {
    const NAME: &str = "job";
    let mut says = format!(
        "{}: {}, step {} of {}, generation {}, {} lost",
        job.name,
        state_of(job),
        job.step,
        job.steps,
        job.generation,
        job.losses
    );
    for (what, words) in
        [("waits for", &job.waiting_for), ("outcome", &job.outcome), ("warning", &job.warning)]
    {
        if !words.is_empty() {
            says += &format!("\n{what}: {words}");
        }
    }
    match job.state() {
        JobState::Failed => Check::failed(NAME, says, format!("contraflow logs {}", job.job)),
        JobState::Recovering => Check::warning(NAME, says, "contraflow nodes shows the slots that there are"),
        _ if !job.warning.is_empty() => Check::warning(NAME, says, format!("contraflow logs {}", job.job)),
        _ => Check::ok(NAME, says),
    }
}

/// The latest one, with what the recorders of the ranks have told of it.
fn incident(known: &Known, now: SystemTime) -> Check {
    const NAME: &str = "incident";
    let found = incidents(&known.lines);
    let Some(latest) = found.first() else { return Check::ok(NAME, "none") };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let ago = now.saturating_sub(Duration::from_millis(latest.began_unix_ms));
    let lines: Vec<&str> = latest.lines.iter().map(|line| line.message.as_str()).collect();
    let says = format!("{} ago: {}", age(ago.as_secs()), lines.join("\n"));
    match latest.over_unix_ms {
        Some(_) => Check::ok(NAME, says),
        None => {
            Check::warning(NAME, says, format!("contraflow status {} says what it waits for", known.job.job))
        }
    }
}

fn storage(place: &Result<PathBuf, String>) -> Check {
    const NAME: &str = "storage";
    match place {
        Ok(path) => Check::ok(NAME, path.display().to_string()),
        Err(why) => {
            let to_do = "without it there is no record of the ranks, and no metrics, in this report";
            Check::warning(NAME, why.as_str(), to_do)
        }
    }
}

/// Without a checkpoint the model of a recipe that names its own is known to the orchestrator alone.
fn check_recipe(known: &Known, model: Option<&serde_json::Value>) -> Check {
    const NAME: &str = "recipe";
    let Known { job, recipe, .. } = known;
    let model = model.and_then(|model| ModelConfig::from_hf_json(&model.to_string()).ok());
    let is_known = model.is_some();
    match Recipe::submitted(recipe, &job.job, &[], model) {
        Ok(_) => Check::ok(NAME, "no faults"),
        Err(_) if !is_known => Check::ok(NAME, "the orchestrator found no faults when it was submitted"),
        Err(faults) => {
            Check::failed(NAME, faults.to_string(), "this program reads it otherwise than the orchestrator")
        }
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::checkpoint::Owner;
    use contraflow_runtime::topology::JobId;

    use super::super::Status;
    use super::*;

    fn line(unix_ms: u64, level: &str, message: &str) -> v1::LogsResponse {
        v1::LogsResponse { unix_ms, level: level.into(), message: message.into(), ..Default::default() }
    }

    fn known(state: JobState) -> Known {
        let job = v1::Job { job: "job-7".into(), name: "small".into(), ..Default::default() };
        Known { job: v1::Job { state: state.into(), ..job }, ..Known::default() }
    }

    fn check<'a>(case: &'a Case, name: &str) -> &'a Check {
        case.examined.checks.iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn a_folder_of_the_same_path_that_is_another_jobs_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display().to_string();
        let own = JobId::new(7, 3);
        let owner = Some(Owner { state: 1, job: own });
        let known = Known { folder: Some(path.clone()), owner, ..known(JobState::Running) };
        let status = || check(&examine(known.clone(), SystemTime::now()), "storage").status;
        assert_eq!(status(), Status::Warning, "no job's");
        let owners = [
            (1, JobId::new(8, 3), Status::Warning),
            // The same number: of another start of the orchestrator, and of another orchestrator.
            (1, JobId::new(7, 4), Status::Warning),
            (2, own, Status::Warning),
            (1, own, Status::Ok),
        ];
        for (state, job, expected) in owners {
            let text = format!(
                "{{\"state\": \"{state:016x}\", \"job\": \"{:016x}\", \"generation\": 1}}",
                job.bits()
            );
            std::fs::write(dir.path().join("owner.json"), text).unwrap();
            assert_eq!(status(), expected, "{state} {job:?}");
        }
        assert_eq!(examine(known, SystemTime::now()).folder, Some(PathBuf::from(path)));
    }

    #[test]
    fn the_latest_incident_is_told_with_what_the_recorders_said() {
        let told = "the ranks of generation 1: rank 2 had been in forward when it was lost";
        let mut known = known(JobState::Running);
        assert_eq!(incident(&known, SystemTime::now()).says, "none");
        known.lines = vec![line(1_000, "WARN", "rank 2 lost"), line(1_400, "WARN", told)];
        let open = incident(&known, SystemTime::now());
        assert!(
            open.status == Status::Warning && open.says.ends_with(&format!("rank 2 lost\n{told}")),
            "{}",
            open.says
        );
        known.lines.push(line(1_500, "INFO", "generation 2: 4 ranks formed from step 7"));
        assert_eq!(incident(&known, SystemTime::now()).status, Status::Ok);
    }

    #[test]
    fn a_clock_that_is_behind_the_orchestrators_is_found_without_the_storage() {
        let mut known = known(JobState::Running);
        let now = SystemTime::now();
        let ms = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64;
        known.lines = vec![line(ms, "INFO", "x")];
        assert_eq!(check(&examine(known.clone(), now), "clock").status, Status::Ok);
        known.lines = vec![line(ms + 600_000, "INFO", "x")];
        assert_eq!(check(&examine(known, now), "clock").status, Status::Warning);
    }
}
