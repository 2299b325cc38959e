//! The update as part of a step: which parameters form a bucket, which ranks hold it, and the operations that reduce its
//! gradients, update its weights and gather them (ZeRO-1, report section 3.2.3).
//!
//! A step has two halves, since a verdict is between them: the first ends with the totals, from which every rank judges
//! alike whether the second one runs. What the second half has updated is gathered behind it, or at the front of the next
//! step. Follows from placement, layouts and topology alone; knows no tensors and no optimizer.

use std::collections::{BTreeMap, VecDeque};

use super::bucket::{Bucket, Contents};
use super::program::{Component, Lane, LayerKind, Op, OpId, Pass, Program, StageLayout, Work};
use crate::topology::Topology;

/// The buckets of a model, ascending by number: of each stage its dense parameters and its routed experts, and the
/// embedding. `placement[rank]` lists the stages of a pipeline rank, `stages[s]` says what stage `s` consists of.
pub fn buckets(placement: &[Vec<usize>], stages: &[StageLayout], topology: &Topology) -> Vec<Bucket> {
    let mut buckets = Vec::new();
    let is_tied = stages.iter().any(|layout| layout.tied);
    let mut add = |contents: Contents, of: Vec<usize>| {
        let holds = |rank: &usize| placement[*rank].iter().any(|stage| of.contains(stage));
        let positions: Vec<usize> = (0..placement.len()).filter(holds).collect();
        let copies = positions.len()
            * match contents {
                Contents::Experts => topology.data,
                Contents::Dense | Contents::Embedding => topology.dp_size(),
            };
        let Some(first) = of.first() else { return };
        let number = 3 * first + contents as usize;
        let tied = is_tied && contents == Contents::Embedding;
        buckets.push(Bucket { number, contents, stages: of, tied, positions, copies });
    };
    for (stage, layout) in stages.iter().enumerate() {
        add(Contents::Dense, vec![stage]);
        if layout.embedding {
            let reads = |layout: &StageLayout| layout.embedding || layout.mtp_layer.is_some() || layout.tied;
            add(Contents::Embedding, (0..stages.len()).filter(|&stage| reads(&stages[stage])).collect());
        }
        if layout.layers.contains(&LayerKind::Moe) || layout.mtp_layer.is_some() {
            add(Contents::Experts, vec![stage]);
        }
    }
    buckets
}

/// Whether an operation reads weights of a bucket, or makes gradients of them.
pub(super) fn uses(work: &Work, bucket: &Bucket) -> bool {
    let Work::Component { chunk, component, .. } = work else { return false };
    bucket.stages.contains(&chunk.stage)
        && match bucket.contents {
            Contents::Embedding => match component {
                Component::Embedding | Component::MtpJoin => true,
                Component::Head | Component::MtpHead => bucket.tied,
                _ => false,
            },
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
    /// Whether a bucket is reduced as soon as its last gradient is there, and gathered beside the next step's first
    /// operations. Sums and weights are the same either way, bit for bit.
    pub overlap: bool,
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
    /// The same behind a step whose update has not been gathered yet.
    pub gathering: Vec<Program>,
    /// What runs next if the totals are not finite: the ranks exchange the evidence.
    pub evidence: Vec<Program>,
    /// The second half, if the verdict is for it.
    pub update: Vec<Program>,
    /// The second half, if the verdict is to continue without an update.
    pub skip: Vec<Program>,
    /// Gathers an update at once: where the next step does not, or where none follows.
    pub gather: Vec<Program>,
    /// See [`Sharding::overlap`].
    pub overlap: bool,
}

impl StepPrograms {
    /// From the programs of the passes, as [`lower`](super::lower()) makes them.
    pub fn new(passes: &[Program], sharding: &Sharding) -> StepPrograms {
        let for_each = |make: &dyn Fn(&Program, Vec<Bucket>) -> Program| {
            let programs = passes.iter().enumerate();
            programs.map(|(position, passes)| make(passes, sharding.held_by(position))).collect()
        };
        StepPrograms {
            gradients: for_each(&|passes, held| gradients(passes, held, sharding, false)),
            gathering: for_each(&|passes, held| gradients(passes, held, sharding, true)),
            evidence: for_each(&|_, _| evidence()),
            update: for_each(&|_, held| update(held)),
            skip: for_each(&|_, _| skip()),
            gather: for_each(&|_, held| gather(held)),
            overlap: sharding.overlap,
        }
    }

    /// A step that is updated, as one program for each pipeline rank: what its timeline is about. With overlap it begins with
    /// the gathering of the step before it.
    pub fn whole(&self) -> Vec<Program> {
        match self.overlap {
            true => joined(&self.gathering, &self.update),
            false => self.alone(),
        }
    }

    /// A step that is updated and gathered, with none before it and none behind it.
    pub(super) fn alone(&self) -> Vec<Program> {
        joined(&joined(&self.gradients, &self.update), &self.gather)
    }
}

/// Each program of `second` begins when that of `first` has ended.
fn joined(first: &[Program], second: &[Program]) -> Vec<Program> {
    first.iter().zip(second).map(|(first, second)| first.then(second)).collect()
}

/// The passes with the reduction behind them or among them, and the totals at the end. With `gathers` the update of the step
/// before is gathered first, each bucket in time for the first operation that reads it.
fn gradients(passes: &Program, held: Vec<Bucket>, sharding: &Sharding, gathers: bool) -> Program {
    let mut draft = Draft::default();
    let shared: Vec<&Bucket> = held.iter().filter(|bucket| bucket.copies > 1).collect();
    if gathers {
        draft.gather(&shared);
    }
    // A backward pass comes to the last stage first: what it finishes first is reduced first.
    let mut order: Vec<&Bucket> = held.iter().collect();
    if sharding.overlap {
        order.reverse();
    }
    draft.reducing = order.iter().filter(|bucket| bucket.copies > 1).map(|bucket| bucket.number).collect();
    let last = |bucket: &Bucket| passes.ops.iter().rposition(|op| differentiates(&op.work, bucket));
    let ready: Vec<(usize, Option<OpId>)> = match sharding.overlap {
        true => shared.iter().map(|bucket| (bucket.number, last(bucket))).collect(),
        false => Vec::new(),
    };
    let offset_of = |numbers: &[OpId], earlier: OpId| numbers.get(earlier).copied();
    let mut numbers: Vec<OpId> = Vec::with_capacity(passes.ops.len());
    for (id, op) in passes.ops.iter().enumerate() {
        let read = shared.iter().filter(|bucket| uses(&op.work, bucket));
        read.for_each(|bucket| draft.unpack(bucket.number));
        let after = op.after.iter().filter_map(|&earlier| offset_of(&numbers, earlier)).collect();
        numbers.push(draft.ops.len());
        draft.ops.push(Op { after, ..op.clone() });
        let complete = ready.iter().filter(|(_, last)| *last == Some(id));
        complete.for_each(|&(bucket, _)| draft.pack(bucket));
    }
    shared.iter().for_each(|bucket| draft.unpack(bucket.number));
    let mut last_norm = None;
    for bucket in order {
        last_norm = Some(draft.norm(bucket));
    }
    if sharding.replicated {
        draft.push(Lane::Collective, Work::AwaitReplica, &[]);
    }
    draft.push(Lane::Collective, Work::Totals, last_norm.as_slice());
    draft.program(held)
}

/// AdamW on every bucket.
fn update(held: Vec<Bucket>) -> Program {
    let mut draft = Draft::default();
    for bucket in &held {
        draft.push(Lane::Compute, Work::Apply { bucket: bucket.number }, &[]);
    }
    draft.push(Lane::Compute, Work::Balance, &[]);
    draft.push(Lane::Compute, Work::Snapshot, &[]);
    draft.program(held)
}

/// Non-finite values, shared with all ranks.
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

/// The gathering of an update, with nothing beside it.
fn gather(held: Vec<Bucket>) -> Program {
    let mut draft = Draft::default();
    let shared: Vec<&Bucket> = held.iter().filter(|bucket| bucket.copies > 1).collect();
    draft.gather(&shared);
    shared.iter().for_each(|bucket| draft.unpack(bucket.number));
    draft.program(held)
}

/// A program in the making.
#[derive(Default)]
struct Draft {
    ops: Vec<Op>,
    /// Gathers that nothing has waited for yet, by bucket.
    gathers: BTreeMap<usize, OpId>,
    /// Packs whose reduction is not issued yet, by bucket.
    packs: BTreeMap<usize, OpId>,
    /// Buckets in the order in which they are reduced: the same on every rank.
    reducing: VecDeque<usize>,
    /// By bucket.
    reduces: BTreeMap<usize, OpId>,
}

impl Draft {
    fn push(&mut self, lane: Lane, work: Work, after: &[OpId]) -> OpId {
        self.ops.push(Op { lane, work, after: after.to_vec(), action: None });
        self.ops.len() - 1
    }

    /// In the order in which a forward pass reads them: the embedding comes before the rest of its stage.
    fn gather(&mut self, buckets: &[&Bucket]) {
        let mut order = buckets.to_vec();
        order.sort_by_key(|bucket| (bucket.stages[0], bucket.contents != Contents::Embedding));
        for &Bucket { number: bucket, .. } in order {
            let gather = self.push(Lane::Collective, Work::Gather { bucket }, &[]);
            self.gathers.insert(bucket, gather);
        }
    }

    /// Unless the bucket is unpacked, or not gathered at all.
    fn unpack(&mut self, bucket: usize) {
        if let Some(gather) = self.gathers.remove(&bucket) {
            self.push(Lane::Compute, Work::Unpack { bucket }, &[gather]);
        }
    }

    /// A bucket's gradients are complete: it is reduced as soon as all those before it are.
    fn pack(&mut self, bucket: usize) {
        let pack = self.push(Lane::Compute, Work::Pack { bucket }, &[]);
        self.packs.insert(bucket, pack);
        while let Some(&bucket) = self.reducing.front()
            && let Some(pack) = self.packs.remove(&bucket)
        {
            self.reducing.pop_front();
            let reduce = self.push(Lane::Collective, Work::Reduce { bucket }, &[pack]);
            self.reduces.insert(bucket, reduce);
        }
    }

    /// Behind the passes: what is not packed yet is packed now.
    fn norm(&mut self, &Bucket { number: bucket, copies, .. }: &Bucket) -> OpId {
        let is_packed = self.reduces.contains_key(&bucket) || self.packs.contains_key(&bucket);
        if copies > 1 && !is_packed {
            self.pack(bucket);
        }
        let after: Vec<OpId> = self.reduces.get(&bucket).copied().into_iter().collect();
        self.push(Lane::Compute, Work::GradNorm { bucket }, &after)
    }

    fn program(self, buckets: Vec<Bucket>) -> Program {
        Program { ops: self.ops, buckets }
    }
}
