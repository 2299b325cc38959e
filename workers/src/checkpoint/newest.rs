//! The newest whole checkpoint of a folder: a damaged one is passed over for the one before it, and never in silence.

use contraflow_runtime::checkpoint::{CheckpointError, CheckpointFolder};

use super::{Checkpoint, CheckpointFaults};
use crate::error::ErrorKind;

/// What a run or job can resume from.
pub struct NewestWhole {
    /// The newest that is whole, checked; `None` if none is.
    pub checkpoint: Option<Checkpoint>,
    /// Steps of the damaged ones after it, newest first, and what is wrong with each.
    pub damaged: Vec<(u64, CheckpointFaults)>,
}

impl NewestWhole {
    /// Looks through the committed checkpoints up to step `last`, from the newest on.
    ///
    /// **Errors**: the folder, or a checkpoint in it, cannot be read: whether that one is damaged is unknown.
    pub fn find(folder: &CheckpointFolder, last: u64) -> Result<Self, CheckpointFaults> {
        let unlisted = |error| CheckpointFaults(vec![CheckpointError::of_system(folder.path(), error)]);
        let steps = folder.list().map_err(unlisted)?;
        let mut damaged = Vec::new();
        for step in steps.into_iter().rev().filter(|step| *step <= last) {
            match Checkpoint::open(&folder.committed(step)) {
                Ok(checkpoint) => return Ok(NewestWhole { checkpoint: Some(checkpoint), damaged }),
                Err(faults) if faults.0.iter().any(|fault| fault.kind == ErrorKind::Node) => {
                    return Err(faults);
                }
                Err(faults) => damaged.push((step, faults)),
            }
        }
        Ok(NewestWhole { checkpoint: None, damaged })
    }

    /// Its step.
    pub fn step(&self) -> Option<u64> {
        self.checkpoint.as_ref().map(|checkpoint| checkpoint.manifest.position.step)
    }
}
