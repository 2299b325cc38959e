//! What the chart lets the operator do: what it asks for, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use contraflow_proto::v1;
use serde_json::{Value, json};

use crate::clusters;
use crate::stage::Stage;

/// API group, resource with its subresource, verb.
type Right = (String, String, String);

/// What a request needs.
fn needed(verb: &str, path: &str) -> Right {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let at = parts.iter().position(|part| *part == "namespaces").unwrap() + 2;
    let group = if parts[0] == "api" { "" } else { parts[1] };
    let (name, subresource) = (parts.get(at + 1), parts.get(at + 2));
    let verb = match (verb, name) {
        ("GET", Some(_)) => "get",
        ("GET", None) => "list",
        ("WATCH", _) => "watch",
        ("POST", _) => "create",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        other => panic!("{other:?}"),
    };
    let resource = subresource
        .map_or_else(|| parts[at].to_owned(), |subresource| format!("{}/{subresource}", parts[at]));
    (group.to_owned(), resource, verb.to_owned())
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// What the Role of the manifest grants. Secrets are granted by name alone.
fn granted() -> BTreeSet<Right> {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../install.yaml")).unwrap();
    let documents = text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
    let roles: Vec<Value> = documents.filter(|object| object["kind"] == "Role").collect();
    let [role] = &roles[..] else { panic!("{} roles", roles.len()) };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        let (groups, resources, verbs) =
            (texts(&rule["apiGroups"]), texts(&rule["resources"]), texts(&rule["verbs"]));
        assert_eq!(resources.contains(&"secrets".to_owned()), rule.get("resourceNames").is_some(), "{rule}");
        for group in &groups {
            for resource in &resources {
                rights.extend(verbs.iter().map(|verb| (group.clone(), resource.clone(), verb.clone())));
            }
        }
    }
    rights
}

#[tokio::test(start_paused = true)]
async fn the_operator_may_do_what_it_does_and_nothing_else() {
    let stage = Stage::new();
    let _operator = stage.operator();
    stage.api.create("trainingclusters", clusters::object("east", &clusters::as_the_chart()));
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "recipes"}, "data": {"recipe.toml": "text"}});
    stage.api.create("configmaps", map);
    let spec = json!({
        "recipe": {"configMap": {"name": "recipes"}}, "ttlSecondsAfterFinished": 1,
        "orchestrator": {"address": "other:7070", "secret": "mine"},
    });
    stage.submit("tiny", spec);
    stage.until("it lacks its secret", |stage| stage.condition("tiny", "Reachable").1 == "NoSecret").await;
    stage.api.create("secrets", clusters::client_secret("mine"));
    stage.until_state("tiny", "Queued").await;
    stage
        .orchestrator
        .move_job("job-1", |job| (job.state, job.ended_unix_ms) = (v1::JobState::Done.into(), 9_000));
    stage.until("it is gone", |stage| stage.api.names("trainingjobs").is_empty()).await;
    stage.submit("there", json!({"recipe": {"builtIn": "tiny"}, "cluster": "east"}));
    stage.until("it lacks its secret", |stage| stage.condition("there", "Reachable").1 == "NoSecret").await;
    let mut spec = clusters::as_the_chart();
    spec["workers"][0]["name"] = "others".into();
    stage.api.patch("trainingclusters", "east", "", &json!({"spec": spec}));
    tokio::time::sleep(Duration::from_secs(120)).await;
    let mut used: BTreeSet<Right> =
        stage.api.all_requests().iter().map(|(verb, path)| needed(verb, path)).collect();
    // An object that is applied and was not there is created.
    let made =
        ["statefulsets", "services", "persistentvolumeclaims", "poddisruptionbudgets", "networkpolicies"];
    let patched: Vec<Right> = used
        .iter()
        .filter(|(_, resource, verb)| verb == "patch" && made.contains(&resource.as_str()))
        .cloned()
        .collect();
    used.extend(patched.into_iter().map(|(group, resource, _)| (group, resource, "create".to_owned())));
    // What a finalizer and an owner's reference may need where the API server asks for it.
    let of_owners =
        |kind: &str| ("contraflow.dev".to_owned(), format!("{kind}/finalizers"), "update".to_owned());
    used.extend(["trainingjobs", "trainingclusters"].map(of_owners));
    let granted = granted();
    let lacking: Vec<&Right> = used.difference(&granted).collect();
    let idle: Vec<&Right> = granted.difference(&used).collect();
    assert!(
        lacking.is_empty() && idle.is_empty(),
        "not granted: {lacking:?}; granted and not used: {idle:?}"
    );
}
