//! From a plan to one program per pipeline rank: actions become component operations on lanes.
//!
//! Lowering is total: it makes programs out of faulty plans too, so that `check` can say what would happen to them. It
//! depends on the pipeline coordinate alone, so all members of an expert group get the same program and issue the same
//! all-to-alls in the same order.
//!
//! A send is issued right behind the operation that makes the data; `receives` puts in the other ends.

use std::collections::HashMap;

use super::action::{Action, Chunk, Plan};
use super::flow::{self, FlowStep, LayerOp};
use super::messages::{Owners, Product};
use super::overlap::{self, Overlap};
use super::program::{Lane, OpId, Pass, Program, StageLayout, TransferKind, Work};
use super::receives;

/// The programs of a plan, one per pipeline rank, with the overlap that is the default.
///
/// `stages[s]` says what stage `s` consists of; without it, or for a stage it does not list, a chunk is one operation.
/// Without it an `F&B` pair is indivisible: it starts when both of its inputs are there. With one expert rank an
/// all-to-all moves nothing between ranks and so stays on the compute lane.
pub fn lower(plan: &Plan, stages: Option<&[StageLayout]>, expert_ranks: usize) -> Vec<Program> {
    lower_with(plan, stages, expert_ranks, Overlap::DEFAULT)
}

/// [`lower`], where `overlap` says what runs beside what.
pub fn lower_with(
    plan: &Plan,
    stages: Option<&[StageLayout]>,
    expert_ranks: usize,
    overlap: Overlap,
) -> Vec<Program> {
    let owners = Owners::of(plan);
    let all_to_all_lane = if expert_ranks > 1 { Lane::Expert } else { Lane::Compute };
    let drafts: Vec<Vec<DraftOp>> = (0..plan.ranks())
        .map(|rank| {
            let drafter = Drafter {
                rank,
                owners: &owners,
                stages,
                all_to_all_lane,
                overlap,
                keeps_gradients: !plan.is_forward_only(),
                made: HashMap::new(),
                under_way: Vec::new(),
                ops: Vec::new(),
            };
            drafter.draft(&plan.actions[rank])
        })
        .collect();
    receives::insert(drafts)
}

/// An operation before the receives are put in: what comes from other ranks is named, not yet numbered.
pub(super) struct DraftOp {
    pub lane: Lane,
    pub work: Work,
    /// Draft operations of the same rank.
    pub after: Vec<OpId>,
    pub needs: Vec<Product>,
    pub action: usize,
}

/// Writes one rank's program but for the receives.
struct Drafter<'a> {
    rank: usize,
    owners: &'a Owners,
    stages: Option<&'a [StageLayout]>,
    all_to_all_lane: Lane,
    overlap: Overlap,
    keeps_gradients: bool,
    /// What this rank made for its own other stage, and the operation that did.
    made: HashMap<Product, OpId>,
    /// Without overlap: operations that none has waited for yet, the latest one and sends.
    under_way: Vec<OpId>,
    ops: Vec<DraftOp>,
}

/// How far one chunk has got within an action.
struct Cursor {
    chunk: Chunk,
    action: usize,
    /// What the first operation on each lane waits for.
    inputs: Vec<Product>,
    /// Lanes whose first operation is behind us.
    begun: Vec<Lane>,
    /// The exchange whose result no compute operation has waited for yet.
    pending_all_to_all: Option<OpId>,
    /// The last operation that was not a weight part: what comes next needs its result.
    last: Option<OpId>,
    /// The last of them on the compute lane.
    last_compute: Option<OpId>,
}

impl Cursor {
    fn new(chunk: Chunk, action: usize, inputs: Vec<Product>) -> Cursor {
        Cursor {
            chunk,
            action,
            inputs,
            begun: Vec::new(),
            pending_all_to_all: None,
            last: None,
            last_compute: None,
        }
    }
}

impl Drafter<'_> {
    fn draft(mut self, actions: &[Action]) -> Vec<DraftOp> {
        for (index, action) in actions.iter().enumerate() {
            match action.parts() {
                // The weight part of the same chunk has nothing to wait for but its input gradient.
                (Action::BackwardInput(chunk), Some(Action::BackwardWeight(same))) if chunk == same => {
                    self.lone(index, Action::Backward(chunk));
                }
                (lone, None) => self.lone(index, lone),
                (first, Some(second)) => self.pair(index, action, [first, second]),
            }
        }
        self.ops
    }

    fn lone(&mut self, index: usize, action: Action) {
        let (mut cursor, steps) = self.begin(index, action);
        self.steps(&mut cursor, &steps);
    }

    /// What an action consists of; of a pair the first one.
    fn begin(&self, index: usize, action: Action) -> (Cursor, Vec<FlowStep>) {
        let needing = |kind, chunk, steps| (Cursor::new(chunk, index, inputs(kind, chunk)), steps);
        match action {
            Action::Backward(chunk) => {
                needing(TransferKind::Gradient, chunk, flow::backward(self.layout(chunk)))
            }
            Action::BackwardInput(chunk) => {
                needing(TransferKind::Gradient, chunk, flow::backward_input(self.layout(chunk)))
            }
            Action::BackwardWeight(chunk) => {
                (Cursor::new(chunk, index, Vec::new()), flow::backward_weight(self.layout(chunk)))
            }
            Action::Forward(chunk) => {
                needing(TransferKind::Activation, chunk, flow::forward(self.layout(chunk)))
            }
            pair => self.begin(index, pair.parts().0),
        }
    }

    /// A segment of one pass, a segment of the other, and so on: the exchange at the end of one segment is hidden by the compute
    /// of the next one. Whichever pass is longer ends alone. Without overlap one after the other, a backward pass before a forward
    /// pass.
    fn pair(&mut self, index: usize, pair: &Action, [first, second]: [Action; 2]) {
        let order = self.overlap.order();
        let is_apart = self.overlap == Overlap::Off
            || self.keeps_gradients
                && self.stages.is_some_and(|stages| overlap::share_a_gradient(pair, stages));
        let is_turned = matches!(pair, Action::ForwardBackward { .. })
            && self.stages.is_some()
            && (is_apart || !order.forward_first);
        let [first, second] = if is_turned { [second, first] } else { [first, second] };
        let ((mut lead, lead_steps), (mut other, other_steps)) =
            (self.begin(index, first), self.begin(index, second));
        if self.stages.is_none() {
            lead.inputs.extend(&other.inputs);
        }
        if self.stages.is_none() || is_apart {
            self.steps(&mut lead, &lead_steps);
            self.steps(&mut other, &other_steps);
            return;
        }
        let (lead_segments, other_segments) = flow::beside(&lead_steps, &other_steps, order);
        let (mut lead_segments, mut other_segments) = (lead_segments.into_iter(), other_segments.into_iter());
        loop {
            let (next_lead, next_other) = (lead_segments.next(), other_segments.next());
            if next_lead.is_none() && next_other.is_none() {
                return;
            }
            self.steps(&mut lead, next_lead.unwrap_or_default());
            self.steps(&mut other, next_other.unwrap_or_default());
        }
    }

    fn layout(&self, chunk: Chunk) -> Option<&StageLayout> {
        self.stages.and_then(|stages| stages.get(chunk.stage))
    }

    fn steps(&mut self, cursor: &mut Cursor, steps: &[FlowStep]) {
        for step in steps {
            match *step {
                FlowStep::Run(piece) => self.run(cursor, piece),
                FlowStep::Deliver(kind) => self.deliver(cursor, kind),
            }
        }
    }

    fn run(&mut self, cursor: &mut Cursor, piece: LayerOp) {
        let LayerOp { pass, component, layer } = piece;
        let work = Work::Component { pass, chunk: cursor.chunk, layer, component };
        let lane = if piece.is_all_to_all() { self.all_to_all_lane } else { Lane::Compute };
        if pass == Pass::BackwardWeight {
            // Its input gradient came first on the same lane, with all that both need.
            self.push(DraftOp { lane, work, after: Vec::new(), needs: Vec::new(), action: cursor.action });
            return;
        }
        let mut after = Vec::new();
        let mut needs = Vec::new();
        if !cursor.begun.contains(&lane) {
            cursor.begun.push(lane);
            for &input in &cursor.inputs {
                match self.made.get(&input) {
                    Some(&op) => after.push(op),
                    None => needs.push(input),
                }
            }
        }
        if piece.is_all_to_all() {
            after.extend(cursor.last_compute);
        } else if !piece.overlaps_all_to_all() {
            after.extend(cursor.pending_all_to_all.take());
        }
        let op = self.push(DraftOp { lane, work, after, needs, action: cursor.action });
        cursor.last = Some(op);
        if piece.is_all_to_all() {
            cursor.pending_all_to_all = Some(op);
        } else {
            cursor.last_compute = Some(op);
        }
    }

    /// Sends what the chunk made, or notes it for this rank's own other stage.
    fn deliver(&mut self, cursor: &Cursor, kind: TransferKind) {
        let chunk = cursor.chunk;
        let product = Product { kind, chunk };
        let (Some(op), Some(consumer)) = (cursor.last, self.owners.consumer(product)) else { return };
        if consumer == self.rank {
            self.made.insert(product, op);
        } else {
            self.push(DraftOp {
                lane: Lane::Send(consumer),
                work: Work::Send { kind, chunk },
                after: vec![op],
                needs: Vec::new(),
                action: cursor.action,
            });
        }
    }

    /// Appends an operation; the order within a lane needs no saying.
    fn push(&mut self, mut op: DraftOp) -> OpId {
        if self.overlap == Overlap::Off && !matches!(op.lane, Lane::Send(_)) {
            op.after.append(&mut self.under_way);
        }
        op.after.retain(|&earlier| self.ops[earlier].lane != op.lane);
        op.after.sort_unstable();
        op.after.dedup();
        self.ops.push(op);
        let id = self.ops.len() - 1;
        if self.overlap == Overlap::Off {
            self.under_way.push(id);
        }
        id
    }
}

fn inputs(kind: TransferKind, chunk: Chunk) -> Vec<Product> {
    Product::needed_by(kind, chunk).into_iter().collect()
}
