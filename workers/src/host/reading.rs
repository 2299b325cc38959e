//! What ranks are made of is read beside the loop, and a file system may never answer. Then the formation is reported with
//! the path that it waits for, and after a few such threads the process begins no further one.

use contraflow_runtime::files;
use tokio::sync::mpsc;

use super::formation::Formation;
use super::{Host, Input};
use crate::error::RankError;

/// Calls of this process that may hang; each holds a thread for as long.
pub(super) const MAX_STUCK: usize = 8;

/// The number of the task that is to read for a formation. Where too many hang already there is none, and the formation is
/// reported as failed.
pub(super) fn begin(formation: &mut Formation, inputs: &mpsc::UnboundedSender<Input>) -> Option<u64> {
    let stuck = files::stuck();
    match stuck.first().filter(|_| stuck.len() >= MAX_STUCK) {
        Some(first) => {
            let message = format!("{first}, and {} more calls of this worker hang", stuck.len() - 1);
            formation.fail(&RankError::Node { message }, inputs);
        }
        None => formation.reading = Some(files::new_task()),
    }
    formation.reading
}

impl Host {
    /// Reports the formations whose files are in a file system that does not answer. Their threads end with the call.
    pub(super) fn give_up_stuck(&mut self) {
        for call in files::stuck() {
            let mut formations = self.formations.values_mut();
            if let Some(formation) = formations.find(|formation| formation.reading == Some(call.task)) {
                formation.reading = None;
                formation.fail(&RankError::Node { message: call.to_string() }, &self.inputs);
            }
        }
    }
}
