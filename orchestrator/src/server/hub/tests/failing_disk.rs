//! The hub with a disk that fails for a while: nothing that is not kept leaves it, clients are told, and it goes on.

use tokio::task::JoinHandle;

use super::*;
use crate::core::{Attachment, Registration};
use crate::store::disk::Disk;

fn started(disk: &Disk) -> (Senders, JoinHandle<Result<(), String>>) {
    let (store, replay) = disk.open().unwrap();
    let hub = Hub::new(store, replay, [7; 32], &Settings::default()).unwrap();
    let (senders, mail) = Mailboxes::open();
    (senders, tokio::spawn(hub.run(mail)))
}

async fn submit(hub: &Senders, key: &str) -> Submitted {
    let (reply, outcome) = oneshot::channel();
    assert!(hub.send(HubMessage::Submit { spec: spec("ann", key), reply }).await);
    outcome.await.unwrap()
}

async fn ask<T: Send + 'static>(hub: &Senders, question: impl FnOnce(&Hub) -> T + Send + 'static) -> T {
    let (reply, answer) = oneshot::channel();
    assert!(hub.send(HubMessage::Ask(Box::new(move |hub| drop(reply.send(question(hub)))))).await);
    answer.await.unwrap()
}

async fn cancel(hub: &Senders, job: JobId) -> Result<(), Status> {
    let (reply, answer) = oneshot::channel();
    let event = Box::new(Event::Cancel { job, reason: "enough".into() });
    assert!(hub.send(HubMessage::Change { event, reply }).await);
    answer.await.unwrap()
}

/// A worker joins; returns what it is told.
async fn join(hub: &Senders, worker: u64) -> mpsc::Receiver<Result<v1::ToWorker, Status>> {
    let (down, told) = mpsc::channel(64);
    hub.send(HubMessage::Linked { worker, link: WorkerLink { number: worker, down, shown: None } }).await;
    let registration = Registration { worker, slots: 1, ..Default::default() };
    let attachment = Attachment { registration, ..Default::default() };
    hub.send(HubMessage::Event(Event::Attached(Box::new(attachment)))).await;
    told
}

fn unavailable(refused: Status, therefore: &str) {
    let words = refused.message();
    assert_eq!(refused.code(), Code::Unavailable, "{words}");
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull).to_string();
    assert!(
        words.starts_with("the orchestrator's state cannot be written for ") && words.contains(&full),
        "{words}"
    );
    assert!(words.ends_with(therefore), "{words}");
}

const UNSURE: &str = "what was asked for is done once it can be kept: look before you ask again";
const REFUSED: &str = "nothing is taken before it can be kept: try again later";

#[tokio::test]
async fn while_the_disk_fails_clients_are_answered_and_nothing_is_done() {
    let disk = Disk::default();
    let (hub, running) = started(&disk);
    let first = submit(&hub, "first").await.unwrap();
    let mut early = join(&hub, 1).await;
    assert!(matches!(early.recv().await.unwrap().unwrap().message, Some(v1::to_worker::Message::Welcome(_))));
    disk.state().room = Some(0);
    // Which of them begins the wait is told that it may come to it; who comes then, that it does not.
    unavailable(submit(&hub, "second").await.unwrap_err(), UNSURE);
    unavailable(submit(&hub, "second").await.unwrap_err(), REFUSED);
    unavailable(submit(&hub, "third").await.unwrap_err(), REFUSED);
    unavailable(cancel(&hub, first).await.unwrap_err(), REFUSED);
    let trouble = ask(&hub, Hub::trouble).await.unwrap();
    assert!(trouble.starts_with("the orchestrator's state cannot be written for "), "{trouble}");
    assert!(ask(&hub, move |hub| hub.core().jobs().all.contains_key(&first)).await);
    let mut late = join(&hub, 2).await;
    assert!(!ask(&hub, |hub| hub.core().member(2).is_some()).await, "it waits");
    assert!(late.try_recv().is_err() && early.try_recv().is_err(), "nothing is said before it is kept");
    let (killed, _running) = started(&disk.after_kill());
    assert_eq!(ask(&killed, |hub| hub.core().jobs().all.len()).await, 1, "nothing of it is kept");
    disk.state().room = None;
    assert!(late.recv().await.is_some());
    assert_eq!(ask(&hub, Hub::trouble).await, None);
    let second = submit(&hub, "second").await.unwrap();
    assert_eq!(ask(&hub, |hub| hub.core().jobs().all.len()).await, 2, "the second one came to it");
    cancel(&hub, first).await.unwrap();
    let seen = ask(&hub, |hub| hub.core().jobs().clone()).await;
    assert!(seen.all[&first].has_ended() && seen.by_key["second"] == second);
    // What was answered is what a start finds, though this one is killed at once.
    let (again, _running) = started(&disk.after_power_loss(|| false));
    assert_eq!(ask(&again, |hub| hub.core().jobs().clone()).await, seen);
    running.abort();
}

#[tokio::test]
async fn workers_that_say_too_much_while_the_disk_fails_are_let_go_of_and_come_back() {
    let disk = Disk::default();
    let (hub, running) = started(&disk);
    let mut told = join(&hub, 1).await;
    told.recv().await.unwrap().unwrap();
    disk.state().room = Some(0);
    unavailable(submit(&hub, "").await.unwrap_err(), UNSURE);
    let silent = ask(&hub, |hub| hub.links.len()).await;
    assert_eq!(silent, 1, "as long as it says little it stays");
    for _ in 0..10_000 {
        hub.send(HubMessage::Event(Event::Beat { worker: 1, progress: Vec::new() })).await;
    }
    assert!(told.recv().await.is_none(), "its stream ends");
    hub.send(HubMessage::Unlinked { worker: 1, link: 1, expelled: None }).await;
    let mut told = join(&hub, 1).await;
    disk.state().room = None;
    assert!(matches!(told.recv().await.unwrap().unwrap().message, Some(v1::to_worker::Message::Welcome(_))));
    running.abort();
}

#[tokio::test]
async fn a_hub_that_is_told_to_end_while_the_disk_fails_does_not_wait_for_it() {
    let disk = Disk::default();
    let (hub, running) = started(&disk);
    disk.state().room = Some(0);
    unavailable(submit(&hub, "").await.unwrap_err(), UNSURE);
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    // The end of the runtime waits for threads that write.
}
