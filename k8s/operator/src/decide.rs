//! What is done about a job next, and when it is looked at again. Pure: knows the object, its status and what the orchestrator says.

use std::time::Duration;

use contraflow_proto::v1;
use k8s_openapi::jiff::Timestamp;
use v1::JobState;

use crate::conditions::{Is, find, is, seconds_since};
use crate::job::{TrainingJobSpec, TrainingJobStatus};
use crate::status::Seen;
use crate::trouble::{REACHABLE, SCALED, SUBMITTED, Trouble};

/// Why a job is cancelled that is to be taken up again. It becomes its outcome, and so tells it from one that somebody has cancelled.
pub const SUSPENDED: &str = "suspended by its TrainingJob";

/// Why a job is cancelled whose object is deleted.
pub const DELETED: &str = "its TrainingJob was deleted";

/// The state of an object whose submission may or may not have come through.
pub const SUBMITTING: &str = "Submitting";

/// How often things are looked at, and how long is waited for them.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two looks at a job that trains.
    pub running: Duration,
    /// Between two looks at one that waits.
    pub waiting: Duration,
    /// Between two looks at one that has ended, which somebody may retry.
    pub ended: Duration,
    /// Where something is in the way, the time until it is tried again grows from here ...
    pub least: Duration,
    /// ... to here.
    pub most: Duration,
    /// How long a deleted object waits for its orchestrator, from the first time that it did not answer.
    pub farewell: Duration,
    /// How long one call to the orchestrator may take.
    pub call: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            running: Duration::from_secs(5),
            waiting: Duration::from_secs(10),
            ended: Duration::from_secs(60),
            least: Duration::from_secs(2),
            most: Duration::from_secs(60),
            farewell: Duration::from_secs(600),
            call: Duration::from_secs(10),
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// There is no job yet.
    Submit,
    /// It is to give up its ranks.
    Suspend,
    /// It is taken up again.
    Resume,
    /// It is to have at most so many ranks; 0: as it was submitted.
    Scale(u32),
    /// Nothing.
    Rest,
}

/// Whether a job has ended.
pub fn has_ended(state: JobState) -> bool {
    matches!(state, JobState::Done | JobState::Failed | JobState::Cancelled)
}

/// Whether it has ended because it is suspended.
pub fn is_suspended(job: &v1::Job) -> bool {
    job.state() == JobState::Cancelled && job.outcome == SUSPENDED
}

/// The next step towards what the object wants. `generation` is that of the object.
pub fn action(
    spec: &TrainingJobSpec,
    generation: Option<i64>,
    status: &TrainingJobStatus,
    job: Option<&v1::Job>,
) -> Action {
    // A job that was there and is not any more is never run anew.
    let rests = spec.suspend || status.job.is_some();
    let Some(job) = job else { return if rests { Action::Rest } else { Action::Submit } };
    match (job.state(), spec.suspend) {
        (JobState::Cancelled, false) if is_suspended(job) => Action::Resume,
        (state, _) if has_ended(state) => Action::Rest,
        (_, true) => Action::Suspend,
        _ => scale(spec, generation, status, job).map_or(Action::Rest, Action::Scale),
    }
}

fn scale(
    spec: &TrainingJobSpec,
    generation: Option<i64>,
    status: &TrainingJobStatus,
    job: &v1::Job,
) -> Option<u32> {
    let was_refused = find(&status.conditions, SCALED)
        .is_some_and(|scaled| scaled.reason == "Refused" && scaled.observed_generation == generation);
    let told = u32::try_from(status.scaled_to).unwrap_or(0);
    let wanted = spec.ranks.and_then(|ranks| u32::try_from(ranks).ok()).filter(|&ranks| ranks > 0);
    let is_as_told =
        |ranks| told == ranks && job.is_scaled && i64::from(job.max_ranks) == i64::from(status.max_ranks);
    match wanted {
        _ if was_refused => None,
        // What somebody else has said of it is left alone.
        None => (told > 0).then_some(0),
        Some(ranks) => (!is_as_told(ranks)).then_some(ranks),
    }
}

/// When the object is looked at again.
pub fn next_look(
    spec: &TrainingJobSpec,
    status: &TrainingJobStatus,
    pace: &Pace,
    now: Timestamp,
) -> Duration {
    let in_the_way = [REACHABLE, SUBMITTED].iter().find_map(|type_| {
        let condition = find(&status.conditions, type_)?;
        (condition.status != Is::True.word() && condition.reason != "Suspended").then_some(condition)
    });
    if let Some(condition) = in_the_way {
        if condition.reason == "Refused" {
            return pace.ended;
        }
        let lasted = Duration::from_secs(seconds_since(condition, now).unsigned_abs());
        return (lasted / 2).clamp(pace.least, pace.most);
    }
    match status.state.as_str() {
        "Running" => pace.running,
        "Queued" | "Forming" | "Recovering" | SUBMITTING => pace.waiting,
        _ => left_to_live(spec, status, now)
            .map_or(pace.ended, |left| left.clamp(Duration::from_millis(100), pace.ended)),
    }
}

/// Whether a look has found that the job has come to its end.
pub fn is_over(seen: &Seen) -> bool {
    match seen {
        Seen::Job(job) => has_ended(job.state()) && !is_suspended(job),
        Seen::Forgotten => true,
        Seen::Held | Seen::Trouble(_) => false,
    }
}

/// How long the object stays yet; none: it stays.
pub fn left_to_live(spec: &TrainingJobSpec, status: &TrainingJobStatus, now: Timestamp) -> Option<Duration> {
    let ended: Timestamp =
        status.ended_at.as_deref().filter(|_| status.state != "Suspended")?.parse().ok()?;
    let end = ended.as_second().saturating_add(i64::from(spec.ttl_seconds_after_finished?));
    Some(Duration::from_secs(u64::try_from(end.saturating_sub(now.as_second())).unwrap_or(0)))
}

/// What becomes of an object that is deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// It may go.
    Go,
    /// Its job is cancelled first.
    Cancel(String),
    /// It waits, and is looked at again then.
    Wait(Duration),
    /// It goes although its job could not be cancelled; why.
    Abandon(String),
}

/// How long a deleted object has waited for its orchestrator: from the first vain look after the deletion, which has made this
/// `generation` of the object, and from when this operator has `started`. An operator that was away has not tried.
pub fn waited(
    status: &TrainingJobStatus,
    generation: Option<i64>,
    started: Timestamp,
    now: Timestamp,
) -> Duration {
    let first = find(&status.conditions, REACHABLE)
        .filter(|reach| reach.status == Is::False.word() && reach.observed_generation == generation);
    let run = now.as_second().saturating_sub(started.as_second());
    let seconds = first.map_or(0, |first| seconds_since(first, now)).min(run);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Whether a job may be at the orchestrator of which the object knows.
pub fn may_have_job(status: &TrainingJobStatus) -> bool {
    status.job.is_some() || status.state == SUBMITTING
}

/// `seen` is its job, or none where the orchestrator has none; `waited` how long nobody has answered.
pub fn farewell(
    status: &TrainingJobStatus,
    seen: Result<Option<&v1::Job>, &Trouble>,
    waited: Duration,
    pace: &Pace,
) -> Farewell {
    match seen {
        Ok(Some(job)) if !has_ended(job.state()) => Farewell::Cancel(job.job.clone()),
        Ok(_) => Farewell::Go,
        Err(_)
            if is(&status.conditions, "Complete", Is::True) || is(&status.conditions, "Failed", Is::True) =>
        {
            Farewell::Go
        }
        Err(trouble) if waited >= pace.farewell => {
            let job = status.job.clone().map_or_else(|| "its job".to_owned(), |job| format!("its job {job}"));
            let seconds = pace.farewell.as_secs();
            Farewell::Abandon(format!(
                "{job} could not be cancelled within {seconds} s and may go on: `contraflow cancel` ends it; {}",
                trouble.words
            ))
        }
        Err(_) => Farewell::Wait((waited / 2).clamp(pace.least, pace.most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conditions::set;

    fn job(state: JobState) -> v1::Job {
        v1::Job { job: "job-1".into(), state: state.into(), max_ranks: 4, ..v1::Job::default() }
    }

    fn next(spec: &TrainingJobSpec, status: &TrainingJobStatus, job: Option<&v1::Job>) -> Action {
        action(spec, Some(1), status, job)
    }

    #[test]
    fn a_job_is_submitted_suspended_and_resumed_and_one_that_somebody_cancelled_is_left() {
        let (on, none) = (TrainingJobSpec::default(), TrainingJobStatus::default());
        let off = TrainingJobSpec { suspend: true, ..on.clone() };
        assert_eq!(next(&on, &none, None), Action::Submit);
        assert_eq!(next(&off, &none, None), Action::Rest);
        let known = TrainingJobStatus { job: Some("job-1".into()), ..none.clone() };
        assert_eq!(next(&on, &known, None), Action::Rest);
        for state in [JobState::Queued, JobState::Forming, JobState::Running, JobState::Recovering] {
            assert_eq!(next(&on, &none, Some(&job(state))), Action::Rest);
            assert_eq!(next(&off, &none, Some(&job(state))), Action::Suspend);
        }
        for state in [JobState::Done, JobState::Failed, JobState::Cancelled] {
            assert_eq!(next(&on, &none, Some(&job(state))), Action::Rest);
            assert_eq!(next(&off, &none, Some(&job(state))), Action::Rest);
        }
        let suspended = v1::Job { outcome: SUSPENDED.into(), ..job(JobState::Cancelled) };
        assert_eq!(next(&on, &none, Some(&suspended)), Action::Resume);
        assert_eq!(next(&off, &none, Some(&suspended)), Action::Rest);
        // A job that failed in these very words has not been suspended.
        let failed = v1::Job { outcome: SUSPENDED.into(), ..job(JobState::Failed) };
        assert_eq!(next(&on, &none, Some(&failed)), Action::Rest);
    }

    #[test]
    fn ranks_are_said_until_the_orchestrator_has_them_and_a_refusal_is_not_repeated() {
        let wants = |ranks| TrainingJobSpec { ranks, ..TrainingJobSpec::default() };
        let told =
            |scaled_to, max_ranks| TrainingJobStatus { scaled_to, max_ranks, ..TrainingJobStatus::default() };
        let automatic = job(JobState::Running);
        let scaled = v1::Job { is_scaled: true, ..job(JobState::Running) };
        for (ranks, status, job, expected) in [
            (None, told(0, 4), &automatic, Action::Rest),
            (None, told(0, 4), &scaled, Action::Rest),
            (None, told(4, 4), &scaled, Action::Scale(0)),
            (Some(4), told(0, 4), &automatic, Action::Scale(4)),
            (Some(4), told(4, 4), &scaled, Action::Rest),
            // No layout has five: it was told five and takes four.
            (Some(5), told(5, 4), &scaled, Action::Rest),
            (Some(5), told(4, 4), &scaled, Action::Scale(5)),
            // Somebody else has said another number since, or none.
            (Some(2), told(2, 2), &scaled, Action::Scale(2)),
            (Some(4), told(4, 4), &automatic, Action::Scale(4)),
        ] {
            assert_eq!(next(&wants(ranks), &status, Some(job)), expected, "{ranks:?} {status:?}");
        }
        let mut refused = told(0, 4);
        set(
            &mut refused.conditions,
            (SCALED, Is::False),
            ("Refused", "none has so few"),
            Some(1),
            Timestamp::UNIX_EPOCH,
        );
        assert_eq!(next(&wants(Some(1)), &refused, Some(&automatic)), Action::Rest);
        assert_eq!(action(&wants(Some(2)), Some(2), &refused, Some(&automatic)), Action::Scale(2));
    }

    #[test]
    fn what_is_in_the_way_is_tried_again_ever_more_rarely() {
        let (spec, pace) = (TrainingJobSpec::default(), Pace::default());
        let at = |second| Timestamp::from_second(second).unwrap_or_default();
        let mut status = TrainingJobStatus { state: "Running".into(), ..TrainingJobStatus::default() };
        assert_eq!(next_look(&spec, &status, &pace, at(0)), pace.running);
        set(&mut status.conditions, (REACHABLE, Is::False), ("Unreachable", ""), None, at(1000));
        for (now, seconds) in [(1000, 2), (1010, 5), (1060, 30), (9000, 60)] {
            assert_eq!(next_look(&spec, &status, &pace, at(now)), Duration::from_secs(seconds), "{now}");
        }
        set(&mut status.conditions, (REACHABLE, Is::True), ("Answers", ""), None, at(9000));
        set(&mut status.conditions, (SUBMITTED, Is::False), ("Refused", ""), None, at(9000));
        assert_eq!(next_look(&spec, &status, &pace, at(9000)), pace.ended);
    }

    #[test]
    fn an_object_lives_as_long_after_its_job_as_it_says() {
        let spec = TrainingJobSpec { ttl_seconds_after_finished: Some(30), ..TrainingJobSpec::default() };
        let at = |second| Timestamp::from_second(second).unwrap_or_default();
        let mut status = TrainingJobStatus { state: "Done".into(), ..TrainingJobStatus::default() };
        assert_eq!(left_to_live(&spec, &status, at(100)), None);
        status.ended_at = Some("1970-01-01T00:01:40Z".into());
        assert_eq!(left_to_live(&spec, &status, at(110)), Some(Duration::from_secs(20)));
        assert_eq!(left_to_live(&spec, &status, at(500)), Some(Duration::ZERO));
        assert_eq!(left_to_live(&TrainingJobSpec::default(), &status, at(500)), None);
        status.state = "Suspended".into();
        assert_eq!(left_to_live(&spec, &status, at(500)), None);
    }

    #[test]
    fn a_deleted_object_has_waited_since_its_first_vain_look_of_an_operator_that_runs() {
        let at = |second| Timestamp::from_second(second).unwrap_or_default();
        let mut status = TrainingJobStatus::default();
        let of =
            |status: &TrainingJobStatus, started| waited(status, Some(2), at(started), at(1000)).as_secs();
        assert_eq!(of(&status, 0), 0);
        // It was away before already.
        set(&mut status.conditions, (REACHABLE, Is::False), ("Unreachable", ""), Some(1), at(100));
        assert_eq!(of(&status, 0), 0);
        let mut parted = crate::status::parting(&status, Some(2));
        set(&mut parted.conditions, (REACHABLE, Is::False), ("Unreachable", ""), Some(2), at(700));
        assert_eq!((of(&parted, 0), of(&parted, 950)), (300, 50));
        assert_eq!(crate::status::parting(&parted, Some(2)), parted);
    }

    #[test]
    fn a_deleted_object_takes_its_job_with_it_and_waits_for_an_absent_orchestrator_for_a_while() {
        let pace = Pace::default();
        let known = TrainingJobStatus { job: Some("job-1".into()), ..TrainingJobStatus::default() };
        let soon = Duration::from_secs(10);
        let away = Trouble::way("Unreachable", "no route".into());
        assert_eq!(
            farewell(&known, Ok(Some(&job(JobState::Running))), soon, &pace),
            Farewell::Cancel("job-1".into())
        );
        assert_eq!(farewell(&known, Ok(Some(&job(JobState::Done))), soon, &pace), Farewell::Go);
        assert_eq!(farewell(&known, Ok(None), soon, &pace), Farewell::Go);
        assert_eq!(farewell(&known, Err(&away), soon, &pace), Farewell::Wait(Duration::from_secs(5)));
        let abandoned = farewell(&known, Err(&away), Duration::from_secs(600), &pace);
        assert!(
            matches!(&abandoned, Farewell::Abandon(words) if words.contains("job-1") && words.contains("no route")),
            "{abandoned:?}"
        );
        let mut over = known.clone();
        set(&mut over.conditions, ("Complete", Is::True), ("Done", ""), None, Timestamp::UNIX_EPOCH);
        assert_eq!(farewell(&over, Err(&away), soon, &pace), Farewell::Go);
        let submitting = TrainingJobStatus { state: SUBMITTING.into(), ..TrainingJobStatus::default() };
        assert!(
            may_have_job(&known) && may_have_job(&submitting) && !may_have_job(&TrainingJobStatus::default())
        );
    }
}
