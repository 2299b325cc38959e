//! A job as a collector sees it: one trace from the submission to the frames between ranks; and a collector that is none.

use std::collections::BTreeSet;
use std::net::TcpListener;

use rustix::process::Signal;

use crate::cluster::{Cluster, Environment, JOB, MODEL, Process, curve, spawn_with, until};
use crate::collector::{Collector, Seen, Spans};

const STEPS: u64 = 3;

/// Two ranks, one behind the other, that compute in pools of threads.
const CHANGES: [&str; 5] = [
    "parallel.pipeline=2",
    "parallel.expert=1",
    "parallel.threads_per_rank=2",
    "checkpoint.every=100",
    "training.steps=3",
];

fn to(endpoint: &str, more: &[(&'static str, &str)]) -> Environment {
    let mut environment = vec![("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.to_owned())];
    environment.extend(more.iter().map(|&(name, value)| (name, value.to_owned())));
    environment
}

/// Ends a process as an operator does.
fn end(process: &mut Process) -> String {
    process.signal(Signal::TERM);
    assert_eq!(process.wait(), Some(0), "{}", process.stderr());
    process.stderr()
}

/// Runs the job to its end, and ends the processes, so that all spans are out.
fn spans_of_a_job(more: &[(&'static str, &str)]) -> Spans {
    let collector = Collector::start();
    let mut cluster = Cluster::start_with(2, to(&collector.endpoint, more));
    let job = cluster.submit(&CHANGES, &[]);
    assert_eq!(cluster.finish(&job).len() as u64, STEPS);
    for worker in cluster.workers.iter_mut().flatten() {
        end(worker);
    }
    end(&mut cluster.orchestrator);
    collector.spans()
}

/// The one link of a span, as long as it has one.
fn linked<'a>(spans: &'a Spans, span: &Seen) -> &'a Seen {
    let [(trace, id)] = &span.links[..] else { panic!("expected one link: {span:?}") };
    assert_eq!(*trace, span.trace);
    spans.get(id)
}

/// The steps of both ranks, in order of step and rank.
fn steps(spans: &Spans) -> Vec<&Seen> {
    let mut steps = spans.named("step");
    steps.sort_by_key(|step| (step.number("step"), step.number("rank")));
    let which: Vec<_> = steps.iter().map(|step| (step.number("step"), step.number("rank"))).collect();
    assert_eq!(which, (1..=STEPS).flat_map(|step| [(step, 0), (step, 1)]).collect::<Vec<_>>());
    steps
}

#[test]
fn a_job_is_one_trace_from_its_submission_to_the_frames_between_its_ranks() {
    let spans = spans_of_a_job(&[("CONTRAFLOW_TRACE_LEVEL", "debug")]);
    let submit = spans.only("submit");
    assert!(submit.parent.is_empty() && submit.service == "contraflow-submit", "{submit:?}");
    let call = spans.only("contraflow.v1.JobService/Submit");
    assert_eq!((&call.parent, call.service.as_str()), (&submit.id, "contraflow-orchestrator"));
    // Orchestrator -> Assign -> rank, each in a process of its own.
    let jobs = spans.named("job");
    for job in &jobs {
        let assign = spans.parent(job);
        assert_eq!((assign.name.as_str(), &assign.parent), ("assign", &call.id), "{assign:?}");
        assert_eq!((assign.number("generation"), job.number("generation")), (1, 1));
    }
    let different =
        |part: fn(&Seen) -> Vec<u8>| jobs.iter().map(|job| part(job)).collect::<BTreeSet<_>>().len();
    assert_eq!((jobs.len(), different(|job| job.parent.clone())), (2, 2));
    assert_eq!(different(|job| job.instance.clone().into_bytes()), 2);
    for step in steps(&spans) {
        let job = spans.parent(step);
        assert_eq!((job.name.as_str(), job.number("rank")), ("job", step.number("rank")));
        spans.child(step, "load");
        spans.child(spans.child(step, "program"), "totals");
        spans.child(step, "update");
        if step.number("step") == 1 {
            let command = linked(&spans, step);
            assert_eq!((command.name.as_str(), &command.parent), ("command", &call.id));
            assert_eq!(command.number("rank"), step.number("rank"));
        }
    }
    spans.named("validate").iter().for_each(|validate| assert_eq!(spans.parent(validate).name, "job"));
    let of_ranks = spans.0.iter().filter(|span| span.service == "contraflow-worker");
    of_ranks.for_each(|span| assert_eq!(span.trace, submit.trace, "{span:?}"));
    frames_carry_the_span_of_their_sender(&spans);
}

/// Each activation and each gradient: where it was taken is linked to where it was sent, in another process.
fn frames_carry_the_span_of_their_sender(spans: &Spans) {
    let received = spans.named("receive");
    let mut senders = BTreeSet::new();
    for receive in &received {
        let send = linked(spans, receive);
        assert_eq!(send.name, "send");
        assert_ne!(send.instance, receive.instance);
        for key in ["kind", "stage", "micro_batch"] {
            assert_eq!(send.attributes[key], receive.attributes[key], "{send:?} {receive:?}");
        }
        assert_eq!(spans.parent(send).attributes["step"], spans.parent(receive).attributes["step"]);
        senders.insert(&send.id);
    }
    assert_eq!((senders.len(), received.len()), (spans.named("send").len(), received.len()));
    assert!(received.len() as u64 > 2 * STEPS, "{}", received.len());
}

#[test]
fn unless_more_is_asked_for_a_step_of_a_rank_is_a_handful_of_spans_and_links() {
    let spans = spans_of_a_job(&[]);
    for step in steps(&spans) {
        let parts: Vec<&Seen> = spans.children(step);
        let of_parts = parts.iter().map(|part| spans.children(part).len()).sum::<usize>();
        assert!(parts.len() + of_parts <= 10, "{parts:?}");
        // However many frames there were, a program is linked once to that of the other rank; so is the sum of the totals.
        let program = spans.child(step, "program");
        for part in [program, spans.child(program, "totals")] {
            let other = linked(&spans, part);
            assert_eq!(other.name, part.name);
            assert_ne!(other.instance, part.instance);
            let mut above = spans.parent(other);
            while above.name != "step" {
                above = spans.parent(above);
            }
            assert_eq!(above.number("step"), step.number("step"));
        }
    }
}

#[test]
fn a_run_in_one_process_is_a_trace_too() {
    let collector = Collector::start();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.json"), MODEL).unwrap();
    let mut arguments = vec!["train", "tiny"];
    JOB.iter().chain(&CHANGES).for_each(|change| arguments.extend(["--set", change]));
    let mut train = spawn_with(folder.path(), "train", &arguments, &to(&collector.endpoint, &[]));
    assert_eq!(train.wait(), Some(0), "{}", train.stderr());
    // It was over long before metrics were due.
    let value = |name: &str, label: &str| {
        let key = ("contraflow-train".to_owned(), name.to_owned(), label.to_owned());
        *collector.values().get(&key).unwrap_or_else(|| panic!("{name} of {:?}", collector.values()))
    };
    assert_eq!(value("contraflow_run_step", "tiny"), STEPS as f64);
    assert_eq!(value("contraflow_build_info", env!("CARGO_PKG_VERSION")), 1.0);
    assert!(value("contraflow_run_resident_memory_bytes", "tiny") > 1e6);
    let spans = collector.spans();
    let root = spans.only("train");
    assert!(root.parent.is_empty(), "{root:?}");
    spans.named("job").iter().for_each(|job| assert_eq!(job.parent, root.id));
    for step in steps(&spans) {
        let program = spans.child(step, "program");
        let other = linked(&spans, program);
        assert_eq!((other.name.as_str(), &other.trace), ("program", &root.trace));
        assert_ne!(other.attributes["rank"], program.attributes["rank"]);
    }
}

#[test]
fn an_orchestrator_tells_what_its_slots_are_used_for_unless_nobody_wants_to_know() {
    let collector = Collector::start();
    let often = [("OTEL_METRIC_EXPORT_INTERVAL", "50"), ("OTEL_TRACES_EXPORTER", "none")];
    let cluster = Cluster::start_with(2, to(&collector.endpoint, &often));
    let job = cluster.submit(&CHANGES, &[]);
    assert_eq!(cluster.finish(&job).len() as u64, STEPS);
    let value = |name: &str, label: &str| {
        let key = ("contraflow-orchestrator".to_owned(), name.to_owned(), label.to_owned());
        collector.values().get(&key).copied()
    };
    until("the account of a job that is over", || (value("contraflow_jobs", "done")? == 1.0).then_some(()));
    let goodput = &cluster.status(&job).unwrap()["goodput"];
    let of = |part: &str| goodput[part].as_f64().unwrap();
    assert!(of("committed") > 0.0 && of("forming") > 0.0 && of("undecided") == 0.0, "{goodput}");
    assert_eq!((of("recovery"), of("recomputed")), (0.0, 0.0), "{goodput}");
    assert!((of("committed") + of("forming") - of("slot_seconds")).abs() < 1e-6, "{goodput}");
    // The job is all that these slots were used for.
    until("the same of all slots", || {
        let is_same = |part| Some((value("contraflow_slot_seconds_total", part)? - of(part)).abs() < 1e-6);
        (is_same("committed")? && is_same("forming")?).then_some(())
    });
    // From here on the slots are free, and time passes.
    until("idle slots", || (value("contraflow_slot_seconds_total", "idle")? > 0.0).then_some(()));
    assert!(collector.spans().0.is_empty());
    drop(cluster);
    let silent = Collector::start();
    let cluster =
        Cluster::start_with(1, to(&silent.endpoint, &[("OTEL_METRICS_EXPORTER", "none"), often[0]]));
    let job = cluster.submit(&CHANGES, &[]);
    until("spans", || (!silent.spans().0.is_empty()).then_some(()));
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    assert!(silent.values().is_empty());
}

#[test]
fn an_unresponsive_collector_is_reported_once_and_changes_nothing() {
    let untraced = Cluster::start(2);
    let expected = curve(&untraced.finish(&untraced.submit(&CHANGES, &[])));
    drop(untraced);
    // Connections are made and nothing is ever answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let limits = [
        ("CONTRAFLOW_TRACE_LEVEL", "trace"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "200"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "32"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "32"),
    ];
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut cluster = Cluster::start_with(2, to(&endpoint, &limits));
    let job = cluster.submit(&CHANGES, &[]);
    assert_eq!(curve(&cluster.finish(&job)), expected);
    for worker in cluster.workers.iter_mut().flatten() {
        let stderr = end(worker);
        let count = |words: &str| stderr.matches(words).count();
        assert_eq!(count("accepts no spans, everything else continues"), 1, "{stderr}");
        assert_eq!(count("dropped a Span due to queue full"), 1, "{stderr}");
        assert_eq!(count("dropped_span_count="), 1, "{stderr}");
        assert_eq!(count("spans have not reached the collector"), 1, "{stderr}");
    }
}
