//! What operations took on a machine, by model: a profile of measurements, and durations from it.
//!
//! A component takes a fixed time and one for each token of a micro-batch; the fixed time of the experts is for each expert that the
//! rank holds. Knows nothing of how it was measured, and no layers but those that were: nothing is guessed from others.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::cluster::{Link, link};
use super::duration::{OperationTimes, format_name, update_bytes};
use super::kernels::KernelShapes;
use super::section::{Range, Section};
use crate::cost;
use crate::recipe::Recomputed;
use crate::schedule::{Component, LayerKind, Op, Pass, Work};
use crate::topology::Coordinates;

/// Components as profiles write them.
const COMPONENTS: [(&str, Component); 9] = [
    ("embedding", Component::Embedding),
    ("attention", Component::Attention),
    ("dispatch", Component::Dispatch),
    ("shared_expert", Component::SharedExpert),
    ("experts", Component::Experts),
    ("combine", Component::Combine),
    ("head", Component::Head),
    ("mtp_join", Component::MtpJoin),
    ("mtp_head", Component::MtpHead),
];

/// Passes as profiles write them.
const PASSES: [(&str, Pass); 3] = [
    ("forward", Pass::Forward),
    ("backward_input", Pass::BackwardInput),
    ("backward_weight", Pass::BackwardWeight),
];

/// Layers as profiles write them; `any` where a component is the same in all of them.
const LAYERS: [(&str, Option<LayerKind>); 3] =
    [("any", None), ("dense", Some(LayerKind::Dense)), ("moe", Some(LayerKind::Moe))];

/// Keys of a model's configuration, and of the recipe, that the time of its operations depends on.
const SIZES: [&str; 14] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "sequence_length",
];

/// The costs of a machine, all of whose ranks are on one node.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredCosts {
    /// Between two pipeline ranks.
    pub send: Link,
    /// All-to-alls, beside what dispatch and combine take on a rank that holds all experts.
    pub exchange: Link,
    /// Collectives of the update.
    pub collective: Link,
    /// The models whose operations were measured.
    pub models: Vec<MeasuredModel>,
}

/// What the operations of a model took.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredModel {
    /// For people.
    pub name: String,
    /// What its layers are; models of other depth have the same.
    pub layers: LayerShape,
    /// Between two operations of a lane. **Units**: seconds.
    pub operation_s: f64,
    /// Of the update.
    pub update: UpdateSpeed,
    /// Of the passes.
    pub operations: Vec<MeasuredOperation>,
}

/// Bytes that operations of the update read and write in a second; 0 of those that the measured run did not need.
///
/// **Units**: bytes/s.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateSpeed {
    /// Gradients into flat parts.
    pub pack: f64,
    /// Squares of the gradient.
    pub norm: f64,
    /// AdamW.
    pub apply: f64,
    /// Gathered weights to where they are computed with.
    pub unpack: f64,
}

/// What a component took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MeasuredOperation {
    /// Which.
    pub component: Component,
    /// In which pass.
    pub pass: Pass,
    /// In which layers, where they differ.
    pub layer: Option<LayerKind>,
    /// Whatever the tokens; of the experts for all of them. **Units**: seconds.
    pub fixed_s: f64,
    /// **Units**: seconds for a token of a micro-batch, under balanced routing.
    pub per_token_s: f64,
}

/// What the time of a layer's operations depends on, but for tokens and ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// In the order of their keys; 0 where the model has none.
    pub sizes: [u64; SIZES.len()],
    /// Formats of all tensors, and what is computed again.
    pub formats: String,
}

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

    fn read(mut section: Section) -> LayerShape {
        let sizes = SIZES.map(|name| section.number_or(name, Range::NotNegative, 0.0) as u64);
        let shape = LayerShape { sizes, formats: section.text("formats") };
        section.close();
        shape
    }
}

impl MeasuredCosts {
    pub(super) fn read(root: &mut Section) -> MeasuredCosts {
        let mut links = root.section("links");
        let [send, exchange, collective] =
            ["send", "exchange", "collective"].map(|key| link(links.section(key)));
        links.close();
        let models = root.rows("measured").into_iter().map(MeasuredModel::read).collect();
        MeasuredCosts { send, exchange, collective, models }
    }

    /// As a profile has it: the sections of these costs.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("[links]\n");
        let links = [("send", self.send), ("exchange", self.exchange), ("collective", self.collective)];
        for (name, Link { bytes_per_s, latency_s }) in links {
            text += &format!("{name} = {{ bytes_per_s = {bytes_per_s:?}, latency_s = {latency_s:?} }}\n");
        }
        for model in &self.models {
            // Writing to a text does not fail.
            let _ = model.write(&mut text);
        }
        text
    }
}

impl MeasuredModel {
    fn read(mut row: Section) -> MeasuredModel {
        let mut update = row.section("update");
        let mut speed = |key| update.number_or(key, Range::NotNegative, 0.0);
        let [pack, norm, apply, unpack] = ["pack", "norm", "apply", "unpack"].map(&mut speed);
        update.close();
        let model = MeasuredModel {
            name: row.text("model"),
            layers: LayerShape::read(row.section("layers")),
            operation_s: row.number("operation_s", Range::NotNegative),
            update: UpdateSpeed { pack, norm, apply, unpack },
            operations: row.rows("operations").into_iter().map(MeasuredOperation::read).collect(),
        };
        row.close();
        model
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n[[measured]]\nmodel = {:?}\noperation_s = {:?}", self.name, self.operation_s)?;
        writeln!(text, "\n[measured.layers]")?;
        for (name, size) in SIZES.iter().zip(self.layers.sizes) {
            writeln!(text, "{name} = {size}")?;
        }
        writeln!(text, "formats = {:?}", self.layers.formats)?;
        let UpdateSpeed { pack, norm, apply, unpack } = self.update;
        writeln!(text, "\n[measured.update] # bytes/s")?;
        for (name, speed) in [("pack", pack), ("norm", norm), ("apply", apply), ("unpack", unpack)] {
            writeln!(text, "{name} = {speed:?}")?;
        }
        for operation in &self.operations {
            let MeasuredOperation { component, pass, layer, fixed_s, per_token_s } = *operation;
            writeln!(text, "\n[[measured.operations]]")?;
            writeln!(text, "component = \"{}\"", name_of(&COMPONENTS, component))?;
            writeln!(text, "pass = \"{}\"", name_of(&PASSES, pass))?;
            writeln!(text, "layer = \"{}\"", name_of(&LAYERS, layer))?;
            writeln!(text, "fixed_s = {fixed_s:?}\nper_token_s = {per_token_s:?}")?;
        }
        Ok(())
    }

    fn operation(&self, pass: Pass, component: Component, kind: LayerKind) -> Option<&MeasuredOperation> {
        let layer = layer_of(component, kind);
        self.operations
            .iter()
            .find(|known| (known.pass, known.component, known.layer) == (pass, component, layer))
    }
}

impl MeasuredOperation {
    fn read(mut row: Section) -> MeasuredOperation {
        let component = row.word("component", &COMPONENTS.map(|(name, _)| name));
        let pass = row.word("pass", &PASSES.map(|(name, _)| name));
        let layer = row.word("layer", &LAYERS.map(|(name, _)| name));
        let operation = MeasuredOperation {
            component: value_of(&COMPONENTS, component),
            pass: value_of(&PASSES, pass),
            layer: value_of(&LAYERS, layer),
            fixed_s: row.number("fixed_s", Range::NotNegative),
            per_token_s: row.number("per_token_s", Range::NotNegative),
        };
        row.close();
        operation
    }
}

fn value_of<T: Copy>(names: &[(&str, T)], name: &str) -> T {
    names.iter().find(|(known, _)| *known == name).unwrap_or(&names[0]).1
}

fn name_of<T: Copy + PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, known)| *known == value).unwrap_or(&names[0]).0
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
