//! Plans for a batch that is too small or too uneven for its schedule, on that schedule's own placement.
//!
//! They work in the manner of 1F1B: a backward pass as soon as there is one to do, and never more micro-batches under way
//! than there are pipeline ranks, so that a rank keeps no more activations alive than under the schedule itself (than the first
//! rank of an interleaved one). Each is made by a walk in which ranks take what is ready, on a clock on which a backward pass
//! takes twice as long as a forward pass.
//! The actions stand in the order in which they begin there, what an action needs before the action: one global order.
//! Of the plans that are sound, the one that ends first is taken.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use super::action::{Action, Chunk, Plan};
use super::bubble::{UnitCosts, simulate};
use super::kind::{Mode, ScheduleError, ScheduleKind};

/// Where the micro-batches enter the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// All at the first stage: 1F1B, folded where the schedule holds two stages of one pass on a rank.
    OneEnd,
    /// Under DualPipe half of them, rounded up, at the first rank, the others at the last one.
    BothEnds,
}

impl Entry {
    /// The name of the plans.
    fn name(self) -> &'static str {
        match self {
            Entry::OneEnd => "one-way",
            Entry::BothEnds => "two-way",
        }
    }
}

/// The plan that ends first of those on the placement of `kind`, for any number of micro-batches.
///
/// # Errors
/// See [`ScheduleKind::validate`]; also no micro-batches.
pub fn fallback(
    kind: ScheduleKind,
    pipeline: usize,
    micro_batches: usize,
    mode: Mode,
) -> Result<Plan, ScheduleError> {
    let one_way = plan(kind, pipeline, micro_batches, mode, Entry::OneEnd)?;
    if kind != ScheduleKind::Dualpipe || micro_batches < 2 {
        return Ok(one_way);
    }
    let two_way = plan(kind, pipeline, micro_batches, mode, Entry::BothEnds)?;
    // One that could block has no end. All ranks take part in both, so that the shorter one also has the smaller bubble.
    let end = |plan: &Plan| simulate(plan, UnitCosts::SUM).map_or(f64::INFINITY, |bubble| bubble.makespan);
    Ok(if end(&two_way) < end(&one_way) { two_way } else { one_way })
}

/// The plan on the placement of `kind` whose micro-batches enter at one or at both ends.
///
/// # Errors
/// As [`fallback`].
pub fn plan(
    kind: ScheduleKind,
    pipeline: usize,
    micro_batches: usize,
    mode: Mode,
    entry: Entry,
) -> Result<Plan, ScheduleError> {
    kind.validate(pipeline)?;
    if micro_batches == 0 {
        return Err(ScheduleError::NoMicroBatches);
    }
    Ok(Plan {
        schedule: entry.name().to_string(),
        stages: kind.stages(pipeline),
        micro_batches,
        placement: kind.placement(pipeline),
        actions: Walk::new(kind, pipeline, micro_batches, mode, entry).run(),
    })
}

/// What a rank may begin, in the order of preference: a backward pass, then what is further on its way, then the lower number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Task {
    is_forward: bool,
    /// Stages that the micro-batch has yet to pass in this pass.
    left: usize,
    micro_batch: usize,
}

/// The micro-batches that enter at one end.
struct Stream {
    /// The next one to enter, and the one behind the last.
    waiting: std::ops::Range<usize>,
    under_way: usize,
}

/// The walk.
struct Walk {
    kind: ScheduleKind,
    stages: usize,
    mode: Mode,
    /// By end.
    streams: Vec<Stream>,
    /// Micro-batches under way at most, by end.
    most: usize,
    /// Micro-batches from here on enter at the other end.
    other_end: usize,
    /// By rank, when it is free.
    free: Vec<u64>,
    /// By rank, what is or becomes ready, with the time.
    tasks: Vec<BTreeSet<(u64, Task)>>,
    /// When a rank may begin something; the time may have moved on.
    next: BinaryHeap<Reverse<(u64, usize)>>,
    actions: Vec<Vec<Action>>,
}

impl Walk {
    fn new(kind: ScheduleKind, pipeline: usize, micro_batches: usize, mode: Mode, entry: Entry) -> Self {
        let other_end = match entry {
            Entry::OneEnd => micro_batches,
            Entry::BothEnds => micro_batches.div_ceil(2),
        };
        let ends = [0..other_end, other_end..micro_batches].into_iter().filter(|waiting| !waiting.is_empty());
        let streams: Vec<Stream> = ends.map(|waiting| Stream { waiting, under_way: 0 }).collect();
        let mut walk = Walk {
            kind,
            stages: kind.stages(pipeline),
            mode,
            most: (pipeline / streams.len()).max(1),
            streams,
            other_end,
            free: vec![0; pipeline],
            tasks: vec![BTreeSet::new(); pipeline],
            next: BinaryHeap::new(),
            actions: vec![Vec::new(); pipeline],
        };
        (0..walk.streams.len()).for_each(|end| walk.enter(end, 0));
        walk
    }

    /// Lets micro-batches in, as many as may be under way.
    fn enter(&mut self, end: usize, time: u64) {
        while self.streams[end].under_way < self.most {
            let Some(micro_batch) = self.streams[end].waiting.next() else { return };
            self.streams[end].under_way += 1;
            self.add(Task { is_forward: true, left: self.stages, micro_batch }, time);
        }
    }

    fn chunk(&self, task: Task) -> Chunk {
        let stage = if task.is_forward { self.stages - task.left } else { task.left - 1 };
        Chunk { stage, micro_batch: task.micro_batch }
    }

    /// The rank that works on a chunk.
    fn rank_of(&self, Chunk { stage, micro_batch }: Chunk) -> usize {
        let last_stage = self.stages - 1;
        match self.kind {
            ScheduleKind::Dualpipe if micro_batch >= self.other_end => last_stage - stage,
            ScheduleKind::Dualpipev => stage.min(last_stage - stage),
            ScheduleKind::Interleaved(_) => stage % self.free.len(),
            _ => stage,
        }
    }

    fn add(&mut self, task: Task, time: u64) {
        let rank = self.rank_of(self.chunk(task));
        self.tasks[rank].insert((time, task));
        self.next.push(Reverse((time.max(self.free[rank]), rank)));
    }

    fn run(mut self) -> Vec<Vec<Action>> {
        while let Some(Reverse((time, rank))) = self.next.pop() {
            if time < self.free[rank] {
                // It has begun something else meanwhile.
                self.next.push(Reverse((self.free[rank], rank)));
                continue;
            }
            let ready = self.tasks[rank].iter().take_while(|(since, _)| *since <= time);
            let Some(chosen) = ready.min_by_key(|(_, task)| *task).copied() else { continue };
            self.tasks[rank].remove(&chosen);
            self.begin(rank, chosen.1, time);
        }
        self.actions
    }

    fn begin(&mut self, rank: usize, task: Task, time: u64) {
        let chunk = self.chunk(task);
        let (action, cost) =
            if task.is_forward { (Action::Forward(chunk), 1) } else { (Action::Backward(chunk), 2) };
        self.actions[rank].push(action);
        let end = time + cost;
        self.free[rank] = end;
        if !self.tasks[rank].is_empty() {
            self.next.push(Reverse((end, rank)));
        }
        match task {
            Task { left: 2.., .. } => self.add(Task { left: task.left - 1, ..task }, end),
            // The backward pass begins where the forward pass has ended.
            Task { is_forward: true, .. } if self.mode == Mode::Train => {
                self.add(Task { is_forward: false, left: self.stages, ..task }, end);
            }
            _ => {
                let of = usize::from(task.micro_batch >= self.other_end && self.streams.len() > 1);
                self.streams[of].under_way -= 1;
                self.enter(of, end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{check, lower};

    fn lines(plan: &Plan) -> Vec<String> {
        let line = |list: &Vec<Action>| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        plan.actions.iter().map(line).collect()
    }

    fn share(plan: &Plan) -> f64 {
        simulate(plan, UnitCosts::SUM).unwrap().share
    }

    #[test]
    fn every_placement_has_a_sound_fallback_that_holds_no_more_than_the_schedule() {
        for kind in ScheduleKind::ALL {
            for (pipeline, micro_batches) in [(2, 1), (2, 7), (4, 1), (4, 2), (4, 5), (8, 3), (8, 15)] {
                for mode in [Mode::Train, Mode::ForwardOnly] {
                    let peak = |plan: &Plan| check(plan, &lower(plan, None, 1)).unwrap().peak_activations;
                    let live = peak(&fallback(kind, pipeline, micro_batches, mode).unwrap());
                    let most = peak(&kind.plan(pipeline, 4 * pipeline, mode).unwrap().0);
                    // 1F1B and ZB1P take any number of micro-batches: they have no need of another plan.
                    // Ranks of an interleaved one keep less the further they are from the first.
                    let fits = match kind {
                        ScheduleKind::Interleaved(_) => live.iter().max() <= most.iter().max(),
                        _ => live.iter().zip(&most).all(|(live, most)| live <= most),
                    };
                    let is_needed = !matches!(kind, ScheduleKind::OneFOneB | ScheduleKind::Zb1p);
                    assert!(fits || !is_needed, "{kind} {pipeline} {micro_batches}: {live:?}, not {most:?}");
                }
            }
        }
    }

    #[test]
    fn from_one_end_it_is_1f1b() {
        for (pipeline, micro_batches) in [(2, 3), (4, 6), (16, 24)] {
            let one_way =
                plan(ScheduleKind::Dualpipe, pipeline, micro_batches, Mode::Train, Entry::OneEnd).unwrap();
            // The bubble of 1F1B: (P - 1) of (m + P - 1).
            let (ranks, batches) = (pipeline as f64, micro_batches as f64);
            let expected = (ranks - 1.0) / (batches + ranks - 1.0);
            assert!(
                (share(&one_way) - expected).abs() < 1e-9,
                "{pipeline} {micro_batches}: {}",
                share(&one_way)
            );
        }
    }

    #[test]
    fn the_first_batch_of_deepseek_v3_has_less_of_a_bubble_than_1f1b() {
        let plan = fallback(ScheduleKind::Dualpipe, 16, 24, Mode::Train).unwrap();
        // The plan that runs it in waves, one after another, stands idle 53.8 % of the time; 1F1B 38.5 %.
        assert!(share(&plan) <= 15.0 / 39.0 + 1e-9, "{} {}", plan.schedule, share(&plan));
    }

    #[test]
    fn no_fallback_is_slower_than_1f1b_on_as_many_ranks() {
        for pipeline in [2, 4, 6, 8] {
            for micro_batches in 1..2 * pipeline {
                let plan = fallback(ScheduleKind::Dualpipe, pipeline, micro_batches, Mode::Train).unwrap();
                let other = ScheduleKind::OneFOneB.plan(pipeline, micro_batches, Mode::Train).unwrap().0;
                assert!(share(&plan) <= share(&other) + 1e-9, "{pipeline} {micro_batches}");
            }
        }
    }

    #[test]
    fn dualpipe_uses_its_two_directions() {
        let plan = plan(ScheduleKind::Dualpipe, 2, 3, Mode::Train, Entry::BothEnds).unwrap();
        assert_eq!(lines(&plan), ["F0.0 F1.2 B1.2 B0.0 F0.1 B0.1", "F0.2 F1.0 B1.0 B0.2 F1.1 B1.1"]);
    }
}
