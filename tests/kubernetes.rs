//! What is in `k8s/` fits the program and itself: its pods call the program as it is, the manifest is the rendered chart, and every
//! example renders. What the operator does with its objects is tested where it is: `k8s/operator`. Rendering needs helm, and validation kubernetes-validate; a test without its tool says so.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s")
}

/// The tool that an environment variable names, or else that of the path.
fn tool(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from);
    let answers = Command::new(&named).arg("--help").output().is_ok_and(|output| output.status.success());
    if !answers {
        println!("skipped: no {name}; {variable} may name one");
    }
    answers.then_some(named)
}

fn template(helm: &Path, arguments: &[&str]) -> Output {
    release(helm, "contraflow", arguments)
}

fn release(helm: &Path, name: &str, arguments: &[&str]) -> Output {
    let chart = folder().join("chart");
    let mut command = Command::new(helm);
    command.args(["template", name]).arg(chart).args(["--namespace", "contraflow"]).args(arguments);
    command.output().unwrap()
}

fn rendered(helm: &Path, arguments: &[&str]) -> String {
    let output = template(helm, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Those that are values of the chart; the others are objects.
fn examples() -> Vec<String> {
    let entries = std::fs::read_dir(folder().join("examples")).unwrap();
    let is_object = |path: &PathBuf| std::fs::read_to_string(path).unwrap().contains("\nkind: ");
    let paths = entries.map(|entry| entry.unwrap().path()).filter(|path| !is_object(path));
    paths.map(|path| path.display().to_string()).collect()
}

#[test]
fn pods_call_the_program_as_it_is() {
    let manifest = std::fs::read_to_string(folder().join("install.yaml")).unwrap();
    // The operator's is a program of its own, whose test looks at it.
    let (calls, operator): (Vec<&str>, Vec<&str>) =
        manifest.split("args:\n").skip(1).partition(|call| !call.trim_start().starts_with("- run\n"));
    assert_eq!((calls.len(), operator.len()), (2, 1));
    for call in calls {
        let mut arguments = call.lines().map(str::trim).map_while(|line| line.strip_prefix("- "));
        let subcommand = arguments.next().unwrap();
        let help =
            Command::new(env!("CARGO_BIN_EXE_contraflow")).args([subcommand, "--help"]).output().unwrap();
        assert!(help.status.success(), "{subcommand}");
        let help = String::from_utf8(help.stdout).unwrap();
        let flags: Vec<&str> = arguments.map(|argument| argument.split('=').next().unwrap()).collect();
        assert!(flags.len() >= 3, "{flags:?}");
        for flag in flags {
            assert!(help.contains(&format!("{flag} <")), "{subcommand} has no {flag}");
        }
    }
}

#[test]
fn the_manifest_is_the_rendered_chart() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    let manifest = std::fs::read_to_string(folder().join("install.yaml")).unwrap();
    let chart = rendered(&helm, &["--include-crds"]);
    assert!(manifest == chart, "k8s/install.yaml is not the chart's: `just manifest` renders it again");
}

#[test]
fn every_example_renders_and_is_what_kubernetes_expects() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    let validate = tool("CONTRAFLOW_KUBERNETES_VALIDATE", "kubernetes-validate");
    for example in examples() {
        let manifest = rendered(&helm, &["--values", &example]);
        let Some(validate) = &validate else { continue };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("manifest.yaml");
        std::fs::write(&file, manifest).unwrap();
        let output = Command::new(validate).arg("--strict").arg(&file).output().unwrap();
        assert!(output.status.success(), "{example}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn without_its_operator_the_chart_asks_for_no_right() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    assert!(rendered(&helm, &[]).contains("kind: Role\n"));
    let without = rendered(&helm, &["--set", "operator.enabled=false"]);
    for kind in ["Role", "RoleBinding", "ServiceAccount", "Deployment"] {
        assert!(!without.contains(&format!("kind: {kind}\n")), "{kind}");
    }
}

#[test]
fn the_operator_reaches_the_orchestrator_whoever_else_may() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    let admits = |arguments: &[&str]| {
        let arguments = [&["--show-only", "templates/policies.yaml"], arguments].concat();
        rendered(&helm, &arguments).matches("app.kubernetes.io/component: operator").count()
    };
    let nobody = ["--set-json", "networkPolicy.clients=[]"];
    assert_eq!((admits(&[]), admits(&nobody)), (1, 1));
    assert_eq!(admits(&[&nobody[..], &["--set", "operator.enabled=false"]].concat()), 0);
}

#[test]
fn names_that_do_not_fit_into_the_labels_of_pods_are_refused() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    let named = |length: usize| {
        let group = format!("workers[0].name={}", "a".repeat(length));
        let values = ["--set", &group, "--set", "workers[0].slots=2", "--set", "workers[0].replicas=1"];
        let output = release(&helm, "contraflow-of-the-east-12", &values);
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert!(named(26).0, "{}", named(26).1);
    let (is_taken, words) = named(27);
    assert!(!is_taken && words.contains("workers[0].name: expected at most 26 characters"), "{words}");
}

#[test]
fn values_that_cannot_be_are_refused_by_their_schema() {
    let Some(helm) = tool("CONTRAFLOW_HELM", "helm") else { return };
    for (value, fault) in [
        ("workers[0].slots=0", "'/workers/0/slots': minimum: got 0, want 1"),
        ("workers[0].replica=3", "additional properties 'replica' not allowed"),
        ("orchestrator.port=80", "'/orchestrator/port': minimum: got 80"),
        ("tls.workerSecret=", "'/tls/workerSecret': minLength"),
        ("operator.enabled=maybe", "'/operator/enabled': got string, want boolean"),
        ("orchestrator.extraArgs[0]=lease-ms", "'/orchestrator/extraArgs/0'"),
        ("securityContext.runAsUser=0", "'/securityContext/runAsUser': minimum"),
    ] {
        let output = template(&helm, &["--set", value]);
        assert!(!output.status.success(), "{value} is taken");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains(fault), "{value}: {words}");
    }
}
