//! Weights on an object store: exported to it, and read from it as from a folder.

use crate::data::Store;
use crate::server::Fault;

/// Trains a little model that is written at the end.
fn trained() -> Store {
    let store = Store::new();
    let steps = "training.steps=2";
    store.succeed(&[
        "train",
        "recipe.toml",
        "--name",
        "a",
        "--set",
        steps,
        "--set",
        "checkpoint.save_model=true",
    ]);
    store
}

#[test]
fn an_export_is_that_of_a_folder_and_is_read_from_the_store() {
    let store = trained();
    store.succeed(&["export", "runs/a", "--to", "local"]);
    // Answers are lost after the effect, also of the last put, which is conditional.
    store.server.set_faults(|request, before| {
        (request.starts_with("PUT bucket/models/a/") && before == 0).then_some(Fault::LoseAnswer)
    });
    store.succeed(&["export", "runs/a", "--to", "s3://bucket/models/a"]);
    let requests = store.server.requests();
    assert!(requests.last().unwrap().ends_with("bucket/models/a/config.json"), "{requests:?}");
    let local = store.place.files("local");
    assert_eq!(store.server.keys("models/a/").len(), local.len());
    for (path, bytes) in &local {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(store.server.get(&format!("models/a/{name}")).as_ref(), Some(bytes), "{name}");
    }
    let init = |name: &str, from: &str| {
        store.succeed(&["train", "recipe.toml", "--name", name, "--init", from, "--set", "training.steps=3"]);
        store.place.curve(&format!("runs/{name}"))
    };
    assert_eq!(init("remote", "s3://bucket/models/a"), init("folder", "local"));
    store.succeed(&["import", "s3://bucket/models/a", "--name", "imported"]);
    assert!(store.place.path("runs/imported/model/config.json").is_file());
    let taken = store.refused(&["export", "runs/a", "--to", "s3://bucket/models/a"]);
    let words = "--to: s3://bucket/models/a: expected a prefix without objects below it, got one with some";
    assert!(taken.contains(words), "{taken}");
}

#[test]
fn large_files_are_sent_in_parts_and_a_lost_end_of_them_is_no_loss() {
    let store = Store::new();
    store.succeed(&["train", "tiny", "--name", "a", "--set", "training.steps=1", "--data", "text.txt"]);
    store.succeed(&["export", "runs/a", "--to", "local"]);
    store.server.set_faults(|request, before| match (request, before) {
        ("PUT bucket/models/a/model.safetensors", 0) => Some(Fault::Status(503)),
        // The first one begins the upload, the second one ends it.
        ("POST bucket/models/a/model.safetensors", 1) => Some(Fault::LoseAnswer),
        _ => None,
    });
    store.succeed(&["export", "runs/a", "--to", "s3://bucket/models/a"]);
    let sent = |requests: Vec<String>| {
        let parts = requests.into_iter().filter(|request| request == "PUT bucket/models/a/model.safetensors");
        parts.count()
    };
    assert_eq!(sent(store.server.requests()), 3, "two parts, one of them twice");
    let local = std::fs::read(store.place.path("local/model.safetensors")).unwrap();
    assert!(store.server.get("models/a/model.safetensors").unwrap() == local);
    // What cannot be sent is given up: its parts cost nobody anything.
    store.server.set_faults(|request, before| {
        (request == "PUT bucket/models/b/model.safetensors" && before > 0).then_some(Fault::Status(403))
    });
    store.refused(&["export", "runs/a", "--to", "s3://bucket/models/b"]);
    assert_eq!(store.server.open_uploads(), 0);
}

#[test]
fn an_export_that_fails_is_no_model() {
    let store = trained();
    store.server.set_faults(|request, _| request.contains("model.safetensors").then_some(Fault::Status(403)));
    let denied = store.refused(&["export", "runs/a", "--to", "s3://bucket/models/b"]);
    assert!(denied.contains("s3://bucket/models/b/model.safetensors: the store denies access"), "{denied}");
    assert_eq!(store.server.get("models/b/config.json"), None);
    store.server.set_faults(|_, _| None);
    let web = store.refused(&["export", "runs/a", "--to", "https://host/models/b"]);
    assert!(web.contains("got a web server, which takes no files"), "{web}");
}
