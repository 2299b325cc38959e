//! A formation goes on from what its workers have in memory: every rank's part is brought to it, then the ranks tell each
//! other what they hold copies of.

use std::sync::Arc;

use contraflow_proto::StepReport;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind};
use contraflow_runtime::topology::{FormationId, Generation};

use super::keeper::step_id;
use super::{Image, Kept, courier};
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
    pub kept: Arc<Kept>,
}

/// Brings parts of this worker to the ranks that go on from them, and gets this rank's own: the part, and what the rank had
/// reported that may not be durable with the orchestrator.
///
/// **Errors**: those of the fabric; a part is not here.
pub fn recover(
    recovered: &Recovered,
    endpoint: &Endpoint,
    formation: FormationId,
) -> Result<(Arc<Image>, Vec<StepReport>), RankError> {
    let Recovered { generation, step, holders, kept } = recovered;
    let own = endpoint.rank();
    let id = step_id(formation, *step);
    let image_of = |rank: usize| {
        kept.get((*generation, *step, rank)).ok_or_else(|| FabricError::Lost {
            rank,
            reason: format!("its state after step {step} of generation {generation} is not in memory here"),
        })
    };
    for rank in (0..holders.len()).filter(|&rank| holders[rank] == own && rank != own) {
        let (image, reports) = (image_of(rank)?, kept.reports(rank, *step));
        courier::send((endpoint, rank), (id, FrameKind::State), &image, reports)?;
    }
    if holders.get(own) == Some(&own) {
        return Ok((image_of(own)?, kept.reports(own, *step)));
    }
    let holder = holders.get(own).copied().unwrap_or(own);
    let (image, reports) = courier::receive((endpoint, holder), (id, FrameKind::State), kept.buffer())?;
    let image = Arc::new(image);
    kept.put(formation.generation, (*generation, *step, own), image.clone(), reports.clone());
    Ok((image, reports))
}
