//! How far every token is from a tie between experts: where two layouts round differently, a token near a tie would
//! go elsewhere and the comparison of gradients would mean nothing.

use std::sync::Arc;

use contraflow_kernels::gate::{GateSpec, Routing};
use contraflow_kernels::host::HostValues;
use contraflow_runtime::fabric::{FrameKind, LocalNetwork, LocalOptions, Phase};
use contraflow_runtime::layout::split_layers;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Chunk, Component, Mode, ScheduleKind, TransferKind, Work, lower};
use contraflow_runtime::topology::FormationId;
use contraflow_workers::comm::address::StepId;
use contraflow_workers::comm::all_to_all::{AllToAll, ExpertGroup, Route};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::engine::compute::{Compute, ComputeOp};
use contraflow_workers::engine::in_flight::InFlight;
use contraflow_workers::model::Architecture;
use contraflow_workers::model::build::{Placement, RankModel, build};
use contraflow_workers::model::micro_batch::{LossScales, MicroBatch};
use contraflow_workers::model::params::{Params, RankParams};
use contraflow_workers::model::precision::Precision;

/// The smallest margin of any choice that the model makes with these weights on these sequences, over all layers.
pub fn smallest(recipe: &Recipe, params: &RankParams, sequences: Sequences) -> f64 {
    let arch = Arc::new(Architecture::new(recipe.model_config.clone(), Precision::of(&recipe.precision)));
    let layouts = split_layers(&recipe.model_config, 1, sequences.sequence_length).unwrap();
    let placement = Placement { topology: recipe.topology(), stages_of: &[vec![0]], layouts: &layouts };
    let RankModel { stages, dense, experts } = build(&arch, &placement, 0);
    let biases = params.dense.gate_biases.clone();
    let params = RankParams {
        dense: with_weights(dense, &params.dense),
        experts: with_weights(experts, &params.experts),
    };
    let mut compute = Compute::new(arch.clone(), Arc::new(stages), params, TaskKind::Evaluate);
    let scales = LossScales {
        denominator: 1.0,
        mtp_denominator: 1.0,
        mtp_weight: 1.0,
        balance: 0.0,
        batch_balance: 0.0,
    };
    let batch = MicroBatch::new(&arch, sequences, &scales);
    let in_flight = InFlight::default();
    let mut alone = Alone::new(recipe);
    let (plan, _) = ScheduleKind::OneFOneB.plan(1, 1, Mode::ForwardOnly).unwrap();
    let program = lower(&plan, Some(&layouts), 1).remove(0);
    let mut smallest = f64::INFINITY;
    for op in &program.ops {
        let Work::Component { pass, chunk, layer, component } = op.work else {
            panic!("one rank sends nothing")
        };
        match component {
            Component::Dispatch => alone.dispatch(&in_flight, chunk, layer),
            Component::Combine => alone.combine(&in_flight, chunk, layer),
            _ => compute.run(ComputeOp { pass, chunk, layer, component }, &in_flight, &batch).unwrap(),
        }
        if component == Component::Attention {
            let routing =
                in_flight.layer(chunk, layer, |in_flight| in_flight.normed.as_ref().map(|(_, r)| r.clone()));
            if let Some(routing) = routing {
                smallest = smallest.min(of_layer(&routing, biases[&layer].values(), &arch.gate));
            }
        }
    }
    smallest
}

fn with_weights(mut params: Params, source: &Params) -> Params {
    for (param, source) in params.iter_mut().zip(source.iter()) {
        assert_eq!(param.parts, source.parts);
        *param.master_mut() = source.master().clone();
    }
    params.gate_biases = source.gate_biases.clone();
    params
}

/// The expert exchange of a rank that owns all experts.
struct Alone {
    endpoint: contraflow_runtime::fabric::Endpoint,
    group: ExpertGroup,
    route: Option<Route>,
}

impl Alone {
    fn new(recipe: &Recipe) -> Self {
        let config = &recipe.model_config;
        Alone {
            endpoint: LocalNetwork::new(LocalOptions::default()).join(0),
            group: ExpertGroup::new(&[0], 0, config.n_routed_experts, 1),
            route: None,
        }
    }

    fn all_to_all(&self, chunk: Chunk, layer: usize) -> AllToAll<'_> {
        let id = StepId { formation: FormationId::default(), phase: Phase::Validate, step: 0 };
        AllToAll {
            endpoint: &self.endpoint,
            group: &self.group,
            tag: id.tag(FrameKind::Dispatch, chunk, layer, 0),
        }
    }

    fn dispatch(&mut self, in_flight: &InFlight, chunk: Chunk, layer: usize) {
        let (normed, routing) = in_flight.take_from((chunk, layer), "rows", |t| &mut t.normed).unwrap();
        let (arrivals, route) = self.all_to_all(chunk, layer).dispatch(&normed, &routing).unwrap();
        in_flight.layer(chunk, layer, |in_flight| in_flight.arrivals = Some(arrivals));
        self.route = Some(route);
    }

    fn combine(&mut self, in_flight: &InFlight, chunk: Chunk, layer: usize) {
        let mut home = in_flight.take_from((chunk, layer), "home", |t| &mut t.home).unwrap();
        let outputs = in_flight.take_from((chunk, layer), "outputs", |t| &mut t.outputs).unwrap();
        let route = self.route.take().unwrap();
        self.all_to_all(chunk, layer).combine(&outputs, &route, &mut home).unwrap();
        in_flight.put(TransferKind::Activation, chunk, home);
    }
}

/// The smallest gap between what a token chose and what it left: of its groups, and of the experts in them.
fn of_layer(routing: &Routing, bias: &[f32], gate: &GateSpec) -> f64 {
    let per_group = gate.num_experts / gate.num_groups;
    let of_token = |scores: &[f32]| {
        let biased: Vec<f64> =
            scores.iter().zip(bias).map(|(&score, &bias)| f64::from(score + bias)).collect();
        let mut groups: Vec<(f64, &[f64])> = biased
            .chunks(per_group)
            .map(|group| {
                let mut sorted = group.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                (sorted.iter().take(2).sum(), group)
            })
            .collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut allowed: Vec<f64> =
            groups[..gate.top_groups].iter().flat_map(|(_, group)| group.to_vec()).collect();
        allowed.sort_by(|a, b| b.total_cmp(a));
        let among_groups = groups[gate.top_groups - 1].0 - groups[gate.top_groups].0;
        among_groups.min(allowed[gate.top_k - 1] - allowed[gate.top_k])
    };
    routing.scores.values::<f32>().chunks(gate.num_experts).map(of_token).fold(f64::INFINITY, f64::min)
}
