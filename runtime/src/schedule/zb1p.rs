//! ZB1P: 1F1B with the backward pass split, its weight parts held back to fill the gaps behind the input parts, within the memory of
//! 1F1B.
//!
//! **Source**: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", there ZB-H1; report section 3.2.1, table 2.

use super::action::{Action, Chunk, Plan};
use super::kind::{Mode, ScheduleError, ScheduleKind};
use super::one_f_one_b::one_stage_a_rank;

/// ZB1P on `ranks` ranks with any number of micro-batches.
///
/// # Errors
/// No ranks, no micro-batches.
pub fn zb1p(ranks: usize, micro_batches: usize, mode: Mode) -> Result<Plan, ScheduleError> {
    one_stage_a_rank(ScheduleKind::Zb1p, ranks, micro_batches, mode, train)
}

/// The order of 1F1B. While forwards are left, stage `s` holds back the weight parts of `s` micro-batches: with the `P - s` under way
/// there as many as 1F1B holds on its first rank. Then one of them follows each input part, and the rest ends the step.
fn train(stage: usize, warm_up: usize, micro_batches: usize) -> Vec<Action> {
    let chunk = |micro_batch| Chunk { stage, micro_batch };
    let mut actions: Vec<Action> = (0..warm_up).map(|at| Action::Forward(chunk(at))).collect();
    let mut held = 0..0;
    for at in 0..micro_batches {
        let ahead = warm_up + at;
        if ahead < micro_batches {
            actions.push(Action::Forward(chunk(ahead)));
        }
        held.end += 1;
        let releases = held.len() > stage || ahead + 1 >= micro_batches;
        if releases && held.len() == 1 {
            // Its own weight part follows at once.
            actions.push(Action::Backward(chunk(at)));
            held.start += 1;
            continue;
        }
        actions.push(Action::BackwardInput(chunk(at)));
        if releases {
            actions.extend(held.next().map(|weight| Action::BackwardWeight(chunk(weight))));
        }
    }
    actions.extend(held.map(|weight| Action::BackwardWeight(chunk(weight))));
    actions
}
