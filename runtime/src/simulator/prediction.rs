//! A simulated step in the figures that runs are compared by, and beside what was published where something was.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::breakdown::Components;
use super::cluster::{Cluster, Published};
use super::run::{Run, simulate_recipe};
use crate::cost;
use crate::layout::recipe_figures;
use crate::model_config::ModelConfig;
use crate::recipe::Recipe;
use crate::schedule::{Action, RankFigures};

/// **Units**: bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;

/// What a user wants to know of a recipe on a cluster.
///
/// # Errors
/// As [`simulate_recipe`].
pub fn predict(recipe: &Recipe, cluster: &Cluster) -> Result<(Run, Prediction), Vec<String>> {
    let run = simulate_recipe(recipe, cluster)?;
    let figures = recipe_figures(recipe).map_err(|error| vec![error])?;
    let mut prediction = Prediction::new(recipe, cluster, &run, &figures);
    for (name, value, without) in cluster.calibrated() {
        let run = simulate_recipe(recipe, &without)?;
        let (bubble_s, step_s) = (run.breakdown.mean.bubble, run.step_s);
        prediction.calibrated.push(Constant { name, value, bubble_s, step_s });
    }
    Ok((run, prediction))
}

/// What a training step takes on a cluster.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Name of the profile.
    pub cluster: String,
    /// The whole step, its update included. **Units**: seconds.
    pub step_s: f64,
    /// Its parts, the mean over ranks; they add up to the step. **Units**: seconds.
    pub components: Components,
    /// How many milliseconds an action takes on average, by kind.
    pub action_ms: BTreeMap<&'static str, f64>,
    /// Waits for all-to-alls inside of actions, the mean over ranks. **Units**: seconds.
    pub exposed_s: f64,
    /// **Units**: tokens/s of a device.
    pub tokens_per_gpu_s: f64,
    /// **Units**: hours of one device.
    pub gpu_hours_per_trillion_tokens: f64,
    /// Share of `peak_flops`: main model, a token attends to half of a sequence.
    pub mfu_causal: f64,
    /// The same where a token attends to all of it.
    pub mfu_noncausal: f64,
    /// What these are shares of. **Units**: FLOP/s of a device.
    pub peak_flops: f64,
    /// By pipeline rank. **Units**: GiB.
    pub peak_memory_gib: Vec<f64>,
    /// Of a device. **Units**: GiB.
    pub memory_gib: f64,
    /// Beside published figures of this run.
    pub published: Vec<Compared>,
    /// What was fitted, and what it does; nothing where nothing was.
    pub calibrated: Vec<Constant>,
    /// How long the simulation took. **Units**: seconds of this machine.
    pub seconds: f64,
}

/// A constant that was fitted, and what is predicted without it: how much hangs on it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Constant {
    /// Its key.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
    /// The bubble where it is 0. **Units**: seconds.
    pub bubble_s: f64,
    /// The step where it is 0. **Units**: seconds.
    pub step_s: f64,
}

/// A predicted figure beside the published one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Which.
    pub name: &'static str,
    /// **Units**: seconds.
    pub predicted_s: f64,
    /// **Units**: seconds.
    pub published_s: f64,
    /// Predicted over published, less 1.
    pub error: f64,
    /// Why they differ.
    pub cause: String,
}

impl Prediction {
    /// Of a simulated step; `figures` are the memory of each pipeline rank.
    pub fn new(recipe: &Recipe, cluster: &Cluster, run: &Run, figures: &[RankFigures]) -> Prediction {
        let world = recipe.topology().world() as f64;
        let length = recipe.training.sequence_length;
        let tokens = (recipe.training.global_batch_size * length) as f64;
        let tokens_per_gpu_s = tokens / run.step_s / world;
        let [causal, noncausal] = main_model_flops(&recipe.model_config, length);
        let components = run.breakdown.mean;
        let is_published = recipe.model.config == "deepseek-v3" && recipe.topology().world() == cluster.ranks;
        let compared = |published: &Published| {
            let named = components.named();
            let found = named.iter().find(|(name, _)| *name == published.name);
            let predicted_s = found.map_or(run.step_s, |&(_, seconds)| seconds);
            Compared {
                name: published.name,
                predicted_s,
                published_s: published.seconds,
                error: predicted_s / published.seconds - 1.0,
                cause: published.cause.clone(),
            }
        };
        Prediction {
            cluster: cluster.name.clone(),
            step_s: run.step_s,
            components,
            action_ms: action_ms(run),
            exposed_s: run.breakdown.exposed.iter().sum::<f64>() / run.breakdown.exposed.len().max(1) as f64,
            tokens_per_gpu_s,
            gpu_hours_per_trillion_tokens: 1e12 / tokens_per_gpu_s / 3600.0,
            mfu_causal: causal * tokens_per_gpu_s / cluster.peak_flops,
            mfu_noncausal: noncausal * tokens_per_gpu_s / cluster.peak_flops,
            peak_flops: cluster.peak_flops,
            peak_memory_gib: figures.iter().map(|rank| rank.device_bytes as f64 / GIB).collect(),
            memory_gib: cluster.memory_bytes as f64 / GIB,
            published: cluster.published.iter().filter(|_| is_published).map(compared).collect(),
            calibrated: Vec::new(),
            seconds: 0.0,
        }
    }
}

/// FLOP of a token in training by the main model: with half of the keys, and with all of them.
fn main_model_flops(config: &ModelConfig, sequence_length: usize) -> [f64; 2] {
    let forward = cost::forward_flops_per_token(config, sequence_length) as f64;
    let core = config.num_hidden_layers as f64 * cost::attention_core_flops(config, sequence_length) as f64;
    // The useful half counts (T + 1) / 2 keys, the whole T.
    let length = sequence_length as f64;
    let all_keys = core * 2.0 * length / (length + 1.0);
    [3.0 * forward, 3.0 * (forward - core + all_keys)]
}

/// Mean over all actions of a kind, on all ranks.
fn action_ms(run: &Run) -> BTreeMap<&'static str, f64> {
    let mut counts = [0_usize; 4];
    for action in run.plan.actions.iter().flatten() {
        counts[match action {
            Action::Forward(_) | Action::ForwardForward { .. } => 0,
            Action::Backward(_) | Action::BackwardInput(_) | Action::InputWeight { .. } => 1,
            Action::BackwardWeight(_) => 2,
            Action::ForwardBackward { .. } => 3,
        }] += 1;
    }
    let Components { forward, backward, weight, pair, .. } = run.breakdown.mean;
    let ranks = run.plan.ranks() as f64;
    let kinds = [("1F", forward), ("1B", backward), ("1W", weight), ("1F1B", pair)].into_iter().zip(counts);
    let some = kinds.filter(|(_, count)| *count > 0);
    some.map(|((name, seconds), count)| (name, 1e3 * seconds * ranks / count as f64)).collect()
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "simulated on {}, in {:.1} s", self.cluster, self.seconds)?;
        writeln!(
            f,
            "  step {:.2} s, {:.0} tokens/s a device, {:.1} thousand device hours a trillion tokens",
            self.step_s,
            self.tokens_per_gpu_s,
            self.gpu_hours_per_trillion_tokens / 1e3
        )?;
        writeln!(
            f,
            "  MFU {:.2} % causal, {:.2} % not causal; main model, of {:.0} TFLOP/s",
            100.0 * self.mfu_causal,
            100.0 * self.mfu_noncausal,
            self.peak_flops / 1e12
        )?;
        let most = self.peak_memory_gib.iter().copied().fold(0.0, f64::max);
        writeln!(f, "  memory: {most:.1} GiB of {:.1} GiB on the largest rank", self.memory_gib)?;
        for Constant { name, value, bubble_s, step_s } in &self.calibrated {
            writeln!(f, "  fitted: {name} = {value}; without it bubble {bubble_s:.2} s, step {step_s:.2} s")?;
        }
        writeln!(f, "\n  {:<10} {:>10} {:>12} {:>9}", "part", "s a step", "ms an action", "share")?;
        for (name, seconds) in self.components.named() {
            let each = self.action_ms.get(name).map_or(String::new(), |ms| format!("{ms:.1}"));
            writeln!(f, "  {name:<10} {seconds:>10.3} {each:>12} {:>7.1} %", 100.0 * seconds / self.step_s)?;
        }
        writeln!(f, "  waits for all-to-alls, in the parts above: {:.3} s", self.exposed_s)?;
        if !self.published.is_empty() {
            writeln!(f, "\n  {:<10} {:>10} {:>10} {:>8}  cause", "part", "predicted", "published", "error")?;
        }
        for Compared { name, predicted_s, published_s, error, cause } in &self.published {
            let error = 100.0 * error;
            writeln!(f, "  {name:<10} {predicted_s:>10.3} {published_s:>10.3} {error:>+6.1} %  {cause}")?;
        }
        Ok(())
    }
}
