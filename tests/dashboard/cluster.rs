//! The pages of a cluster without a browser: what a form may ask of an orchestrator.

use std::net::SocketAddr;

use serde_json::json;

use crate::browser::Running;
use crate::http::{Answer, ask};

fn check(address: SocketAddr, body: &str) -> Answer {
    let headers = [("host", &*address.to_string()), ("x-contraflow-action", "1")];
    ask(address, "POST", "/api/v1/check", &headers, body)
}

#[test]
fn a_form_is_checked_as_a_submission_and_reads_no_file_of_the_orchestrators_machine() {
    let dir = tempfile::tempdir().unwrap();
    let state = ["orchestrator", "--state", "state", "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"];
    let orchestrator = Running::start(dir.path(), &state);
    let url = orchestrator.said("dashboard: ");
    let address: SocketAddr = url.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    let form = |config: &str| {
        let recipe = format!(
            "[model]\nconfig = {config:?}\n[training]\nsteps = 4\nglobal_batch_size = 8\nmicro_batch_size = 2\n\
             sequence_length = 64\n[lr]\npeak = 1e-3\n"
        );
        json!({"recipe": recipe, "overrides": []}).to_string()
    };

    let sound = check(address, &form("tiny"));
    assert_eq!(sound.status, 200, "{}", sound.body);
    assert_eq!(sound.json()["micro_batches"], 4);
    assert!(sound.json()["memory_bytes"].as_u64().unwrap() > 1 << 20);

    let secret = dir.path().join("secret.json");
    std::fs::write(&secret, "a secret word").unwrap();
    let there = check(address, &form(secret.to_str().unwrap()));
    let missing = check(address, &form(dir.path().join("missing").to_str().unwrap()));
    for refused in [&there, &missing] {
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("or its config.json with the recipe"), "{}", refused.body);
        assert!(!refused.body.contains("a secret word"), "{}", refused.body);
    }

    let many = form("tiny").replace("[lr]", "[parallel]\\nexpert = 4\\ndata = 100000\\n[lr]");
    assert_eq!(check(address, &many).status, 400);
    assert_eq!(check(address, "{").status, 400);
}
