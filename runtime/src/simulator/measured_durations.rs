//! Durations of a recipe's operations from what was measured of the same layers.
//!
//! Nothing is guessed from other layers: a recipe that was not measured is refused, with the keys that differ.

use std::collections::BTreeSet;

use super::kernels::KernelShapes;
use super::link::Link;
use super::measured::{
    COMPONENTS, LAYERS, LayerShape, MeasuredCosts, MeasuredModel, MeasuredOperation, PASSES, SIZES,
    UpdateSpeed, name_of,
};
use super::times::{OperationTimes, format_name, update_bytes};
use crate::cost;
use crate::recipe::Recomputed;
use crate::schedule::{Component, LayerKind, Op, Pass, Work};
use crate::topology::Coordinates;

impl LayerShape {
    /// Of a recipe's model.
    pub fn of(kernels: KernelShapes) -> LayerShape {
        let (c, precision) = (kernels.shapes.config, kernels.shapes.precision);
        let sizes = [
            c.vocab_size,
            c.hidden_size,
            c.intermediate_size,
            c.moe_intermediate_size,
            c.num_attention_heads,
            c.q_lora_rank.unwrap_or(0),
            c.kv_lora_rank,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
            c.n_shared_experts,
            c.n_routed_experts,
            c.num_experts_per_tok,
            kernels.shapes.sequence_length,
        ];
        let formats = [
            ("linear", precision.linear),
            ("activations", precision.activations),
            ("dispatch", precision.dispatch),
            ("combine", precision.combine),
            ("attention_output", precision.attention_output),
            ("swiglu_input", precision.swiglu_input),
            ("moments", precision.moments),
        ];
        let again = [
            ("norms", Recomputed::Norms),
            ("mla_up_projections", Recomputed::MlaUpProjections),
            ("swiglu", Recomputed::Swiglu),
        ];
        let formats = formats.map(|(name, format)| format!("{name} {}", format_name(format)));
        let again = again.into_iter().filter(|(_, what)| kernels.memory.recompute.contains(what));
        let again = again.map(|(name, _)| format!("{name} again"));
        LayerShape {
            sizes: sizes.map(|size| size as u64),
            formats: formats.into_iter().chain(again).collect::<Vec<_>>().join(", "),
        }
    }
}

impl MeasuredModel {
    fn operation(&self, pass: Pass, component: Component, kind: LayerKind) -> Option<&MeasuredOperation> {
        let layer = layer_of(component, kind);
        self.operations
            .iter()
            .find(|known| (known.pass, known.component, known.layer) == (pass, component, layer))
    }
}

/// The kind of layer that a component's time depends on, if it does.
pub(super) fn layer_of(component: Component, kind: LayerKind) -> Option<LayerKind> {
    matches!(component, Component::Attention | Component::SharedExpert).then_some(kind)
}

/// The kind of a layer of the model, those of multi-token prediction among them.
pub(super) fn kind_of(kernels: KernelShapes, layer: usize) -> LayerKind {
    let config = kernels.shapes.config;
    if config.mtp_layer() == Some(layer) { LayerKind::Moe } else { config.layer_kind(layer) }
}

/// The durations of a recipe's operations, as those of the same layers were measured.
pub struct MeasuredDurations<'a> {
    costs: &'a MeasuredCosts,
    model: &'a MeasuredModel,
    kernels: KernelShapes<'a>,
}

impl<'a> MeasuredDurations<'a> {
    /// On the cluster of that name.
    ///
    /// # Errors
    /// None of the models that were measured has these layers.
    pub fn new(
        cluster: &str,
        costs: &'a MeasuredCosts,
        kernels: KernelShapes<'a>,
    ) -> Result<Self, Vec<String>> {
        let wanted = LayerShape::of(kernels);
        let model = costs.models.iter().find(|model| model.layers == wanted);
        let model = model.ok_or_else(|| {
            let nearest = costs.models.iter().map(|model| {
                format!("{} ({})", model.name, differences(&model.layers, &wanted).join(", "))
            });
            let known: Vec<String> = nearest.collect();
            vec![format!(
                "{cluster}: measured: expected the recipe's layers, got other ones: {}; measure them: contraflow bench profile",
                known.join("; ")
            )]
        })?;
        Ok(MeasuredDurations { costs, model, kernels })
    }

    fn component(&self, pass: Pass, component: Component, layer: usize) -> f64 {
        let shapes = self.kernels.shapes;
        // What is missing has been refused before.
        let Some(operation) = self.model.operation(pass, component, kind_of(self.kernels, layer)) else {
            return 0.0;
        };
        let held = if component == Component::Experts { shapes.topology.expert as f64 } else { 1.0 };
        operation.fixed_s / held + operation.per_token_s * shapes.micro_batch_tokens as f64
    }

    fn over(&self, link: Link, pipeline: usize, work: &Work) -> f64 {
        let rank = self.kernels.shapes.topology.rank(Coordinates { pipeline, data: 0, expert: 0 });
        let bytes = cost::of(work, rank, self.kernels.shapes).sent_bytes as f64;
        link.latency_s + bytes / link.bytes_per_s
    }

    fn speed(&self, work: &Work) -> Option<(&'static str, f64)> {
        let UpdateSpeed { pack, norm, apply, unpack } = self.model.update;
        match work {
            Work::Pack { .. } => Some(("pack", pack)),
            Work::GradNorm { .. } => Some(("norm", norm)),
            Work::Apply { .. } => Some(("apply", apply)),
            Work::Unpack { .. } => Some(("unpack", unpack)),
            _ => None,
        }
    }
}

/// The keys in which layers differ, with the first one's values.
fn differences(one: &LayerShape, other: &LayerShape) -> Vec<String> {
    let sizes = SIZES.iter().zip(one.sizes.iter().zip(other.sizes));
    let differ = sizes.filter(|(_, (size, wanted))| **size != *wanted);
    let mut all: Vec<String> =
        differ.map(|(name, (size, wanted))| format!("{name} {size}, not {wanted}")).collect();
    if one.formats != other.formats {
        all.push(format!("{}, not {}", one.formats, other.formats));
    }
    all
}

impl OperationTimes for MeasuredDurations<'_> {
    fn of(&self, pipeline: usize, op: &Op) -> f64 {
        let is_alone = self.kernels.shapes.topology.world() == 1;
        let seconds = match op.work {
            Work::Component { pass, layer, component, .. } => {
                let own = self.component(pass, component, layer);
                let is_exchange = matches!(component, Component::Dispatch | Component::Combine);
                let crosses = is_exchange && self.kernels.shapes.topology.expert > 1;
                own + if crosses { self.over(self.costs.exchange, pipeline, &op.work) } else { 0.0 }
            }
            Work::Send { .. } => return self.over(self.costs.send, pipeline, &op.work),
            Work::Reduce { .. } | Work::Gather { .. } | Work::Totals | Work::Evidence => {
                let link = self.costs.collective;
                return if is_alone { 0.0 } else { self.over(link, pipeline, &op.work) };
            }
            _ => self
                .speed(&op.work)
                .filter(|(_, speed)| *speed > 0.0)
                .map_or(0.0, |(_, speed)| update_bytes(&op.work, self.kernels.shapes) / speed),
        };
        if seconds > 0.0 { seconds + self.model.operation_s } else { 0.0 }
    }

    fn missing(&self, works: &[&Work]) -> Vec<String> {
        let name = &self.model.name;
        let without = works.iter().filter_map(|work| match **work {
            Work::Component { pass, layer, component, .. } => {
                let kind = kind_of(self.kernels, layer);
                let known = self.model.operation(pass, component, kind).is_some();
                // A backward pass of the all-to-alls' weights there is not.
                (!known && component != Component::Chunk).then(|| {
                    let layer = name_of(&LAYERS, layer_of(component, kind));
                    let (component, pass) = (name_of(&COMPONENTS, component), name_of(&PASSES, pass));
                    format!("measured: expected {component}, {pass}, layer {layer} of {name}")
                })
            }
            ref work => {
                let (key, _) = self.speed(work).filter(|(_, speed)| *speed == 0.0)?;
                (update_bytes(work, self.kernels.shapes) > 0.0)
                    .then(|| format!("measured: expected a speed update.{key} of {name}"))
            }
        });
        without.collect::<BTreeSet<String>>().into_iter().collect()
    }
}
