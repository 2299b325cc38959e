//! A forward and backward pair in steady state: one rank, no pipeline, MoE layers alone. What published traces show.

use super::cluster::{Cluster, Costs};
use super::duration::Durations;
use super::kernels::{Kernel, KernelShapes, Traffic};
use super::run::simulate_shapes;
use super::times::format_name;
use crate::cost::Shapes;
use crate::recipe::Recipe;
use crate::schedule::{
    Action, Chunk, Component, Lane, LayerKind, Mode, Overlap, Pass, Plan, StageLayout, Work, lower_with,
};

/// Where the time of a pair goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pair {
    /// From one pair's end to the next one's. **Units**: seconds.
    pub span_s: f64,
    /// Of it the compute lane. **Units**: seconds.
    pub compute_s: f64,
    /// Of it the all-to-alls. **Units**: seconds.
    pub exchange_s: f64,
    /// Of the compute lane by kind of kernel. **Units**: seconds.
    pub kernels_s: Vec<(String, f64)>,
}

/// Pairs behind which the next one is like the last.
const SETTLED: usize = 4;

/// A pair of `layers` MoE layers of a recipe's model, behind the dense ones.
///
/// # Errors
/// A profile of durations; rates that the profile lacks.
pub fn pair(recipe: &Recipe, cluster: &Cluster, layers: usize) -> Result<Pair, Vec<String>> {
    pair_with(recipe, cluster, layers, Overlap::of(recipe.parallel.overlap))
}

/// [`pair`], where `overlap` says what runs beside what.
///
/// # Errors
/// As [`pair`].
pub fn pair_with(
    recipe: &Recipe,
    cluster: &Cluster,
    layers: usize,
    overlap: Overlap,
) -> Result<Pair, Vec<String>> {
    let Costs::Kernels(rates) = &cluster.costs else {
        return Err(vec![format!("{}: expected rates of kernels, got durations", cluster.name)]);
    };
    let first_layer = recipe.model_config.first_k_dense_replace;
    let stage = StageLayout {
        first_layer,
        layers: vec![LayerKind::Moe; layers],
        embedding: false,
        head: false,
        tied: false,
        mtp_layer: None,
    };
    let stages = [stage];
    let shapes = Shapes {
        config: &recipe.model_config,
        topology: recipe.topology(),
        expert_nodes: recipe.expert_nodes(),
        stages: &stages,
        buckets: &[],
        micro_batch_tokens: recipe.training.micro_batch_size * recipe.training.sequence_length,
        sequence_length: recipe.training.sequence_length,
        precision: &recipe.precision,
        mode: Mode::Train,
    };
    let kernels = KernelShapes { shapes: &shapes, memory: &recipe.memory };
    let plan = pairs(SETTLED + 1);
    let programs = lower_with(&plan, Some(&stages), recipe.parallel.expert, overlap);
    let run = simulate_shapes(plan, programs, cluster, kernels)?;
    let ops = || run.programs[0].ops.iter().zip(&run.timeline.spans[0]);
    let of_action = |action: usize| ops().filter(move |(op, _)| op.action == Some(action));
    let end = |action| of_action(action).map(|(_, span)| span.end).fold(0.0, f64::max);
    let on =
        |lane| of_action(SETTLED).filter(|(op, _)| op.lane == lane).map(|(_, span)| span.duration()).sum();
    let durations = Durations::new(cluster, rates, kernels);
    let mut kernels_s: Vec<(String, f64)> = Vec::new();
    for (pass, component, layer) in of_action(SETTLED).filter_map(|(op, _)| piece(&op.work)) {
        for kernel in kernels.of(pass, component, layer) {
            let (kind, seconds) = (kind(&kernel), durations.kernel(&kernel));
            match kernels_s.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, sum)) => *sum += seconds,
                None => kernels_s.push((kind, seconds)),
            }
        }
    }
    Ok(Pair {
        span_s: end(SETTLED) - end(SETTLED - 1),
        compute_s: on(Lane::Compute),
        exchange_s: on(Lane::Expert),
        kernels_s,
    })
}

/// A forward pass, pairs of the next one with its backward pass, and the last backward pass.
fn pairs(number: usize) -> Plan {
    let chunk = |micro_batch| Chunk { stage: 0, micro_batch };
    let pair = |at| Action::ForwardBackward { forward: chunk(at + 1), backward: chunk(at) };
    let mut actions = vec![Action::Forward(chunk(0))];
    actions.extend((0..number).map(pair));
    actions.push(Action::Backward(chunk(number)));
    Plan {
        schedule: "pairs".to_owned(),
        stages: 1,
        micro_batches: number + 1,
        placement: vec![vec![0]],
        actions: vec![actions],
    }
}

fn piece(work: &Work) -> Option<(Pass, Component, usize)> {
    match *work {
        Work::Component { pass, component, layer, .. } => Some((pass, component, layer)),
        _ => None,
    }
}

fn kind(kernel: &Kernel) -> String {
    let name = match kernel {
        Kernel::Product { role, format, .. } => return format!("{} {}", role.name(), format_name(*format)),
        Kernel::Attention(_) | Kernel::AttentionBackward(_) | Kernel::Traffic(Traffic::AttentionEnds, _) => {
            "attention"
        }
        Kernel::Traffic(Traffic::Norm, _) => "norm",
        Kernel::Traffic(Traffic::Swiglu, _) => "swiglu",
        Kernel::Traffic(Traffic::Cast, _) => "cast",
        Kernel::Traffic(Traffic::Copy | Traffic::Update, _) => "copy",
    };
    name.to_owned()
}
