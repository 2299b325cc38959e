//! What others hear of a run: viewers of its pages, and the address that its user has named.

use std::sync::Arc;

use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::webhook::Webhook;

use super::Run;
use crate::dashboard::Phase;
use crate::failure::Failure;
use crate::telemetry::webhook::Telling;

impl Run {
    /// The same, and tells an address what happens to it.
    ///
    /// **Errors**: code 1; the system gives no thread.
    pub fn telling(mut self, webhook: Option<Webhook>) -> Result<Self, Failure> {
        let start = |webhook| Telling::start(webhook, &self.name, self.frame.steps);
        self.telling = webhook.map(start).transpose()?.map(Arc::new);
        Ok(self)
    }

    /// Tells how the run has ended, if somebody is told.
    ///
    /// **Errors**: those that it has ended with.
    pub fn ended(&self, result: Result<(), Failure>) -> Result<(), Failure> {
        let (step, outcome) = self.shown.read(|state| (state.history.step(), state.outcome.clone()));
        self.telling.iter().for_each(|telling| telling.ended(&result, step, &outcome));
        result
    }

    /// How a formation has ended, for viewers.
    pub(super) fn show_end(&self, outcome: &Outcome) {
        let (phase, words) = match outcome {
            Outcome::Done { validation: Some((loss, _)) } => {
                (Phase::Done, format!("validation loss {loss:.4} nats/token at the end"))
            }
            Outcome::Done { validation: None } => (Phase::Done, "all steps are made".to_owned()),
            Outcome::Stopped { step, .. } => (Phase::Stopped, format!("interrupted after step {step}")),
            Outcome::Diverged { divergence, .. } => (Phase::Starting, divergence.why.clone()),
            Outcome::Failed { message, .. } => (Phase::Failed, message.clone()),
        };
        self.shown.end(phase, words);
    }
}
