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
    if !has_promtool() {
        return;
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

/// The metrics of this project that an expression names.
fn names_in(expression: &str) -> impl Iterator<Item = &str> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    expression.split(move |c: char| !is_word(c)).filter(|word| word.starts_with("contraflow_"))
}

#[test]
fn alerts_name_documented_metrics_alone() {
    let alerts = include_str!("../../packaging/prometheus/alerts.yml");
    let expressions = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let names: BTreeSet<&str> = expressions.flat_map(names_in).collect();
    let documented = documented();
    assert!(names.len() >= 6 && names.iter().all(|name| documented.contains_key(*name)), "{names:?}");
}

/// The queries of the panels of the dashboard for Grafana.
fn grafana_queries() -> Vec<String> {
    let text = include_str!("../../packaging/grafana/contraflow.json");
    let dashboard: serde_json::Value = serde_json::from_str(text).unwrap();
    let of_panel = |panel: &serde_json::Value| {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.iter().map(|target| target["expr"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    dashboard["panels"].as_array().unwrap().iter().flat_map(of_panel).collect()
}

#[test]
fn the_dashboard_for_grafana_shows_documented_metrics_and_all_that_tell_how_training_goes() {
    let (queries, documented) = (grafana_queries(), documented());
    let names: BTreeSet<&str> = queries.iter().flat_map(|query| names_in(query)).collect();
    let unknown: Vec<_> = names.iter().filter(|name| !documented.contains_key(**name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // What else there is are constants, times and counts that other queries contain.
    let left_out: BTreeSet<&str> =
        documented.keys().map(String::as_str).filter(|name| !names.contains(name)).collect();
    let expected = [
        "contraflow_build_info",
        "contraflow_dashboard_viewers",
        "contraflow_job_loss_nats",
        "contraflow_jobs_left_out",
        "contraflow_run_info",
        "contraflow_run_last_step_timestamp_seconds",
        "contraflow_run_live_chunks",
        "contraflow_run_tokens_total",
        "contraflow_run_training",
        "contraflow_run_training_seconds_total",
        "contraflow_workers",
    ];
    assert_eq!(left_out, BTreeSet::from(expected));
}

#[test]
fn promtool_reads_every_query_of_the_dashboard_for_grafana() {
    if !has_promtool() {
        return;
    }
    let rule = |(number, query): (usize, String)| {
        let query = query.replace("$run", ".*");
        serde_json::json!({"record": format!("query:{number}"), "expr": query})
    };
    let rules: Vec<_> = grafana_queries().into_iter().enumerate().map(rule).collect();
    assert!(rules.len() >= 20, "{rules:?}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yml");
    let groups = serde_json::json!({"groups": [{"name": "queries", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).unwrap();
    let output = Command::new("promtool").args(["check", "rules"]).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
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
