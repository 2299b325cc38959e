//! The job actor answers while files are written for it: a disk that does not answer blocks nothing. It tells the end last.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use contraflow_orchestrator::job::{JobSetup, Outcome};
use contraflow_orchestrator::job_actor::{JobActor, JobActorSetup, JobMessage};
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::JobConstants;
use contraflow_proto::StepReport;
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::topology::Rank;
use ractor::Actor;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::sync::oneshot;

/// Far less than the job waits for ranks that do not answer an abort.
const SOON: Duration = Duration::from_secs(4);

#[test]
fn a_job_is_cancelled_while_its_weights_are_put_in_place() {
    let dir = tempfile::tempdir().unwrap();
    // Opening a pipe for writing waits for a reader.
    let index = dir.path().join("model.safetensors.index.json");
    mknodat(CWD, &index, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (commands, commanded) = mpsc::channel();
    let (tell_ended, ended) = oneshot::channel();
    let setup = JobActorSetup {
        job: JobSetup {
            world: 1,
            steps_before: 0,
            steps: 0,
            keeps_checkpoints: false,
            export_dir: Some(dir.path().to_owned()),
        },
        model_config: "{}".into(),
        checkpoints: None,
        constants: JobConstants { world: 1, ..JobConstants::default() },
        send: Arc::new(move |_, command| drop(commands.send(command))),
        subscribers: Vec::new(),
        ended: tell_ended,
    };
    let (job, _) = runtime.block_on(Actor::spawn(None, JobActor, setup)).unwrap();
    let send_event = |event| job.cast(JobMessage::Event(event)).unwrap();
    let command = || commanded.recv_timeout(SOON).expect("a command");
    send_event(RankEvent::Ready { rank: Rank::new(0) });
    assert_eq!(command(), RankCommand::Validate);
    send_event(RankEvent::Validated { rank: Rank::new(0), loss: 0.0, tokens: 0 });
    assert!(matches!(command(), RankCommand::Export { .. }));
    let file = ExportedFile { file: "model-00001-of-00001.safetensors".into(), ..ExportedFile::default() };
    send_event(RankEvent::Exported { rank: Rank::new(0), file });
    job.cast(JobMessage::Cancel { reason: "enough".into() }).unwrap();
    let aborted = commanded.recv_timeout(SOON);
    // Lets the writer go, whatever comes of the test.
    let reader = std::thread::spawn(move || File::open(index).map(drop));
    assert_eq!(aborted.expect("an abort"), RankCommand::Abort { reason: "enough".into() });
    send_event(RankEvent::Aborted { rank: Rank::new(0) });
    let outcome = runtime.block_on(async { tokio::time::timeout(SOON, ended).await.unwrap().unwrap() });
    assert!(matches!(outcome, Outcome::Failed { ref message, .. } if message == "enough"), "{outcome:?}");
    reader.join().unwrap().unwrap();
}

#[test]
fn the_end_is_told_when_the_records_of_all_steps_are_taken() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (tell_ended, ended) = oneshot::channel();
    let taken = Arc::new(AtomicU64::new(0));
    let by_subscriber = taken.clone();
    let slow: Subscriber = Box::new(move |record| {
        // Nothing is waited for here: an end that does not wait has so long to overtake the records.
        std::thread::sleep(Duration::from_millis(200));
        by_subscriber.store(record.step, Ordering::SeqCst);
    });
    let setup = JobActorSetup {
        job: JobSetup { world: 1, steps_before: 0, steps: 2, keeps_checkpoints: false, export_dir: None },
        model_config: "{}".into(),
        checkpoints: None,
        constants: JobConstants { world: 1, ..JobConstants::default() },
        send: Arc::new(|_, _| {}),
        subscribers: vec![slow],
        ended: tell_ended,
    };
    let (job, _) = runtime.block_on(Actor::spawn(None, JobActor, setup)).unwrap();
    let send_event = |event| job.cast(JobMessage::Event(event)).unwrap();
    send_event(RankEvent::Ready { rank: Rank::new(0) });
    for step in 1..=2 {
        send_event(RankEvent::StepDone { report: StepReport { step, ..StepReport::default() } });
    }
    send_event(RankEvent::Validated { rank: Rank::new(0), loss: 0.0, tokens: 0 });
    let outcome = runtime.block_on(async { tokio::time::timeout(SOON, ended).await.unwrap().unwrap() });
    assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    assert_eq!(taken.load(Ordering::SeqCst), 2);
}
