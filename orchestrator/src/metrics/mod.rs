//! The metrics actor of a job in one process: makes the record of each step and hands it to the subscribers. What a record is
//! is in [`record`], which rank holds the others up in [`pace`], where the slot time of a job goes in [`goodput`].

pub mod goodput;
pub mod pace;
pub mod record;

use contraflow_proto::StepReport;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use self::record::{Collector, JobConstants, StepRecord};

/// Receives the record of every step.
pub type Subscriber = Box<dyn FnMut(&StepRecord) + Send>;

/// Messages of the metrics actor.
pub enum MetricsMessage {
    /// A rank's report.
    Record(Box<StepReport>),
    /// Adds a subscriber to every record from now on.
    Subscribe(Subscriber),
    /// Says when all that came before is with the subscribers.
    Flush(oneshot::Sender<()>),
}

/// The actor's state.
pub struct MetricsState {
    collector: Collector,
    subscribers: Vec<Subscriber>,
}

impl MetricsState {
    fn record(&mut self, report: StepReport) {
        if let Some(record) = self.collector.record(report) {
            self.subscribers.iter_mut().for_each(|subscriber| subscriber(&record));
        }
    }
}

/// The metrics actor.
pub struct Metrics;

impl Actor for Metrics {
    type Msg = MetricsMessage;
    type State = MetricsState;
    type Arguments = JobConstants;

    async fn pre_start(
        &self,
        _myself: ActorRef<MetricsMessage>,
        constants: JobConstants,
    ) -> Result<MetricsState, ActorProcessingErr> {
        Ok(MetricsState { collector: Collector::new(constants), subscribers: Vec::new() })
    }

    async fn handle(
        &self,
        _myself: ActorRef<MetricsMessage>,
        message: MetricsMessage,
        state: &mut MetricsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MetricsMessage::Record(report) => state.record(*report),
            MetricsMessage::Subscribe(subscriber) => state.subscribers.push(subscriber),
            // Whoever asked may be gone.
            MetricsMessage::Flush(done) => drop(done.send(())),
        }
        Ok(())
    }
}
