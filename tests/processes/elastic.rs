//! Jobs that grow and shrink while workers come and go: each step once, every sequence once, on whatever layout.

use rustix::process::Signal;
use serde_json::Value;

use crate::chaos::from_memory;
use crate::cluster::{Cluster, ENDLESS, committed, curve, until};
use crate::hostile::ALONE;

/// Steps over which a difference of rounding has not grown beyond 1e-3; see tests/cluster/resume.rs.
const COMPARED: usize = 60;

const ELASTIC: [&str; 4] = ["--min-ranks", "1", "--max-ranks", "4"];

fn ranks(cluster: &Cluster, job: &str) -> Option<usize> {
    Some(cluster.status(job)?["ranks"].as_array()?.len())
}

fn until_ranks(cluster: &Cluster, job: &str, count: usize) {
    until(&format!("{count} ranks of {job}"), || (ranks(cluster, job)? == count).then_some(()));
}

/// Each step once, in order, and for as long as rounding does not count what an undisturbed run has.
fn compare(steps: &[Value], whole: &[Value]) {
    let numbers: Vec<u64> = steps.iter().map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=steps.len() as u64).collect::<Vec<_>>());
    for (step, whole) in steps.iter().zip(whole) {
        let (got, expected) = (step["loss"].as_f64().unwrap(), whole["loss"].as_f64().unwrap());
        assert!((got - expected).abs() <= 1e-3 * expected, "{step} {whole}");
        assert_eq!(step["tokens"], whole["tokens"], "{step} {whole}");
    }
}

#[test]
fn a_job_grows_with_the_cluster_and_is_scaled_and_every_step_is_that_of_an_undisturbed_run() {
    let mut cluster = Cluster::start(1);
    let changes = [&ALONE[..], &[ENDLESS]].concat();
    let whole = cluster.undisturbed(&changes, COMPARED);
    let job = cluster.submit(&changes, &ELASTIC);
    cluster.until_step(&job, 2);
    assert_eq!(ranks(&cluster, &job), Some(1));
    for number in 1..4 {
        let worker = cluster.worker(number);
        cluster.workers.push(Some(worker));
    }
    until_ranks(&cluster, &job, 4);
    let words = cluster.run(&["status", &job]).1;
    assert!(words.contains("ranks: 4 of 1 to 4\n"), "{words}");

    let (code, said, errors) = cluster.run(&["scale", &job, "--ranks", "2"]);
    assert_eq!((code, said.contains("1 to 2 ranks")), (0, true), "{said}{errors}");
    until_ranks(&cluster, &job, 2);
    let words = cluster.run(&["status", &job]).1;
    assert!(words.contains("ranks: 2 of 1 to 2, as it was scaled\n"), "{words}");
    assert_eq!(cluster.run(&["scale", &job, "--ranks", "auto"]).0, 0);
    until_ranks(&cluster, &job, 4);
    // A node that is drained: there is no layout of three ranks, so there are two, until it is back.
    assert_eq!(cluster.run(&["drain", "n3"]).0, 0);
    until_ranks(&cluster, &job, 2);
    assert_eq!(cluster.run(&["drain", "--undo", "n3"]).0, 0);
    until_ranks(&cluster, &job, 4);
    compare(&cluster.ten_more_steps(&job), &whole);
    let (_, log, _) = cluster.run(&["logs", &job]);
    for words in
        ["grows from 1 rank to ", "scaled to 2 ranks; its state ", "grows from 2 ranks to 4; its state "]
    {
        assert!(log.contains(words), "{words:?} is not in {log}");
    }
    assert!(cluster.workers.iter_mut().flatten().all(|worker| !worker.has_ended()), "the processes stay");
    for (arguments, words) in [
        (["scale", &job, "--ranks", "2"], "job: expected one that has not ended"),
        (["scale", &job, "--ranks", "0"], "expected a number from 1 on, or auto"),
        (["scale", "job-99", "--ranks", "2"], "job-99"),
    ] {
        let (code, said, errors) = cluster.run(&arguments);
        assert_eq!(code, 2, "{said}{errors}");
        assert!(errors.contains(words), "{words:?} is not in {errors}");
    }
}

#[test]
fn a_job_gives_up_ranks_to_others_and_has_them_back() {
    let cluster = Cluster::start(4);
    let changes = [&ALONE[..], &[ENDLESS]].concat();
    let job = cluster.submit(&changes, &ELASTIC);
    until_ranks(&cluster, &job, 4);
    cluster.until_step(&job, 2);
    // As important: it gives up what goes beyond its recipe.
    let two = ["parallel.pipeline=2", "parallel.expert=1", ENDLESS];
    let other = cluster.submit(&two, &[]);
    until_ranks(&cluster, &other, 2);
    until("a rank of the first job", || (ranks(&cluster, &job)? > 0).then_some(()));
    cluster.until_step(&other, 2);
    assert!(ranks(&cluster, &job) <= Some(2));
    assert_eq!(cluster.run(&["cancel", &other]).0, 0);
    until_ranks(&cluster, &job, 4);
    let steps = cluster.ten_more_steps(&job);
    compare(&steps, &[]);
}

#[test]
fn a_job_has_only_layouts_that_its_recipe_names_and_says_why_it_has_which() {
    let mut cluster = Cluster::start(3);
    let named = "elastic.layouts=[[1, 1, 1], [1, 1, 4]]";
    let changes = [&ALONE[..], &[ENDLESS, named]].concat();
    let job = cluster.submit(&changes, &[]);
    cluster.until_step(&job, 2);
    let words = cluster.run(&["status", &job]).1;
    let layout = "1 rank as pipeline 1, expert 1, data 1: the most that 3 free slots allow; of 2 layouts that the recipe names; \
                  1,1,4 needs 4";
    assert!(words.contains(&format!("ranks: 1 of 1 to 4\n  layout: {layout}\n")), "{words}");
    let (code, said, errors) = cluster.run(&["scale", &job, "--ranks", "2"]);
    assert_eq!(code, 2, "{said}{errors}");
    assert!(
        errors.contains("ranks: expected 1 or 4, those of the layouts that the recipe names, got 2"),
        "{errors}"
    );
    let worker = cluster.worker(3);
    cluster.workers.push(Some(worker));
    until_ranks(&cluster, &job, 4);
    let status = cluster.status(&job).unwrap();
    let grown = "4 ranks as pipeline 1, expert 1, data 4: the most that it may have; of 2 layouts that the recipe names";
    assert_eq!(status["layout"], grown);
    let (_, log, _) = cluster.run(&["logs", &job]);
    assert!(log.contains(&format!("layout: {layout}")) && log.contains(&format!("layout: {grown}")), "{log}");
}

/// No checkpoint comes that a job could go back to.
const RARE: &str = "checkpoint.every=1000000";

fn checkpoints(cluster: &Cluster, job: &str) -> Vec<u64> {
    committed(&cluster.path().join(format!("storage/jobs/{job}")))
}

/// A job that goes on from a checkpoint of another one, with changes.
fn resumed(cluster: &Cluster, from: &str, step: u64, changes: &[&str]) -> String {
    let dir = cluster.path().join(format!("storage/jobs/{from}/checkpoints/step-{step:08}"));
    until("the checkpoint", || checkpoints(cluster, from).contains(&step).then_some(()));
    let mut arguments = vec!["submit", "--resume", dir.to_str().unwrap(), "--format", "json"];
    changes.iter().for_each(|change| arguments.extend(["--set", change]));
    let (code, out, errors) = cluster.run(&arguments);
    assert_eq!(code, 0, "{out}{errors}");
    serde_json::from_str::<Value>(&out).unwrap()["job"].as_str().unwrap().to_owned()
}

/// By formation, its last step.
fn ends(steps: &[Value]) -> Vec<u64> {
    let generation = |step: &Value| step["generation"].as_u64().unwrap();
    let spans = steps.chunk_by(|one, next| generation(one) == generation(next));
    spans.map(|span| span.last().unwrap()["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_layout_is_changed_in_memory_to_the_bits_that_checkpoints_would_bring() {
    let mut cluster = Cluster::start(1);
    let rare = [&ALONE[..], &[ENDLESS, RARE]].concat();
    let job = cluster.submit(&rare, &["--min-ranks", "1", "--max-ranks", "2"]);
    cluster.until_step(&job, 3);
    let worker = cluster.worker(1);
    cluster.workers.push(Some(worker));
    until_ranks(&cluster, &job, 2);
    let step = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.until_step(&job, step + 4);
    assert_eq!(cluster.run(&["scale", &job, "--ranks", "1"]).0, 0);
    until_ranks(&cluster, &job, 1);
    let steps = cluster.ten_more_steps(&job);
    assert_eq!(checkpoints(&cluster, &job), Vec::<u64>::new());
    let ends = ends(&steps);
    let [grown, shrunk, _] = ends[..] else { panic!("expected three formations, got {ends:?}") };
    assert_eq!(from_memory(&cluster, &job), [grown, shrunk], "no step is lost");
    let (_, log, _) = cluster.run(&["logs", &job]);
    // Half of one rank's state goes to the second one. Whoever stays has both halves, for it is the other one's buddy.
    let moved: Vec<[&str; 3]> = log.lines().filter_map(moved).collect();
    let [[all, half, least], [_, nothing, none]] = moved[..] else { panic!("expected two lines: {log}") };
    assert_eq!((half, nothing, none), (least, "0.0 B", "0.0 B"), "{log}");
    assert!(half != "0.0 B" && half != all, "{log}");

    // The same changes after the same steps, each from a checkpoint.
    let every = format!("checkpoint.every={grown}");
    let saved = [&ALONE[..], &[ENDLESS, "checkpoint.keep=1000", &every]].concat();
    let one = cluster.submit(&saved, &[]);
    let every = format!("checkpoint.every={shrunk}");
    until("the checkpoint", || checkpoints(&cluster, &one).contains(&grown).then_some(()));
    assert_eq!(cluster.run(&["cancel", &one]).0, 0);
    let two = resumed(&cluster, &one, grown, &["parallel.data=2", &every]);
    until("the checkpoint", || checkpoints(&cluster, &two).contains(&shrunk).then_some(()));
    let of_two = cluster.first_steps(&two, (shrunk - grown) as usize);
    let three = resumed(&cluster, &two, shrunk, &["parallel.data=1"]);
    let of_three = cluster.first_steps(&three, steps.len() - shrunk as usize);
    assert_eq!(curve(&steps[grown as usize..shrunk as usize]), curve(&of_two));
    assert_eq!(curve(&steps[shrunk as usize..]), curve(&of_three));
}

/// Of a line about what was taken over: all of it, what came from other workers, and what had to.
fn moved(line: &str) -> Option<[&str; 3]> {
    let (needed, words) = line.split_once("of ")?.1.split_once(" of state in memory ")?;
    let (moved, words) = words.split_once(" moved between workers, ")?;
    Some([needed, moved, words.strip_suffix(" had to")?])
}

#[test]
fn ranks_that_are_left_adopt_from_memory_what_a_lost_one_had() {
    let mut cluster = Cluster::start(4);
    let rare = [&ALONE[..], &[ENDLESS, RARE]].concat();
    let whole = cluster.undisturbed(&rare, COMPARED);
    let job = cluster.submit(&rare, &ELASTIC);
    until_ranks(&cluster, &job, 4);
    cluster.until_step(&job, 6);
    let victim = cluster.host_of(&job, 3);
    let reported = cluster.status(&job).unwrap()["step"].as_u64().unwrap();
    cluster.workers[victim].as_mut().unwrap().kill();
    until_ranks(&cluster, &job, 2);
    let steps = cluster.ten_more_steps(&job);
    compare(&steps, &whole);
    let resumed = from_memory(&cluster, &job);
    assert_eq!(resumed.len(), 1);
    assert!(resumed[0] + 1 >= reported, "{resumed:?} {reported}");
    assert_eq!(checkpoints(&cluster, &job), Vec::<u64>::new());
}

/// Steps of the run in which workers come and go.
const STEPS: u64 = 300;

/// Ranks of the largest layout for so many workers: three columns do not divide the batch.
const LARGEST: [usize; 5] = [0, 1, 2, 2, 4];

/// Waits until the job has as many ranks as there is room for and has made some steps with them; whether it has ended instead.
fn settles(cluster: &Cluster, job: &str, workers: usize) -> bool {
    let mut begins = None;
    until(&format!("{} ranks of {job}, and steps of them", LARGEST[workers]), || {
        let status = cluster.status(job)?;
        let (held, step) = (status["ranks"].as_array()?.len(), status["step"].as_u64()?);
        let generation = (status["generation"].as_u64()?, held);
        let (formed, first) =
            *begins.insert(begins.filter(|(of, _)| *of == generation).unwrap_or((generation, step)));
        let is_over = !status["outcome"].as_str()?.is_empty();
        (is_over || formed.1 == LARGEST[workers] && step >= first + 3).then_some(is_over)
    })
}

#[test]
fn workers_that_join_and_leave_every_few_steps_cost_no_step_and_no_sequence() {
    let mut cluster = Cluster::start(4);
    let steps = format!("training.steps={STEPS}");
    let changes = [&ALONE[..], &[&steps]].concat();
    let whole = cluster.finish(&cluster.submit(&changes, &[]));
    let job = cluster.submit(&changes, &ELASTIC);
    let (mut random, mut workers, mut changed) = (1_u64, 4, 0);
    while !settles(&cluster, &job, workers) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The first worker stays, so that there is always room for the fewest ranks.
        let number = 1 + (random >> 33) as usize % 3;
        match cluster.workers[number].take() {
            Some(mut worker) if (random >> 40).is_multiple_of(3) => worker.kill(),
            Some(mut worker) => {
                worker.signal(Signal::TERM);
                until("the end of a worker that leaves", || worker.has_ended().then_some(()));
            }
            None => cluster.workers[number] = Some(cluster.worker(number)),
        }
        workers = cluster.workers.iter().flatten().count();
        changed += 1;
    }
    let steps = cluster.finish(&job);
    assert_eq!(steps.len() as u64, STEPS);
    compare(&steps, &whole[..COMPARED]);
    let tokens =
        |steps: &[Value]| steps.iter().map(|step| step["tokens"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(tokens(&steps), tokens(&whole));
    let generations = steps.last().unwrap()["generation"].as_u64().unwrap();
    eprintln!("{changed} workers came or went, {generations} formations");
    assert!(changed >= 4 && generations >= 4, "{changed} changes, {generations} formations");
}
