//! The hub by itself: what it takes, what it refuses, and what it keeps.

mod census;
mod failing_disk;

use contraflow_runtime::recipe::{Recipe, RecipeSource};

use tokio::sync::mpsc;
use tonic::Code;

use super::*;
use crate::server::admission::MAX_OPEN_OF_USER;

fn open(dir: &std::path::Path) -> Hub {
    let (store, replay) = Store::open(dir).unwrap();
    Hub::new(store, replay, [7; 32], &Settings::default()).unwrap()
}

fn spec(user: &str, key: &str) -> Box<JobSpec> {
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
    Box::new(JobSpec {
        name: "job".into(),
        priority: 0,
        min_ranks: 1,
        max_ranks: 0,
        key: key.into(),
        user: user.into(),
        recipe: Arc::new(recipe),
        rank_bytes: 0,
        traceparent: String::new(),
        origin: None,
    })
}

#[tokio::test]
async fn a_user_with_too_many_open_jobs_may_submit_again_once_one_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (mut hub, one) = (open(dir.path()), spec("ann", ""));
    let mut batch = CommitBatch::default();
    let first = hub.submit(spec("ann", "first"), &mut batch).unwrap();
    for _ in 1..MAX_OPEN_OF_USER {
        hub.submit(one.clone(), &mut batch).unwrap();
    }
    let refused = hub.submit(one.clone(), &mut batch).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let words = refused.message();
    assert!(words.starts_with("jobs: expected at most 1000 of ann that have not ended"), "{words}");
    assert_eq!(hub.core().jobs().all.len(), MAX_OPEN_OF_USER, "nothing of it is kept");
    let again = hub.submit(spec("ann", "first"), &mut batch).unwrap();
    assert_eq!(again, first, "a job that is known is no new one");
    assert!(hub.submit(spec("bob", ""), &mut batch).is_ok());
    // The same after a restart.
    hub.keep(&mut batch, &mut Mailboxes::open().1).await.unwrap();
    drop(hub);
    let mut hub = open(dir.path());
    let mut batch = CommitBatch::default();
    assert!(hub.submit(one.clone(), &mut batch).is_err());
    hub.step(Event::Cancel { job: first, reason: String::new() }, &mut batch);
    assert!(hub.submit(one.clone(), &mut batch).is_ok());
    assert!(hub.submit(one, &mut batch).is_err());
}

#[tokio::test]
async fn a_key_is_that_of_one_job_and_another_one_is_refused_with_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let (mut hub, mut batch) = (open(dir.path()), CommitBatch::default());
    let job = hub.submit(spec("ann", "nightly"), &mut batch).unwrap();
    hub.keep(&mut batch, &mut Mailboxes::open().1).await.unwrap();
    drop(hub);
    // As it is read back from the state, too.
    let mut hub = open(dir.path());
    assert_eq!(hub.submit(spec("bob", "nightly"), &mut batch).unwrap(), job);
    let changed = |change: &dyn Fn(&mut JobSpec)| {
        let mut spec = spec("ann", "nightly");
        change(&mut spec);
        spec
    };
    let with = |set: &str| {
        Recipe::load(&RecipeSource::Builtin("tiny".into()), &[set.to_owned()]).map(Arc::new).unwrap()
    };
    for (other, field) in [
        (changed(&|spec| spec.name = "other".into()), "name"),
        (changed(&|spec| spec.min_ranks = 2), "min_ranks"),
        (changed(&|spec| spec.recipe = with("training.steps=7")), "training.steps"),
    ] {
        let refused = hub.submit(other, &mut batch).unwrap_err();
        let words = format!(
            "idempotency_key: \"nightly\" is that of {job}, which has another {field}; submit this one under another key"
        );
        assert_eq!((refused.code(), refused.message()), (Code::AlreadyExists, words.as_str()));
    }
}

/// What comes from the ranks of a job and from elsewhere, as lines of its log.
#[tokio::test]
async fn a_line_of_the_log_is_bounded_and_printable() {
    let dir = tempfile::tempdir().unwrap();
    let mut hub = open(dir.path());
    let mut batch = CommitBatch::default();
    let job = hub.submit(spec("", ""), &mut batch).unwrap();
    let reason = format!("\u{1b}[2J{}", "r".repeat(20 << 20));
    hub.step(Event::Cancel { job, reason }, &mut batch);
    let line: LogRecord = serde_json::from_slice(&batch.lines[&job][0]).unwrap();
    assert!(
        line.message.starts_with("cancelled: \\u{1b}[2Jrrr") && line.message.len() == MAX_LINE,
        "{}",
        line.message.len()
    );
}

#[tokio::test]
async fn a_new_stream_carries_nothing_that_was_decided_for_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut hub = open(dir.path());
    let mut batch = CommitBatch::default();
    let (down, mut reader) = mpsc::channel(4);
    // Decided while the worker's earlier stream was broken, which nobody had noticed.
    batch.commands = vec![(7, WorkerCommand::Disconnect), (8, WorkerCommand::Disconnect)];
    hub.take(HubMessage::Linked { worker: 7, link: WorkerLink { number: 2, down, shown: None } }, &mut batch);
    let registration = crate::core::Registration { worker: 7, slots: 1, ..Default::default() };
    let attachment = crate::core::Attachment { registration, ..Default::default() };
    hub.take(HubMessage::Event(Event::Attached(Box::new(attachment))), &mut batch);
    assert_eq!(batch.commands[0], (8, WorkerCommand::Disconnect), "others' are still sent");
    hub.apply_effects(batch);
    let first = reader.try_recv().unwrap().unwrap();
    assert!(matches!(first.message, Some(v1::to_worker::Message::Welcome(_))), "{first:?}");
    assert!(hub.links.contains_key(&7), "the new stream is not the one that was let go of");
}

#[tokio::test]
async fn a_stream_that_ends_after_the_hub_has_let_go_of_it_ends_its_workers_membership() {
    let dir = tempfile::tempdir().unwrap();
    let mut hub = open(dir.path());
    let mut batch = CommitBatch::default();
    let attach = |hub: &mut Hub, batch: &mut CommitBatch, link| {
        let (down, reader) = mpsc::channel(4);
        let link = WorkerLink { number: link, down, shown: None };
        hub.take(HubMessage::Linked { worker: 7, link }, batch);
        let registration = crate::core::Registration { worker: 7, slots: 1, ..Default::default() };
        let attachment = crate::core::Attachment { registration, ..Default::default() };
        hub.take(HubMessage::Event(Event::Attached(Box::new(attachment))), batch);
        reader
    };
    let unlinked = |link, expelled: Option<&str>| HubMessage::Unlinked {
        worker: 7,
        link,
        expelled: expelled.map(str::to_owned),
    };
    drop(attach(&mut hub, &mut batch, 1));
    // Nobody reads any more.
    hub.send(7, Some(v1::to_worker::Message::Refused(String::new())), false);
    assert!(hub.links.is_empty());
    let reader = attach(&mut hub, &mut batch, 2);
    hub.take(unlinked(1, None), &mut batch);
    assert!(hub.core().member(7).unwrap().is_attached, "an earlier stream does not count");
    drop(reader);
    hub.send(7, Some(v1::to_worker::Message::Refused(String::new())), false);
    hub.take(unlinked(2, Some("token: gone")), &mut batch);
    assert!(hub.core().member(7).is_none());
}

#[tokio::test]
async fn a_removal_is_answered_by_the_worker_that_was_asked_and_no_retry_comes_between() {
    let dir = tempfile::tempdir().unwrap();
    let (mut hub, mut batch) = (open(dir.path()), CommitBatch::default());
    let (down, mut reader) = mpsc::channel(4);
    hub.take(HubMessage::Linked { worker: 7, link: WorkerLink { number: 1, down, shown: None } }, &mut batch);
    let registration = crate::core::Registration { worker: 7, slots: 1, ..Default::default() };
    let attachment = crate::core::Attachment { registration, ..Default::default() };
    hub.take(HubMessage::Event(Event::Attached(Box::new(attachment))), &mut batch);
    let job = hub.submit(Box::new(JobSpec { min_ranks: 4, ..*spec("ann", "") }), &mut batch).unwrap();
    let remove = |hub: &mut Hub, batch: &mut CommitBatch| {
        let (reply, outcome) = oneshot::channel();
        hub.take(HubMessage::Remove { job, reply }, batch);
        hub.apply_effects(std::mem::take(batch));
        outcome
    };
    let refused = remove(&mut hub, &mut batch).try_recv().unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    hub.step(Event::Cancel { job, reason: String::new() }, &mut batch);
    let mut waiting = remove(&mut hub, &mut batch);
    let sent = std::iter::from_fn(|| reader.try_recv().ok()?.ok()?.message);
    assert!(matches!(
        sent.last(),
        Some(v1::to_worker::Message::Discard(v1::Discard { everything: true, .. }))
    ));
    let busy = hub.retry(job, &mut batch).unwrap_err();
    assert!(busy.message().contains("are being removed"), "{}", busy.message());
    let answer = |hub: &mut Hub, batch: &mut CommitBatch, worker| {
        hub.take(HubMessage::Event(Event::Removed { worker, job, result: Ok(()) }), batch);
        hub.apply_effects(std::mem::take(batch));
    };
    answer(&mut hub, &mut batch, 8);
    assert!(waiting.try_recv().is_err() && hub.core().jobs().all.contains_key(&job), "nobody asked it");
    answer(&mut hub, &mut batch, 7);
    assert_eq!(waiting.try_recv().unwrap().unwrap(), job);
    assert!(!hub.core().jobs().all.contains_key(&job));
    // Whoever asked has gone: the job may be taken up again.
    let job = hub.submit(spec("ann", ""), &mut batch).unwrap();
    hub.step(Event::Cancel { job, reason: String::new() }, &mut batch);
    let (reply, outcome) = oneshot::channel();
    hub.take(HubMessage::Remove { job, reply }, &mut batch);
    drop(outcome);
    assert!(hub.retry(job, &mut batch).is_ok());
}
