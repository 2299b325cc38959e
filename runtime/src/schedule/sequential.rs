//! The plan for a batch that is too small or too uneven for its schedule, on that schedule's own placement.
//!
//! Micro-batches run in waves of as many as there are pipeline ranks: all forwards of a wave, then all its backwards.
//! A wave keeps no more activations alive than the schedule itself would, so a rank that has the memory for one has it
//! for the other. Every rank takes its actions from one global order that respects all dependencies, so no set of
//! ranks can wait in a circle.

use super::action::{Action, Chunk, Plan};
use super::kind::{Mode, ScheduleError, ScheduleKind};

/// The fallback on the placement of `kind`, for any number of micro-batches. Under DualPipe the first half of them,
/// rounded up, enters at the first rank.
///
/// # Errors
/// See [`ScheduleKind::validate`]; also no micro-batches.
pub fn sequential(
    kind: ScheduleKind,
    pipeline: usize,
    micro_batches: usize,
    mode: Mode,
) -> Result<Plan, ScheduleError> {
    kind.validate(pipeline)?;
    if micro_batches == 0 {
        return Err(ScheduleError::NoMicroBatches);
    }
    let stages = kind.stages(pipeline);
    let mut actions = vec![Vec::new(); pipeline];
    for wave in waves(kind, pipeline, micro_batches) {
        for (direction, chunk) in wave_order(&wave, stages) {
            actions[rank_of(kind, pipeline, direction, chunk.stage)].push(Action::Forward(chunk));
        }
        if mode == Mode::Train {
            // The backward pass is the forward pass with the stages counted from the other end.
            for (direction, mirrored) in wave_order(&wave, stages) {
                let chunk = Chunk { stage: stages - 1 - mirrored.stage, ..mirrored };
                actions[rank_of(kind, pipeline, direction, chunk.stage)].push(Action::Backward(chunk));
            }
        }
    }
    Ok(Plan {
        schedule: "sequential".to_string(),
        stages,
        micro_batches,
        placement: kind.placement(pipeline),
        actions,
    })
}

/// The end at which a micro-batch enters the pipeline.
#[derive(Clone, Copy)]
enum Direction {
    FromFirst,
    FromLast,
}

/// Cuts the micro-batches into waves; of each wave, the micro-batches that enter at the two ends.
fn waves(kind: ScheduleKind, pipeline: usize, micro_batches: usize) -> Vec<[Vec<usize>; 2]> {
    let (from_first, per_end) = match kind {
        ScheduleKind::Dualpipe => (micro_batches.div_ceil(2), pipeline / 2),
        ScheduleKind::Dualpipev | ScheduleKind::OneFOneB => (micro_batches, pipeline),
    };
    let slice = |range: std::ops::Range<usize>, wave: usize| {
        range.skip(wave * per_end).take(per_end).collect::<Vec<usize>>()
    };
    (0..from_first.div_ceil(per_end))
        .map(|wave| [slice(0..from_first, wave), slice(from_first..micro_batches, wave)])
        .collect()
}

/// All chunks of a wave, stage by stage: what a chunk needs comes before it.
fn wave_order(wave: &[Vec<usize>; 2], stages: usize) -> Vec<(Direction, Chunk)> {
    let mut order = Vec::new();
    for stage in 0..stages {
        for (direction, micro_batches) in [Direction::FromFirst, Direction::FromLast].into_iter().zip(wave) {
            order.extend(micro_batches.iter().map(|&micro_batch| (direction, Chunk { stage, micro_batch })));
        }
    }
    order
}

/// The rank that works on `stage` of the micro-batches of one direction.
fn rank_of(kind: ScheduleKind, pipeline: usize, direction: Direction, stage: usize) -> usize {
    let last_stage = kind.stages(pipeline) - 1;
    match (kind, direction) {
        (ScheduleKind::Dualpipe, Direction::FromLast) => last_stage - stage,
        (ScheduleKind::Dualpipev, _) => stage.min(last_stage - stage),
        _ => stage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{check, lower};

    #[test]
    fn every_placement_has_a_sound_fallback() {
        for kind in ScheduleKind::ALL {
            for (pipeline, micro_batches) in [(2, 1), (2, 7), (4, 1), (4, 2), (4, 5), (8, 3)] {
                for mode in [Mode::Train, Mode::ForwardOnly] {
                    let plan = sequential(kind, pipeline, micro_batches, mode).unwrap();
                    check(&plan, &lower(&plan, None, 1)).unwrap();
                }
            }
        }
    }

    #[test]
    fn dualpipe_keeps_its_two_directions() {
        let plan = sequential(ScheduleKind::Dualpipe, 2, 3, Mode::Train).unwrap();
        let lines: Vec<String> = plan
            .actions
            .iter()
            .map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(lines[0], "F0.0 F1.2 B1.2 B0.0 F0.1 B0.1");
        assert_eq!(lines[1], "F0.2 F1.0 B1.0 B0.2 F1.1 B1.1");
    }
}
