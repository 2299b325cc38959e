//! A whole model on one rank, run as in training: a plan, checked and lowered to a program, on the rank's lanes.
//!
//! Operations are issued one by one, so that a check can look at what is between them. Knows no fixture.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use contraflow_kernels::host::HostValues;
use contraflow_kernels::par::Threads;
use contraflow_runtime::fabric::{Endpoint, LocalNetwork, LocalOptions, Phase};
use contraflow_runtime::layout::split_layers;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::schedule::{
    Op, Program, ScheduleKind, Sharding, StageLayout, StepPrograms, buckets, check, lower,
};
use contraflow_runtime::topology::{FormationId, Topology};
use contraflow_workers::comm::address::StepId;
use contraflow_workers::comm::all_to_all::ExpertGroup;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::engine::compute::Compute;
use contraflow_workers::engine::in_flight::InFlight;
use contraflow_workers::engine::lanes::{LaneEvent, Lanes};
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::running::{RankContext, RunningProgram, Workload};
use contraflow_workers::engine::step::{Next, ProgramKind, next};
use contraflow_workers::engine::update::{SaveWhen, Update, UpdateOrder};
use contraflow_workers::hf::weights::HfWeights;
use contraflow_workers::model::build::{Placement, RankModel, build};
use contraflow_workers::model::micro_batch::{LossScales, MicroBatch};
use contraflow_workers::model::params::{self, Param, RankParams, gate_bias_name};
use contraflow_workers::model::precision::Precision;
use contraflow_workers::model::{Architecture, Stage};
use contraflow_workers::optimizer::totals::{GlobalTotals, Totals};
use contraflow_workers::optimizer::update::{OptimizerState, UpdateRates};

/// A schedule, and the number of sequences of its micro-batches (`None`: all in one).
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    pub schedule: ScheduleKind,
    pub micro_batch_size: Option<usize>,
}

/// One stage, one micro-batch.
pub const PLAIN: Variant = Variant { schedule: ScheduleKind::OneFOneB, micro_batch_size: None };

/// Every way in which one rank can run a model: with one micro-batch, with several, with two stages.
pub fn ways(config: &ModelConfig) -> Vec<Variant> {
    let mut ways = vec![PLAIN, Variant { micro_batch_size: Some(1), ..PLAIN }];
    if config.num_hidden_layers >= 2 {
        ways.push(Variant { schedule: ScheduleKind::Dualpipev, micro_batch_size: Some(1) });
    }
    ways
}

/// A batch, cut into micro-batches, and what its losses are divided by.
#[derive(Clone)]
pub struct Batch {
    pub micro_batches: Vec<Sequences>,
    pub scales: LossScales,
}

impl Batch {
    /// Predicts the next token in each sequence. The last position has none to predict: its loss weighs nothing.
    pub fn new(rows: &[Vec<u32>], variant: Variant, mtp_weight: f64) -> Batch {
        let sequences = |rows: &[Vec<u32>]| {
            let last = rows[0].len() - 1;
            let next = |row: &Vec<u32>| row[1..].iter().copied().chain([0]).collect::<Vec<u32>>();
            let targets = rows.iter().flat_map(next).collect();
            let mut sequences = Sequences::new(rows.concat(), targets, last + 1);
            sequences.loss_weights.iter_mut().skip(last).step_by(last + 1).for_each(|weight| *weight = 0.0);
            sequences
        };
        let size = variant.micro_batch_size.unwrap_or(rows.len());
        let micro_batches: Vec<Sequences> = rows.chunks(size).map(sequences).collect();
        let scales = LossScales {
            denominator: micro_batches.iter().map(Sequences::loss_weight).sum(),
            mtp_denominator: micro_batches.iter().map(Sequences::mtp_loss_weight).sum(),
            mtp_weight,
            balance: 0.0,
            batch_balance: 0.0,
        };
        Batch { micro_batches, scales }
    }

    /// The same tokens with nothing to lose but balance, as a mean over the sequences.
    pub fn balance_only(mut self) -> Batch {
        let length = self.micro_batches[0].sequence_length;
        let num_tokens: usize = self.micro_batches.iter().map(|sequences| sequences.ids.len()).sum();
        self.micro_batches.iter_mut().for_each(|sequences| sequences.loss_weights.fill(0.0));
        let balance = length as f64 / num_tokens as f64;
        self.scales = LossScales {
            denominator: 1.0,
            mtp_denominator: 1.0,
            mtp_weight: 0.0,
            balance,
            batch_balance: 0.0,
        };
        self
    }
}

/// The model and its rank.
pub struct OneRank {
    pub arch: Arc<Architecture>,
    pub stages: Arc<Vec<Stage>>,
    pub params: RankParams,
    pub endpoint: Endpoint,
    pub threads: Arc<Threads>,
    layouts: Vec<StageLayout>,
    schedule: ScheduleKind,
}

impl OneRank {
    /// Builds the model for one rank and reads its weights from an HF directory.
    pub fn load(config: ModelConfig, dir: &Path, schedule: ScheduleKind) -> OneRank {
        let arch = Arc::new(Architecture::new(config, Precision::F32));
        let layouts = split_layers(&arch.config, schedule.stages(1), 1).unwrap();
        let topology = Topology { pipeline: 1, expert: 1, data: 1 };
        let placement = Placement { topology, stages_of: &schedule.placement(1), layouts: &layouts };
        let RankModel { stages, mut dense, mut experts } = build(&arch, &placement, 0);
        let weights = HfWeights::open(dir).unwrap();
        weights.fill(&mut dense).unwrap();
        weights.fill(&mut experts).unwrap();
        OneRank {
            arch,
            stages: Arc::new(stages),
            params: RankParams { dense, experts },
            endpoint: LocalNetwork::new(LocalOptions::default()).join(0),
            threads: Arc::new(Threads::new(1)),
            layouts,
            schedule,
        }
    }

    /// Runs the passes of one step, their operations in issue order; `look` is called after each of them.
    pub fn run(
        &mut self,
        kind: TaskKind,
        step: u64,
        batch: &Batch,
        mut look: impl FnMut(&Op, &InFlight),
    ) -> Totals {
        let (plan, _) = self.schedule.plan(1, batch.micro_batches.len(), kind.mode()).unwrap();
        let mut programs = lower(&plan, Some(&self.layouts), 1);
        check(&plan, &programs).unwrap_or_else(|faults| panic!("{faults:?}"));
        let prepare = |sequences: &Sequences| MicroBatch::new(&self.arch, sequences.clone(), &batch.scales);
        let batches = batch.micro_batches.iter().map(prepare).collect();
        let compute = Compute::new(self.arch.clone(), self.stages.clone(), self.take_params(), kind);
        let workload = Workload { batches, in_flight: InFlight::default(), compute, update: None };
        let Workload { compute, in_flight, .. } =
            self.run_program(step, programs.remove(0), workload, &mut look);
        assert!(!kind.has_backward() || compute.num_left() + in_flight.num_left() == 0);
        let Compute { params, totals, .. } = compute;
        self.params = params;
        totals
    }

    /// Updates the weights by the gradients that are there: both halves of a step without its passes.
    pub fn update(
        &mut self,
        optimizer: &mut Option<OptimizerState>,
        rates: UpdateRates,
        totals: Totals,
    ) -> GlobalTotals {
        let topology = Topology { pipeline: 1, expert: 1, data: 1 };
        let buckets = buckets(&self.schedule.placement(1), &self.layouts, &topology);
        let sharding = Sharding { buckets, replicated: false, overlap: false };
        let step = StepPrograms::new(&[Program::default()], &sharding);
        let kind = TaskKind::Train;
        let mut compute = Compute::new(self.arch.clone(), self.stages.clone(), self.take_params(), kind);
        compute.totals = totals;
        let save = SaveWhen::Never;
        let order = UpdateOrder::alone(rates, save);
        let update = Some(Update::new(order, optimizer.take().unwrap()));
        let workload = Workload { batches: Vec::new(), in_flight: InFlight::default(), compute, update };
        let look = &mut |_: &Op, _: &InFlight| {};
        let mut workload = self.run_program(rates.step, step.gradients[0].clone(), workload, look);
        let comes = next(ProgramKind::Passes, workload.update.as_mut()).unwrap();
        assert!(matches!(comes, Next::Run(ProgramKind::Update)), "{comes:?}");
        let workload = self.run_program(rates.step, step.update[0].clone(), workload, look);
        self.params = workload.compute.params;
        self.params.clear_gradients();
        let update = workload.update.unwrap();
        *optimizer = Some(update.optimizer);
        update.global.unwrap()
    }

    fn take_params(&mut self) -> RankParams {
        let RankParams { dense, experts } = &mut self.params;
        RankParams { dense: std::mem::take(dense), experts: std::mem::take(experts) }
    }

    fn run_program(
        &self,
        step: u64,
        program: Program,
        workload: Workload,
        look: &mut impl FnMut(&Op, &InFlight),
    ) -> Workload {
        let (program, phase) = (Arc::new(program), Phase::Train);
        let id = StepId { formation: FormationId::default(), phase, step };
        let running = Arc::new(RunningProgram::new(
            &self.context(),
            (id, program.clone()),
            workload,
            tracing::Span::none(),
        ));
        let (report, events) = channel();
        let report = Arc::new(move |event| report.send(event).unwrap());
        let mut lanes = Lanes::new(self.threads.clone(), report);
        for (op_id, op) in program.ops.iter().enumerate() {
            lanes.issue(&running, op_id);
            if let LaneEvent::Failed { error, .. } = events.recv().unwrap() {
                panic!("{}: {error}", op.work);
            }
            look(op, &running.in_flight);
        }
        Arc::into_inner(running).unwrap().into_workload()
    }

    fn context(&self) -> RankContext {
        RankContext {
            endpoint: self.endpoint.clone(),
            world: Arc::new(vec![0]),
            buckets: Arc::default(),
            group: ExpertGroup::new(&[0], 0, self.arch.config.n_routed_experts, 1),
            stages: self.stages.clone(),
            pipeline_peers: vec![0],
            hidden_size: self.arch.config.hidden_size,
            precision: self.arch.precision,
            flight: None,
            probe: Probe::default(),
        }
    }

    fn find(&self, name: &str) -> Option<(&Param, &params::PublishedTensor)> {
        let params = self.params.dense.iter().chain(self.params.experts.iter());
        params
            .flat_map(|param| param.parts.iter().map(move |part| (param, part)))
            .find(|(_, part)| part.name == name)
    }

    /// A weight or a gate bias by its published name.
    pub fn weight(&self, name: &str) -> Option<Vec<f32>> {
        if let Some((param, part)) = self.find(name) {
            return Some(param.master().view(part.range()).values().to_vec());
        }
        let biases = &self.params.dense.gate_biases;
        biases
            .iter()
            .find(|(layer, _)| gate_bias_name(**layer) == name)
            .map(|(_, bias)| bias.values().to_vec())
    }

    /// The gradient of a weight by its published name.
    pub fn gradient(&self, name: &str) -> Option<Vec<f32>> {
        let (param, part) = self.find(name)?;
        let gradient = |grad: &contraflow_kernels::tensor::Tensor| grad.view(part.range()).values().to_vec();
        Some(param.grad.as_ref().map_or_else(|| vec![0.0; part.len()], gradient))
    }
}
