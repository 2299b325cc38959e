//! What ranks say, as lines of the log of this worker. Not every word is one: of steps there are only the warnings.

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::topology::JobId;

/// Logs an event, if it has a line.
pub(super) fn tell(job: JobId, event: &RankEvent) {
    let (job, rank) = (job.bits(), event.rank().number());
    match event {
        RankEvent::Ready { .. } => tracing::info!(job, rank, "has its model and waits for the others"),
        RankEvent::Stopped { step, .. } => tracing::info!(job, rank, "stopped after step {step}"),
        RankEvent::ShardSaved { position, .. } => {
            tracing::info!(job, rank, "its part of the checkpoint of step {} is on disk", position.step);
        }
        RankEvent::Validated { .. } => tracing::info!(job, rank, "has run the validation sequences"),
        RankEvent::Exported { .. } => tracing::info!(job, rank, "its weights are on disk"),
        RankEvent::Diverged { divergence, .. } => tracing::warn!(job, rank, "{}", divergence.why),
        RankEvent::Failed { action, cause, .. } => tracing::error!(job, rank, "{action}: {cause}"),
        RankEvent::StepDone { report } => {
            if let Some(warning) = &report.warning {
                tracing::warn!(job, rank, "step {}: {warning}", report.step);
            }
        }
        RankEvent::Aborted { .. } => {}
    }
}
