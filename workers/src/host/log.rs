//! Events of ranks as log lines of this worker. Of steps only the warnings are logged.

use contraflow_runtime::control::{MovedBytes, RankEvent};
use contraflow_runtime::topology::JobId;

/// Logs an event, if it has a line.
pub(super) fn event(job: JobId, event: &RankEvent) {
    let (job, rank) = (job.bits(), event.rank().number());
    match event {
        RankEvent::Ready { .. } => tracing::info!(job, rank, "model built, waiting for other ranks"),
        RankEvent::StateMoved { moved: MovedBytes { moved, least, needed }, .. } => {
            tracing::info!(
                job,
                rank,
                "took its state over from memory: of {needed} bytes {moved} came from other workers, {least} had to"
            );
        }
        RankEvent::Stopped { step, in_memory: false, .. } => {
            tracing::info!(job, rank, "stopped after step {step}");
        }
        RankEvent::Stopped { step, in_memory: true, .. } => {
            tracing::info!(job, rank, "stopped after step {step}, its state is in memory");
        }
        RankEvent::ShardSaved { position, .. } => {
            tracing::info!(job, rank, "its part of the checkpoint of step {} is on disk", position.step);
        }
        RankEvent::Validated { .. } => tracing::info!(job, rank, "has run the validation sequences"),
        RankEvent::Exported { .. } => tracing::info!(job, rank, "its weights are on disk"),
        RankEvent::Diverged { divergence, .. } => tracing::warn!(job, rank, "{}", divergence.why),
        // The rank itself logs it.
        RankEvent::SaveFailed { .. } => {}
        RankEvent::Failed { action, cause, .. } => tracing::error!(job, rank, "{action}: {cause}"),
        RankEvent::StepDone { report } => {
            if let Some(warning) = &report.warning {
                tracing::warn!(job, rank, "step {}: {warning}", report.step);
            }
        }
        RankEvent::Aborted { .. } => {}
    }
}
