//! What `contraflow doctor` says of runs that were killed, that hang and that are damaged, and what its archive holds.

use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::archive::unpack;
use crate::workplace::{Workplace, stderr, wait_for};

/// Long enough not to end by itself in a test.
const LONG: [&str; 6] =
    ["train", "recipe.toml", "--set", "training.steps=1000000", "--set", "checkpoint.every=0"];

/// What the doctor says of a run, and its exit code.
fn examine(place: &Workplace, run: &str) -> (Value, Option<i32>) {
    let output = place.run(&["doctor", run, "--format", "json"]);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    (report, output.status.code())
}

/// How a check has ended, and what it says.
fn check<'a>(report: &'a Value, name: &str) -> (&'a str, &'a str) {
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    let text = |key: &str| check[key].as_str().unwrap();
    assert!(text("status") == "ok" || check["to_do"].is_string(), "{check}");
    (text("status"), text("says"))
}

#[test]
fn a_run_that_was_killed_has_left_what_its_ranks_were_about() {
    let place = Workplace::new();
    let mut child = place.start(&LONG, "");
    drop(wait_for(&mut child, "step 1/"));
    let steps = || {
        let metrics = std::fs::read_to_string(place.path("runs/recipe/metrics.jsonl")).unwrap();
        metrics.lines().count()
    };
    let began = Instant::now();
    while steps() < 3 {
        assert!(began.elapsed() < Duration::from_secs(120), "no three steps within two minutes");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (report, code) = examine(&place, "runs/recipe");
    assert_eq!(code, Some(0), "{report}");
    let (status, says) = check(&report, "ranks");
    assert_eq!(status, "warning", "{says}");
    assert!(says.starts_with("ended before they had finished: "), "{says}");
    assert_eq!(check(&report, "run").0, "warning");
    let ranks = report["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 2, "{report}");
    // The steps of the two differ by no more than what runs ahead, and each had made at least two.
    let last = |rank: &Value| rank["last"]["step"].as_u64().unwrap();
    assert!(ranks.iter().all(|rank| last(rank) >= 2), "{report}");
    assert!(last(&ranks[0]).abs_diff(last(&ranks[1])) <= 1, "{report}");
    let on_record = place.curve("runs/recipe").last().unwrap().0;
    assert!(last(&ranks[0]).abs_diff(on_record) <= 2, "{on_record}: {report}");
    assert!(!ranks[0]["last"]["operation"].as_str().unwrap().is_empty());
    let text = String::from_utf8(place.run(&["doctor"]).stdout).unwrap();
    assert!(text.contains("\nrank 1 ") && text.contains("of step "), "{text}");
}

#[test]
fn a_run_that_finished_is_well_and_the_next_has_a_record_of_its_own() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let (report, code) = examine(&place, "recipe");
    assert_eq!(
        (code, check(&report, "ranks")),
        (Some(0), ("ok", "all ranks have done what they were asked"))
    );
    let faults: Vec<&Value> =
        report["checks"].as_array().unwrap().iter().filter(|check| check["status"] != "ok").collect();
    assert!(faults.is_empty(), "{faults:?}");
    // One rank instead of two: nothing of the second is left.
    let one =
        ["--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b", "--set", "training.steps=14"];
    place.succeed(&[&["train", "--resume"][..], &one].concat());
    let (report, _) = examine(&place, "recipe");
    assert_eq!(report["ranks"].as_array().unwrap().len(), 1, "{report}");
}

#[test]
fn a_hang_names_the_rank_its_operation_and_who_waits_and_still_does_when_it_was_killed() {
    let place = Workplace::new();
    // Some operation in the third step or so does not come back.
    let mut child = place.start(&LONG, "compute.operation=300*off->1*pause");
    let lines = wait_for(&mut child, "step 1/");
    let began = Instant::now();
    let mut stuck_for = None;
    let stuck = loop {
        let (report, code) = examine(&place, "runs/recipe");
        let seconds = report["ranks"][0]["seconds"].as_f64().unwrap_or_default();
        if report["is_stuck"] == true {
            assert_eq!(code, Some(1), "{report}");
            // The last sign of life before a kill may be a second old: by then it has to be a hang as well.
            if seconds > *stuck_for.get_or_insert(seconds) + 3.0 {
                break report;
            }
        }
        assert!(began.elapsed() < Duration::from_secs(120), "no hang within two minutes: {report}");
        std::thread::sleep(Duration::from_millis(500));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    drop(lines);
    let words = |report: &Value| report["flight"].as_str().unwrap().to_owned();
    let said = words(&stuck);
    let (rank, other) = if said.starts_with("rank 0 ") { (0, 1) } else { (1, 0) };
    assert!(said.starts_with(&format!("rank {rank} has been in ")), "{said}");
    assert!(said.contains(", stage ") && said.contains(", micro-batch "), "{said}");
    assert!(said.contains(", of step ") && said.ends_with(&format!("; rank {other} waits for it")), "{said}");
    let doing = stuck["ranks"][other]["doing"].as_str().unwrap();
    assert!(
        doing.starts_with("has been waiting for ") && doing.contains(&format!("from rank {rank}")),
        "{doing}"
    );
    // The process said until its end that it was alive, so that it is known for how long.
    let (after, code) = examine(&place, "runs/recipe");
    let until = |words: &str| words.split(" for ").next().unwrap().to_owned();
    assert_eq!((code, until(&words(&after))), (Some(1), until(&said)));
    assert_eq!(check(&after, "ranks").0, "failed");
}

#[test]
fn each_fault_is_found_by_the_check_that_is_meant_for_it() {
    let place = Workplace::new();
    place.succeed(&["train", "recipe.toml"]);
    let run = place.path("runs/recipe");
    let sound = examine(&place, "recipe").0;
    assert!(check(&sound, "metrics").1.starts_with("12 steps, the last is step 12"), "{sound}");
    assert!(check(&sound, "checkpoints").1.starts_with("whole, of step "), "{sound}");

    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let damaged = metrics.replacen('{', "x", 1) + "{\"step\":13,\"lo";
    std::fs::write(run.join("metrics.jsonl"), damaged).unwrap();
    let shard = std::fs::read_dir(place.checkpoint("runs/recipe", 12))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let recipe = std::fs::read_to_string(run.join("recipe.toml")).unwrap();
    std::fs::write(run.join("recipe.toml"), recipe.replace("pipeline = 2", "pipeline = 3")).unwrap();
    std::fs::write(run.join("flight/rank-00001.ring"), "torn").unwrap();
    std::fs::write(run.join("evidence.json"), "{}").unwrap();
    let tomorrow = SystemTime::now() + Duration::from_secs(86_400);
    std::fs::File::open(run.join("recipe.toml")).unwrap().set_modified(tomorrow).unwrap();

    let (report, code) = examine(&place, "recipe");
    assert_eq!(code, Some(1), "{report}");
    let (status, says) = check(&report, "metrics");
    assert!(status == "warning" && says.starts_with("11 steps") && says.ends_with("in line 1"), "{says}");
    let (status, says) = check(&report, "checkpoints");
    assert!(status == "failed" && says.contains("step 12: ") && !says.contains("step 8: "), "{says}");
    let (status, says) = check(&report, "recipe");
    assert!(status == "failed" && says.contains("parallel.pipeline"), "{says}");
    assert_eq!(check(&report, "clock").0, "warning");
    assert_eq!(check(&report, "evidence").0, "warning");
    let doing = report["ranks"][1]["doing"].as_str().unwrap();
    assert!(doing.contains("no record that can be read"), "{doing}");

    let output = place.run(&["doctor", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("nowhere: expected a run"), "{}", stderr(&output));
}

#[test]
fn an_archive_holds_what_a_report_needs_and_neither_a_secret_nor_a_text() {
    const SECRET: &str = "correcthorse";
    const TEXT: &str = "quetzalcoatlus";
    let place = Workplace::new();
    let line = |number: usize| format!("the {TEXT} {number} jumps over {} lazy dogs\n", number % 5);
    std::fs::write(place.path("text.txt"), (0..600).map(line).collect::<String>()).unwrap();
    place.succeed(&["train", "recipe.toml"]);
    let run = place.path("runs/recipe");
    let holds = |bytes: &[u8], word: &str| bytes.windows(word.len()).any(|part| part == word.as_bytes());
    // Runs keep words of the text and what was generated in files of their own.
    for file in ["summary.json", "samples.jsonl", "evidence.json"] {
        std::fs::write(run.join(file), format!("{{\"sample_prompt\": \"{TEXT} {SECRET}\"}}")).unwrap();
    }
    std::fs::write(run.join("token"), SECRET).unwrap();
    std::fs::write(run.join("flight/notes.txt"), SECRET).unwrap();
    let recipe = std::fs::read_to_string(run.join("recipe.toml")).unwrap();
    let store = format!("store = \"s3://user:{SECRET}@bucket/x?signature={SECRET}\"");
    assert!(recipe.contains("store = \"\"") && recipe.contains("prompt = \"\""));
    let recipe =
        recipe.replace("store = \"\"", &store).replace("prompt = \"\"", &format!("prompt = \"{TEXT}\""));
    std::fs::write(run.join("recipe.toml"), format!("# {SECRET} {TEXT}\n{recipe}")).unwrap();
    let plan = std::fs::read_to_string(run.join("plan.txt")).unwrap();
    std::fs::write(run.join("plan.txt"), format!("# {SECRET}\n{plan}")).unwrap();
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), format!("{SECRET} {TEXT}\n{metrics}")).unwrap();
    // Behind what is recorded, in the place of a record.
    let ring = run.join("flight/rank-00001.ring");
    let mut bytes = std::fs::read(&ring).unwrap();
    let at = bytes.len() - 64;
    bytes[at..at + SECRET.len()].copy_from_slice(SECRET.as_bytes());
    std::fs::write(&ring, bytes).unwrap();

    let mut command = place.command(&["doctor", "recipe", "--archive", "report.tar.gz"]);
    command.env("AWS_SECRET_ACCESS_KEY", SECRET).env("RUST_LOG", format!("info,token={SECRET}"));
    let output = crate::deadline::output(command.env("CONTRAFLOW_TOKEN", SECRET));
    assert!(!holds(&output.stdout, SECRET) && !holds(&output.stderr, SECRET), "{output:?}");
    let files = unpack(&place.path("report.tar.gz"));
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected = [
        "doctor/doctor.json",
        "doctor/doctor.txt",
        "doctor/environment.txt",
        "doctor/flight/rank-00000.ring",
        "doctor/flight/rank-00001.ring",
        "doctor/metrics-tail.jsonl",
        "doctor/plan.txt",
        "doctor/recipe.toml",
    ];
    assert_eq!(names, expected);
    for (name, bytes) in &files {
        assert!(!holds(bytes, SECRET), "{name}: {}", String::from_utf8_lossy(bytes));
        assert!(!holds(bytes, TEXT), "{name}: {}", String::from_utf8_lossy(bytes));
    }
    let text = |name: &str| String::from_utf8(files[&format!("doctor/{name}")].clone()).unwrap();
    let recipe: toml::Table = text("recipe.toml").parse().unwrap();
    assert_eq!(recipe["parallel"]["pipeline"].as_integer(), Some(2));
    assert_eq!(recipe["checkpoint"]["store"].as_str(), Some("s3://[redacted]@bucket/x?[redacted]"));
    assert_eq!(text("metrics-tail.jsonl").lines().count(), 12);
    assert_eq!(text("plan.txt"), plan);
    assert!(
        text("environment.txt").contains("RUST_LOG=info,token=[redacted]"),
        "{}",
        text("environment.txt")
    );
    assert!(text("doctor.txt").contains("ranks "), "{}", text("doctor.txt"));
    let report: Value = serde_json::from_str(&text("doctor.json")).unwrap();
    assert_eq!(report["ranks"].as_array().unwrap().len(), 2);
    // Of the ring all is there that can be read.
    let ring = contraflow_runtime::flight::Ring::read(&files["doctor/flight/rank-00001.ring"]).unwrap();
    assert!(ring.unreadable == 0 && ring.records.len() > 100, "{}", ring.records.len());
}
