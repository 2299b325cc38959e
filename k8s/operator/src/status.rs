//! What is shown of a job: its status and its events, from what the orchestrator says. Pure.

use contraflow_proto::v1;
use k8s_openapi::jiff::Timestamp;
use v1::JobState;

use crate::conditions::{Condition, Is, find, is, set, short, time};
use crate::decide::{SUBMITTING, has_ended, is_suspended};
use crate::job::TrainingJobStatus;
use crate::trouble::{REACHABLE, SCALED, SUBMITTED, Trouble, state_name};

/// Why a job has failed that was suspended, and that the orchestrator does not know any more.
const NOT_RETAINED: &str = "NotRetained";

/// Why any other has failed that it does not know any more.
const LOST: &str = "Lost";

/// What there is of a job.
#[derive(Clone, Debug)]
pub enum Seen {
    /// What the orchestrator says of it.
    Job(Box<v1::Job>),
    /// It is suspended before it was submitted.
    Held,
    /// The orchestrator does not know it any more.
    Forgotten,
    /// What is in the way.
    Trouble(Trouble),
}

/// What a look has found.
#[derive(Clone, Debug)]
pub struct Look {
    /// The generation of the object.
    pub generation: Option<i64>,
    /// Its job.
    pub seen: Seen,
    /// Identifies what would be submitted now; none where that is not known.
    pub wanted: Option<String>,
    /// Why it could not be scaled.
    pub scale: Option<Trouble>,
    /// When.
    pub now: Timestamp,
}

/// The status after a look. `before` has what this look has done already: `scaled_to`, `fingerprint`.
pub fn status(before: &TrainingJobStatus, look: &Look) -> TrainingJobStatus {
    let mut after = TrainingJobStatus { observed_generation: look.generation, ..before.clone() };
    match &look.seen {
        Seen::Job(job) => describe(&mut after, look, job),
        Seen::Forgotten => forget(&mut after, look),
        Seen::Held => {
            after.job = None;
            after.state = "Suspended".into();
            after.message = "it is submitted once it is not suspended".into();
            let words = after.message.clone();
            let mut say = sayer(&mut after, look);
            say(SUBMITTED, Is::False, "Suspended", &words);
            say("Suspended", Is::True, "Suspended", &words);
            say("Ready", Is::False, "Suspended", &words);
        }
        Seen::Trouble(trouble) => in_trouble(&mut after, look, trouble),
    }
    after
}

fn sayer<'a>(after: &'a mut TrainingJobStatus, look: &'a Look) -> impl FnMut(&str, Is, &str, &str) + 'a {
    |type_, is, reason, words| {
        set(&mut after.conditions, (type_, is), (reason, words), look.generation, look.now)
    }
}

/// A job that has ended stays as it was seen; any other has failed, for nobody runs it.
fn forget(after: &mut TrainingJobStatus, look: &Look) {
    let has_outcome = ["Complete", "Failed"].iter().any(|type_| is(&after.conditions, type_, Is::True));
    let was_suspended = after.state == "Suspended";
    let (job, step) = (after.job.clone().unwrap_or_default(), after.step);
    let (reason, what) = if was_suspended {
        (
            NOT_RETAINED,
            format!(
                "{job} was suspended, and the orchestrator does not retain it any more or it was removed"
            ),
        )
    } else {
        let was = &after.state;
        (
            LOST,
            format!(
                "the orchestrator does not know {job} any more, which was {was} when it was seen last: its state is another, or the job was removed"
            ),
        )
    };
    let words = format!(
        "{what}. It is not run again by itself: make another TrainingJob to train from step 0, or go on from its checkpoint (step {step}) with `contraflow submit --resume`"
    );
    let is_shown = find(&after.conditions, "Suspended").is_some();
    if !has_outcome {
        (after.state, after.message) = ("Failed".into(), short(&words));
        (after.ranks, after.eta_seconds, after.ended_at) = (0, None, Some(time(look.now)));
        after.left.clear();
    }
    let mut say = sayer(after, look);
    say(REACHABLE, Is::True, "Answers", "");
    if !has_outcome {
        say("Failed", Is::True, reason, &words);
        say("Ready", Is::False, reason, &words);
        if is_shown {
            say("Suspended", Is::False, "NotSuspended", "");
        }
    }
}

fn in_trouble(after: &mut TrainingJobStatus, look: &Look, trouble: &Trouble) {
    let was = if after.state.is_empty() { "Pending".to_owned() } else { after.state.clone() };
    let is_reach = trouble.condition == REACHABLE;
    let last = match &after.job {
        Some(job) if is_reach => format!("; {job} was {was} at step {} when it was seen last", after.step),
        _ => String::new(),
    };
    let words = short(&format!("{}{last}", trouble.words));
    // What it was about to submit has been answered: there is no job.
    let is_settled = trouble.condition == SUBMITTED && trouble.reason == "Refused" && after.job.is_none();
    after.state = if is_settled { "Pending".into() } else { was };
    if is_settled {
        after.fingerprint.clear();
    }
    after.message.clone_from(&words);
    let mut say = sayer(after, look);
    say(trouble.condition, Is::False, trouble.reason, &trouble.words);
    if !is_reach && trouble.reason != "NoRecipe" {
        say(REACHABLE, Is::True, "Answers", "");
    }
    say("Ready", if is_reach { Is::Unknown } else { Is::False }, trouble.reason, &words);
}

fn describe(after: &mut TrainingJobStatus, look: &Look, job: &v1::Job) {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let ranks = |ranks: usize| i32::try_from(ranks).unwrap_or(i32::MAX);
    let (suspended, ended) = (is_suspended(job), has_ended(job.state()));
    let name = if suspended { "Suspended" } else { state_name(job.state()) };
    let message = if ended { &job.outcome } else { &job.waiting_for };
    let nats = |loss: Option<f64>| loss.map_or_else(String::new, |loss| format!("{loss:.4}"));
    let at = |ms: u64| {
        Timestamp::from_millisecond(i64::try_from(ms).unwrap_or(0)).ok().filter(|_| ms > 0).map(time)
    };
    after.job = Some(job.job.clone());
    after.state = name.into();
    after.message = short(message);
    (after.step, after.steps) = (number(job.step), number(job.steps));
    after.progress = format!("{}/{}", job.step, job.steps);
    (after.loss, after.validation_loss) = (nats(job.loss), nats(job.validation_loss));
    after.eta_seconds = job.eta_seconds.filter(|eta| eta.is_finite()).map(|eta| eta.round() as i64);
    after.left = after.eta_seconds.map_or_else(String::new, left);
    after.ranks = ranks(job.ranks.len());
    (after.min_ranks, after.max_ranks) = (ranks(job.min_ranks as usize), ranks(job.max_ranks as usize));
    after.losses = ranks(job.losses as usize);
    after.warning = short(&job.warning);
    (after.submitted_at, after.ended_at) = (at(job.submitted_unix_ms), at(job.ended_unix_ms));
    let (fingerprint, scaled_to) = (after.fingerprint.clone(), after.scaled_to);
    let is_shown = |type_: &str| find(&after.conditions, type_).is_some();
    let (was_complete, was_failed, was_scaled) = (is_shown("Complete"), is_shown("Failed"), is_shown(SCALED));
    let was_refused = find(&after.conditions, SCALED)
        .is_some_and(|scaled| scaled.reason == "Refused" && scaled.observed_generation == look.generation);
    let mut say = sayer(after, look);
    say(REACHABLE, Is::True, "Answers", "");
    say(SUBMITTED, Is::True, "Submitted", &format!("it is {}", job.job));
    say("Suspended", Is::so(suspended), if suspended { "Suspended" } else { "NotSuspended" }, "");
    say("Ready", Is::so(job.state() == JobState::Running), name, message);
    if let Some(wanted) = look.wanted.as_ref().filter(|_| !fingerprint.is_empty()) {
        match *wanted == fingerprint {
            true => say("Current", Is::True, "Unchanged", ""),
            false => say(
                "Current",
                Is::False,
                "Immutable",
                "the recipe is another one by now than the job was submitted with, and is not taken up: make another TrainingJob",
            ),
        }
    }
    let failed = ended && !suspended && job.state() != JobState::Done;
    if job.state() == JobState::Done || was_complete {
        say("Complete", Is::so(job.state() == JobState::Done), name, message);
    }
    if failed || was_failed {
        say("Failed", Is::so(failed), name, message);
    }
    match &look.scale {
        Some(trouble) => say(SCALED, Is::False, trouble.reason, &trouble.words),
        None if was_refused => {}
        None if scaled_to > 0 => say(SCALED, Is::True, "Scaled", &format!("at most {scaled_to} ranks")),
        None if was_scaled => say(SCALED, Is::False, "Automatic", "it grows and shrinks with the cluster"),
        None => {}
    }
}

/// A duration as it is shown: its two largest units.
fn left(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// Something that has happened to an object, for its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether a person should look at it.
    pub is_warning: bool,
    /// In one word.
    pub reason: &'static str,
    /// In words.
    pub words: String,
}

/// What has happened between two statuses of an object.
pub fn notices(before: &TrainingJobStatus, after: &TrainingJobStatus) -> Vec<Notice> {
    let notice = |is_warning, reason, words: &str| Notice { is_warning, reason, words: short(words) };
    let has_turned = |type_, into| is(&after.conditions, type_, into) && !is(&before.conditions, type_, into);
    let words_of = |type_| find(&after.conditions, type_).map_or("", |condition| condition.message.as_str());
    let mut notices = Vec::new();
    let job = after.job.as_deref().unwrap_or_default();
    if before.job.is_none() && after.job.is_some() {
        notices.push(notice(false, "Submitted", &format!("submitted as {job}")));
    }
    if has_turned(REACHABLE, Is::False) {
        let reason = if find(&after.conditions, REACHABLE).is_some_and(|it| it.reason == "Denied") {
            "Denied"
        } else {
            "Unreachable"
        };
        notices.push(notice(true, reason, words_of(REACHABLE)));
    }
    if has_turned(REACHABLE, Is::True) && is(&before.conditions, REACHABLE, Is::False) {
        notices.push(notice(false, "Reachable", "the orchestrator answers again"));
    }
    for (type_, reason) in [(SUBMITTED, "NotSubmitted"), (SCALED, "NotScaled")] {
        let of = |status: &TrainingJobStatus| {
            find(&status.conditions, type_).map(|it| (it.reason.clone(), it.message.clone()))
        };
        let is_fault = find(&after.conditions, type_).is_some_and(|it| {
            it.status == "False" && !["Suspended", "Automatic"].contains(&it.reason.as_str())
        });
        if is_fault && of(before) != of(after) {
            notices.push(notice(true, reason, words_of(type_)));
        }
    }
    if has_turned("Current", Is::False) {
        notices.push(notice(true, "Immutable", words_of("Current")));
    }
    if has_turned(SCALED, Is::True) || (after.scaled_to != before.scaled_to && after.scaled_to > 0) {
        notices.push(notice(false, "Scaled", words_of(SCALED)));
    }
    if before.state != after.state {
        let (is_warning, reason) = match after.state.as_str() {
            "Running" => (false, "Running"),
            "Recovering" => (true, "Recovering"),
            "Suspended" => (false, "Suspended"),
            "Done" => (false, "Done"),
            "Failed" => (true, failure(after)),
            "Cancelled" => (true, "Cancelled"),
            "Queued" if before.state == "Suspended" => (false, "Resumed"),
            _ => (false, ""),
        };
        let words = match (after.state.as_str(), after.message.as_str()) {
            ("Running", _) => format!("trains on {} ranks from step {} on", after.ranks, after.step),
            (state, "") => state.to_lowercase(),
            (_, message) => message.to_owned(),
        };
        if !reason.is_empty() {
            notices.push(notice(is_warning, reason, &words));
        }
    } else if after.state == "Running" && before.ranks != after.ranks && before.ranks > 0 && after.ranks > 0 {
        notices.push(notice(
            false,
            "Resized",
            &format!("trains on {} ranks, before on {}", after.ranks, before.ranks),
        ));
    }
    if before.warning != after.warning && !after.warning.is_empty() {
        notices.push(notice(true, "Warning", &after.warning));
    }
    notices
}

/// Why a job has failed, as an event has it.
fn failure(after: &TrainingJobStatus) -> &'static str {
    let reason = find(&after.conditions, "Failed").map(|failed| failed.reason.as_str());
    [LOST, NOT_RETAINED].into_iter().find(|known| reason == Some(known)).unwrap_or("Failed")
}

/// What an object is deleted with: that its orchestrator did not answer before is no reason to wait less for it, so that this begins anew.
/// `generation` is that of the deletion.
pub fn parting(before: &TrainingJobStatus, generation: Option<i64>) -> TrainingJobStatus {
    let is_kept = |it: &Condition| it.type_ != REACHABLE || it.observed_generation == generation;
    let conditions = before.conditions.iter().filter(|it| is_kept(it)).cloned().collect();
    TrainingJobStatus { conditions, ..before.clone() }
}

/// What is kept before a job is submitted: from then on there may be one.
pub fn submitting(before: &TrainingJobStatus, fingerprint: &str) -> TrainingJobStatus {
    TrainingJobStatus { state: SUBMITTING.into(), fingerprint: fingerprint.to_owned(), ..before.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::SUSPENDED;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap_or_default()
    }

    fn look(seen: Seen) -> Look {
        Look { generation: Some(1), seen, wanted: None, scale: None, now: at(1000) }
    }

    fn of(job: v1::Job) -> Look {
        look(Seen::Job(Box::new(job)))
    }

    fn job(state: JobState) -> v1::Job {
        let ranks = vec![v1::RankPlace::default(); 4];
        let (job, steps, step) = ("job-7".into(), 720, 12);
        v1::Job {
            job,
            state: state.into(),
            step,
            steps,
            ranks,
            min_ranks: 1,
            max_ranks: 8,
            submitted_unix_ms: 5000,
            ..v1::Job::default()
        }
    }

    fn condition(status: &TrainingJobStatus, type_: &str) -> (String, String) {
        find(&status.conditions, type_).map(|it| (it.status.clone(), it.reason.clone())).unwrap_or_default()
    }

    fn pair(status: &str, reason: &str) -> (String, String) {
        (status.into(), reason.into())
    }

    fn reasons(before: &TrainingJobStatus, after: &TrainingJobStatus) -> Vec<&'static str> {
        notices(before, after).iter().map(|notice| notice.reason).collect()
    }

    #[test]
    fn a_job_that_trains_is_shown_with_its_figures() {
        let running = v1::Job { loss: Some(2.345_678), eta_seconds: Some(3900.4), ..job(JobState::Running) };
        let none = TrainingJobStatus::default();
        let after = status(&none, &of(running));
        assert_eq!(
            (after.state.as_str(), after.progress.as_str(), after.loss.as_str()),
            ("Running", "12/720", "2.3457")
        );
        assert_eq!((after.left.as_str(), after.eta_seconds, after.ranks), ("1h05m", Some(3900), 4));
        assert_eq!(after.submitted_at.as_deref(), Some("1970-01-01T00:00:05Z"));
        assert_eq!(condition(&after, "Ready"), pair("True", "Running"));
        assert_eq!(condition(&after, REACHABLE), pair("True", "Answers"));
        assert_eq!(reasons(&none, &after), ["Submitted", "Running"]);
    }

    #[test]
    fn an_orchestrator_that_is_away_leaves_what_was_known() {
        let before = status(&TrainingJobStatus::default(), &of(job(JobState::Running)));
        let trouble = Trouble::way("Unreachable", "no route to host".into());
        let after = status(&before, &look(Seen::Trouble(trouble)));
        assert_eq!((after.state.as_str(), after.step), ("Running", 12));
        assert_eq!(condition(&after, REACHABLE), pair("False", "Unreachable"));
        assert_eq!(condition(&after, "Ready"), pair("Unknown", "Unreachable"));
        assert_eq!(after.message, "no route to host; job-7 was Running at step 12 when it was seen last");
        assert_eq!(reasons(&before, &after), ["Unreachable"]);
        let back = status(&after, &of(job(JobState::Running)));
        assert_eq!(reasons(&after, &back), ["Reachable"]);
        assert_eq!(condition(&back, "Ready"), pair("True", "Running"));
    }

    #[test]
    fn a_recipe_that_is_refused_is_said_once_and_leaves_no_doubt_that_there_is_no_job() {
        let before = submitting(&TrainingJobStatus::default(), "abc");
        let refused = Trouble {
            condition: SUBMITTED,
            reason: "Refused",
            words: "training.steps: expected 1, got 0".into(),
        };
        let after = status(&before, &look(Seen::Trouble(refused.clone())));
        assert_eq!((after.state.as_str(), after.fingerprint.as_str()), ("Pending", ""));
        assert_eq!(condition(&after, SUBMITTED), pair("False", "Refused"));
        assert_eq!(condition(&after, "Ready"), pair("False", "Refused"));
        assert_eq!(reasons(&before, &after), ["NotSubmitted"]);
        assert_eq!(reasons(&after, &status(&after, &look(Seen::Trouble(refused)))), [] as [&str; 0]);
        // Where the answer is missing, there may be one.
        let away = status(&before, &look(Seen::Trouble(Trouble::way("Unreachable", "reset".into()))));
        assert_eq!((away.state.as_str(), away.fingerprint.as_str()), (SUBMITTING, "abc"));
    }

    #[test]
    fn ends_are_told_apart() {
        let before = status(&TrainingJobStatus::default(), &of(job(JobState::Running)));
        let ended =
            |state, outcome: &str| v1::Job { outcome: outcome.into(), ended_unix_ms: 9000, ..job(state) };
        for (state, outcome, name, type_) in [
            (JobState::Done, "done", "Done", "Complete"),
            (JobState::Failed, "rank 1: out of memory", "Failed", "Failed"),
            (JobState::Cancelled, "enough", "Cancelled", "Failed"),
            (JobState::Cancelled, SUSPENDED, "Suspended", "Suspended"),
        ] {
            let after = status(&before, &of(ended(state, outcome)));
            assert_eq!((after.state.as_str(), after.message.as_str()), (name, outcome));
            for other in ["Complete", "Failed", "Suspended"] {
                assert_eq!(is(&after.conditions, other, Is::True), other == type_, "{name}: {other}");
            }
            assert_eq!(reasons(&before, &after), [name]);
            let again = status(&after, &of(job(JobState::Queued)));
            assert!(["Complete", "Failed", "Suspended"].iter().all(|other| !is(
                &again.conditions,
                other,
                Is::True
            )));
            assert_eq!(again.ended_at, None);
        }
    }

    #[test]
    fn another_recipe_than_was_submitted_is_said() {
        let before = TrainingJobStatus { fingerprint: "abc".into(), ..TrainingJobStatus::default() };
        let with = |wanted: &str| Look { wanted: Some(wanted.into()), ..of(job(JobState::Running)) };
        let same = status(&before, &with("abc"));
        assert_eq!(condition(&same, "Current"), pair("True", "Unchanged"));
        let other = status(&same, &with("def"));
        assert_eq!(condition(&other, "Current"), pair("False", "Immutable"));
        assert_eq!((reasons(&same, &other), other.fingerprint.as_str()), (vec!["Immutable"], "abc"));
    }

    #[test]
    fn a_refused_number_of_ranks_stays_said_until_another_is_wanted() {
        let before = status(&TrainingJobStatus::default(), &of(job(JobState::Running)));
        let refused = Trouble { condition: SCALED, reason: "Refused", words: "none has so few".into() };
        let after = status(&before, &Look { scale: Some(refused), ..of(job(JobState::Running)) });
        assert_eq!(
            (condition(&after, SCALED), reasons(&before, &after)),
            (pair("False", "Refused"), vec!["NotScaled"])
        );
        let later = status(&after, &of(job(JobState::Running)));
        assert_eq!(condition(&later, SCALED), pair("False", "Refused"));
        let told = TrainingJobStatus { scaled_to: 2, ..later };
        let scaled = status(&told, &Look { generation: Some(2), ..of(job(JobState::Running)) });
        assert_eq!(condition(&scaled, SCALED), pair("True", "Scaled"));
    }

    #[test]
    fn a_job_that_the_orchestrator_forgot_has_failed_unless_it_had_ended() {
        let with = |state, outcome: &str| v1::Job { outcome: outcome.into(), ..job(state) };
        for (known, name, reason, event) in [
            (with(JobState::Running, ""), "Failed", "Lost", vec!["Lost"]),
            (with(JobState::Cancelled, SUSPENDED), "Failed", "NotRetained", vec!["NotRetained"]),
            (with(JobState::Cancelled, "enough"), "Cancelled", "Cancelled", vec![]),
        ] {
            let before = status(&TrainingJobStatus::default(), &of(known));
            let after = status(&before, &look(Seen::Forgotten));
            assert_eq!((after.state.as_str(), condition(&after, "Failed")), (name, pair("True", reason)));
            assert_eq!(
                (reasons(&before, &after), is(&after.conditions, "Suspended", Is::True)),
                (event, false)
            );
            let later = Look { now: at(2000), ..look(Seen::Forgotten) };
            assert_eq!(status(&after, &later), after);
        }
        let done = status(&TrainingJobStatus::default(), &of(job(JobState::Done)));
        let after = status(&done, &look(Seen::Forgotten));
        assert_eq!((after.state.as_str(), condition(&after, "Failed")), ("Done", pair("", "")));
    }

    #[test]
    fn a_job_that_shrinks_is_said() {
        let before = status(&TrainingJobStatus::default(), &of(job(JobState::Running)));
        let fewer = v1::Job {
            ranks: vec![v1::RankPlace::default(); 2],
            warning: "no room".into(),
            ..job(JobState::Running)
        };
        assert_eq!(reasons(&before, &status(&before, &of(fewer))), ["Resized", "Warning"]);
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, shown) in [(0, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (90_000, "1d01h")] {
            assert_eq!(left(seconds), shown);
        }
    }
}
