//! A stage for an operator: an API server, an orchestrator, a clock that runs as fast as nothing happens, and ways to kill the operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use contraflow_operator::context::{Clock, Context, Home};
use contraflow_operator::decide::Pace;
use contraflow_operator::link::{self, Connect};
use contraflow_operator::{clusters, jobs};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::api::ApiServer;
use crate::orchestrator::Orchestrator;

/// Tells that something has changed.
#[derive(Clone)]
pub struct Change(Arc<watch::Sender<u64>>);

impl Change {
    fn new() -> Self {
        Change(Arc::new(watch::Sender::new(0)))
    }

    pub fn tell(&self) {
        self.0.send_modify(|count| *count += 1);
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// Where in its requests an operator dies; the default: never.
#[derive(Clone, Default)]
pub struct Fuse(Option<Arc<Burning>>);

struct Burning {
    /// Requests that it has yet.
    left: AtomicUsize,
    /// Whether the last one is carried out, and only its answer is lost.
    is_carried_out: bool,
    has_burnt: Notify,
}

impl Fuse {
    pub fn new(left: usize, is_carried_out: bool) -> Self {
        let left = AtomicUsize::new(left);
        Fuse(Some(Arc::new(Burning { left, is_carried_out, has_burnt: Notify::new() })))
    }

    pub async fn before(&self) {
        let Some(burning) = &self.0 else { return };
        let left = burning
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1)))
            .unwrap();
        if left == 0 || (left == 1 && !burning.is_carried_out) {
            burning.has_burnt.notify_one();
            std::future::pending::<()>().await;
        }
    }

    pub async fn after(&self) {
        let Some(burning) = &self.0 else { return };
        if burning.left.load(Ordering::SeqCst) == 0 {
            burning.has_burnt.notify_one();
            std::future::pending::<()>().await;
        }
    }

    /// Waits until it has burnt down.
    pub async fn burnt(&self) {
        self.0.as_ref().unwrap().has_burnt.notified().await;
    }
}

/// All of it.
pub struct Stage {
    pub api: ApiServer,
    pub orchestrator: Orchestrator,
    change: Change,
    clock: Clock,
}

/// One that runs until it is dropped.
pub struct Operator(JoinHandle<()>);

impl Drop for Operator {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Stage {
    pub fn new() -> Self {
        let start = Instant::now();
        let clock: Clock = Arc::new(move || {
            let seconds = 1_750_000_000 + i64::try_from(start.elapsed().as_secs()).unwrap();
            Timestamp::from_second(seconds).unwrap()
        });
        let change = Change::new();
        let api = ApiServer::new(change.clone(), clock.clone());
        Stage { api, orchestrator: Orchestrator::new(change.clone()), change, clock }
    }

    pub fn operator(&self) -> Operator {
        self.operator_that_dies(Fuse::default())
    }

    pub fn operator_that_dies(&self, fuse: Fuse) -> Operator {
        let client = self.api.client(fuse.clone());
        self.operator_with(client, "home:7070", self.orchestrator.connect(fuse), Pace::default())
    }

    /// One whose home is an orchestrator of another process.
    pub fn operator_of(&self, address: &str, pace: Pace) -> Operator {
        self.operator_with(self.api.client(Fuse::default()), address, Arc::new(link::connect), pace)
    }

    /// What an operator knows, for a single look.
    pub fn context(&self) -> Arc<Context> {
        let connect = self.orchestrator.connect(Fuse::default());
        self.context_with(self.api.client(Fuse::default()), "home:7070", connect, Pace::default())
    }

    fn context_with(
        &self,
        client: kube::Client,
        address: &str,
        connect: Connect,
        pace: Pace,
    ) -> Arc<Context> {
        let home = Home { address: address.into(), secret: None };
        Arc::new(Context::new(client, connect, pace, Some(home), self.clock.clone()))
    }

    fn operator_with(&self, client: kube::Client, address: &str, connect: Connect, pace: Pace) -> Operator {
        let context = self.context_with(client, address, connect, pace);
        Operator(tokio::spawn(async move {
            let never = std::future::pending::<()>;
            tokio::join!(
                jobs::run(context.clone(), "training", never()),
                clusters::run(context, "training", never())
            );
        }))
    }

    pub fn submit(&self, name: &str, spec: Value) {
        let object = json!({"apiVersion": "contraflow.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": name}, "spec": spec});
        self.api.create("trainingjobs", object);
    }

    pub fn job(&self, name: &str) -> Value {
        self.api.get("trainingjobs", name).unwrap_or_default()
    }

    /// Status and reason of a condition.
    pub fn condition(&self, name: &str, type_: &str) -> (String, String) {
        let job = self.job(name);
        let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let condition =
            conditions.into_iter().find(|condition| condition["type"] == type_).unwrap_or_default();
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        (text("status"), text("reason"))
    }

    /// So much time passes for the operator, for what must not happen in it. The clock is stopped (`start_paused`): it moves to the next
    /// timer whenever nobody has anything to do, so that every look and retry of that time is made, and nothing is waited for.
    pub async fn passes(&self, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    /// Waits until something is so.
    pub async fn until(&self, what: &str, mut is_so: impl FnMut(&Stage) -> bool) {
        let mut change = self.change.subscribe();
        let waited = async {
            while !is_so(self) {
                change.changed().await.unwrap();
            }
        };
        let limit = Duration::from_secs(1200);
        let seen = tokio::time::timeout(limit, waited).await;
        assert!(
            seen.is_ok(),
            "{what}: not within {limit:?}: {:#?} {:#?}",
            self.api.names("trainingjobs"),
            self.orchestrator.jobs()
        );
    }

    pub async fn until_state(&self, name: &str, state: &str) {
        self.until(&format!("{name} is {state}"), |stage| stage.job(name)["status"]["state"] == state).await;
    }
}
