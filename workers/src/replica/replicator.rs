//! The replicator: a thread per rank that copies the state after every step into memory, sends it to the rank's buddy, and
//! receives the replica that the rank holds for another one. Training continues meanwhile.
//!
//! A thread, not an actor: it waits for frames. It processes steps in order; the state of a step is received before that of
//! the next one, so no cycle of buddies can wait for itself.

use std::sync::{Arc, mpsc};

use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Phase, Region};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::FormationId;

use super::{ReplicaStore, ShardReplica, transfer};
use crate::checkpoint::{Snapshot, shard_bytes};
use crate::comm::address::StepId;
use crate::error::RankError;

const NOWHERE: Chunk = Chunk { stage: 0, micro_batch: 0 };

/// The state after a step.
pub struct Replicate {
    /// Position of the run.
    pub position: Position,
    /// The rank's part. Dropped as soon as it is copied: until then the next update would copy what it writes to.
    pub snapshot: Snapshot,
    /// The rank's report of the step.
    pub report: StepReport,
    /// The ranks stop after this step, and this is where its state is kept: whoever stops waits until the buddy has it.
    pub is_last: bool,
}

/// The replication of one rank.
#[derive(Clone)]
pub struct Replicator {
    /// This rank's end of the fabric.
    pub endpoint: Endpoint,
    /// Where shards are stored.
    pub store: Arc<ReplicaStore>,
    /// Whose states are kept: later formations do not take them.
    pub formation: FormationId,
    /// Who keeps replicas of whom; `None` if all ranks are in one process, where a state is kept only if the ranks stop after it.
    pub circle: Option<Circle>,
}

/// A rank's neighbours among those that keep replicas of one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circle {
    /// The rank that holds this one's replica.
    pub buddy: usize,
    /// The rank whose replica this one holds.
    pub source: usize,
}

/// Starts a rank's replicator, in a formation that resumes after `first_step`; it ends with the sender, or with the first
/// error, which goes to `fail`. Of the last step `kept` hears once it is in memory, here and at the buddy.
///
/// **Errors**: the thread cannot be started.
pub fn start(
    replicator: Replicator,
    first_step: u64,
    kept: impl Fn(u64) + Send + 'static,
    fail: impl FnOnce(RankError) + Send + 'static,
) -> std::io::Result<mpsc::Sender<Replicate>> {
    let (sender, keeps) = mpsc::channel::<Replicate>();
    let work = move || {
        let all = || {
            keeps.iter().try_for_each(|keep| {
                let last = keep.is_last.then_some(keep.position.step);
                replicator.keep(keep, first_step)?;
                last.into_iter().for_each(&kept);
                Ok(())
            })
        };
        if let Err(error) = RankError::catch(all) {
            fail(error);
        }
    };
    std::thread::Builder::new().name("replicator".into()).spawn(work)?;
    Ok(sender)
}

impl Replicator {
    fn keep(&self, keep: Replicate, first_step: u64) -> Result<(), RankError> {
        let _at_work = self.endpoint.work();
        let Replicate { position, snapshot, report, is_last } = keep;
        let generation = self.formation.generation;
        let (step, own) = (position.step, self.endpoint.rank());
        let id = step_id(self.formation, step);
        if step > first_step + 1 {
            // The update has ended: it was made when every buddy had the state before it.
            self.store.acknowledged(generation, step - 1);
        }
        let watch = snapshot.watch.clone();
        let bytes = shard_bytes(snapshot, self.store.buffer());
        let bytes = Arc::new(bytes.map_err(|source| RankError::File { path: "memory".into(), source })?);
        let replica = Arc::new(ShardReplica { position, watch, bytes });
        self.store.put(generation, (generation, step, own), replica.clone(), [report.clone()]);
        let Some(Circle { buddy, source }) = self.circle else { return Ok(()) };
        // A new buddy also gets the earlier reports.
        let is_first = step == first_step + 1;
        let reports = if is_first { self.store.reports(own, step) } else { vec![report] };
        transfer::send((&self.endpoint, buddy), (id, FrameKind::State, own), &replica, reports)?;
        drop(replica);
        let from = (&self.endpoint, source);
        let (replica, reports) =
            transfer::receive(from, (id, FrameKind::State, source), self.store.buffer())?;
        self.store.put(generation, (generation, step, source), Arc::new(replica), reports);
        let tag = id.tag(FrameKind::StateReplicated, NOWHERE, 0, own);
        self.endpoint.send(source, tag, vec![Region::new(Vec::new())])?;
        if is_last {
            // No update comes that would wait for it.
            acknowledged(&self.endpoint, self.formation, buddy, step)?;
        }
        Ok(())
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
    let tag = step_id(formation, step).tag(FrameKind::StateReplicated, NOWHERE, 0, buddy);
    endpoint.receive(tag).map(drop)
}

/// The part of the tags of frames about the state after a step.
pub fn step_id(formation: FormationId, step: u64) -> StepId {
    StepId { formation, phase: Phase::Replicate, step }
}
