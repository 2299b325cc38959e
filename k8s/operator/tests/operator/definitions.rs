//! The definitions that are installed: those that the program prints, with what users are shown and what they are refused.

use std::path::{Path, PathBuf};

use contraflow_operator::{cluster, job, yaml};
use serde_json::Value;

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../chart")
}

#[test]
fn the_chart_has_the_definitions_that_the_program_prints() {
    for (kind, text) in [
        ("trainingjobs", yaml(&job::definition()).unwrap()),
        ("trainingclusters", yaml(&cluster::definition()).unwrap()),
    ] {
        let path = chart().join("crds").join(format!("{kind}.yaml"));
        if std::env::var_os("CONTRAFLOW_WRITE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
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
