//! Updates without passes, on two expert ranks: the programs of a step run operation by operation, on gradients that the test
//! has made.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;

use contraflow_kernels::host::HostValuesMut;
use contraflow_kernels::par::Threads;
use contraflow_runtime::fabric::{Endpoint, LocalNetwork, LocalOptions, Phase};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Program, StepPrograms};
use contraflow_runtime::topology::FormationId;
use contraflow_workers::comm::address::StepId;
use contraflow_workers::comm::all_to_all::ExpertGroup;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::compute::Compute;
use contraflow_workers::engine::in_flight::InFlight;
use contraflow_workers::engine::lanes::{LaneEvent, Lanes};
use contraflow_workers::engine::plans::Plans;
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::running::{RankContext, RunningProgram, Workload};
use contraflow_workers::engine::step::{Next, ProgramKind, next};
use contraflow_workers::engine::update::{SaveWhen, Update, UpdateOrder};
use contraflow_workers::model::Architecture;
use contraflow_workers::model::build::{Placement, RankModel, build};
use contraflow_workers::model::init::initialise;
use contraflow_workers::model::params::{Params, RankParams};
use contraflow_workers::model::precision::Precision;
use contraflow_workers::optimizer::totals::Totals;
use contraflow_workers::optimizer::update::{OptimizerState, UpdateRates};
use contraflow_workers::rank::build::optimizer_setup;

use crate::lab::{Lab, layout};
use crate::watch::{Bits, bits, set_all};

/// The outcome of one update on one rank.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Updated,
    Skipped,
    Diverged,
}

/// One rank and its own end of the network.
struct Rank {
    context: RankContext,
    arch: Arc<Architecture>,
    programs: StepPrograms,
    params: RankParams,
    optimizer: Option<OptimizerState>,
}

/// Fresh weights, with gradients that are all 1.
fn with_gradients(mut params: Params, seed: u64) -> Params {
    initialise(&mut params, seed, 0.1);
    params.iter_mut().for_each(|param| set_all(param.grad_mut(), 1.0));
    params
}

impl Rank {
    fn new(recipe: &Recipe, endpoint: Endpoint) -> Rank {
        let rank = endpoint.rank();
        let plans = Plans::new(recipe).unwrap();
        let arch = Arc::new(Architecture::new(recipe.model_config.clone(), Precision::of(&recipe.precision)));
        let topology = recipe.topology();
        let placement = Placement { topology, stages_of: &[vec![0]], layouts: &plans.layouts };
        let RankModel { stages, dense, experts } = build(&arch, &placement, rank);
        let seed = recipe.training.seed;
        let mut params =
            RankParams { dense: with_gradients(dense, seed), experts: with_gradients(experts, seed) };
        let optimizer = OptimizerState::new(optimizer_setup(recipe, rank), &mut params);
        let world: Vec<usize> = topology.ranks().collect();
        let context = RankContext {
            endpoint,
            group: ExpertGroup::new(&world, rank, 4, 1),
            world: Arc::new(world),
            buckets: Arc::new(optimizer.groups()),
            stages: Arc::new(stages),
            pipeline_peers: vec![rank],
            hidden_size: recipe.model_config.hidden_size,
            precision: Precision::F32,
            flight: None,
            probe: Probe::default(),
        };
        let programs = StepPrograms::new(&[Program::default()], &plans.sharding);
        Rank { context, arch, programs, params, optimizer: Some(optimizer) }
    }

    fn run(&self, step: u64, part: ProgramKind, workload: Workload) -> Workload {
        let programs = match part {
            ProgramKind::Passes => &self.programs.gradients,
            ProgramKind::Gathering => &self.programs.gathering,
            ProgramKind::Evidence => &self.programs.evidence,
            ProgramKind::Update => &self.programs.update,
            ProgramKind::Skip => &self.programs.skip,
            ProgramKind::Gather => &self.programs.gather,
        };
        let id = StepId { formation: FormationId::default(), phase: Phase::Train, step };
        let program = Arc::new(programs[0].clone());
        let running = RunningProgram::new(&self.context, (id, program), workload, tracing::Span::none());
        let running = Arc::new(running);
        let (report, events) = channel();
        let report = Arc::new(move |event| report.send(event).unwrap());
        let mut lanes = Lanes::new(Arc::new(Threads::new(1)), report);
        for op in 0..programs[0].ops.len() {
            lanes.issue(&running, op);
            if let LaneEvent::Failed { error, .. } = events.recv().unwrap() {
                panic!("{error}");
            }
        }
        Arc::into_inner(running).unwrap().into_workload()
    }

    /// A step without passes, with the gradients that are there.
    fn step(&mut self, step: u64) -> Outcome {
        let RankParams { dense, experts } = &mut self.params;
        let params = RankParams { dense: std::mem::take(dense), experts: std::mem::take(experts) };
        let (arch, stages) = (self.arch.clone(), self.context.stages.clone());
        let mut compute = Compute::new(arch, stages, params, TaskKind::Train);
        let expert_counts = BTreeMap::from([(4, vec![9, 4, 5, 2, 5, 5, 5, 5])]);
        compute.totals = Totals { expert_counts, ..Totals::default() };
        let rates = UpdateRates { step, learning_rate: 0.1, bias_speed: 0.1 };
        let save = SaveWhen::Never;
        let order = UpdateOrder::alone(rates, save);
        let update = Some(Update::new(order, self.optimizer.take().unwrap()));
        let in_flight = InFlight::default();
        let mut workload = Workload { batches: Vec::new(), in_flight, compute, update };
        let mut part = ProgramKind::Passes;
        let diverged = loop {
            workload = self.run(step, part, workload);
            match next(part, workload.update.as_mut()).unwrap() {
                Next::Run(another) => part = another,
                Next::End => break false,
                Next::Diverged(_) => break true,
            }
        };
        let Compute { mut params, .. } = workload.compute;
        params.clear_gradients();
        self.params = params;
        let update = workload.update.unwrap();
        self.optimizer = Some(update.optimizer);
        match (diverged, update.global.unwrap().skipped) {
            (true, _) => Outcome::Diverged,
            (false, true) => Outcome::Skipped,
            (false, false) => Outcome::Updated,
        }
    }
}

/// Each of two expert ranks makes an update for every gradient: a number that all values have. `poison` may spoil those of the
/// second rank where the number is not finite. Returns, by rank, the outcomes and the weights and biases in the end.
fn update_two_ranks(
    recipe: &Recipe,
    gradients: &[f32],
    poison: fn(&mut RankParams, f32),
) -> Vec<(Vec<Outcome>, Bits)> {
    let network = LocalNetwork::new(LocalOptions::default());
    let endpoints = [network.join(0), network.join(1)];
    let update = |endpoint: &Endpoint| {
        let mut rank = Rank::new(recipe, endpoint.clone());
        let mut outcomes = Vec::new();
        for (step, &gradient) in (1..).zip(gradients) {
            if gradient.is_finite() {
                rank.params.iter_mut().for_each(|param| set_all(param.grad_mut(), gradient));
            } else if endpoint.rank() == 1 {
                poison(&mut rank.params, gradient);
            }
            outcomes.push(rank.step(step));
        }
        (outcomes, bits(&rank.params))
    };
    std::thread::scope(|scope| {
        let ranks = endpoints.each_ref().map(|endpoint| scope.spawn(move || update(endpoint)));
        ranks.map(|rank| rank.join().unwrap()).into_iter().collect()
    })
}

const POISONS: [fn(&mut RankParams, f32); 2] = [
    |params, value| params.experts.get_mut(0).grad_mut().values_mut()[3] = value,
    |params, value| params.dense.get_mut(5).grad_mut().values_mut()[0] = value,
];

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_on_any() {
    let lab = Lab::new();
    let recipe = lab.recipe(layout("1f1b", (1, 2, 1)), &[]);
    let before = update_two_ranks(&recipe, &[], POISONS[0]);
    for (poison, value) in POISONS.into_iter().zip([f32::NAN, f32::INFINITY]) {
        let after = update_two_ranks(&recipe, &[value], poison);
        for (rank, (after, before)) in after.iter().zip(&before).enumerate() {
            assert_eq!(after.0, [Outcome::Diverged], "rank {rank}");
            assert!(after.1 == before.1, "rank {rank} has changed a weight");
        }
    }
}

/// Moments, the optimizer's count of updates and the gate biases are those of a run that never saw the batch.
#[test]
fn after_a_skipped_batch_the_next_update_is_the_one_it_would_have_been() {
    let lab = Lab::new();
    let recipe = lab.recipe(layout("1f1b", (1, 2, 1)), &["watch.on_nan=skip"]);
    for poison in POISONS {
        let skipped = update_two_ranks(&recipe, &[1.0, f32::NAN, 0.5], poison);
        let plain = update_two_ranks(&recipe, &[1.0, 0.5], poison);
        for ((skipped, after), (_, expected)) in skipped.iter().zip(&plain) {
            assert_eq!(skipped[..], [Outcome::Updated, Outcome::Skipped, Outcome::Updated]);
            assert!(after == expected);
        }
    }
}
