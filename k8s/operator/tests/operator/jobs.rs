//! The life of a `TrainingJob`.

use std::sync::Arc;
use std::time::Duration;

use contraflow_operator::job::TrainingJob;
use contraflow_operator::jobs;
use contraflow_proto::v1;
use serde_json::{Value, json};
use v1::JobState;

use crate::clusters::client_secret;
use crate::stage::Stage;

fn tiny() -> Value {
    json!({"recipe": {"builtIn": "tiny"}, "overrides": ["training.steps=20"], "minRanks": 1})
}

fn train(job: &mut v1::Job) {
    job.state = JobState::Running.into();
    job.ranks = vec![v1::RankPlace::default(); 4];
    (job.step, job.loss, job.eta_seconds) = (12, Some(2.345_678), Some(65.0));
    job.waiting_for.clear();
}

fn pair(status: &str, reason: &str) -> (String, String) {
    (status.into(), reason.into())
}

/// An object whose job trains, and its operator.
async fn training() -> (Stage, crate::stage::Operator) {
    let stage = Stage::new();
    let operator = stage.operator();
    stage.submit("tiny", tiny());
    stage.until_state("tiny", "Queued").await;
    stage.orchestrator.move_job("job-1", train);
    stage.until_state("tiny", "Running").await;
    (stage, operator)
}

#[tokio::test(start_paused = true)]
async fn an_object_becomes_one_job_and_shows_how_it_goes() {
    let (stage, _operator) = training().await;
    let status = stage.job("tiny")["status"].clone();
    let shown = ["job", "progress", "loss", "left"].map(|field| status[field].as_str().unwrap().to_owned());
    assert_eq!(shown, ["job-1", "12/720", "2.3457", "1m05s"]);
    assert_eq!(status["ranks"], 4);
    assert_eq!(stage.condition("tiny", "Ready"), pair("True", "Running"));
    stage.orchestrator.move_job("job-1", |job| {
        job.state = JobState::Done.into();
        (job.step, job.outcome, job.validation_loss, job.ended_unix_ms) =
            (720, "done".into(), Some(1.5), 9_000);
    });
    stage.until_state("tiny", "Done").await;
    assert_eq!(stage.job("tiny")["status"]["validationLoss"], "1.5000");
    assert_eq!(stage.condition("tiny", "Complete"), pair("True", "Done"));
    let [request] = &stage.orchestrator.requests()[..] else { panic!("{:?}", stage.orchestrator.requests()) };
    assert!(request.recipe.contains("[parallel]"), "{}", request.recipe);
    assert_eq!((request.overrides.clone(), request.min_ranks), (vec!["training.steps=20".to_owned()], 1));
    assert!(request.name.starts_with("training/tiny."), "{}", request.name);
    assert_eq!(stage.orchestrator.calls("submit"), 1);
    stage.until("events", |stage| stage.api.events() == ["Submitted", "Running", "Done"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_status_is_not_a_reason_to_look_again() {
    let (stage, _operator) = training().await;
    let (looks, writes) = (stage.orchestrator.all_calls(), stage.api.requests("PATCH", "trainingjobs"));
    // The job makes a step whenever it is looked at, so that each look changes the status.
    for step in 0..120 {
        stage.orchestrator.move_job("job-1", |job| job.step = 13 + step);
        stage.passes(1).await;
    }
    let (looks, writes) =
        (stage.orchestrator.all_calls() - looks, stage.api.requests("PATCH", "trainingjobs") - writes);
    assert!(
        (20..=26).contains(&looks) && (20..=26).contains(&writes),
        "{looks} looks, {writes} writes in 120 s"
    );
}

#[tokio::test(start_paused = true)]
async fn a_deleted_object_takes_its_job_with_it() {
    let (stage, _operator) = training().await;
    stage.api.delete("trainingjobs", "tiny");
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    let [job] = &stage.orchestrator.jobs()[..] else { panic!() };
    assert_eq!((job.state(), job.outcome.as_str()), (JobState::Cancelled, "its TrainingJob was deleted"));
    // One of the same name is another job.
    stage.submit("tiny", tiny());
    stage.until_state("tiny", "Queued").await;
    assert_eq!(stage.job("tiny")["status"]["job"], "job-2");
}

#[tokio::test(start_paused = true)]
async fn a_deleted_object_waits_for_an_absent_orchestrator_and_goes_in_the_end() {
    let (stage, _operator) = training().await;
    stage.orchestrator.set_away(true);
    stage.api.delete("trainingjobs", "tiny");
    let calls = stage.api.requests("PATCH", "trainingjobs");
    stage.passes(250).await;
    assert_eq!(stage.condition("tiny", "Reachable"), pair("False", "Unreachable"));
    assert!(stage.api.requests("PATCH", "trainingjobs") - calls <= 2);
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert_eq!(stage.api.events().last().unwrap(), "Abandoned");
    assert_eq!(stage.orchestrator.jobs()[0].state(), JobState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_object_whose_orchestrator_comes_back_cancels_its_job() {
    let (stage, _operator) = training().await;
    stage.orchestrator.set_away(true);
    stage.api.delete("trainingjobs", "tiny");
    stage.passes(60).await;
    assert_eq!(stage.api.names("trainingjobs"), ["tiny"]);
    stage.orchestrator.set_away(false);
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert_eq!(stage.orchestrator.jobs()[0].state(), JobState::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn an_object_that_was_never_submitted_goes_without_its_orchestrator() {
    let stage = Stage::new();
    let _operator = stage.operator();
    stage.submit("lost", json!({"recipe": {"configMap": {"name": "none"}}}));
    stage
        .until("it lacks its recipe", |stage| {
            stage.condition("lost", "Submitted") == pair("False", "NoRecipe")
        })
        .await;
    stage.orchestrator.set_away(true);
    stage.api.delete("trainingjobs", "lost");
    let begin = tokio::time::Instant::now();
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_suspended_job_gives_up_its_ranks_and_goes_on_under_its_id() {
    let (stage, _operator) = training().await;
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": true}}));
    stage.until_state("tiny", "Suspended").await;
    assert_eq!(stage.condition("tiny", "Suspended"), pair("True", "Suspended"));
    assert_eq!(stage.orchestrator.jobs()[0].state(), JobState::Cancelled);
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": false}}));
    stage.until_state("tiny", "Queued").await;
    assert_eq!((stage.orchestrator.jobs().len(), stage.orchestrator.calls("retry")), (1, 1));
    assert_eq!(stage.condition("tiny", "Suspended"), pair("False", "NotSuspended"));
}

#[tokio::test(start_paused = true)]
async fn what_is_suspended_from_the_start_is_submitted_once_it_is_not() {
    let stage = Stage::new();
    let _operator = stage.operator();
    stage.submit("later", json!({"recipe": {"builtIn": "tiny"}, "suspend": true}));
    stage.until_state("later", "Suspended").await;
    assert_eq!(stage.orchestrator.calls("submit"), 0);
    stage.api.patch("trainingjobs", "later", "", &json!({"spec": {"suspend": false}}));
    stage.until_state("later", "Queued").await;
}

#[tokio::test(start_paused = true)]
async fn a_job_that_somebody_cancelled_is_not_taken_up_again_and_one_that_somebody_retried_is_followed() {
    let (stage, _operator) = training().await;
    stage
        .orchestrator
        .move_job("job-1", |job| (job.state, job.outcome) = (JobState::Cancelled.into(), "enough".into()));
    stage.until_state("tiny", "Cancelled").await;
    assert_eq!(stage.condition("tiny", "Failed"), pair("True", "Cancelled"));
    stage.passes(600).await;
    assert_eq!((stage.orchestrator.calls("retry"), stage.orchestrator.calls("submit")), (0, 1));
    stage.orchestrator.move_job("job-1", train);
    stage.until_state("tiny", "Running").await;
    assert_eq!(stage.condition("tiny", "Failed"), pair("False", "Running"));
}

#[tokio::test(start_paused = true)]
async fn ranks_are_those_of_the_scale_subresource() {
    let (stage, _operator) = training().await;
    let ranks = |stage: &Stage| stage.orchestrator.jobs()[0].max_ranks;
    stage.api.patch("trainingjobs", "tiny", "scale", &json!({"spec": {"replicas": 3}}));
    stage.until("it has two", |stage| ranks(stage) == 2).await;
    stage.until("that is shown", |stage| stage.condition("tiny", "Scaled") == pair("True", "Scaled")).await;
    stage.passes(120).await;
    assert_eq!(stage.orchestrator.calls("scale"), 1);
    // What somebody else says is put right again.
    stage.orchestrator.move_job("job-1", |job| job.max_ranks = 8);
    stage.until("it has two", |stage| ranks(stage) == 2).await;
    stage.api.patch("trainingjobs", "tiny", "scale", &json!({"spec": {"replicas": 1}}));
    stage.until("it is refused", |stage| stage.condition("tiny", "Scaled") == pair("False", "Refused")).await;
    let calls = stage.orchestrator.calls("scale");
    stage.passes(120).await;
    assert_eq!(
        (stage.orchestrator.calls("scale"), stage.condition("tiny", "Ready")),
        (calls, pair("True", "Running"))
    );
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"ranks": null}}));
    stage.until("it is let go", |stage| !stage.orchestrator.jobs()[0].is_scaled).await;
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_is_away_is_said_and_asked_ever_more_rarely() {
    let (stage, _operator) = training().await;
    stage.orchestrator.set_away(true);
    stage
        .until("it is said", |stage| stage.condition("tiny", "Reachable") == pair("False", "Unreachable"))
        .await;
    assert_eq!(stage.condition("tiny", "Ready"), pair("Unknown", "Unreachable"));
    assert_eq!(stage.job("tiny")["status"]["state"], "Running");
    let requests = |stage: &Stage| {
        stage.api.requests("PATCH", "tiny")
            + stage.api.requests("GET", "tiny")
            + stage.api.requests("POST", "events")
    };
    let before = (requests(&stage), stage.api.requests("WATCH", "trainingjobs"));
    let asked = |stage: &Stage| stage.orchestrator.calls("get") + stage.orchestrator.calls("connect");
    let asked_before = asked(&stage);
    stage.passes(3600).await;
    let (made, watches) =
        (requests(&stage) - before.0, stage.api.requests("WATCH", "trainingjobs") - before.1);
    // Nothing is written while nothing changes; a watch lasts five minutes.
    assert!(made <= 4 && watches <= 16, "{made} requests, {watches} watches in an hour");
    let asked = asked(&stage) - asked_before;
    assert!((55..=75).contains(&asked), "asked {asked} times in an hour");
    stage.orchestrator.set_away(false);
    let begin = tokio::time::Instant::now();
    stage.until("it is back", |stage| stage.condition("tiny", "Ready") == pair("True", "Running")).await;
    assert!(begin.elapsed() <= Duration::from_secs(61));
    assert_eq!(stage.api.events(), ["Submitted", "Running", "Unreachable", "Reachable"]);
}

#[tokio::test(start_paused = true)]
async fn a_recipe_that_is_refused_is_said_with_its_fault_and_taken_once_it_is_right() {
    let stage = Stage::new();
    let _operator = stage.operator();
    let map = |text: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "recipes"}, "data": {"recipe.toml": text}});
    stage.submit("mine", json!({"recipe": {"configMap": {"name": "recipes"}}}));
    stage
        .until("it lacks its recipe", |stage| {
            stage.condition("mine", "Submitted") == pair("False", "NoRecipe")
        })
        .await;
    stage.api.create("configmaps", map("broken"));
    stage
        .until("it is refused", |stage| stage.condition("mine", "Submitted") == pair("False", "Refused"))
        .await;
    assert_eq!(stage.job("mine")["status"]["message"], "training.steps: expected a number, got broken");
    let asked = stage.orchestrator.calls("submit");
    stage.passes(600).await;
    assert!(stage.orchestrator.calls("submit") - asked <= 11);
    stage.api.patch("configmaps", "recipes", "", &json!({"data": {"recipe.toml": "right"}}));
    stage.until_state("mine", "Queued").await;
    assert_eq!(stage.condition("mine", "Current"), pair("True", "Unchanged"));
    // From here on the recipe is that of the job.
    stage.api.patch("configmaps", "recipes", "", &json!({"data": {"recipe.toml": "another"}}));
    stage.until("it is said", |stage| stage.condition("mine", "Current") == pair("False", "Immutable")).await;
    assert_eq!(
        stage.orchestrator.requests().iter().map(|request| request.recipe.as_str()).collect::<Vec<_>>(),
        ["right"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_job_that_the_orchestrator_lost_has_failed_and_is_not_run_anew() {
    let (stage, _operator) = training().await;
    stage.orchestrator.forget_all();
    // It has the id.
    stage.orchestrator.submit_by_hand("somebody else's");
    stage.until_state("tiny", "Failed").await;
    assert_eq!(stage.condition("tiny", "Failed"), pair("True", "Lost"));
    assert!(stage.job("tiny")["status"]["message"].as_str().unwrap().contains("contraflow submit --resume"));
    stage.passes(600).await;
    assert_eq!((stage.orchestrator.calls("submit"), stage.orchestrator.jobs().len()), (1, 1));
    assert_eq!(stage.api.events(), ["Submitted", "Running", "Lost"]);
    // A deletion leaves the other one alone.
    stage.api.delete("trainingjobs", "tiny");
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert_eq!(stage.orchestrator.jobs()[0].state(), JobState::Queued);
}

#[tokio::test(start_paused = true)]
async fn a_suspended_job_that_is_no_longer_retained_has_failed_and_is_not_run_anew() {
    let (stage, _operator) = training().await;
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": true}}));
    stage.until_state("tiny", "Suspended").await;
    stage.orchestrator.forget_all();
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": false}}));
    stage.until_state("tiny", "Failed").await;
    assert_eq!(stage.condition("tiny", "Failed"), pair("True", "NotRetained"));
    assert_eq!(stage.condition("tiny", "Suspended"), pair("False", "NotSuspended"));
    stage.passes(600).await;
    assert_eq!((stage.orchestrator.calls("submit"), stage.orchestrator.jobs().len()), (1, 0));
}

/// An object as a look that began before it changed knows it.
async fn known(stage: &Stage) -> Arc<TrainingJob> {
    let operator = stage.operator();
    stage.submit("tiny", json!({"recipe": {"configMap": {"name": "recipes"}}}));
    stage.until("it lacks its recipe", |stage| stage.condition("tiny", "Submitted").1 == "NoRecipe").await;
    drop(operator);
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "recipes"}, "data": {"recipe.toml": "right"}});
    stage.api.create("configmaps", map);
    Arc::new(serde_json::from_value(stage.job("tiny")).unwrap())
}

#[tokio::test(start_paused = true)]
async fn nothing_is_submitted_for_an_object_that_is_about_to_go_or_gone() {
    let stage = Stage::new();
    let object = known(&stage).await;
    stage.api.delete("trainingjobs", "tiny");
    assert_eq!(stage.api.names("trainingjobs"), ["tiny"]);
    jobs::reconcile(object.clone(), stage.context()).await.unwrap();
    assert_eq!(stage.orchestrator.calls("submit"), 0);
    // Also one whose submission was begun before.
    let begun = Arc::new(serde_json::from_value::<TrainingJob>(stage.job("tiny")).unwrap());
    assert_eq!(begun.status.as_ref().unwrap().state, "Submitting");
    let mut begun = (*begun).clone();
    begun.metadata.deletion_timestamp = None;
    jobs::reconcile(Arc::new(begun), stage.context()).await.unwrap();
    assert_eq!(stage.orchestrator.calls("submit"), 0);
    stage.api.patch("trainingjobs", "tiny", "", &json!({"metadata": {"finalizers": null}}));
    assert!(stage.api.names("trainingjobs").is_empty());
    jobs::reconcile(object.clone(), stage.context()).await.unwrap();
    // Another one has the name.
    stage.submit("tiny", tiny());
    jobs::reconcile(object, stage.context()).await.unwrap();
    assert_eq!(stage.orchestrator.calls("submit"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_was_retried_meanwhile_keeps_its_object() {
    let stage = Stage::new();
    let operator = stage.operator();
    stage.submit("short", json!({"recipe": {"builtIn": "tiny"}, "ttlSecondsAfterFinished": 90}));
    stage.until_state("short", "Queued").await;
    let fail =
        |job: &mut v1::Job| (job.state, job.ended_unix_ms) = (JobState::Failed.into(), 1_750_000_060_000);
    stage.orchestrator.move_job("job-1", fail);
    stage.until_state("short", "Failed").await;
    drop(operator);
    stage.passes(3600).await;
    // Who does not answer may have it run.
    stage.orchestrator.set_away(true);
    let _operator = stage.operator();
    stage.until("it is said", |stage| stage.condition("short", "Reachable").0 == "False").await;
    stage.passes(300).await;
    assert_eq!(stage.api.names("trainingjobs"), ["short"]);
    stage.orchestrator.move_job("job-1", |job| {
        train(job);
        job.ended_unix_ms = 0;
    });
    stage.orchestrator.set_away(false);
    stage.until_state("short", "Running").await;
    stage.passes(300).await;
    assert_eq!(
        (stage.api.names("trainingjobs"), stage.orchestrator.calls("cancel")),
        (vec!["short".into()], 0)
    );
    stage.orchestrator.move_job("job-1", fail);
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_deleted_object_waits_as_long_for_an_orchestrator_that_was_absent_before() {
    let (stage, _operator) = training().await;
    stage.orchestrator.set_away(true);
    stage.passes(3600).await;
    assert_eq!(stage.condition("tiny", "Reachable"), pair("False", "Unreachable"));
    stage.api.delete("trainingjobs", "tiny");
    let begin = tokio::time::Instant::now();
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert!((590..=670).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_deleted_object_waits_as_long_for_an_absent_orchestrator_where_the_operator_was_away_too() {
    let (stage, operator) = training().await;
    stage.orchestrator.set_away(true);
    stage.until("it is said", |stage| stage.condition("tiny", "Reachable").0 == "False").await;
    drop(operator);
    stage.api.delete("trainingjobs", "tiny");
    stage.passes(3600).await;
    // One that tries once and is gone again.
    let operator = stage.operator();
    stage.passes(30).await;
    drop(operator);
    stage.passes(3600).await;
    let _operator = stage.operator();
    let begin = tokio::time::Instant::now();
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert!((590..=670).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_ended_job_that_is_no_longer_retained_is_not_run_again() {
    let (stage, _operator) = training().await;
    stage
        .orchestrator
        .move_job("job-1", |job| (job.state, job.ended_unix_ms) = (JobState::Done.into(), 9_000));
    stage.until_state("tiny", "Done").await;
    stage.orchestrator.forget_all();
    stage.passes(600).await;
    assert_eq!(
        (stage.orchestrator.calls("submit"), stage.job("tiny")["status"]["state"].as_str()),
        (1, Some("Done"))
    );
}

#[tokio::test(start_paused = true)]
async fn an_object_goes_some_time_after_its_job_has_ended() {
    let stage = Stage::new();
    let _operator = stage.operator();
    stage.submit("short", json!({"recipe": {"builtIn": "tiny"}, "ttlSecondsAfterFinished": 90}));
    stage.until_state("short", "Queued").await;
    let now = 1_750_000_000_000 + u64::try_from(Duration::from_secs(60).as_millis()).unwrap();
    stage.orchestrator.move_job("job-1", |job| (job.state, job.ended_unix_ms) = (JobState::Done.into(), now));
    stage.until_state("short", "Done").await;
    let begin = tokio::time::Instant::now();
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    assert!((80..=160).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    assert_eq!(stage.orchestrator.calls("cancel"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_job_goes_to_the_orchestrator_that_it_names() {
    let stage = Stage::new();
    let _operator = stage.operator();
    stage.submit(
        "own",
        json!({"recipe": {"builtIn": "tiny"}, "orchestrator": {"address": "other:7070", "secret": "mine"}}),
    );
    stage
        .until("it lacks its secret", |stage| {
            stage.condition("own", "Reachable") == pair("False", "NoSecret")
        })
        .await;
    stage.api.create("secrets", client_secret("mine"));
    stage.until_state("own", "Queued").await;
    stage.submit("at-home", json!({"recipe": {"builtIn": "tiny"}}));
    stage.until_state("at-home", "Queued").await;
    stage.submit("nowhere", json!({"recipe": {"builtIn": "tiny"}, "cluster": "none"}));
    stage
        .until("it lacks its cluster", |stage| {
            stage.condition("nowhere", "Reachable") == pair("False", "NoCluster")
        })
        .await;
    assert_eq!(stage.orchestrator.places(), ["other:7070", "home:7070"]);
}

#[tokio::test(start_paused = true)]
async fn many_objects_become_as_many_jobs() {
    let stage = Stage::new();
    let _operator = stage.operator();
    for number in 0..500 {
        stage.submit(&format!("job-{number}"), tiny());
    }
    stage.until("all are there", |stage| stage.orchestrator.jobs().len() == 500).await;
    let is_queued =
        |stage: &Stage, number| stage.job(&format!("job-{number}"))["status"]["state"] == "Queued";
    stage.until("all are shown", |stage| (0..500).all(|number| is_queued(stage, number))).await;
    assert_eq!(stage.orchestrator.calls("submit"), 500);
}
