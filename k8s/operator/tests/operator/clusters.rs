//! The life of a `TrainingCluster`.

use std::collections::BTreeMap;
use std::path::Path;

use contraflow_operator::cluster::TrainingCluster;
use contraflow_operator::objects::objects;
use contraflow_proto::v1;
use serde_json::{Value, json};

use crate::stage::Stage;

/// What the chart makes of its own values.
pub fn as_the_chart() -> Value {
    json!({
        "image": "contraflow:0.1.0",
        "tls": {
            "orchestratorSecret": "contraflow-orchestrator", "workerSecret": "contraflow-worker", "clientSecret": "contraflow-operator",
        },
        "workers": [{
            "name": "workers", "minWorkers": 2, "slots": 2, "shm": "2Gi",
            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        }],
    })
}

pub fn object(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "contraflow.dev/v1alpha1", "kind": "TrainingCluster", "metadata": {"name": name}, "spec": spec})
}

/// A Secret with the credentials of a client.
pub fn client_secret(name: &str) -> Value {
    let files =
        ["ca.pem", "client.pem", "client.key", "token"].map(|key| (key.to_owned(), Value::from("dGV4dA==")));
    let data: serde_json::Map<String, Value> = files.into_iter().collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data})
}

/// Whose it is, and of which version, is not compared.
fn without_marks(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("app.kubernetes.io/managed-by");
            fields.remove("app.kubernetes.io/version");
            fields.remove("helm.sh/resource-policy");
            fields.values_mut().for_each(without_marks);
            fields.retain(|key, value| {
                key != "annotations" || value.as_object().is_some_and(|notes| !notes.is_empty())
            });
        }
        Value::Array(values) => values.iter_mut().for_each(without_marks),
        _ => {}
    }
}

fn differences(path: &str, chart: &Value, own: &Value, faults: &mut Vec<String>) {
    match (chart, own) {
        (Value::Object(chart), Value::Object(own)) => {
            let keys: std::collections::BTreeSet<&String> = chart.keys().chain(own.keys()).collect();
            let of = |fields: &serde_json::Map<String, Value>, key: &str| {
                fields.get(key).cloned().unwrap_or_default()
            };
            keys.into_iter().for_each(|key| {
                differences(&format!("{path}.{key}"), &of(chart, key), &of(own, key), faults)
            });
        }
        (Value::Array(chart), Value::Array(own)) if chart.len() == own.len() => {
            let pairs = chart.iter().zip(own).enumerate();
            pairs.for_each(|(index, (chart, own))| {
                differences(&format!("{path}[{index}]"), chart, own, faults)
            });
        }
        _ if chart == own => {}
        _ => faults.push(format!("{path}: {chart} and {own}")),
    }
}

#[test]
fn a_cluster_is_what_the_chart_makes_of_the_same_values() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../install.yaml")).unwrap();
    // Kubernetes reads YAML 1.1, where this is octal.
    let text = text.replace("defaultMode: 0440", "defaultMode: 288");
    let documents = text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
    let of_cluster =
        ["Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy", "PersistentVolumeClaim"];
    let key = |value: &Value| {
        format!("{} {}", value["kind"].as_str().unwrap(), value["metadata"]["name"].as_str().unwrap())
    };
    let is_ours = |value: &Value| {
        of_cluster.contains(&value["kind"].as_str().unwrap_or_default())
            && !value["metadata"]["name"].as_str().unwrap().ends_with("-operator")
    };
    let by_key = |values: Vec<Value>| -> BTreeMap<String, Value> {
        values
            .into_iter()
            .map(|mut value| {
                without_marks(&mut value);
                (key(&value), value)
            })
            .collect()
    };
    let mut chart = by_key(documents.filter(is_ours).collect());
    // The chart's clients may be others than all pods of the namespace, and its operator is one of them then.
    let policy = chart.get_mut("NetworkPolicy contraflow-orchestrator").unwrap();
    let admitted = policy["spec"]["ingress"][0]["from"].as_array_mut().unwrap();
    let operator =
        |from: &mut Value| from["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "operator";
    assert_eq!(admitted.extract_if(.., operator).count(), 1);
    let cluster: TrainingCluster = serde_json::from_value(object("contraflow", &as_the_chart())).unwrap();
    let own = objects(&cluster, |group| group.min_workers);
    let own = by_key(own.into_iter().map(|object| object.body).collect());
    assert_eq!(chart.keys().collect::<Vec<_>>(), own.keys().collect::<Vec<_>>());
    let mut faults = Vec::new();
    for (key, chart) in &chart {
        differences(key, chart, &own[key], &mut faults);
    }
    assert!(faults.is_empty(), "chart and operator differ:\n{}", faults.join("\n"));
}

fn be_ready(stage: &Stage, set: &str, replicas: i32) {
    stage.api.patch(
        "statefulsets",
        set,
        "status",
        &json!({"status": {"replicas": replicas, "readyReplicas": replicas}}),
    );
}

fn ready(stage: &Stage) -> (String, String) {
    let cluster = stage.api.get("trainingclusters", "east").unwrap_or_default();
    let conditions = cluster["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let condition = conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default();
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

/// A cluster whose pods are ready, and its operator.
async fn ready_cluster(spec: &Value) -> (Stage, crate::stage::Operator) {
    let stage = Stage::new();
    let operator = stage.operator();
    stage.api.create("trainingclusters", object("east", spec));
    stage.until("its pods are asked for", |stage| stage.api.names("statefulsets").len() == 2).await;
    stage.until("it waits for them", |stage| ready(stage).0 == "OrchestratorNotReady").await;
    be_ready(&stage, "east-orchestrator", 1);
    stage.until("it waits for workers", |stage| ready(stage).1 == "workers: 0 of 2 ready").await;
    be_ready(&stage, "east-workers", 2);
    stage.until("it is ready", |stage| ready(stage).0 == "Ready").await;
    (stage, operator)
}

fn replicas(stage: &Stage, set: &str) -> Option<i64> {
    stage.api.get("statefulsets", set).and_then(|set| set["spec"]["replicas"].as_i64())
}

#[tokio::test(start_paused = true)]
async fn a_cluster_is_made_shown_changed_and_goes_with_its_object_but_for_its_checkpoints() {
    let (stage, _operator) = ready_cluster(&as_the_chart()).await;
    assert_eq!(stage.api.get("trainingclusters", "east").unwrap()["status"]["workers"], "2/2");
    // Nothing is written while nothing changes.
    let writes = stage.api.requests("PATCH", "status");
    stage.passes(600).await;
    assert_eq!(stage.api.requests("PATCH", "status"), writes);
    assert!(stage.api.requests("GET", "statefulsets/east-workers") < 40);
    // A group is renamed and another image wanted.
    let mut spec = as_the_chart();
    (spec["image"], spec["workers"][0]["name"]) = ("contraflow:0.2.0".into(), "rack-a".into());
    stage.api.patch("trainingclusters", "east", "", &json!({"spec": spec}));
    stage
        .until("the group is another", |stage| {
            stage.api.names("statefulsets") == ["east-orchestrator", "east-rack-a"]
        })
        .await;
    let image = |set: &str| {
        stage.api.get("statefulsets", set).unwrap()["spec"]["template"]["spec"]["containers"][0]["image"]
            .clone()
    };
    assert_eq!(
        (image("east-orchestrator"), image("east-rack-a")),
        ("contraflow:0.2.0".into(), "contraflow:0.2.0".into())
    );
    // Somebody removes an object of it.
    stage.api.delete("statefulsets", "east-rack-a");
    stage.until("it is there again", |stage| stage.api.names("statefulsets").len() == 2).await;
    stage.api.delete("trainingclusters", "east");
    stage
        .until("all is gone", |stage| {
            stage.api.names("services").is_empty() && stage.api.names("statefulsets").is_empty()
        })
        .await;
    stage.passes(120).await;
    assert_eq!(stage.api.names("persistentvolumeclaims"), ["east-storage"]);
    assert!(stage.api.names("statefulsets").is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_somebody_elses_is_not_taken_over() {
    let stage = Stage::new();
    let _operator = stage.operator();
    let foreign = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "east-orchestrator"}, "spec": {"ports": []}});
    stage.api.create("services", foreign);
    stage.api.create("trainingclusters", object("east", &as_the_chart()));
    stage.until("it is said", |stage| ready(stage).0 == "Refused").await;
    assert_eq!(ready(&stage).1, "Service east-orchestrator is there and not of this TrainingCluster");
    assert_eq!(stage.api.get("services", "east-orchestrator").unwrap()["spec"], json!({"ports": []}));
}

#[tokio::test(start_paused = true)]
async fn workers_come_as_the_queue_lacks_slots_and_go_once_they_are_idle() {
    let mut spec = as_the_chart();
    spec["workers"][0]["maxWorkers"] = 5.into();
    let (stage, _operator) = ready_cluster(&spec).await;
    stage.api.create("secrets", client_secret("contraflow-operator"));
    stage.submit("wide", json!({"recipe": {"builtIn": "tiny"}, "cluster": "east", "minRanks": 8}));
    stage.until("there are four", |stage| replicas(stage, "east-workers") == Some(4)).await;
    stage.passes(300).await;
    assert_eq!(replicas(&stage, "east-workers"), Some(4));
    let busy = |used| {
        (0..4)
            .map(|pod| v1::Worker {
                worker: format!("east-workers-{pod}-1"),
                slots: 2,
                used,
                ..v1::Worker::default()
            })
            .collect()
    };
    stage.orchestrator.move_job("job-1", |job| job.state = v1::JobState::Running.into());
    stage.orchestrator.set_workers(busy(2));
    stage.passes(600).await;
    assert_eq!(replicas(&stage, "east-workers"), Some(4));
    stage.orchestrator.move_job("job-1", |job| job.state = v1::JobState::Done.into());
    stage.orchestrator.set_workers(busy(0));
    let begin = tokio::time::Instant::now();
    stage.until("there are two", |stage| replicas(stage, "east-workers") == Some(2)).await;
    assert!((300..=330).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    stage
        .until("it is told", |stage| {
            stage.api.events().iter().filter(|reason| *reason == "Resized").count() == 2
        })
        .await;
    assert!(stage.orchestrator.places().contains(&"east-orchestrator:7070".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_too_large_for_its_cluster_starts_no_worker_and_is_said() {
    let mut spec = as_the_chart();
    spec["workers"][0]["maxWorkers"] = 5.into();
    let (stage, _operator) = ready_cluster(&spec).await;
    stage.api.create("secrets", client_secret("contraflow-operator"));
    stage.submit("huge", json!({"recipe": {"builtIn": "tiny"}, "cluster": "east", "minRanks": 11}));
    stage.until("it is said", |stage| stage.api.events().contains(&"TooLarge".to_owned())).await;
    stage.passes(120).await;
    assert_eq!(replicas(&stage, "east-workers"), Some(2));
    let cluster = stage.api.get("trainingclusters", "east").unwrap();
    let conditions = cluster["status"]["conditions"].as_array().unwrap();
    let fits = conditions.iter().find(|condition| condition["type"] == "QueueFits").unwrap();
    assert_eq!(fits["message"], "job-1 needs 11 ranks, and all groups at their most have 10 slots");
    assert_eq!(stage.api.events().iter().filter(|reason| *reason == "TooLarge").count(), 1);
}
