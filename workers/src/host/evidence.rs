//! The evidence of a step that was not finite, left in the job's folder before the orchestrator learns of the step. All ranks
//! have the same evidence; the worker of rank 0 writes it.

use std::path::Path;

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::topology::{JobId, Rank};

/// Whether an event comes with evidence that this worker has to write.
pub(super) fn is_in(event: &RankEvent) -> bool {
    matches!(event, RankEvent::Diverged { rank: Rank::ZERO, divergence, .. } if divergence.evidence.is_some())
}

/// Writes the evidence of an event into a job's folder, and returns the event: without evidence where that failed, so that
/// no message refers to a file that does not exist.
pub(super) fn write(dir: &Path, job: JobId, mut event: RankEvent) -> RankEvent {
    let RankEvent::Diverged { rank, divergence, .. } = &mut event else { return event };
    let (job, rank) = (job.bits(), rank.number());
    match divergence.evidence.as_ref().map(|evidence| evidence.write(dir)) {
        Some(Ok(path)) => tracing::warn!(job, rank, "the evidence is in {}", path.display()),
        Some(Err(error)) => {
            divergence.evidence = None;
            tracing::warn!(job, rank, "the evidence cannot be written to {}: {error}", dir.display());
        }
        None => {}
    }
    event
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::stability::evidence::{EVIDENCE_FILE, Evidence};
    use contraflow_runtime::stability::{Divergence, StepAction};

    use super::*;

    fn diverged(rank: Rank, step: u64) -> RankEvent {
        let evidence = Evidence {
            step,
            loss: "NaN".into(),
            grad_norm: "NaN".into(),
            ranks: Vec::new(),
            sequences: Vec::new(),
        };
        let (action, why, evidence) = (StepAction::Stop, "not finite".to_owned(), Some(evidence));
        RankEvent::Diverged {
            rank,
            divergence: Box::new(Divergence { step, action, why, evidence }),
            cursor: 8,
        }
    }

    #[test]
    fn the_latest_evidence_is_in_the_folder_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for step in [3, 5] {
            assert!(is_in(&diverged(Rank::ZERO, step)) && !is_in(&diverged(Rank::new(1), step)));
            assert_eq!(
                write(dir.path(), JobId::new(1, 0), diverged(Rank::ZERO, step)),
                diverged(Rank::ZERO, step)
            );
            let text = std::fs::read_to_string(dir.path().join(EVIDENCE_FILE)).unwrap();
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["step"], step);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn if_it_cannot_be_written_no_message_refers_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let event = write(&dir.path().join("missing"), JobId::new(1, 0), diverged(Rank::ZERO, 3));
        let RankEvent::Diverged { divergence, cursor: 8, .. } = event else { panic!("{event:?}") };
        assert_eq!((divergence.why.as_str(), divergence.evidence), ("not finite", None));
    }
}
