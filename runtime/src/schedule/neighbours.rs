//! Which neighbours of a plan run beside each other, so that one computes while the exchange of the other is under way.
//!
//! Lone passes of different micro-batches that follow one another on a rank need nothing of each other: they may become a pair, where
//! the other ranks do not wait for the first of them alone. Whether they do hangs on the whole plan, so kinds of neighbours are
//! tried: on a clock of whole actions, then on that of operations, where exchanges take as long as computations. Those are kept that
//! shorten the step there and do not lengthen it where exchanges take half as long. Only the order inside a rank changes, and only
//! where no two operations that add to one tensor change places. Pure.

use super::action::{Action, Chunk, Plan};
use super::bubble::clock_by;
use super::flow::{self, FlowStep};
use super::lower::lower;
use super::overlap::share_a_gradient;
use super::program::{Lane, Op, Pass, StageLayout};
use super::walk::walk;

/// Two actions that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbours {
    /// `B F`: a pair that holds the activations of both while it runs.
    BackwardForward,
    /// `F B`.
    ForwardBackward,
    /// `F F`, of which none is further on its way than the first: nobody waits longer for it.
    ForwardForward,
    /// `I W` or `W I`.
    InputWeight,
}

impl Neighbours {
    /// Every kind.
    pub const ALL: [Neighbours; 4] = [
        Neighbours::BackwardForward,
        Neighbours::ForwardBackward,
        Neighbours::ForwardForward,
        Neighbours::InputWeight,
    ];

    /// The pair that two actions of this kind make.
    fn pair(self, first: Action, second: Action) -> Option<Action> {
        use Action::{Backward, BackwardInput, BackwardWeight, Forward};
        match (self, first, second) {
            (Neighbours::ForwardForward, Forward(one), Forward(other)) if one.stage < other.stage => None,
            (Neighbours::ForwardBackward, Forward(_), Backward(_))
            | (Neighbours::ForwardForward, Forward(_), Forward(_))
            | (Neighbours::InputWeight, BackwardInput(_), BackwardWeight(_)) => Action::pair(first, second),
            (Neighbours::BackwardForward, Backward(_), Forward(_))
            | (Neighbours::InputWeight, BackwardWeight(_), BackwardInput(_)) => Action::pair(second, first),
            _ => None,
        }
    }
}

/// The step has to become shorter by this share of it, or the plan stays as it is: the clocks are no finer.
const LEAST_GAIN: f64 = 0.01;

/// How long an exchange takes, where an operation of the compute lane takes 1. A mixture layer has nine of these and four exchanges: the
/// proportion of DeepSeek-V3 with experts across nodes (report section 3.2.1).
const EXCHANGE: f64 = 9.0 / 4.0;

/// The plan with the kinds of neighbours paired that shorten it, `stages[s]` saying what stage `s` consists of. What is returned cannot
/// block if the plan cannot. A plan that has forward and backward passes beside each other already, as DualPipe's, keeps its order.
pub fn pair_up(plan: Plan, stages: &[StageLayout]) -> Plan {
    let is_pair = |action: &Action| matches!(action, Action::ForwardBackward { .. });
    if plan.actions.iter().flatten().any(is_pair) {
        return plan;
    }
    let (mut kinds, mut chosen) = (Vec::new(), plan.clone());
    loop {
        let most = (1.0 - LEAST_GAIN) * actions_end(&chosen, stages);
        let others = Neighbours::ALL.into_iter().filter(|kind| !kinds.contains(kind));
        let candidate = |kind| {
            let candidate = paired(&plan, &[&kinds[..], &[kind]].concat(), stages);
            let end = if candidate == chosen { f64::INFINITY } else { actions_end(&candidate, stages) };
            (end.is_finite() && end <= most).then_some((end, kind, candidate))
        };
        let mut candidates: Vec<(f64, Neighbours, Plan)> = others.filter_map(candidate).collect();
        candidates.sort_by(|(one, ..), (other, ..)| one.total_cmp(other));
        let now = if candidates.is_empty() { [0.0; 2] } else { operations_ends(&chosen, stages) };
        let is_shorter = |candidate: &Plan| {
            let [end, with_faster_links] = operations_ends(candidate, stages);
            end <= (1.0 - LEAST_GAIN) * now[0] && with_faster_links <= now[1]
        };
        match candidates.into_iter().find(|(.., candidate)| is_shorter(candidate)) {
            Some((_, kind, candidate)) => {
                kinds.push(kind);
                chosen = candidate;
            }
            None => return chosen,
        }
    }
}

/// When a plan ends on the clock of actions; never, if it could block.
fn actions_end(plan: &Plan, stages: &[StageLayout]) -> f64 {
    let walked = clock_by(plan, |action| duration(action, stages));
    walked.map_or(f64::INFINITY, |(_, timeline)| timeline.makespan)
}

/// When its programs end, with exchanges of [`EXCHANGE`] and of half of it; never, if they could block.
fn operations_ends(plan: &Plan, stages: &[StageLayout]) -> [f64; 2] {
    let programs = lower(plan, Some(stages), 2);
    [EXCHANGE, EXCHANGE / 2.0].map(|exchange| {
        let cost = |_: usize, op: &Op| match op.lane {
            Lane::Compute => 1.0,
            Lane::Expert => exchange,
            _ => 0.0,
        };
        walk(&programs, cost).map_or(f64::INFINITY, |timeline| timeline.makespan)
    })
}

/// The plan with all neighbours of these kinds paired, from the first action of each rank on: those of different micro-batches, one of
/// which has an exchange, and whose order decides about no bit. Other ranks may wait for it in vain.
pub fn paired(plan: &Plan, kinds: &[Neighbours], stages: &[StageLayout]) -> Plan {
    let keeps_gradients = !plan.is_forward_only();
    let may_pair = |pair: &Action| {
        let (first, second) = pair.parts();
        let of = |action: Action| micro_batch(&action);
        second.is_some_and(|second| of(first) != of(second))
            && exchanges(pair, stages) > 0.0
            && !(keeps_gradients && share_a_gradient(pair, stages))
    };
    let of_rank = |list: &Vec<Action>| {
        let mut actions: Vec<Action> = Vec::with_capacity(list.len());
        for &action in list {
            let pair = actions.last().and_then(|&before| {
                let mut pairs = kinds.iter().filter_map(|kind| kind.pair(before, action));
                pairs.find(&may_pair)
            });
            match (pair, actions.last_mut()) {
                (Some(pair), Some(before)) => *before = pair,
                _ => actions.push(action),
            }
        }
        actions
    };
    Plan { actions: plan.actions.iter().map(of_rank).collect(), ..plan.clone() }
}

/// Of an action that is no pair.
fn micro_batch(action: &Action) -> Option<usize> {
    let mut chunks = action.forwards().chain(action.backward_input()).chain(action.backward_weight());
    chunks.next().map(|chunk| chunk.micro_batch)
}

/// How long exchanges of an action take.
fn exchanges(action: &Action, stages: &[StageLayout]) -> f64 {
    let (first, second) = action.parts();
    [Some(first), second].into_iter().flatten().map(|part| cost(&part, stages).exchange).sum()
}

/// What an action that is no pair takes, in computations of the compute lane.
#[derive(Clone, Copy, Default)]
struct Cost {
    /// What hides no exchange of its own.
    compute: f64,
    /// Weight gradients.
    weight: f64,
    exchange: f64,
}

impl Cost {
    /// Its end, where nothing runs beside it.
    fn alone(self) -> f64 {
        self.compute + f64::max(self.weight, self.exchange)
    }
}

fn cost(action: &Action, stages: &[StageLayout]) -> Cost {
    let layout = |chunk: Chunk| stages.get(chunk.stage);
    let steps = match *action {
        Action::Forward(chunk) => flow::forward(layout(chunk)),
        Action::Backward(chunk) => flow::backward(layout(chunk)),
        Action::BackwardInput(chunk) => flow::backward_input(layout(chunk)),
        Action::BackwardWeight(chunk) => flow::backward_weight(layout(chunk)),
        _ => Vec::new(),
    };
    let mut cost = Cost::default();
    for step in steps {
        match step {
            FlowStep::Deliver(_) => {}
            FlowStep::Run(piece) if piece.is_all_to_all() => cost.exchange += EXCHANGE,
            FlowStep::Run(piece) if piece.pass == Pass::BackwardWeight => cost.weight += 1.0,
            FlowStep::Run(_) => cost.compute += 1.0,
        }
    }
    cost
}

/// A pair takes as long as its computations or its exchanges, and no less than either of its passes alone.
fn duration(action: &Action, stages: &[StageLayout]) -> f64 {
    let (first, second) = action.parts();
    let first = cost(&first, stages);
    let Some(second) = second.map(|second| cost(&second, stages)) else { return first.alone() };
    let compute = first.compute + first.weight + second.compute + second.weight;
    [compute, first.exchange + second.exchange, second.alone()].into_iter().fold(first.alone(), f64::max)
}
