//! Checkpoints in an object store: SIGKILL at every named place of a commit, writers that meet, answers that are lost.

use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};

use crate::data::Store;
use crate::deadline;
use crate::server::Fault;
use crate::workplace::stderr;

const SIGKILL: i32 = 9;

/// Every failpoint on the way of a commit to a store, and those around it in the folder.
const FAILPOINTS: [&str; 8] = [
    "checkpoint.parts-begin",
    "checkpoint.parts-half-sent",
    "checkpoint.parts-sent",
    "checkpoint.manifest-created",
    "checkpoint.manifest-removed",
    "checkpoint.manifest-synced",
    "checkpoint.renamed",
    "checkpoint.dropped",
];

fn failpoints_in_the_source() -> Vec<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/runtime/src/checkpoint/remote.rs");
    let text = std::fs::read_to_string(source).unwrap();
    text.split("failpoint(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

impl Store {
    fn start(&self, args: &[&str], failpoints: &str) -> Output {
        let mut command = self.place.command(args);
        self.server.configure(&mut command, &self.place.path("cache"));
        deadline::output(command.env("FAILPOINTS", failpoints).stdout(Stdio::null()))
    }

    /// Steps committed in the store, and whether each has all its parts.
    fn committed(&self, run: &str) -> Vec<String> {
        let keys = self.server.keys(&format!("{run}/"));
        let steps: Vec<String> =
            keys.iter().filter(|key| key.ends_with(".json") && !key.contains('/')).cloned().collect();
        for step in &steps {
            let commit = self.server.get(&format!("{run}/{step}")).unwrap();
            let commit: serde_json::Value = serde_json::from_slice(&commit).unwrap();
            let below =
                format!("{}/{}/", step.strip_suffix(".json").unwrap(), commit["parts"].as_str().unwrap());
            let parts = |list: &str| commit["manifest"][list].as_array().unwrap().clone();
            for file in [parts("shards"), parts("companions")].concat() {
                let key = format!("{run}/{below}{}", file["file"].as_str().unwrap());
                let bytes = self.server.get(&key).unwrap_or_else(|| panic!("{key} is missing"));
                assert_eq!(bytes.len() as u64, file["bytes"].as_u64().unwrap(), "{key}");
            }
        }
        steps
    }

    fn train_in(&self, run: &str, more: &[&str]) -> String {
        let store = format!("checkpoint.store=s3://bucket/{run}");
        self.succeed(&[&["train", "recipe.toml", "--name", run, "--set", &store], more].concat())
    }
}

#[test]
fn a_run_killed_at_any_point_of_a_commit_to_a_store_resumes_from_the_store_with_the_same_bits() {
    let store = Store::new();
    store.place.succeed(&["train", "recipe.toml", "--name", "whole"]);
    let whole = store.place.curve("runs/whole");
    for name in failpoints_in_the_source() {
        assert!(FAILPOINTS.contains(&name.as_str()), "{name}");
    }
    for name in FAILPOINTS {
        // Two commits stand and are kept; the third is the one that dies, and the first to drop one.
        let run = name.replace('.', "-");
        store.train_in(&run, &["--set", "training.steps=8"]);
        let before = ["step-00000004.json", "step-00000008.json"];
        assert_eq!(store.committed(&run), before, "{name}");
        let path = format!("runs/{run}");
        let resume = ["train", "--resume", &path, "--set", "training.steps=12"];
        let output = store.start(&resume, &format!("{name}=return"));
        assert_eq!(output.status.signal(), Some(SIGKILL), "{name}: {}", stderr(&output));
        let committed = store.committed(&run);
        assert!(
            committed.contains(&before[1].to_owned()),
            "{name}: what was committed stands: {committed:?}"
        );
        // The machine is lost with its disk: the store is what is left.
        std::fs::remove_dir_all(store.place.path(&path).join("checkpoints")).unwrap();
        store.succeed(&resume);
        assert_eq!(store.place.curve(&path), whole, "{name}");
        assert_eq!(store.committed(&run), ["step-00000008.json", "step-00000012.json"], "{name}");
    }
}

#[test]
fn a_run_goes_on_on_another_machine_and_a_second_fresh_one_is_refused() {
    let store = Store::new();
    store.place.succeed(&["train", "recipe.toml", "--name", "whole"]);
    store.train_in("run", &["--set", "training.steps=8"]);
    let taken = ["train", "recipe.toml", "--name", "other", "--set", "checkpoint.store=s3://bucket/run"];
    let refused = store.refused(&taken);
    let words = "s3://bucket/run: expected a prefix without checkpoints, got that of step 8; --resume s3://bucket/run";
    assert!(refused.contains(words), "{refused}");
    assert!(!store.place.path("runs/other").exists());
    std::fs::rename(store.place.path("runs/run"), store.place.path("gone")).unwrap();
    store.succeed(&["train", "--resume", "s3://bucket/run", "--set", "training.steps=12"]);
    // It has the steps that it has made itself.
    assert_eq!(store.place.curve("runs/run"), store.place.curve("runs/whole")[8..]);
    assert_eq!(store.committed("run"), ["step-00000008.json", "step-00000012.json"]);
    let none = store.refused(&["train", "--resume", "s3://bucket/nothing"]);
    assert!(
        none.contains("s3://bucket/nothing: expected a committed checkpoint to resume from, got none"),
        "{none}"
    );
}

#[test]
fn of_two_writers_one_commits_and_a_lost_answer_is_no_loss() {
    let store = Store::new();
    // Every first answer to a put is lost after the effect, that of the manifests too.
    store.server.set_faults(|request, before| {
        (request.starts_with("PUT bucket/run/step") && before == 0).then_some(Fault::LoseAnswer)
    });
    let said = store.train_in("run", &[]);
    assert!(!said.contains("another process") && !said.contains("could not be"), "{said}");
    assert_eq!(store.committed("run"), ["step-00000008.json", "step-00000012.json"]);
    // Another writer is faster, just before the manifest.
    store.server.set_faults(|_, _| None);
    store.server.change_before(
        "PUT bucket/late/step-00000004.json",
        "late/step-00000004.json",
        "the other's",
    );
    let said = store.train_in("late", &["--set", "training.steps=4"]);
    assert!(said.contains("another process has committed the checkpoint of this step"), "{said}");
    assert_eq!(store.server.get("late/step-00000004.json").unwrap(), b"the other's");
    assert_eq!(store.server.keys("late/"), ["step-00000004.json"], "its own parts are gone");
}

#[test]
fn what_is_wrong_with_a_store_is_said_before_the_first_step() {
    let store = Store::new();
    let args = ["train", "recipe.toml", "--name", "run", "--set", "checkpoint.store=s3://bucket/run"];
    store.server.set_faults(|request, _| request.starts_with("PUT").then_some(Fault::Status(403)));
    let denied = store.refused(&args);
    let words = "checkpoint.store: s3://bucket/run/.probe-";
    assert!(denied.contains(words) && denied.contains("the store denies access"), "{denied}");
    store.server.set_faults(|_, _| None);
    store.server.ignore_conditions();
    let unsafe_store = store.refused(&args);
    assert!(
        unsafe_store.contains("expected a store that creates an object only where there is none"),
        "{unsafe_store}"
    );
    let web = store.refused(&["train", "recipe.toml", "--set", "checkpoint.store=https://host/run"]);
    assert!(web.contains("checkpoint.store: expected s3://BUCKET/RUN, "), "{web}");
    assert!(!store.place.path("runs").exists(), "nothing is made");
}

#[test]
fn a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_taken() {
    let store = Store::new();
    store.place.succeed(&["train", "recipe.toml", "--name", "whole"]);
    store.train_in("run", &["--set", "training.steps=8"]);
    let shard = |key: &String| key.starts_with("step-00000008/") && key.ends_with("rank-00001.safetensors");
    let key = store.server.keys("run/").into_iter().find(shard).unwrap();
    let mut bytes = store.server.get(&format!("run/{key}")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    store.server.put(&format!("run/{key}"), bytes);
    std::fs::remove_dir_all(store.place.path("runs/run/checkpoints")).unwrap();
    store.succeed(&["train", "--resume", "runs/run", "--set", "training.steps=12"]);
    assert_eq!(store.place.curve("runs/run"), store.place.curve("runs/whole"));
    let damaged = "damaged-step-00000008.json".to_owned();
    assert!(store.server.keys("run/").contains(&damaged));
    store.server.remove("run/damaged-step-00000008.json");
    assert_eq!(store.committed("run"), ["step-00000008.json", "step-00000012.json"]);
}
