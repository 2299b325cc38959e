//! A rank's membership in a job: the model it has built, the actors around it, and how far it has come in the data.
//!
//! Made once per assignment. Knows who the children are and what they are given, not the order of things within a step.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_proto::{LayerLoad, StepReport};
use contraflow_runtime::checkpoint::{CheckpointFolder, Position};
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::fabric::Endpoint;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::trace::TraceContext;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};

use crate::buckets::RankParams;
use crate::checkpoint::{Checkpoint, Records, Snapshot};
use crate::checkpointer::{Checkpointer, CheckpointerMessage};
use crate::collectives::Collectives;
use crate::error::RankError;
use crate::exchange::ExpertGroup;
use crate::expert_shard::{ExpertShard, ExpertShardMessage, ExpertShardSetup};
use crate::kept::{self, Keep, Keeper, Recovered};
use crate::lanes::Site;
use crate::loader::{Datasets, Loader, LoaderMessage, LoaderSetup};
use crate::model::Architecture;
use crate::model::build::{Placement, RankModel, build};
use crate::model::init::initialise;
use crate::optimizer::{Optimizer, OptimizerMessage};
use crate::params::Params;
use crate::pipeline::{Pipeline, PipelineMessage, PipelineSetup};
use crate::plans::Plans;
use crate::probe::Probe;
use crate::rank::RankMessage;
use crate::update::{GlobalTotals, OptimizerSetup, OptimizerState, SaveWhen, UpdateOrder};
use crate::weights::HfWeights;

/// Takes a rank's events to the orchestrator.
pub type Tell = Arc<dyn Fn(RankEvent) + Send + Sync>;

/// Everything a rank is told when it joins a job.
pub struct Assignment {
    /// Job number.
    pub job: u32,
    /// Count of (re)formations.
    pub generation: u32,
    /// What to train and how.
    pub recipe: Arc<Recipe>,
    /// The rank's end of the fabric.
    pub endpoint: Endpoint,
    /// The sequences.
    pub datasets: Arc<Datasets>,
    /// The checkpoint that the run goes on from, if it is neither fresh nor recovered.
    pub resume: Option<Arc<Checkpoint>>,
    /// The state in the workers' memory that the run goes on from.
    pub recovered: Option<Recovered>,
    /// Who keeps this rank's state in memory, and whose it keeps; nobody where all ranks are in one process.
    pub keeper: Option<Keeper>,
    /// Where checkpoints are kept, if anywhere.
    pub checkpoints: Option<CheckpointFolder>,
    /// The span below which the rank's belong.
    pub trace: TraceContext,
    /// For tests.
    pub probe: Probe,
}

/// A model with an optimizer.
pub struct Built {
    assignment: Assignment,
    arch: Arc<Architecture>,
    plans: Plans,
    model: RankModel,
    optimizer: OptimizerState,
    threads: Arc<Threads>,
    position: Position,
    /// What the rank had reported before, for an orchestrator that may not have kept it.
    reports: Vec<StepReport>,
}

/// Builds the model of a rank: weights drawn or read and moments zero, or both from the checkpoint.
///
/// **Errors**: in words, if the recipe's layers do not fit its stages; a weight or a checkpoint that cannot be read or is
/// of another model.
pub fn build_rank(rank: usize, assignment: Assignment) -> Result<Built, RankError> {
    let recipe = assignment.recipe.clone();
    let wrong = |message| RankError::Content { path: "recipe".into(), message };
    let plans = Plans::new(&recipe).map_err(wrong)?;
    let arch = Arc::new(Architecture::new(recipe.model_config.clone()));
    let topology = recipe.topology();
    let stages_of = recipe.parallel.schedule.placement(recipe.parallel.pipeline);
    let placement = Placement { topology, stages_of: &stages_of, layouts: &plans.layouts };
    let mut model = build(&arch, &placement, rank);
    for params in [&mut model.dense, &mut model.experts] {
        match (&assignment.resume, recipe.model.init_dir()) {
            _ if assignment.recovered.is_some() => {}
            (Some(checkpoint), _) => checkpoint.records.fill(params)?,
            (None, Some(dir)) => HfWeights::open(dir)?.fill(params)?,
            (None, None) => initialise(params, recipe.training.seed, recipe.training.init_std),
        }
    }
    let threads = Arc::new(Threads::new(recipe.parallel.threads_per_rank));
    let setup = OptimizerSetup {
        recipe: recipe.optimizer.clone(),
        watch: recipe.watch.clone(),
        names: published_names(&recipe.model_config),
        endpoint: assignment.endpoint.clone(),
        world: topology.ranks().collect(),
        num_experts: recipe.model_config.n_routed_experts,
        num_layers: recipe.model_config.num_hidden_layers + recipe.model_config.num_nextn_predict_layers,
        threads: threads.clone(),
    };
    let mut params = RankParams { dense: model.dense, experts: model.experts };
    let mut optimizer = OptimizerState::new(setup, &params);
    let (mut position, mut reports) = (Position::default(), Vec::new());
    if let Some(checkpoint) = &assignment.resume {
        optimizer.restore(&params, &checkpoint.records)?;
        optimizer.watch = checkpoint.manifest.watch.clone();
        position = checkpoint.manifest.position;
    }
    if let Some(recovered) = &assignment.recovered {
        (position, reports) = recover(recovered, &assignment, &mut optimizer, &mut params)?;
    }
    let model = RankModel { stages: model.stages, dense: params.dense, experts: params.experts };
    Ok(Built { assignment, arch, plans, model, optimizer, threads, position, reports })
}

/// Fills model and optimizer from the workers' memory: where the run stood, and what the rank had reported.
fn recover(
    recovered: &Recovered,
    assignment: &Assignment,
    optimizer: &mut OptimizerState,
    params: &mut RankParams,
) -> Result<(Position, Vec<StepReport>), RankError> {
    let formation = (assignment.job, assignment.generation);
    let (image, mut reports) = kept::recover(recovered, &assignment.endpoint, formation)?;
    let of = format!("the state after step {} in memory", recovered.step);
    let records = Records::in_memory(of, image.bytes.clone())?;
    let id = kept::step_id(formation, recovered.step);
    optimizer.recover(params, &records, &Collectives { endpoint: &assignment.endpoint, id })?;
    optimizer.watch = image.watch.clone();
    reports.iter_mut().for_each(|report| report.generation = assignment.generation);
    Ok((image.position, reports))
}

/// The published list of a model's weights, without stored copies.
pub fn published_names(config: &ModelConfig) -> Vec<String> {
    let own = config.weights().into_iter().filter(|weight| weight.tied_to.is_none());
    own.map(|weight| weight.name).collect()
}

/// The rank's actors.
pub struct Children {
    /// Runs programs.
    pub pipeline: ActorRef<PipelineMessage>,
    /// Owns the routed experts.
    pub experts: ActorRef<ExpertShardMessage>,
    /// Makes updates.
    pub optimizer: ActorRef<OptimizerMessage>,
    /// Brings sequences.
    pub loader: ActorRef<LoaderMessage>,
    /// Writes files.
    pub checkpointer: ActorRef<CheckpointerMessage>,
}

impl Children {
    /// A child in words.
    pub fn name_of(&self, cell: &ActorCell) -> &'static str {
        let named = [
            (self.pipeline.get_id(), "the pipeline"),
            (self.experts.get_id(), "the expert shard"),
            (self.optimizer.get_id(), "the optimizer"),
            (self.loader.get_id(), "the loader"),
            (self.checkpointer.get_id(), "the checkpointer"),
        ];
        named.iter().find(|(id, _)| *id == cell.get_id()).map_or("an unknown actor", |(_, name)| name)
    }
}

/// A rank that has joined a job.
pub struct Member {
    /// What the rank was told.
    pub assignment: Assignment,
    /// Its plans.
    pub plans: Plans,
    /// Its actors.
    pub children: Children,
    /// The dense parameters, between programs.
    pub dense: Option<Params>,
    /// How far the run has come.
    pub position: Position,
    /// The step after which the formation began.
    pub first_step: u64,
    /// Takes the state of each step to memory.
    pub keeper: Option<mpsc::Sender<Keep>>,
    /// A checkpoint is being written.
    pub is_saving: bool,
    /// When the running step began.
    pub began: Instant,
    /// **Units**: bytes sent before the running step.
    pub sent_before: u64,
}

impl Member {
    /// All parameters of the rank, for somebody to work on.
    ///
    /// **Errors**: the dense ones are with somebody else.
    pub fn take_params(&mut self, experts: Params) -> Result<RankParams, RankError> {
        let dense =
            self.dense.take().ok_or(RankError::ActorGone { actor: "the holder of the dense parameters" })?;
        Ok(RankParams { dense, experts })
    }

    /// Takes the parameters back, and returns the routed experts to their owner.
    ///
    /// **Errors**: it is gone.
    pub fn give_back(&mut self, params: RankParams) -> Result<(), RankError> {
        self.dense = Some(params.dense);
        let message = ExpertShardMessage::Return(Box::new(params.experts));
        self.children.experts.cast(message).map_err(gone("the expert shard"))
    }

    /// When the state after an update is to be kept.
    pub fn save_when(&self, step: u64) -> SaveWhen {
        match self.assignment.checkpoints {
            None => SaveWhen::Never,
            Some(_) if self.assignment.recipe.saves_after(step) => SaveWhen::Now,
            Some(_) => SaveWhen::AtStop,
        }
    }

    /// Whether a step is the recipe's last.
    pub fn is_last(&self, step: u64) -> bool {
        step >= self.assignment.recipe.training.steps as u64
    }

    /// Who must have the state of the step before this one in memory; nobody before the formation's second step.
    pub fn kept_by(&self, step: u64) -> Option<usize> {
        let keeper = self.assignment.keeper.as_ref().filter(|_| step > self.first_step + 1);
        keeper.map(|keeper| keeper.buddy)
    }

    /// Has the state after the present step kept in memory.
    pub fn keep(&self, snapshot: Snapshot, report: &StepReport) {
        if let Some(keeper) = &self.keeper {
            let keep = Keep { position: self.position, snapshot, report: report.clone() };
            // A keeper that has ended has said why.
            drop(keeper.send(keep));
        }
    }

    /// What the rank tells of an update.
    pub fn report(&self, rank: usize, order: &UpdateOrder, global: GlobalTotals, tokens: u64) -> StepReport {
        let mtp_weight = self.assignment.recipe.mtp_weight_at(self.position.tokens);
        let has_mtp = self.assignment.recipe.model_config.num_nextn_predict_layers > 0 && mtp_weight > 0.0;
        let load = |(layer, counts): (usize, Vec<u64>)| LayerLoad { layer: layer as u32, counts };
        StepReport {
            rank: rank as u32,
            generation: order.id.generation,
            step: order.id.step,
            tokens,
            loss: global.loss,
            mtp_loss: has_mtp.then(|| global.mtp_loss / mtp_weight),
            balance_loss: global.balance_loss,
            grad_norm: global.grad_norm,
            learning_rate: order.learning_rate,
            seconds: self.began.elapsed().as_secs_f64(),
            bubble_seconds: 0.0,
            peak_live_chunks: 0,
            sent_bytes: self.assignment.endpoint.sent_bytes() - self.sent_before,
            loads: global.expert_counts.into_iter().map(load).collect(),
            gradient_norms: Some(global.gradient_norms),
            skipped: global.skipped,
            warning: global.warning,
        }
    }
}

/// The error for a message that nobody took.
pub fn gone<M>(actor: &'static str) -> impl Fn(ractor::MessagingErr<M>) -> RankError {
    move |_| RankError::ActorGone { actor }
}

/// Starts the rank's actors around a model that has been built.
///
/// **Errors**: an actor that cannot be started.
pub async fn join(
    myself: &ActorRef<RankMessage>,
    rank_id: usize,
    built: Built,
) -> Result<(Member, Vec<StepReport>), ActorProcessingErr> {
    let Built { assignment, arch, plans, model, optimizer, threads, position, reports } = built;
    let recipe = assignment.recipe.clone();
    let topology = recipe.topology();
    let at = topology.coordinates(rank_id);
    let site = Site {
        endpoint: assignment.endpoint.clone(),
        group: ExpertGroup {
            ranks: topology.expert_group(rank_id),
            own: at.expert,
            experts_per_rank: recipe.model_config.n_routed_experts / topology.expert,
        },
        stages: Arc::new(model.stages),
        pipeline_peers: (0..topology.pipeline).map(|at| topology.pipeline_peer(rank_id, at)).collect(),
        top_k: recipe.model_config.num_experts_per_tok,
        hidden_size: recipe.model_config.hidden_size,
    };
    let probe = assignment.probe.clone();
    let cell = || myself.get_cell();
    let rank = myself.clone();
    let setup = PipelineSetup {
        rank: rank.clone(),
        pipeline: at.pipeline,
        arch,
        site,
        threads,
        probe: probe.clone(),
    };
    let (pipeline, _) = Actor::spawn_linked(None, Pipeline, setup, cell()).await?;
    let setup =
        ExpertShardSetup { rank: rank.clone(), rank_id, experts: model.experts, probe: probe.clone() };
    let (experts, _) = Actor::spawn_linked(None, ExpertShard, setup, cell()).await?;
    let setup = (rank.clone(), optimizer, probe.clone());
    let (optimizer, _) = Actor::spawn_linked(None, Optimizer, setup, cell()).await?;
    let setup = LoaderSetup {
        rank: rank.clone(),
        rank_id,
        column: topology.column(rank_id),
        datasets: assignment.datasets.clone(),
        seed: recipe.training.seed,
        attend_across_documents: recipe.data.attend_across_documents,
        probe: probe.clone(),
    };
    let (loader, _) = Actor::spawn_linked(None, Loader, setup, cell()).await?;
    let (checkpointer, _) = Actor::spawn_linked(None, Checkpointer, (rank.clone(), probe), cell()).await?;
    let fail = move |error| {
        let action = "keeping the state in memory".to_owned();
        // If the rank is gone the job has ended and nobody asks any more.
        drop(rank.cast(RankMessage::ChildFailed { action, error }));
    };
    let start = |keeper| kept::start(keeper, position.step, fail);
    let keeper = assignment.keeper.clone().map(start).transpose()?;
    let member = Member {
        assignment,
        plans,
        children: Children { pipeline, experts, optimizer, loader, checkpointer },
        dense: Some(model.dense),
        position,
        first_step: position.step,
        keeper,
        is_saving: false,
        began: Instant::now(),
        sent_before: 0,
    };
    Ok((member, reports))
}
