//! Recovery from memory: every rank's shard is sent to it, then the ranks gather the parameters they hold copies of.

use std::sync::Arc;

use contraflow_proto::StepReport;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind};
use contraflow_runtime::topology::{FormationId, Generation};

use super::replicator::step_id;
use super::{ReplicaStore, ShardReplica, transfer};
use crate::error::RankError;

/// Where the parts of a state are.
#[derive(Clone)]
pub struct Recovered {
    /// Of the formation that made the step.
    pub generation: Generation,
    /// The step.
    pub step: u64,
    /// By rank, the rank of this formation whose worker has its part.
    pub holders: Vec<usize>,
    /// What this worker has.
    pub store: Arc<ReplicaStore>,
}

/// Brings parts of this worker to the ranks that resume from them, and gets this rank's own: the part, and what the rank had
/// reported that may not be durable with the orchestrator.
///
/// **Errors**: those of the fabric; a part is not here.
pub fn recover(
    recovered: &Recovered,
    endpoint: &Endpoint,
    formation: FormationId,
) -> Result<(Arc<ShardReplica>, Vec<StepReport>), RankError> {
    let Recovered { generation, step, holders, store } = recovered;
    let own = endpoint.rank();
    let id = step_id(formation, *step);
    let image_of = |rank: usize| {
        store.get((*generation, *step, rank)).ok_or_else(|| FabricError::Lost {
            rank,
            reason: format!("its state after step {step} of generation {generation} is not in memory here"),
        })
    };
    for rank in (0..holders.len()).filter(|&rank| holders[rank] == own && rank != own) {
        let (replica, reports) = (image_of(rank)?, store.reports(rank, *step));
        transfer::send((endpoint, rank), (id, FrameKind::State), &replica, reports)?;
    }
    if holders.get(own) == Some(&own) {
        return Ok((image_of(own)?, store.reports(own, *step)));
    }
    let holder = holders.get(own).copied().unwrap_or(own);
    let (replica, reports) = transfer::receive((endpoint, holder), (id, FrameKind::State), store.buffer())?;
    let replica = Arc::new(replica);
    store.put(formation.generation, (*generation, *step, own), replica.clone(), reports.clone());
    Ok((replica, reports))
}
