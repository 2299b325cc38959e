//! 1F1B: rank `r` holds stage `r`; after a warm-up of forwards every rank alternates one forward with one backward.

use super::action::{Action, Chunk, Plan};
use super::kind::{Mode, ScheduleError, ScheduleKind};

/// 1F1B on `ranks` ranks with any number of micro-batches.
///
/// # Errors
/// No ranks, no micro-batches.
pub fn one_f_one_b(ranks: usize, micro_batches: usize, mode: Mode) -> Result<Plan, ScheduleError> {
    one_stage_a_rank(ScheduleKind::OneFOneB, ranks, micro_batches, mode, train)
}

/// A schedule of one stage a rank that trains as `train` says: of a stage, its forwards before the first backward, and micro-batches.
pub(super) fn one_stage_a_rank(
    kind: ScheduleKind,
    ranks: usize,
    micro_batches: usize,
    mode: Mode,
    train: fn(usize, usize, usize) -> Vec<Action>,
) -> Result<Plan, ScheduleError> {
    kind.validate_batch(ranks, micro_batches)?;
    Ok(kind.with_actions(ranks, micro_batches, |stage| match mode {
        Mode::Train => train(stage, micro_batches.min(ranks - 1 - stage), micro_batches),
        Mode::ForwardOnly => {
            (0..micro_batches).map(|micro_batch| Action::Forward(Chunk { stage, micro_batch })).collect()
        }
    }))
}

/// `warm_up` forwards, then pairs of one forward and one backward, then the backwards that are left.
fn train(stage: usize, warm_up: usize, micro_batches: usize) -> Vec<Action> {
    let forward = |micro_batch| Action::Forward(Chunk { stage, micro_batch });
    let backward = |micro_batch| Action::Backward(Chunk { stage, micro_batch });
    let mut actions: Vec<Action> = (0..warm_up).map(forward).collect();
    for micro_batch in warm_up..micro_batches {
        actions.push(forward(micro_batch));
        actions.push(backward(micro_batch - warm_up));
    }
    actions.extend((micro_batches - warm_up..micro_batches).map(backward));
    actions
}
