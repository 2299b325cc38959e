//! A plan without backward passes on any placement: what a user's own plan validates with. Knows no schedule.

use super::action::{Action, Chunk, Plan};

/// Forward passes of `micro_batches` on the ranks that hold the stages; where several hold one, they take turns.
///
/// The chunks stand in one global order, in which each comes after what it needs: so nothing waits in a circle.
pub fn forward_only(schedule: &str, placement: &[Vec<usize>], micro_batches: usize) -> Plan {
    let stages = placement.iter().flatten().map(|stage| stage + 1).max().unwrap_or_default();
    let holders = |stage: usize| {
        let holds = |rank: &usize| placement[*rank].contains(&stage);
        (0..placement.len()).filter(holds).collect::<Vec<_>>()
    };
    let holders: Vec<Vec<usize>> = (0..stages).map(holders).collect();
    let mut actions = vec![Vec::new(); placement.len()];
    for turn in 0..stages + micro_batches {
        for (stage, holders) in holders.iter().enumerate().filter(|(_, holders)| !holders.is_empty()) {
            if let Some(micro_batch) = turn.checked_sub(stage).filter(|&number| number < micro_batches) {
                let rank = holders[micro_batch % holders.len()];
                actions[rank].push(Action::Forward(Chunk { stage, micro_batch }));
            }
        }
    }
    Plan { schedule: schedule.to_owned(), stages, micro_batches, placement: placement.to_vec(), actions }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{ScheduleKind, check, lower};

    #[test]
    fn every_placement_has_a_sound_one() {
        for kind in ScheduleKind::ALL.into_iter().chain([ScheduleKind::Interleaved(3)]) {
            for pipeline in (1..=6).filter(|&pipeline| kind.validate(pipeline).is_ok()) {
                for micro_batches in [1, 2, 7, 16] {
                    let plan = forward_only("mine", &kind.placement(pipeline), micro_batches);
                    let faults = check(&plan, &lower(&plan, None, 1)).map(drop);
                    assert_eq!(faults, Ok(()), "{kind} {pipeline} {micro_batches}");
                    assert!(plan.is_forward_only());
                }
            }
        }
    }
}
