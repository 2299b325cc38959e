//! The keeper: beside each rank a thread that puts the state after every step into memory, sends it to the rank's buddy, and
//! takes in what the rank keeps for another one. Training goes on meanwhile.
//!
//! A thread and no actor: it waits for frames. What it is told comes in the order of the steps, and so does what it does; the
//! state of a step is asked for before that of the next one, so no circle of buddies can wait for itself.

use std::sync::{Arc, mpsc};

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Phase, Region};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::FormationId;

use super::{Image, Kept, courier};
use crate::checkpoint::{Snapshot, shard_bytes};
use crate::comm::address::StepId;
use crate::error::RankError;

const NOWHERE: Chunk = Chunk { stage: 0, micro_batch: 0 };

/// The state after a step.
pub struct Keep {
    /// Where the run stands.
    pub position: Position,
    /// The rank's part. Let go as soon as it is copied: until then the next update would copy what it writes to.
    pub snapshot: Snapshot,
    /// The rank's report of the step.
    pub report: StepReport,
}

/// Who keeps what.
#[derive(Clone)]
pub struct Keeper {
    /// This rank's end of the fabric.
    pub endpoint: Endpoint,
    /// Where parts are put.
    pub kept: Arc<Kept>,
    /// Whose states are kept: later formations do not take them.
    pub formation: FormationId,
    /// The rank that keeps this one's state.
    pub buddy: usize,
    /// The rank whose state this one keeps.
    pub ward: usize,
}

/// Starts a rank's keeper, in a formation that goes on after `first_step`; it ends with the sender, or with the first error, which goes to `fail`.
///
/// **Errors**: the thread cannot be started.
pub fn start(
    keeper: Keeper,
    first_step: u64,
    fail: impl FnOnce(RankError) + Send + 'static,
) -> std::io::Result<mpsc::Sender<Keep>> {
    let (sender, keeps) = mpsc::channel::<Keep>();
    let work = move || {
        let all = || keeps.iter().try_for_each(|keep| keeper.keep(keep, first_step));
        if let Err(error) = RankError::catch(all) {
            fail(error);
        }
    };
    std::thread::Builder::new().name("keeper".into()).spawn(work)?;
    Ok(sender)
}

impl Keeper {
    fn keep(&self, keep: Keep, first_step: u64) -> Result<(), RankError> {
        let _at_work = self.endpoint.work();
        let Keep { position, snapshot, report } = keep;
        let generation = self.formation.generation;
        let (step, own) = (position.step, self.endpoint.rank());
        let id = step_id(self.formation, step);
        if step > first_step + 1 {
            // The update has ended: it was made when every buddy had the state before it.
            self.kept.acknowledged(generation, step - 1);
        }
        let watch = snapshot.watch.clone();
        let bytes = shard_bytes(snapshot, self.kept.buffer());
        let bytes = Arc::new(bytes.map_err(|source| RankError::File { path: "memory".into(), source })?);
        let image = Arc::new(Image { position, watch, bytes });
        self.kept.put(generation, (generation, step, own), image.clone(), [report.clone()]);
        // A buddy that is new to it gets what was reported before, too.
        let is_first = step == first_step + 1;
        let reports = if is_first { self.kept.reports(own, step) } else { vec![report] };
        courier::send((&self.endpoint, self.buddy), (id, FrameKind::State), &image, reports)?;
        drop(image);
        let from = (&self.endpoint, self.ward);
        let (image, reports) = courier::receive(from, (id, FrameKind::State), self.kept.buffer())?;
        self.kept.put(generation, (generation, step, self.ward), Arc::new(image), reports);
        let tag = id.tag(FrameKind::StateKept, NOWHERE, 0, own);
        Ok(self.endpoint.send(self.ward, tag, vec![Region::new(Vec::new())])?)
    }
}

/// Waits until `buddy` has this rank's state after `step`.
///
/// **Errors**: those of the fabric.
pub fn acknowledged(
    endpoint: &Endpoint,
    formation: FormationId,
    buddy: usize,
    step: u64,
) -> Result<(), FabricError> {
    let tag = step_id(formation, step).tag(FrameKind::StateKept, NOWHERE, 0, buddy);
    endpoint.receive(tag).map(drop)
}

/// The part of the tags of frames about the state after a step.
pub fn step_id(formation: FormationId, step: u64) -> StepId {
    StepId { formation, phase: Phase::Keep, step }
}
