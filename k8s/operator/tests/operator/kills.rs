//! An operator that dies in the midst of anything: the next one goes on, and there is never a second job.

use contraflow_proto::v1;
use serde_json::json;
use v1::JobState;

use crate::stage::{Fuse, Stage};

/// Runs a life with an operator that dies after so many requests, then with one that does not. Returns whether the first one died.
async fn killed(requests: usize, is_carried_out: bool) -> bool {
    let stage = Stage::new();
    let fuse = Fuse::new(requests, is_carried_out);
    let mortal = stage.operator_that_dies(fuse.clone());
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "recipes"}, "data": {"recipe.toml": "first"}});
    stage.api.create("configmaps", map);
    stage.submit("tiny", json!({"recipe": {"configMap": {"name": "recipes"}}, "ranks": 2}));
    let life = async {
        stage.until_state("tiny", "Queued").await;
        stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": true}}));
        stage.until_state("tiny", "Suspended").await;
        stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": false}}));
        stage.until_state("tiny", "Queued").await;
        stage.orchestrator.move_job("job-1", |job| job.state = JobState::Running.into());
        stage.until_state("tiny", "Running").await;
        stage.until("it is scaled", |stage| stage.condition("tiny", "Scaled").0 == "True").await;
        stage.api.delete("trainingjobs", "tiny");
        stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    };
    tokio::pin!(life);
    let has_died = tokio::select! {
        () = &mut life => false,
        () = fuse.burnt() => true,
    };
    if has_died {
        drop(mortal);
        if requests.is_multiple_of(3) {
            // The recipe is another one meanwhile.
            stage.api.patch("configmaps", "recipes", "", &json!({"data": {"recipe.toml": "second"}}));
        }
        let _immortal = stage.operator();
        life.await;
    }
    let what = format!("killed at request {requests}, carried out: {is_carried_out}");
    let [job] = &stage.orchestrator.jobs()[..] else { panic!("{what}: {:#?}", stage.orchestrator.jobs()) };
    assert_eq!(
        (job.state(), job.outcome.as_str()),
        (JobState::Cancelled, "its TrainingJob was deleted"),
        "{what}"
    );
    has_died
}

#[tokio::test(start_paused = true)]
async fn an_operator_that_dies_at_any_request_leaves_one_job_that_the_next_one_looks_after() {
    for is_carried_out in [false, true] {
        let mut requests = 1;
        while killed(requests, is_carried_out).await {
            requests += 1;
        }
        assert!(requests > 25, "{requests}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_deleted_while_nobody_knows_whether_it_was_submitted_leaves_no_job() {
    let mut seen = 0;
    for requests in 1..30 {
        let stage = Stage::new();
        let fuse = Fuse::new(requests, true);
        let mortal = stage.operator_that_dies(fuse.clone());
        // Others are there too, so that the job is on a later page of the list.
        (0..5).for_each(|number| stage.orchestrator.submit_by_hand(&format!("other-{number}")));
        stage.submit("tiny", json!({"recipe": {"builtIn": "tiny"}}));
        let ended = tokio::select! {
            () = stage.until_state("tiny", "Queued") => true,
            () = fuse.burnt() => false,
        };
        drop(mortal);
        (0..5).for_each(|number| stage.orchestrator.submit_by_hand(&format!("later-{number}")));
        if stage
            .api
            .get("trainingjobs", "tiny")
            .is_some_and(|job| job["metadata"].get("finalizers").is_some())
        {
            stage.api.delete("trainingjobs", "tiny");
        } else {
            continue;
        }
        let _immortal = stage.operator();
        stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
        let jobs = stage.orchestrator.jobs();
        let (own, others): (Vec<&v1::Job>, Vec<&v1::Job>) =
            jobs.iter().partition(|job| job.name.starts_with("training/"));
        assert!(
            own.iter().all(|job| job.state() == JobState::Cancelled),
            "killed at request {requests}: {own:?}"
        );
        assert!(others.iter().all(|job| job.state() == JobState::Queued));
        seen += own.len();
        if ended {
            break;
        }
    }
    assert!(seen > 1, "{seen}");
}
