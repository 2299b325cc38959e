//! The placement that a dashboard proposes: of a run that trains and of a folder, over HTTP.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use contraflow::dashboard::of_folder;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_proto::LayerLoad;
use serde_json::{Value, json};

use crate::http::get;
use crate::{record, serve, shown};

/// How long a folder may take to be read.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of eight experts, on two ranks: 24 and 8 tokens a rank in order. The heaviest two on one rank each and the light ones around them
/// make 16 and 16.
const LOAD: [u64; 8] = [9, 7, 5, 3, 1, 3, 1, 3];

fn with_loads(step: u64, counts: &[u64]) -> StepRecord {
    StepRecord { loads: vec![LayerLoad { layer: 2, counts: counts.to_vec() }], ..record(step) }
}

fn placement(address: SocketAddr, run: &str) -> Value {
    let answer = get(address, &format!("/api/v1/runs/{run}/placement"));
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

/// Whoever is asked, the answer is this one.
fn assert_is_proposed(view: &Value, steps: &Value) {
    assert_eq!(&view["steps"], steps);
    assert_eq!((&view["ranks"], &view["copies_per_rank"]), (&json!(2), &json!(1)), "{view}");
    let [layer] = &view["layers"].as_array().unwrap()[..] else { panic!("{view}") };
    assert_eq!((&layer["layer"], &layer["now"]), (&json!(2), &json!(1.5)));
    assert_eq!(layer["moved"]["imbalance"], 1.0, "{layer}");
    let mut loads: Vec<u64> = Vec::new();
    for rank in layer["moved"]["ranks"].as_array().unwrap() {
        let experts = rank.as_array().unwrap().iter().map(|expert| expert.as_u64().unwrap() as usize);
        loads.push(experts.map(|expert| LOAD[expert]).sum());
    }
    assert_eq!(loads, [16, 16], "{layer}");
}

#[test]
fn a_run_that_trains_is_told_where_its_experts_would_stand_and_what_that_gains() {
    let run = shown(0);
    let dashboard = serve(vec![run.clone()], "127.0.0.1:0", None);
    let before = placement(dashboard.address(), "tiny");
    assert_eq!((&before["layers"], &before["steps"]["count"]), (&json!([]), &json!(0)));
    assert!(before["why"].as_str().unwrap().contains("of no step"), "{before}");
    // Two steps with this mean.
    let more = LOAD.map(|tokens| 2 * tokens);
    run.step(&with_loads(1, &more));
    run.step(&with_loads(2, &[0; 8]));
    assert_is_proposed(&placement(dashboard.address(), "tiny"), &json!({"count": 2, "first": 1, "last": 2}));
}

#[test]
fn a_run_that_is_over_is_told_the_same_from_its_folder() {
    let runs = tempfile::tempdir().unwrap();
    let folder = runs.path().join("over");
    std::fs::create_dir(&folder).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write("recipe.toml", include_str!("../../recipes/tiny.toml").to_owned());
    write(
        "metrics.jsonl",
        (1..=6).map(|step| serde_json::to_string(&record(step)).unwrap() + "\n").collect(),
    );
    let line = |step: u64| json!({"step": step, "loads": [{"layer": 2, "counts": LOAD}]}).to_string() + "\n";
    write("experts.jsonl", line(3) + &line(6));
    write("summary.json", "{}".to_owned());
    let dashboard = serve(vec![of_folder(&folder).unwrap()], "127.0.0.1:0", None);
    let began = Instant::now();
    let view = loop {
        let view = placement(dashboard.address(), "over");
        if view["steps"]["count"] != 0 {
            break view;
        }
        assert!(began.elapsed() < PATIENCE, "nothing of experts.jsonl has been read: {view}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_is_proposed(&view, &json!({"count": 2, "first": 3, "last": 6}));
}
