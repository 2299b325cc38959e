//! The update as part of a step: which parameters form a bucket, which ranks hold it, and the operations that reduce its
//! gradients, update its weights and gather them (ZeRO-1, report section 3.2.3).
//!
//! A step has two halves, since a verdict stands between them: the first ends with the totals, from which every rank judges
//! alike whether the second one runs. Follows from placement, layouts and topology alone; knows no tensors and no optimizer.

use super::bucket::{Bucket, Contents};
use super::program::{Component, Lane, LayerKind, Op, OpId, Pass, Program, StageLayout, Work};
use crate::topology::Topology;

/// The buckets of a model, ascending by number: of each stage its dense parameters and its routed experts, and the
/// embedding. `placement[rank]` lists the stages of a pipeline rank, `stages[s]` says what stage `s` consists of.
pub fn buckets(placement: &[Vec<usize>], stages: &[StageLayout], topology: &Topology) -> Vec<Bucket> {
    let mut buckets = Vec::new();
    let mut add = |contents: Contents, of: Vec<usize>| {
        let holds = |rank: &usize| placement[*rank].iter().any(|stage| of.contains(stage));
        let positions: Vec<usize> = (0..placement.len()).filter(holds).collect();
        let copies = positions.len()
            * match contents {
                Contents::Experts => topology.data,
                Contents::Dense | Contents::Embedding => topology.columns(),
            };
        let Some(first) = of.first() else { return };
        let number = 3 * first + contents as usize;
        buckets.push(Bucket { number, contents, stages: of, positions, copies });
    };
    for (stage, layout) in stages.iter().enumerate() {
        add(Contents::Dense, vec![stage]);
        if layout.embedding {
            let reads = |stage: &usize| stages[*stage].embedding || stages[*stage].mtp_layer.is_some();
            add(Contents::Embedding, (0..stages.len()).filter(reads).collect());
        }
        if layout.layers.contains(&LayerKind::Moe) || layout.mtp_layer.is_some() {
            add(Contents::Experts, vec![stage]);
        }
    }
    buckets
}

/// Whether an operation reads weights of a bucket, or makes gradients of them.
fn uses(work: &Work, bucket: &Bucket) -> bool {
    let Work::Component { chunk, component, .. } = work else { return false };
    bucket.stages.contains(&chunk.stage)
        && match bucket.contents {
            Contents::Embedding => matches!(component, Component::Embedding | Component::MtpJoin),
            Contents::Experts => *component == Component::Experts,
            Contents::Dense => matches!(
                component,
                Component::Attention
                    | Component::SharedExpert
                    | Component::Head
                    | Component::MtpJoin
                    | Component::MtpHead
            ),
        }
}

/// Whether an operation adds to gradients of a bucket. The heads make theirs with the loss, in the forward pass.
pub(super) fn differentiates(work: &Work, bucket: &Bucket) -> bool {
    let Work::Component { pass, component, .. } = work else { return false };
    let with_loss = matches!(component, Component::Head | Component::MtpHead);
    uses(work, bucket) && (*pass != Pass::Forward || with_loss)
}

/// How the state of a model is spread over the ranks: what the update of a step follows from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharding {
    /// Every bucket of the model.
    pub buckets: Vec<Bucket>,
    /// Whether each rank's state is replicated in the memory of another worker.
    pub replicated: bool,
}

impl Sharding {
    /// What a pipeline rank holds of it.
    fn held_by(&self, position: usize) -> Vec<Bucket> {
        self.buckets.iter().filter(|bucket| bucket.positions.contains(&position)).cloned().collect()
    }
}

/// The programs of a training step, each by pipeline rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPrograms {
    /// The first half: the passes, the reduction of the gradients, the totals.
    pub gradients: Vec<Program>,
    /// What runs next if the totals are not finite: the ranks tell each other why.
    pub evidence: Vec<Program>,
    /// The second half, if the verdict is for it.
    pub update: Vec<Program>,
    /// The second half, if the verdict is to go on without an update.
    pub skip: Vec<Program>,
}

impl StepPrograms {
    /// From the programs of the passes, as [`lower`](super::lower()) makes them.
    pub fn new(passes: Vec<Program>, sharding: &Sharding) -> StepPrograms {
        let ranks = passes.len();
        let passes = passes.into_iter().enumerate();
        StepPrograms {
            gradients: passes.map(|(position, passes)| gradients(passes, position, sharding)).collect(),
            evidence: vec![evidence(); ranks],
            update: (0..ranks).map(|position| update(sharding.held_by(position))).collect(),
            skip: vec![skip(); ranks],
        }
    }

    /// Both halves of a step that is updated, as one program for each pipeline rank: what its timeline is about.
    pub fn whole(&self) -> Vec<Program> {
        self.gradients.iter().zip(&self.update).map(|(first, second)| joined(first, second)).collect()
    }
}

/// The second half begins when the first one has ended.
fn joined(first: &Program, second: &Program) -> Program {
    let offset = first.ops.len();
    let mut begun: Vec<Lane> = Vec::new();
    let mut whole = first.clone();
    for op in &second.ops {
        let mut op = op.clone();
        op.after.iter_mut().for_each(|earlier| *earlier += offset);
        if !begun.contains(&op.lane) {
            begun.push(op.lane);
            let totals = first.ops.iter().rposition(|earlier| earlier.work == Work::Totals);
            op.after.extend(totals.filter(|&totals| first.ops[totals].lane != op.lane));
        }
        whole.ops.push(op);
    }
    whole
}

/// Passes, then bucket by bucket the reduction, then the totals.
fn gradients(passes: Program, position: usize, sharding: &Sharding) -> Program {
    let mut draft = Draft { ops: passes.ops };
    let held = sharding.held_by(position);
    let mut last = None;
    for &Bucket { number: bucket, copies, .. } in &held {
        let mut after = Vec::new();
        if copies > 1 {
            let pack = draft.push(Lane::Compute, Work::Pack { bucket }, &[]);
            after.push(draft.push(Lane::Collective, Work::Reduce { bucket }, &[pack]));
        }
        last = Some(draft.push(Lane::Compute, Work::GradNorm { bucket }, &after));
    }
    if sharding.replicated {
        draft.push(Lane::Collective, Work::AwaitReplica, &[]);
    }
    draft.push(Lane::Collective, Work::Totals, last.as_slice());
    draft.program(held)
}

/// Bucket by bucket AdamW and the gathering, which hides behind the next bucket.
fn update(held: Vec<Bucket>) -> Program {
    let mut draft = Draft::default();
    let mut gathers = Vec::new();
    for &Bucket { number: bucket, copies, .. } in &held {
        let apply = draft.push(Lane::Compute, Work::Apply { bucket }, &[]);
        if copies > 1 {
            gathers.push((bucket, draft.push(Lane::Collective, Work::Gather { bucket }, &[apply])));
        }
    }
    draft.push(Lane::Compute, Work::Balance, &[]);
    draft.push(Lane::Compute, Work::Snapshot, &[]);
    for (bucket, gather) in gathers {
        draft.push(Lane::Compute, Work::Unpack { bucket }, &[gather]);
    }
    draft.program(held)
}

/// What is not finite, told to all.
fn evidence() -> Program {
    let mut draft = Draft::default();
    let inspect = draft.push(Lane::Compute, Work::Inspect, &[]);
    draft.push(Lane::Collective, Work::Evidence, &[inspect]);
    draft.program(Vec::new())
}

/// A step without an update leaves the state as it was, and may have to save it.
fn skip() -> Program {
    let mut draft = Draft::default();
    draft.push(Lane::Compute, Work::Snapshot, &[]);
    draft.program(Vec::new())
}

/// A program in the making.
#[derive(Default)]
struct Draft {
    ops: Vec<Op>,
}

impl Draft {
    fn push(&mut self, lane: Lane, work: Work, after: &[OpId]) -> OpId {
        self.ops.push(Op { lane, work, after: after.to_vec(), action: None });
        self.ops.len() - 1
    }

    fn program(self, buckets: Vec<Bucket>) -> Program {
        Program { ops: self.ops, buckets }
    }
}
