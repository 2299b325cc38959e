//! What a chunk consists of: the order of its components in each pass.
//!
//! Knows no ranks, lanes or micro-batches; `lower` puts these steps on lanes.

use super::overlap::PairOrder;
use super::program::{Component, LayerKind, Pass, StageLayout, TransferKind};

/// One step of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowStep {
    /// A component runs.
    Run(LayerOp),
    /// What the chunk makes for its neighbour is complete.
    Deliver(TransferKind),
}

/// A component of one layer in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerOp {
    pub pass: Pass,
    pub component: Component,
    pub layer: usize,
}

impl LayerOp {
    /// Whether it is an all-to-all of the expert group.
    pub fn is_all_to_all(self) -> bool {
        matches!(self.component, Component::Dispatch | Component::Combine)
    }

    /// Whether it needs nothing of the exchange that was issued just before it.
    pub fn overlaps_all_to_all(self) -> bool {
        self.component == Component::SharedExpert
    }
}

/// Whether a component's weight gradients can be computed after its input gradient; the others that have weights
/// compute both at once.
pub(super) fn has_deferrable_weights(component: Component) -> bool {
    use Component::{Attention, Chunk, Experts, MtpJoin, SharedExpert};
    matches!(component, Chunk | Attention | SharedExpert | Experts | MtpJoin)
}

/// The forward pass of a chunk; without a layout it is one piece.
pub(super) fn forward(layout: Option<&StageLayout>) -> Vec<FlowStep> {
    let pieces = layout.map(forward_pieces).unwrap_or_default();
    let mut steps = run(pieces, Pass::Forward);
    steps.push(FlowStep::Deliver(TransferKind::Activation));
    steps
}

/// The input gradients of a chunk (action `I`).
pub(super) fn backward_input(layout: Option<&StageLayout>) -> Vec<FlowStep> {
    let pieces = layout.map(backward_pieces).unwrap_or_default();
    let mut steps = run(pieces, Pass::BackwardInput);
    steps.push(FlowStep::Deliver(TransferKind::Gradient));
    steps
}

/// The weight gradients of a chunk (action `W`), in the order of their input gradients.
pub(super) fn backward_weight(layout: Option<&StageLayout>) -> Vec<FlowStep> {
    backward_input(layout).into_iter().filter_map(weight_part).collect()
}

/// The full backward pass of a chunk (action `B`): a weight part waits until the next communication is under way, and
/// then hides it.
pub(super) fn backward(layout: Option<&StageLayout>) -> Vec<FlowStep> {
    let mut steps = Vec::new();
    let mut waiting = Vec::new();
    for step in backward_input(layout) {
        steps.push(step);
        waiting.extend(weight_part(step));
        if is_communication(step) {
            steps.append(&mut waiting);
        }
    }
    steps
}

/// The segments of two passes beside each other. One without exchanges has none to be cut behind: it is spread evenly over the
/// other's.
pub(super) fn beside<'a>(
    first: &'a [FlowStep],
    second: &'a [FlowStep],
    order: PairOrder,
) -> (Vec<&'a [FlowStep]>, Vec<&'a [FlowStep]>) {
    let (of_first, of_second) = (segments(first, order), segments(second, order));
    match (has_exchange(first), has_exchange(second)) {
        (true, false) => {
            let spread = parts(second, of_first.len());
            (of_first, spread)
        }
        (false, true) => {
            let spread = parts(first, of_second.len());
            (spread, of_second)
        }
        _ => (of_first, of_second),
    }
}

/// Whether a pass has exchanges.
pub(super) fn has_exchange(steps: &[FlowStep]) -> bool {
    steps.iter().any(|step| matches!(step, FlowStep::Run(piece) if piece.is_all_to_all()))
}

/// As many parts of about the same number of steps.
fn parts(steps: &[FlowStep], number: usize) -> Vec<&[FlowStep]> {
    let bound = |part: usize| part * steps.len() / number;
    (0..number).map(|part| &steps[bound(part)..bound(part + 1)]).collect()
}

/// Cuts a pass behind each exchange, and behind the delivery where it follows one directly: up to there the compute
/// lane can be given to another chunk without holding up a communication. What needs nothing of the exchange stands on the side of
/// the cut that `order` says.
fn segments(steps: &[FlowStep], order: PairOrder) -> Vec<&[FlowStep]> {
    let is_before = |step: &FlowStep| match step {
        FlowStep::Deliver(_) => true,
        FlowStep::Run(piece) => order.is_before_switch(*piece),
    };
    let mut cuts = Vec::new();
    let mut rest = steps;
    while let Some(all_to_all) =
        rest.iter().position(|step| matches!(step, FlowStep::Run(piece) if piece.is_all_to_all()))
    {
        let behind = &rest[all_to_all + 1..];
        let own = behind.iter().take_while(|step| is_before(step)).count();
        let (segment, behind) = rest.split_at(all_to_all + 1 + own);
        cuts.push(segment);
        rest = behind;
    }
    if !rest.is_empty() {
        cuts.push(rest);
    }
    cuts
}

impl PairOrder {
    /// Whether an operation that follows an exchange it does not need runs before the other pass has its turn.
    fn is_before_switch(self, LayerOp { pass, component, .. }: LayerOp) -> bool {
        match (pass, component) {
            (Pass::BackwardWeight, Component::Attention | Component::MtpJoin) => self.attention_weights_first,
            (Pass::BackwardWeight, _) => self.expert_weights_first,
            (_, Component::SharedExpert) => self.shared_first,
            _ => false,
        }
    }
}

fn is_communication(step: FlowStep) -> bool {
    match step {
        FlowStep::Run(piece) => piece.is_all_to_all(),
        FlowStep::Deliver(_) => true,
    }
}

fn weight_part(step: FlowStep) -> Option<FlowStep> {
    match step {
        FlowStep::Run(piece) if has_deferrable_weights(piece.component) => {
            Some(FlowStep::Run(LayerOp { pass: Pass::BackwardWeight, ..piece }))
        }
        _ => None,
    }
}

fn run(mut pieces: Vec<(Component, usize)>, pass: Pass) -> Vec<FlowStep> {
    if pieces.is_empty() {
        pieces.push((Component::Chunk, 0));
    }
    pieces.into_iter().map(|(component, layer)| FlowStep::Run(LayerOp { pass, component, layer })).collect()
}

fn forward_pieces(stage: &StageLayout) -> Vec<(Component, usize)> {
    let mut pieces = Vec::new();
    if stage.embedding {
        pieces.push((Component::Embedding, 0));
    }
    for (layer, &kind) in (stage.first_layer..).zip(&stage.layers) {
        pieces.extend(layer_forward(kind).iter().map(|&component| (component, layer)));
    }
    if stage.head {
        pieces.push((Component::Head, 0));
    }
    if let Some(layer) = stage.mtp_layer {
        pieces.push((Component::MtpJoin, layer));
        pieces.extend(layer_forward(LayerKind::Moe).iter().map(|&component| (component, layer)));
        pieces.push((Component::MtpHead, layer));
    }
    pieces
}

fn backward_pieces(stage: &StageLayout) -> Vec<(Component, usize)> {
    let mut pieces = Vec::new();
    if let Some(layer) = stage.mtp_layer {
        pieces.push((Component::MtpHead, layer));
        pieces.extend(layer_backward(LayerKind::Moe).iter().map(|&component| (component, layer)));
        pieces.push((Component::MtpJoin, layer));
    }
    if stage.head {
        pieces.push((Component::Head, 0));
    }
    for (position, &kind) in stage.layers.iter().enumerate().rev() {
        let layer = stage.first_layer + position;
        pieces.extend(layer_backward(kind).iter().map(|&component| (component, layer)));
    }
    if stage.embedding {
        pieces.push((Component::Embedding, 0));
    }
    pieces
}

/// The shared expert runs while the dispatch is under way.
fn layer_forward(kind: LayerKind) -> &'static [Component] {
    use Component::{Attention, Combine, Dispatch, Experts, SharedExpert};
    match kind {
        LayerKind::Dense => &[Attention, SharedExpert],
        LayerKind::Moe => &[Attention, Dispatch, SharedExpert, Experts, Combine],
    }
}

/// Not quite the mirror image: here too the shared expert runs while the first exchange is under way.
fn layer_backward(kind: LayerKind) -> &'static [Component] {
    use Component::{Attention, Combine, Dispatch, Experts, SharedExpert};
    match kind {
        LayerKind::Dense => &[SharedExpert, Attention],
        LayerKind::Moe => &[Combine, SharedExpert, Experts, Dispatch, Attention],
    }
}
