//! The definitions that are installed: those that the program prints, with what users are shown and what they are refused.

use std::path::{Path, PathBuf};

use contraflow_operator::{cluster, job, watching, yaml};
use serde_json::{Value, json};

use crate::stage::{Fuse, Stage};

fn k8s() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_chart_has_the_definitions_that_the_program_prints() {
    for (kind, text) in [
        ("trainingjobs", yaml(&job::definition()).unwrap()),
        ("trainingclusters", yaml(&cluster::definition()).unwrap()),
    ] {
        let path = k8s().join("chart/crds").join(format!("{kind}.yaml"));
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == text,
            "{} is not what `contraflow-operator crds {kind}` prints: `just crds` writes it again",
            path.display()
        );
    }
}

fn version(definition: impl serde::Serialize) -> Value {
    serde_json::to_value(definition).unwrap()["spec"]["versions"][0].clone()
}

#[test]
fn a_list_of_jobs_shows_state_step_loss_time_left_and_ranks() {
    let version = version(job::definition());
    let columns = version["additionalPrinterColumns"].as_array().unwrap();
    let shown = columns.iter().filter(|column| column["priority"].is_null() || column["priority"] == 0);
    let names: Vec<&str> = shown.map(|column| column["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["STATE", "STEP", "LOSS", "LEFT", "RANKS", "AGE"]);
    assert_eq!(version["subresources"]["scale"]["specReplicasPath"], ".spec.ranks");
    assert_eq!(version["subresources"]["scale"]["statusReplicasPath"], ".status.ranks");
    // Each column is a field of the schema.
    let schema = &version["schema"]["openAPIV3Schema"];
    for column in columns {
        let path = column["jsonPath"].as_str().unwrap();
        let Some(field) = path.strip_prefix(".status.") else { continue };
        assert!(schema["properties"]["status"]["properties"].get(field).is_some(), "{path}");
    }
}

/// Kubernetes takes only structural schemas: every part has a type, and no keyword that it does not know.
#[test]
fn schemas_are_structural() {
    fn check(path: &str, schema: &Value, faults: &mut Vec<String>) {
        let object = schema.as_object().unwrap();
        let is_typed = object.contains_key("type") || object.contains_key("x-kubernetes-int-or-string");
        if !is_typed {
            faults.push(format!("{path}: no type in {schema}"));
        }
        for keyword in ["$ref", "definitions", "$defs", "const", "if", "patternProperties"] {
            if object.contains_key(keyword) {
                faults.push(format!("{path}: {keyword}"));
            }
        }
        if object.get("nullable").is_some_and(|nullable| nullable == true) {
            faults.push(format!("{path}: a rule would take its null for a value"));
        }
        if object.contains_key("properties") && object.contains_key("additionalProperties") {
            faults.push(format!("{path}: properties and additionalProperties"));
        }
        if object
            .get("format")
            .is_some_and(|format| ["uint32", "uint64", "uint"].contains(&format.as_str().unwrap()))
        {
            faults.push(format!("{path}: {}", object["format"]));
        }
        for (name, property) in object.get("properties").and_then(Value::as_object).into_iter().flatten() {
            check(&format!("{path}.{name}"), property, faults);
        }
        if let Some(items) = object.get("items") {
            check(&format!("{path}[]"), items, faults);
        }
        if let Some(more) = object.get("additionalProperties").filter(|more| more.is_object()) {
            check(&format!("{path}{{}}"), more, faults);
        }
    }
    for definition in [job::definition(), cluster::definition()] {
        let version = version(&definition);
        let mut faults = Vec::new();
        check("", &version["schema"]["openAPIV3Schema"]["properties"]["spec"], &mut faults);
        check("", &version["schema"]["openAPIV3Schema"]["properties"]["status"], &mut faults);
        assert!(faults.is_empty(), "{}: {faults:#?}", definition.metadata.name.unwrap());
    }
}

#[test]
fn what_was_submitted_cannot_be_changed() {
    let version = version(job::definition());
    let spec = &version["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let rules = spec["x-kubernetes-validations"].as_array().unwrap();
    let fixed: Vec<&str> = rules
        .iter()
        .filter(|rule| rule["rule"].as_str().unwrap().contains("oldSelf"))
        .map(|rule| rule["fieldPath"].as_str().unwrap())
        .collect();
    let open = [".ranks", ".suspend", ".ttlSecondsAfterFinished"];
    let all: Vec<String> =
        spec["properties"].as_object().unwrap().keys().map(|field| format!(".{field}")).collect();
    for field in &all {
        assert!(
            fixed.contains(&field.as_str()) != open.contains(&field.as_str()),
            "{field} is in one of them: {fixed:?} {open:?}"
        );
    }
}

/// Objects in the examples; the other files there are values of the chart.
fn examples() -> Vec<(String, Value)> {
    let mut objects = Vec::new();
    for entry in std::fs::read_dir(k8s().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let of_file =
            text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
        let ours = of_file.filter(|object| object["apiVersion"] == "contraflow.dev/v1alpha1");
        objects.extend(ours.map(|object| (path.display().to_string(), object)));
    }
    objects
}

/// Every field of `written` is one of `read`.
fn fields_that_are_lost(path: &str, written: &Value, read: &Value, lost: &mut Vec<String>) {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => {
            for (key, value) in written {
                match read.get(key) {
                    Some(read) => fields_that_are_lost(&format!("{path}.{key}"), value, read, lost),
                    None => lost.push(format!("{path}.{key}")),
                }
            }
        }
        (Value::Array(written), Value::Array(read)) => {
            written
                .iter()
                .zip(read)
                .for_each(|(written, read)| fields_that_are_lost(path, written, read, lost));
        }
        _ => {}
    }
}

#[test]
fn the_examples_are_objects_whose_fields_all_count() {
    let mut kinds = std::collections::BTreeSet::new();
    for (file, object) in examples() {
        let kind = object["kind"].as_str().unwrap().to_owned();
        let read = match kind.as_str() {
            "TrainingJob" => {
                serde_json::to_value(serde_json::from_value::<job::TrainingJob>(object.clone()).unwrap())
            }
            _ => serde_json::to_value(
                serde_json::from_value::<cluster::TrainingCluster>(object.clone()).unwrap(),
            ),
        };
        let mut lost = Vec::new();
        fields_that_are_lost(&kind, &object, &read.unwrap(), &mut lost);
        assert!(lost.is_empty(), "{file}: no fields of {kind}: {lost:?}");
        kinds.insert(kind);
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["TrainingCluster", "TrainingJob"]);
}

#[test]
fn the_pod_calls_the_program_as_it_is() {
    let manifest = std::fs::read_to_string(k8s().join("install.yaml")).unwrap();
    let (_, call) = manifest.split_once("command: [/usr/local/bin/contraflow-operator]").unwrap();
    let (_, arguments) = call.split_once("args:\n").unwrap();
    let mut arguments = arguments.lines().map(str::trim).map_while(|line| line.strip_prefix("- "));
    let program = env!("CARGO_BIN_EXE_contraflow-operator");
    let help =
        std::process::Command::new(program).args([arguments.next().unwrap(), "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let flags: Vec<&str> = arguments.map(|argument| argument.split('=').next().unwrap()).collect();
    assert_eq!(flags.len(), 3);
    assert!(flags.iter().all(|flag| help.contains(&format!("{flag} <"))), "{flags:?} {help}");
}

#[tokio::test]
async fn an_operator_without_its_definitions_says_how_they_are_made() {
    let stage = Stage::new();
    let client = stage.api.client(Fuse::default());
    watching::check(&client, "training").await.unwrap();
    stage.api.undefine("trainingclusters");
    let words = watching::check(&client, "training").await.unwrap_err().to_string();
    assert!(
        words.contains("got no TrainingCluster: `kubectl apply --server-side -f k8s/chart/crds`"),
        "{words}"
    );
    stage.api.undefine("trainingjobs");
    let words = watching::check(&client, "training").await.unwrap_err().to_string();
    assert!(words.contains("got no TrainingJob:"), "{words}");
}

/// Every rule of a definition, and the words for what it refuses.
fn rules(schema: &Value) -> Vec<(String, String)> {
    let rules = schema["x-kubernetes-validations"].as_array().unwrap();
    let text = |rule: &Value, field: &str| rule[field].as_str().unwrap().to_owned();
    rules.iter().map(|rule| (text(rule, "rule"), text(rule, "message"))).collect()
}

/// The longest label of a pod is that of its StatefulSet's revision: the set's name, a dash and ten characters, at most 63.
#[test]
fn names_of_clusters_and_groups_fit_into_the_labels_of_their_pods() {
    let version = version(cluster::definition());
    let rules = rules(&version["schema"]["openAPIV3Schema"]);
    let bound = |words: &str| -> usize {
        let (rule, _) = rules.iter().find(|(_, message)| message.contains(words)).unwrap();
        let (_, number) = rule.split_once("<= ").unwrap();
        number.split([' ', ')']).next().unwrap().parse().unwrap()
    };
    assert_eq!(bound("no dot") + "-orchestrator".len() + 11, 63);
    assert_eq!(bound("together with the name of each group") + "-".len() + 11, 63);
    assert!(rules[0].0.contains("!self.metadata.name.contains('.')"));
}

#[test]
fn no_ranks_are_not_a_number_of_ranks() {
    let version = version(job::definition());
    let ranks = &version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["ranks"];
    assert_eq!((&ranks["minimum"], &ranks["maximum"]), (&json!(1.0), &json!(65536.0)));
}
