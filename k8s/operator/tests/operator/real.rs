//! The operator against the real orchestrator, a process without workers: what the small one of the other tests pretends is so.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use contraflow_operator::decide::Pace;
use serde_json::json;

use crate::stage::Stage;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The orchestrator, and where it listens.
fn orchestrator(program: &std::ffi::OsStr, state: &std::path::Path) -> (Process, String) {
    let mut command = Command::new(program);
    command.arg("orchestrator").arg("--state").arg(state).args(["--listen", "127.0.0.1:0"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let process = Process(child);
    let mut addresses = lines.filter_map(|line| {
        let (_, rest) = line.split_once("orchestrator at ")?;
        rest.split(',').next().map(str::to_owned)
    });
    let address = addresses.next().unwrap();
    // It goes on writing.
    std::thread::spawn(move || addresses.count());
    (process, address)
}

#[tokio::test]
async fn a_real_orchestrator_does_what_the_small_one_does() {
    // The clock is real here, and so is a minute.
    tokio::time::timeout(Duration::from_secs(60), live()).await.unwrap();
}

async fn live() {
    let Some(program) = std::env::var_os("CONTRAFLOW_PROGRAM") else {
        println!("skipped: CONTRAFLOW_PROGRAM names no program");
        return;
    };
    assert!(
        std::path::Path::new(&program).is_file(),
        "CONTRAFLOW_PROGRAM: there is no {}",
        program.display()
    );
    let folder = tempfile::tempdir().unwrap();
    let (_process, address) = orchestrator(&program, &folder.path().join("state"));
    let stage = Stage::new();
    let often = Duration::from_millis(100);
    let pace =
        Pace { running: often, waiting: often, ended: often, least: often, most: often, ..Pace::default() };
    let operator = stage.operator_of(&address, pace);
    let recipe = |steps: &str| {
        include_str!("../../../../recipes/tiny.toml").replace("steps = 720", &format!("steps = {steps}"))
    };
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "recipes"}, "data": {"recipe.toml": recipe("-1")}});
    stage.api.create("configmaps", map);
    stage.submit("tiny", json!({"recipe": {"configMap": {"name": "recipes"}}, "minRanks": 1}));
    stage.until("it is refused", |stage| stage.condition("tiny", "Submitted").1 == "Refused").await;
    let words = stage.job("tiny")["status"]["message"].to_string();
    assert!(words.contains("training.steps"), "{words}");
    let steps = |steps: &str| json!({"data": {"recipe.toml": recipe(steps)}});
    stage.api.patch("configmaps", "recipes", "", &steps("200"));
    stage.until_state("tiny", "Queued").await;
    assert_eq!(stage.job("tiny")["status"]["progress"], "0/200");
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": true}}));
    stage.until_state("tiny", "Suspended").await;
    stage.api.patch("trainingjobs", "tiny", "", &json!({"spec": {"suspend": false, "ranks": 2}}));
    stage
        .until("it is taken up and scaled", |stage| {
            stage.job("tiny")["status"]["state"] == "Queued"
                && stage.condition("tiny", "Scaled").1 == "Scaled"
        })
        .await;
    // An operator that died before it wrote down which job it is, and another recipe since.
    drop(operator);
    stage.api.patch(
        "trainingjobs",
        "tiny",
        "status",
        &json!({"status": {"job": null, "state": "Submitting"}}),
    );
    stage.api.patch("configmaps", "recipes", "", &steps("300"));
    let _operator = stage.operator_of(&address, pace);
    stage.until_state("tiny", "Queued").await;
    assert_eq!(
        (stage.job("tiny")["status"]["job"].clone(), stage.condition("tiny", "Current").1),
        (json!("job-1"), "Immutable".into())
    );
    stage.api.delete("trainingjobs", "tiny");
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    stage.submit("tiny", json!({"recipe": {"builtIn": "tiny"}}));
    stage.until_state("tiny", "Queued").await;
    assert_eq!(stage.job("tiny")["status"]["job"], "job-2");
}
