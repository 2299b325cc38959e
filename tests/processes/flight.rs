//! The flight recorder of a job: what the ranks were about when one of them was lost is in its incident and in the archive of doctor.

use contraflow_runtime::flight::read_all;
use serde_json::Value;

use crate::archive::unpack;
use crate::cluster::{Cluster, ENDLESS, until};

/// A worker that ends with SIGKILL in some operation of its rank, steps after it has begun.
const DIES: (&str, &str) = ("FAILPOINTS", "compute.operation=1200*off->return");

/// What stands in texts that are trained on, and what is secret.
const TEXT: &str = "quetzalcoatlus";
const SECRET: &str = "correcthorse";

/// The line of a job's log that tells of the ranks of a generation.
fn told(cluster: &Cluster, job: &str, generation: u32) -> String {
    let begins = format!("the ranks of generation {generation}: ");
    until("what the recorders tell", || {
        let (_, log, _) = cluster.run(&["logs", job, "--format", "json"]);
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut own = lines.filter(|line| line["ranks"].as_array().unwrap().is_empty());
        own.find_map(|line| Some(line["message"].as_str()?.strip_prefix(&begins)?.to_owned()))
    })
}

fn after_a_loss(changes: &[&str]) -> (Cluster, String, usize) {
    after(DIES, changes)
}

/// A cluster whose job has lost the rank on the worker with this variable, and has gone on with the spare one: which rank it was.
fn after((name, value): (&'static str, &str), changes: &[&str]) -> (Cluster, String, usize) {
    let mut cluster = Cluster::start(3);
    cluster.workers.push(Some(cluster.worker_with(3, &[(name, value.to_owned())])));
    until("all workers", || (cluster.nodes().len() == 4).then_some(()));
    let job = cluster.submit(&[&[ENDLESS], changes].concat(), &[]);
    let on = |status: &Value, rank: usize| status["ranks"][rank]["node"] == "n3";
    let victim = until("the places of the ranks", || {
        let status = cluster.status(&job)?;
        (0..4).find(|&rank| on(&status, rank))
    });
    cluster.workers.push(Some(cluster.worker(4)));
    until("the second generation", || {
        let status = cluster.status(&job)?;
        (status["generation"] == 2 && status["state"] == "running").then_some(())
    });
    (cluster, job, victim)
}

#[test]
fn the_incident_of_a_killed_worker_names_its_rank_the_operation_and_what_the_others_waited_for() {
    let (cluster, job, victim) = after_a_loss(&[]);
    let said = told(&cluster, &job, 1);
    // The failpoint is in an operation of the compute lane.
    assert!(said.starts_with(&format!("rank {victim} had been in ")), "{said}");
    assert!(said.contains(", of step ") && said.contains(" when it was lost; rank"), "{said}");
    let (_, others) = said.split_once(" for it: rank ").unwrap();
    assert!(others.contains(" for ") && others.ends_with(&format!(" from rank {victim}")), "{said}");
    // The same in the incident that the pages show, in the story of the loss.
    let log = cluster.run(&["logs", &job]).1;
    let at = |words: &str| log.lines().position(|line| line.contains(words)).unwrap();
    assert!(at(&format!("rank {victim} lost")) < at(&said), "{log}");
    // Once, and as a warning for an operator.
    assert_eq!(log.matches(" when it was lost").count(), 1, "{log}");
    assert!(log.lines().nth(at(&said)).unwrap().contains(" WARN  orchestrator "), "{log}");
}

#[test]
fn the_incident_of_a_hang_names_the_rank_that_hangs_and_its_operation() {
    // For a minute nobody makes progress: then its worker has to exit.
    let (cluster, job, victim) = after(("FAILPOINTS", "compute.operation=1200*off->1*pause"), &[]);
    let said = told(&cluster, &job, 1);
    assert!(said.starts_with(&format!("rank {victim} had been in ")), "{said}");
    let (_, lasted) = said.split_once(", of step ").unwrap().1.split_once(" for ").unwrap();
    let seconds: f64 = lasted.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds > 50.0 && said.contains(" when it was lost; ranks "), "{said}");
    let log = cluster.run(&["logs", &job]).1;
    assert!(log.contains(&format!("rank {victim} has made no progress for 6")), "{log}");
}

#[test]
fn rings_stay_for_the_last_two_formations_and_go_with_the_jobs_files() {
    let (mut cluster, job, _) = after_a_loss(&[]);
    let folder = cluster.path().join(format!("storage/jobs/{job}"));
    let generation = || cluster.status(&job)?["generation"].as_u64();
    let mut latest = until("a generation", generation);
    for _ in 0..2 {
        let after = cluster.status(&job).unwrap()["step"].as_u64().unwrap() + 1;
        cluster.until_step(&job, after);
        let victim = cluster.host_of(&job, 0);
        cluster.workers[victim].as_mut().unwrap().kill();
        cluster.workers[victim] = Some(cluster.worker(victim));
        latest = until("the next generation", || {
            cluster.status(&job)?["generation"].as_u64().filter(|&generation| generation > latest)
        });
    }
    let read = until("the rings of the last two", || {
        let read = read_all(&folder).unwrap();
        let names: Vec<String> = read.iter().map(|(folder, _)| folder.display().to_string()).collect();
        let expected = [latest, latest - 1].map(|number| format!("flight/generation-{number:05}"));
        (names == expected && read[0].1.len() == 4).then_some(read)
    });
    for (rank, ring) in &read[0].1 {
        let header = &ring.as_ref().unwrap().header;
        assert_eq!((header.rank as usize, header.world, u64::from(header.generation)), (*rank, 4, latest));
    }
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    assert_eq!(cluster.run(&["jobs", "rm", &job]).0, 0);
    until("the end of the folder", || (!folder.exists()).then_some(()));
}

#[test]
fn where_rings_cannot_be_kept_the_ranks_train_without_and_say_so_once() {
    let cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 2);
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    // A file is in the place of the folder.
    let flight = cluster.path().join(format!("storage/jobs/{job}/flight"));
    std::fs::remove_dir_all(&flight).unwrap();
    std::fs::write(&flight, "").unwrap();
    assert_eq!(cluster.run(&["retry", &job]).0, 0);
    let steps = until("steps of the second generation", || {
        let status = cluster.status(&job)?;
        (status["generation"] == 2 && status["state"] == "running").then(|| status["step"].as_u64().unwrap())
    });
    cluster.until_step(&job, steps + 3);
    let said = || {
        let log = cluster.run(&["logs", &job]).1;
        log.lines().filter(|line| line.contains("what the ranks do is not recorded")).count()
    };
    // Workers that say the same may share a line.
    until("what is said of it", || (said() > 0).then_some(()));
    assert!(said() <= 4, "{}", cluster.run(&["logs", &job]).1);
    assert!(flight.is_file());
}

#[test]
fn the_archive_of_a_job_has_the_sentence_and_neither_a_secret_nor_a_text() {
    let (cluster, job, victim) = after_a_loss(&["sample.every=5", &format!("sample.prompt={TEXT}")]);
    let said = told(&cluster, &job, 1);
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    let folder = cluster.path().join(format!("storage/jobs/{job}"));
    // What a job's folder may hold beside its own files.
    for file in ["summary.json", "samples.jsonl", "evidence.json", "token", "flight/notes.txt"] {
        std::fs::write(folder.join(file), format!("{{\"prompt\": \"{TEXT} {SECRET}\"}}")).unwrap();
    }
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    std::fs::write(folder.join("metrics.jsonl"), format!("{SECRET} {TEXT}\n{metrics}")).unwrap();
    std::fs::write(cluster.path().join("token.txt"), SECRET).unwrap();
    let archive = cluster.path().join("report.tar.gz");
    let (_, out, stderr) = cluster.run(&["doctor", &job, "--archive", "report.tar.gz", "--token", SECRET]);
    assert!(out.contains(&said) && out.contains(&format!("rank {victim} lost")), "{out}{stderr}");
    assert!(!out.contains(SECRET) && !stderr.contains(SECRET), "{out}{stderr}");
    let files = unpack(&archive);
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    for name in
        ["doctor.json", "doctor.txt", "environment.txt", "log.jsonl", "metrics-tail.jsonl", "recipe.toml"]
    {
        assert!(names.contains(&format!("doctor/{name}").as_str()), "{names:?}");
    }
    let rings = |generation: u32| {
        let folder = format!("doctor/flight/generation-{generation:05}/rank-");
        names.iter().filter(|name| name.starts_with(&folder)).count()
    };
    assert_eq!((rings(1), rings(2)), (4, 4), "{names:?}");
    let holds = |bytes: &[u8], word: &str| bytes.windows(word.len()).any(|part| part == word.as_bytes());
    for (name, bytes) in &files {
        assert!(!holds(bytes, SECRET), "{name}: {}", String::from_utf8_lossy(bytes));
        assert!(!holds(bytes, TEXT), "{name}: {}", String::from_utf8_lossy(bytes));
    }
    assert!(holds(&files["doctor/doctor.txt"], &said) && holds(&files["doctor/log.jsonl"], &said));
    let recipe: toml::Table =
        String::from_utf8(files["doctor/recipe.toml"].clone()).unwrap().parse().unwrap();
    assert_eq!(recipe["parallel"]["pipeline"].as_integer(), Some(2));
    // The same for programs; who has no such job is told so.
    let (_, out, _) = cluster.run(&["doctor", &job, "--format", "json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["job"], report["ranks"].as_array().unwrap().len()), (&Value::from(job.as_str()), 4));
    let (code, _, stderr) = cluster.run(&["doctor", "job-99"]);
    assert!(code == 2 && stderr.contains("job-99"), "{stderr}");
}

#[test]
fn without_the_storage_the_report_says_where_the_files_are_and_tells_the_rest() {
    let (cluster, job, _) = after_a_loss(&[]);
    let said = told(&cluster, &job, 1);
    // As on a machine that does not have it.
    let storage = cluster.path().join("storage");
    let elsewhere = cluster.path().join("elsewhere");
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    std::fs::rename(&storage, &elsewhere).unwrap();
    let (_, out, stderr) = cluster.run(&["doctor", &job, "--archive", "report.tar.gz"]);
    std::fs::rename(&elsewhere, &storage).unwrap();
    assert!(out.contains(&said) && out.contains("not to be reached from here"), "{out}{stderr}");
    assert!(out.contains(&format!("storage/jobs/{job}")), "{out}");
    let names: Vec<String> = unpack(&cluster.path().join("report.tar.gz")).into_keys().collect();
    let expected = ["doctor.json", "doctor.txt", "environment.txt", "log.jsonl", "recipe.toml"];
    assert_eq!(names, expected.map(|name| format!("doctor/{name}")));
}
