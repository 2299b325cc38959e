//! The half of `check` that looks at programs: do they carry out the plan, and do they come to their end.

use std::collections::{HashMap, HashSet};

use super::action::{Action, Chunk, Plan};
use super::check::{ActionIndex, PlanFaults, name, passes};
use super::deadlock::{Deadlock, Stuck, WaitsFor, list_ranks};
use super::flow;
use super::messages::{Message, messages};
use super::program::{Lane, Op, Pass, Program, Work};
use super::walk::partners;

/// Whether the programs carry out the plan: all of it, nothing else, with transfers that match.
pub(super) fn program_faults(plan: &Plan, programs: &[Program], faults: &mut PlanFaults) {
    for (rank, program) in programs.iter().enumerate() {
        op_faults(rank, program, faults);
        component_faults(rank, &plan.actions[rank], program, faults);
        completeness_faults(rank, program, plan.is_forward_only(), faults);
    }
    transfer_faults(plan, programs, faults);
}

/// Whether each operation is on its lane, waits for earlier ones only, and is there once.
pub(super) fn op_faults(rank: usize, program: &Program, faults: &mut PlanFaults) {
    let mut seen: HashSet<Work> = HashSet::with_capacity(program.ops.len());
    for (id, op) in program.ops.iter().enumerate() {
        if let Some(later) = op.after.iter().find(|&&earlier| earlier >= id) {
            let text = format!("operation {id} waits for operation {later}, which is not an earlier one");
            faults.of(rank, op, text);
        }
        if !is_on_its_lane(op) {
            faults.of(rank, op, format!("operation {id} is on lane {:?}: {}", op.lane, op.work));
        }
        if !seen.insert(op.work) {
            faults.of(rank, op, format!("operation {id} runs again: {}", op.work));
        }
    }
}

fn is_on_its_lane(op: &Op) -> bool {
    match op.work {
        Work::Component { .. } => matches!(op.lane, Lane::Compute | Lane::Expert),
        Work::Send { .. } => matches!(op.lane, Lane::Send(_)),
        Work::Receive { .. } => matches!(op.lane, Lane::Receive(_)),
        Work::Reduce { .. } | Work::AwaitReplica | Work::Totals | Work::Evidence | Work::Gather { .. } => {
            op.lane == Lane::Collective
        }
        Work::Pack { .. }
        | Work::GradNorm { .. }
        | Work::Inspect
        | Work::Apply { .. }
        | Work::Balance
        | Work::Unpack { .. }
        | Work::Snapshot => op.lane == Lane::Compute,
    }
}

/// The program does what the actions say, in their order, and all of it.
fn component_faults(rank: usize, actions: &[Action], program: &Program, faults: &mut PlanFaults) {
    let mut carried_out: HashSet<(usize, Pass, Chunk)> = HashSet::new();
    let mut reached = 0;
    for (id, op) in program.ops.iter().enumerate() {
        let Work::Component { pass, chunk, .. } = op.work else { continue };
        let action = op.action.unwrap_or(usize::MAX);
        let planned = actions.get(action).is_some_and(|action| passes(action).any(|p| p == (pass, chunk)));
        if !planned || action < reached {
            faults.of(rank, op, format!("operation {id} is not what the plan does here: {}", op.work));
        }
        reached = reached.max(action);
        carried_out.insert((action, pass, chunk));
    }
    for (index, action) in actions.iter().enumerate() {
        // A stage may have no weights to defer.
        for (pass, chunk) in passes(action).filter(|(pass, _)| *pass != Pass::BackwardWeight) {
            if !carried_out.contains(&(index, pass, chunk)) {
                faults.at(
                    ActionIndex { rank, action: index },
                    format!("{action}: the program has no {}", name(pass)),
                );
            }
        }
    }
}

/// Whatever component runs in one pass runs once in each.
fn completeness_faults(rank: usize, program: &Program, forward_only: bool, faults: &mut PlanFaults) {
    if forward_only {
        return;
    }
    let seen: HashSet<Work> = program.ops.iter().map(|op| op.work).collect();
    for op in &program.ops {
        let Work::Component { pass, chunk, layer, component } = op.work else { continue };
        for other in [Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight] {
            let exists = other != Pass::BackwardWeight || flow::has_deferrable_weights(component);
            if exists && !seen.contains(&Work::Component { pass: other, chunk, layer, component }) {
                let text = format!("the program has a {} but no {}: {}", name(pass), name(other), op.work);
                faults.of(rank, op, text);
            }
        }
    }
}

fn transfer_faults(plan: &Plan, programs: &[Program], faults: &mut PlanFaults) {
    let mut expected: HashMap<Message, isize> = HashMap::new();
    for message in messages(plan) {
        *expected.entry(message).or_default() += 1;
    }
    let partners = partners(programs);
    for (rank, program) in programs.iter().enumerate() {
        for (id, op) in program.ops.iter().enumerate() {
            let (to, kind, chunk) = match (op.lane, op.work) {
                (Lane::Send(to), Work::Send { kind, chunk }) => (Some(to), kind, chunk),
                (_, Work::Receive { kind, chunk }) => (None, kind, chunk),
                _ => continue,
            };
            if let Some(to) = to {
                let Chunk { stage, micro_batch } = chunk;
                *expected.entry(Message { kind, micro_batch, stage, from: rank, to }).or_default() -= 1;
            }
            let at_other_end = partners[rank][id].map(|(peer, other)| programs[peer].ops[other].work);
            match at_other_end {
                None => faults.of(rank, op, format!("{} has no other end", op.work)),
                Some(Work::Send { kind: k, chunk: c } | Work::Receive { kind: k, chunk: c })
                    if (k, c) == (kind, chunk) => {}
                Some(other) => faults.of(rank, op, format!("{} meets {other}", op.work)),
            }
        }
    }
    let mut wrong: Vec<(Message, isize)> = expected.into_iter().filter(|&(_, count)| count != 0).collect();
    wrong.sort_unstable();
    for (message, count) in wrong {
        let Message { kind, micro_batch, stage, from, to } = message;
        let what = if count > 0 { "is never sent" } else { "is sent without need" };
        let text = format!("the {kind} of stage {stage}, micro-batch {micro_batch} to rank {to} {what}");
        faults.add(Some(from), None, text);
    }
}

/// One fault per lane that computes, exchanges or reduces: what is stuck there and what is missing. Transfers are named as
/// what is missing; on their own only if nothing else is stuck.
pub(super) fn deadlock_faults(deadlock: &Deadlock, programs: &[Program], faults: &mut PlanFaults) {
    let computes = |stuck: &&Stuck| matches!(stuck.lane, Lane::Compute | Lane::Expert | Lane::Collective);
    let mut heads: Vec<&Stuck> = deadlock.stuck.iter().filter(computes).collect();
    if heads.is_empty() {
        heads = deadlock.stuck.iter().collect();
    }
    for stuck in heads {
        let missing = missing(stuck, programs).unwrap_or_else(|| "what no program does".to_string());
        let text = format!("deadlock: {} waits for {missing}", stuck.work);
        faults.add(Some(stuck.rank), stuck.action, text);
    }
}

fn missing(stuck: &Stuck, programs: &[Program]) -> Option<String> {
    let (rank, op) = match &stuck.waits_for {
        WaitsFor::Own(op) => (stuck.rank, *op),
        WaitsFor::Peer { rank, op } => (*rank, *op),
        WaitsFor::Nobody => return None,
        WaitsFor::Members(ranks) => return Some(list_ranks(ranks)),
    };
    Some(match programs[rank].ops.get(op)? {
        Op { lane: Lane::Receive(from), work: Work::Receive { kind, chunk }, .. } => {
            format!("the {kind} of {chunk} from rank {from}")
        }
        op => format!("rank {rank}: {}", op.work),
    })
}
