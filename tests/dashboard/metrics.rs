//! What `/metrics` gives, against docs/metrics.md and against the rules of the format.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use contraflow::dashboard::metric_families;

use crate::http::get;
use crate::{serve, shown};

/// Rows of the tables of docs/metrics.md: name, kind, meaning.
fn documented() -> BTreeMap<String, (String, String)> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `contraflow_"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0].trim_matches('`').to_owned(), (cells[1].to_owned(), cells[2].to_owned()))
    };
    rows.map(row).collect()
}

#[test]
fn the_document_has_every_family_and_no_other() {
    let families: BTreeMap<String, (String, String)> = metric_families()
        .map(|(name, kind, help)| (name.to_owned(), (kind.to_owned(), help.to_owned())))
        .collect();
    assert_eq!(documented(), families);
}

#[test]
fn a_local_run_emits_what_is_documented_in_base_units_with_few_labels() {
    let dashboard = serve(vec![shown(4)], "127.0.0.1:0", None);
    let answer = get(dashboard.address(), "/metrics");
    assert_eq!(
        (answer.status, answer.headers["content-type"].as_str()),
        (200, "text/plain; version=0.0.4; charset=utf-8")
    );
    let samples: Vec<&str> = answer.body.lines().filter(|line| !line.starts_with('#')).collect();
    let name = |sample: &&str| sample.split(['{', ' ']).next().unwrap().to_owned();
    let emitted: BTreeSet<String> = samples.iter().map(name).collect();
    let documented: BTreeSet<String> = documented().into_keys().collect();
    assert!(emitted.is_subset(&documented), "{emitted:?}");
    assert!(emitted.len() >= 25, "{}: {emitted:?}", emitted.len());
    let value = |start: &str| {
        let sample = samples.iter().find(|sample| sample.starts_with(start));
        sample
            .unwrap_or_else(|| panic!("{start} in {samples:?}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse::<f64>()
            .unwrap()
    };
    assert_eq!(value("contraflow_run_step{run=\"tiny\"}"), 4.0);
    assert_eq!(value("contraflow_run_tokens_total{run=\"tiny\"}"), 4_096.0);
    assert_eq!(value("contraflow_run_loss_nats{run=\"tiny\"}"), 1.5);
    assert_eq!(value("contraflow_run_idle_experts{run=\"tiny\",layer=\"1\"}"), 1.0);
    assert_eq!(value("contraflow_run_expert_violation_ratio{run=\"tiny\",layer=\"1\"}"), 1.0);
    assert_eq!(value("contraflow_run_last_step_timestamp_seconds"), 1_700_000_000.004);
    let labels = |sample: &&str| sample.split(['{', '}']).nth(1).unwrap_or_default().to_owned();
    let keys: BTreeSet<String> = samples
        .iter()
        .flat_map(|sample| {
            labels(sample)
                .split(',')
                .map(|pair| pair.split('=').next().unwrap().to_owned())
                .collect::<Vec<_>>()
        })
        .collect();
    let allowed = ["", "run", "layer", "model", "schedule", "ranks", "version"];
    assert!(keys.iter().all(|key| allowed.contains(&key.as_str())), "{keys:?}");
}

/// Says so where a test is skipped.
fn has_promtool() -> bool {
    let run = Command::new("promtool").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let is_there = run.is_ok_and(|status| status.success());
    if !is_there {
        eprintln!("skipped: there is no promtool");
    }
    is_there
}

#[test]
fn promtool_has_nothing_to_say() {
    let has_promtool =
        Command::new("promtool").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !has_promtool.is_ok_and(|status| status.success()) {
        return eprintln!("skipped: there is no promtool");
    }
    let dashboard = serve(vec![shown(4)], "127.0.0.1:0", None);
    let text = get(dashboard.address(), "/metrics").body;
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn alerts_name_documented_metrics_alone() {
    let alerts = include_str!("../../packaging/prometheus/alerts.yml");
    let expressions = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names: BTreeSet<&str> = expressions
        .flat_map(|expression| {
            expression.split(|c: char| !is_word(c)).filter(|word| word.starts_with("contraflow_"))
        })
        .collect();
    let documented = documented();
    assert!(names.len() >= 6 && names.iter().all(|name| documented.contains_key(*name)), "{names:?}");
}

#[test]
fn alerts_fire_when_they_should() {
    if !has_promtool() {
        return;
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/prometheus");
    let output = Command::new("promtool")
        .args(["test", "rules", "alerts.test.yml"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
