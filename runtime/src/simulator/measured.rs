//! What operations took on a machine, by model, as a profile has it.
//!
//! A component takes a fixed time and one for each token of a micro-batch; the fixed time of the experts is for each expert that the
//! rank holds. Knows neither how it was measured nor what follows from it.

use std::fmt::Write;

use super::link::{Link, link};
use super::section::{Range, Section};
use crate::schedule::{Component, LayerKind, Pass};

/// Components as profiles write them.
pub(super) const COMPONENTS: [(&str, Component); 9] = [
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
pub(super) const PASSES: [(&str, Pass); 3] = [
    ("forward", Pass::Forward),
    ("backward_input", Pass::BackwardInput),
    ("backward_weight", Pass::BackwardWeight),
];

/// Layers as profiles write them; `any` where a component is the same in all of them.
pub(super) const LAYERS: [(&str, Option<LayerKind>); 3] =
    [("any", None), ("dense", Some(LayerKind::Dense)), ("moe", Some(LayerKind::Moe))];

/// Keys of a model's configuration, and of the recipe, that the time of its operations depends on.
pub(super) const SIZES: [&str; 14] = [
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

/// The name of a value, in a table of them.
pub(super) fn name_of<T: Copy + PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, known)| *known == value).unwrap_or(&names[0]).0
}
