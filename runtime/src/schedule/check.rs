//! Proves a plan and its programs before anything is launched; for any plan, a user's own too.
//!
//! Looks at the plan alone first (is every chunk run once, in an order that can work), then at the programs (do they
//! carry out this plan, do sends match receives), then walks them with rendezvous transfers. It reports every fault it
//! finds and never panics, whatever it is given.

use std::collections::HashMap;
use std::fmt;

use serde::Serialize;

use super::action::{Action, Chunk, Plan};
use super::check_programs::{deadlock_faults, program_faults};
use super::program::{Lane, Op, Pass, Program};
use super::walk::walk;

/// How many chunks that never run are listed one by one.
const MAX_LISTED: usize = 1000;

/// What a sound plan costs in memory, per pipeline rank. A plan without backward passes keeps nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Chunks alive at the same time, from their forward until their input gradient is done.
    pub peak_activations: Vec<usize>,
    /// The same until their weight gradient is done.
    pub peak_activations_until_weight: Vec<usize>,
    /// Weight parts waiting at the same time.
    pub queue_depth: Vec<usize>,
    /// Whether every rank runs its deferred weight parts oldest first.
    pub weights_in_order: bool,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlanFault {
    /// Pipeline rank, where it belongs to one.
    pub rank: Option<usize>,
    /// Index in the rank's list of actions, where it belongs to one.
    pub action: Option<usize>,
    /// What was expected and what came.
    pub text: String,
}

impl fmt::Display for PlanFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rank, self.action) {
            (Some(rank), Some(action)) => write!(f, "rank {rank}, action {action}: {}", self.text),
            (Some(rank), None) => write!(f, "rank {rank}: {}", self.text),
            _ => f.write_str(&self.text),
        }
    }
}

/// Checks a plan and the programs made of it.
///
/// # Errors
/// All faults: a chunk that never runs or runs twice, a backward pass before or away from its forward pass, a weight part
/// without its input part, a stage on a rank that does not hold it, programs that do something other than the plan,
/// transfers that do not match, a deadlock.
pub fn check(plan: &Plan, programs: &[Program]) -> Result<Report, Vec<PlanFault>> {
    let mut faults = PlanFaults::default();
    plan_faults(plan, &mut faults);
    if programs.len() != plan.ranks() {
        faults.add(
            None,
            None,
            format!("expected {} programs, one per rank, got {}", plan.ranks(), programs.len()),
        );
    } else {
        if faults.0.is_empty() {
            program_faults(plan, programs, &mut faults);
        }
        if let Err(deadlock) = walk(programs, unit_cost) {
            deadlock_faults(&deadlock, programs, &mut faults);
        }
    }
    if faults.0.is_empty() { Ok(report(plan)) } else { Err(faults.0) }
}

/// Arithmetic takes time, communication none: what a proof walks with.
pub(super) fn unit_cost(_rank: usize, op: &Op) -> f64 {
    if op.lane == Lane::Compute { 1.0 } else { 0.0 }
}

/// The faults found so far.
#[derive(Default)]
pub(super) struct PlanFaults(pub Vec<PlanFault>);

impl PlanFaults {
    pub fn add(&mut self, rank: Option<usize>, action: Option<usize>, text: String) {
        self.0.push(PlanFault { rank, action, text });
    }

    pub fn at(&mut self, place: ActionIndex, text: String) {
        self.add(Some(place.rank), Some(place.action), text);
    }

    /// Of an operation of a rank's program.
    pub fn of(&mut self, rank: usize, op: &Op, text: String) {
        self.add(Some(rank), op.action, text);
    }
}

/// Where in a plan something happens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ActionIndex {
    pub rank: usize,
    pub action: usize,
}

type ActionIndices = HashMap<(Pass, Chunk), ActionIndex>;

fn plan_faults(plan: &Plan, faults: &mut PlanFaults) {
    if plan.placement.len() != plan.ranks() {
        let (placed, ranks) = (plan.placement.len(), plan.ranks());
        faults.add(None, None, format!("expected a placement for each of {ranks} ranks, got {placed}"));
    }
    for (rank, held) in plan.placement.iter().enumerate() {
        for stage in held.iter().filter(|&&stage| stage >= plan.stages) {
            faults.add(
                Some(rank),
                None,
                format!("holds stage {stage}, but there are {} stages", plan.stages),
            );
        }
    }
    let places = places(plan, faults);
    missing_faults(plan, &places, faults);
    order_faults(&places, faults);
}

/// The passes an action runs, each with its chunk.
pub(super) fn passes(action: &Action) -> impl Iterator<Item = (Pass, Chunk)> {
    let forwards = action.forwards().map(|chunk| (Pass::Forward, chunk));
    let input = action.backward_input().map(|chunk| (Pass::BackwardInput, chunk));
    let weight = action.backward_weight().map(|chunk| (Pass::BackwardWeight, chunk));
    forwards.chain(input).chain(weight)
}

/// The name of a pass.
pub(super) fn name(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::BackwardInput => "input gradient",
        Pass::BackwardWeight => "weight gradient",
    }
}

/// Where every pass of every chunk runs; complains about those that run twice or where they must not.
fn places(plan: &Plan, faults: &mut PlanFaults) -> ActionIndices {
    let mut places = ActionIndices::new();
    for (rank, list) in plan.actions.iter().enumerate() {
        let held = plan.placement.get(rank).map_or(&[][..], Vec::as_slice);
        for (index, action) in list.iter().enumerate() {
            let place = ActionIndex { rank, action: index };
            for (pass, chunk) in passes(action) {
                let name = name(pass);
                if chunk.stage >= plan.stages || chunk.micro_batch >= plan.micro_batches {
                    let (stages, micro_batches) = (plan.stages, plan.micro_batches);
                    let text = format!(
                        "{action}: the {name} of {chunk} lies outside of {stages} stages and {micro_batches} micro-batches"
                    );
                    faults.at(place, text);
                } else if !held.contains(&chunk.stage) {
                    faults.at(
                        place,
                        format!("{action}: the rank holds stages {held:?}, not stage {}", chunk.stage),
                    );
                }
                match places.get(&(pass, chunk)) {
                    None => {
                        places.insert((pass, chunk), place);
                    }
                    Some(first) => {
                        let ActionIndex { rank, action: index } = first;
                        let text = format!(
                            "{action}: the {name} of {chunk} runs again, first as action {index} of rank {rank}"
                        );
                        faults.at(place, text);
                    }
                }
            }
        }
    }
    places
}

fn missing_faults(plan: &Plan, places: &ActionIndices, faults: &mut PlanFaults) {
    let wanted: &[Pass] = if plan.is_forward_only() {
        &[Pass::Forward]
    } else {
        &[Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight]
    };
    if plan.stages == 0 || plan.micro_batches == 0 {
        let (stages, micro_batches) = (plan.stages, plan.micro_batches);
        let text = format!("expected at least 1 stage and 1 micro-batch, got {stages} and {micro_batches}");
        faults.add(None, None, text);
        return;
    }
    let chunks = (0..plan.stages)
        .flat_map(|stage| (0..plan.micro_batches).map(move |micro_batch| Chunk { stage, micro_batch }));
    let mut missing = chunks
        .flat_map(|chunk| wanted.iter().map(move |&pass| (pass, chunk)))
        .filter(|key| !places.contains_key(key));
    for (pass, chunk) in missing.by_ref().take(MAX_LISTED) {
        let holder = plan.placement.iter().position(|held| held.contains(&chunk.stage));
        faults.add(holder, None, format!("the {} of {chunk} never runs", name(pass)));
    }
    if missing.next().is_some() {
        faults.add(None, None, format!("and more than {MAX_LISTED} others never run"));
    }
}

/// What must come earlier on the same rank. Order between ranks follows from the messages; the walk proves it.
fn order_faults(places: &ActionIndices, faults: &mut PlanFaults) {
    let mut found: Vec<(ActionIndex, String)> = Vec::new();
    for (&(pass, chunk), &place) in places {
        let earlier = match pass {
            Pass::Forward => None,
            Pass::BackwardInput => Some(Pass::Forward),
            Pass::BackwardWeight => Some(Pass::BackwardInput),
        };
        if let Some(earlier) = earlier {
            found.extend(order_fault((pass, chunk), place, (earlier, chunk), places));
        }
        let neighbour = match pass {
            Pass::Forward => chunk.stage.checked_sub(1),
            Pass::BackwardInput => chunk.stage.checked_add(1),
            Pass::BackwardWeight => None,
        };
        let neighbour = neighbour.map(|stage| (pass, Chunk { stage, ..chunk }));
        if let Some(key) = neighbour
            && let Some(before) = places.get(&key)
            && before.rank == place.rank
            && before.action >= place.action
        {
            let (name, other) = (name(pass), key.1);
            found
                .push((place, format!("the {name} of {chunk} comes before that of {other}, which it needs")));
        }
    }
    // The map has no order of its own.
    found.sort_by_key(|(place, text)| (place.rank, place.action, text.clone()));
    found.into_iter().for_each(|(place, text)| faults.at(place, text));
}

fn order_fault(
    (pass, chunk): (Pass, Chunk),
    place: ActionIndex,
    earlier: (Pass, Chunk),
    places: &ActionIndices,
) -> Option<(ActionIndex, String)> {
    let (name, needed) = (name(pass), name(earlier.0));
    let text = match places.get(&earlier) {
        None => format!("the {name} of {chunk} has no {needed}"),
        Some(before) if before.rank != place.rank => {
            format!("the {name} of {chunk} runs away from its {needed}, which is on rank {}", before.rank)
        }
        // A full backward computes both gradients in one action.
        Some(before) if before == &place && pass == Pass::BackwardWeight => return None,
        Some(before) if before.action >= place.action => {
            format!("the {name} of {chunk} does not come after its {needed}, action {}", before.action)
        }
        Some(_) => return None,
    };
    Some((place, text))
}

/// Activations are kept for a backward pass alone.
fn loads(plan: &Plan) -> Vec<Load> {
    if plan.is_forward_only() {
        return vec![Load { in_order: true, ..Load::default() }; plan.ranks()];
    }
    plan.actions.iter().map(|list| Load::of(list)).collect()
}

fn report(plan: &Plan) -> Report {
    let loads = loads(plan);
    Report {
        peak_activations: loads.iter().map(|load| load.peak_until_input).collect(),
        peak_activations_until_weight: loads.iter().map(|load| load.peak_until_weight).collect(),
        queue_depth: loads.iter().map(|load| load.peak_queue).collect(),
        weights_in_order: loads.iter().all(|load| load.in_order),
    }
}

/// What a rank keeps alive at most. A pair counts its new forwards before its backward is freed, and the weight part that it leaves
/// before the one that it takes.
#[derive(Clone, Default)]
struct Load {
    peak_until_input: usize,
    peak_until_weight: usize,
    peak_queue: usize,
    in_order: bool,
}

impl Load {
    fn of(actions: &[Action]) -> Load {
        let mut load = Load::default();
        let (mut forwards, mut inputs, mut weights) = (0, 0, 0);
        for action in actions {
            forwards += action.forwards().count();
            load.peak_until_input = load.peak_until_input.max(forwards - inputs);
            load.peak_until_weight = load.peak_until_weight.max(forwards - weights);
            inputs += usize::from(action.backward_input().is_some());
            if let Action::InputWeight { .. } = action {
                load.peak_queue = load.peak_queue.max(inputs - weights);
            }
            weights += usize::from(action.backward_weight().is_some());
            load.peak_queue = load.peak_queue.max(inputs - weights);
        }
        let deferred = actions.iter().filter_map(|action| match action {
            Action::BackwardInput(chunk) | Action::InputWeight { input: chunk, .. } => Some(chunk),
            _ => None,
        });
        let done = actions.iter().filter_map(|action| match action {
            Action::BackwardWeight(chunk) | Action::InputWeight { weight: chunk, .. } => Some(chunk),
            _ => None,
        });
        load.in_order = deferred.eq(done);
        load
    }
}
