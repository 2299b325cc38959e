//! A rank's membership in a job: the model it has built, the actors around it, and how far it has come in the data.
//!
//! Made once per assignment. Knows who the children are and what they are given, not the order of things within a step.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use contraflow_proto::{LayerLoad, StepReport};
use contraflow_runtime::checkpoint::Position;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};

use super::RankMessage;
use super::build::{Assignment, Built};
use super::checkpointer::{Checkpointer, CheckpointerMessage};
use super::expert_shard::{ExpertShard, ExpertShardMessage, ExpertShardSetup};
use super::loader::{Loader, LoaderMessage, LoaderSetup};
use crate::checkpoint::Snapshot;
use crate::checkpoint::saves::Saves;
use crate::comm::address::StepId;
use crate::comm::all_to_all::ExpertGroup;
use crate::data::batches::{Batch, BatchShape, Task};
use crate::engine::pipeline::{Pipeline, PipelineMessage, PipelineSetup};
use crate::engine::plans::{Plans, validation_shape};
use crate::engine::running::RankContext;
use crate::engine::update::{SaveWhen, StopOrder, UpdateOrder};
use crate::error::{Missing, RankError};
use crate::model::micro_batch::LossScales;
use crate::model::params::{Params, RankParams};
use crate::model::precision::Precision;
use crate::optimizer::totals::GlobalTotals;
use crate::optimizer::update::UpdateRates;
use crate::replica::{self, Replicate, Replicator};

/// The rank's actors.
pub struct Children {
    /// Runs programs.
    pub pipeline: ActorRef<PipelineMessage>,
    /// Owns the routed experts.
    pub experts: ActorRef<ExpertShardMessage>,
    /// Brings sequences.
    pub loader: ActorRef<LoaderMessage>,
    /// Writes files.
    pub checkpointer: ActorRef<CheckpointerMessage>,
}

impl Children {
    /// The name of a child.
    pub fn name_of(&self, cell: &ActorCell) -> &'static str {
        let named = [
            (self.pipeline.get_id(), "the pipeline"),
            (self.experts.get_id(), "the expert shard"),
            (self.loader.get_id(), "the loader"),
            (self.checkpointer.get_id(), "the checkpointer"),
        ];
        named.iter().find(|(id, _)| *id == cell.get_id()).map_or("an unknown actor", |(_, name)| name)
    }
}

/// A batch that is loaded beside the step before it.
#[derive(Default)]
pub struct Upcoming {
    /// Of which step; 0 where none has been asked for.
    pub step: u64,
    /// The batch, once it is there.
    pub batch: Option<Box<Batch>>,
}

/// A rank that has joined a job.
pub struct JoinedRank {
    /// What the rank was assigned.
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
    /// Takes the state of each step to memory, or that of the last one alone.
    pub replicator: Option<mpsc::Sender<Replicate>>,
    /// The step after which the ranks stop, once its state is in memory.
    pub kept: Option<u64>,
    /// The batch of the next step.
    pub upcoming: Upcoming,
    /// Whether the weights are whole, and not left to the next step to be gathered.
    pub is_gathered: bool,
    /// The latest validation while it trains: before which step, and this rank's share of the loss.
    pub validated: Option<(u64, f64)>,
    /// How its saves go.
    pub saves: Arc<Saves>,
    /// When the running step began.
    pub began: Instant,
    /// **Units**: bytes sent before the running step.
    pub sent_before: u64,
    /// What its connections had taken before the running step.
    pub link_before: Duration,
}

impl JoinedRank {
    /// Whether the weights can be measured or written.
    ///
    /// **Errors**: they have not been gathered since the last update.
    pub fn weights_are_whole(&self) -> Result<(), RankError> {
        self.is_gathered
            .then_some(())
            .ok_or(Missing::OfStep { what: "the weights of other ranks' shards" }.into())
    }

    /// All parameters of the rank, handed out by value.
    ///
    /// **Errors**: the dense ones are handed out already.
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
            Some(_) if self.is_last(step) => SaveWhen::Now,
            Some(_) if self.assignment.recipe.saves_after(step) => SaveWhen::Due,
            Some(_) => SaveWhen::AtStop,
        }
    }

    /// Whether a step is the recipe's last.
    pub fn is_last(&self, step: u64) -> bool {
        step >= self.assignment.recipe.training.steps as u64
    }

    /// Inputs of a step's update.
    pub fn update_order(&self, step: u64, stop: Arc<StopOrder>) -> UpdateOrder {
        let (recipe, tokens) = (&self.assignment.recipe, self.position.tokens);
        let rates = UpdateRates {
            step,
            learning_rate: recipe.lr_at(step as usize - 1, tokens),
            bias_speed: recipe.bias_speed_at(tokens),
        };
        // Before the formation's second step no rank has a state of its own to replicate.
        let circle = self.assignment.replicator.as_ref().and_then(|replicator| replicator.circle);
        let can_keep = self.replicator.is_some() && !self.is_last(step);
        UpdateOrder {
            rates,
            stop,
            save: self.save_when(step),
            saves: self.saves.clone(),
            replicate: can_keep && circle.is_some(),
            can_keep,
            gather: !self.plans.sharding.overlap || self.is_last(step) || recipe.validates_after(step),
            validated: self.validated.filter(|(before, _)| *before == step).map(|(_, loss)| loss),
            patience: recipe.validate.patience,
            buddy: circle.filter(|_| step > self.first_step + 1).map(|circle| circle.buddy),
        }
    }

    /// How the validation before a step is cut, if one is due that has not been made.
    pub fn validation_before(&self, step: u64) -> Option<BatchShape> {
        let recipe = &self.assignment.recipe;
        let is_made = self.validated.is_some_and(|(before, _)| before == step);
        if is_made || !recipe.validates_after(step - 1) {
            return None;
        }
        validation_shape(recipe, self.assignment.datasets.validation.num_sequences())
    }

    /// Divisors and factors of a batch's losses.
    pub fn scales(&self, task: Task, batch: &Batch) -> LossScales {
        let recipe = &self.assignment.recipe;
        LossScales {
            denominator: batch.denominator,
            mtp_denominator: batch.mtp_denominator,
            mtp_weight: recipe.mtp_weight_at(self.position.tokens),
            balance: recipe.balance.sequence_alpha / task.shape.global_batch as f64,
            batch_balance: recipe.balance.batch_alpha
                / (task.shape.global_batch / task.shape.micro_batch_size) as f64,
        }
    }

    /// Has the state after the present step kept in memory; `is_last`: the ranks stop after it.
    pub fn keep(&self, snapshot: Snapshot, report: &StepReport, is_last: bool) {
        if let Some(replicator) = &self.replicator {
            let keep = Replicate { position: self.position, snapshot, report: report.clone(), is_last };
            // A replicator that has ended has reported why.
            drop(replicator.send(keep));
        }
    }

    /// Without a buddy nothing is kept step by step: the state that the formation began with would only get older.
    pub fn forget_earlier(&self, step: u64) {
        if let Some(Replicator { circle: None, store, formation, .. }) = &self.assignment.replicator
            && step == self.first_step + 1
        {
            store.acknowledged(formation.generation, step);
        }
    }

    /// What all ranks know of a step, and what this one has sent in it. Of what several ranks know alike one reports: counts
    /// by layer the ranks of the first column, norms rank 0.
    pub fn report(&self, (rank, id): (usize, StepId), global: GlobalTotals) -> StepReport {
        let mtp_weight = self.assignment.recipe.mtp_weight_at(self.position.tokens);
        let has_mtp = self.assignment.recipe.model_config.num_nextn_predict_layers > 0 && mtp_weight > 0.0;
        let reports_loads = self.assignment.recipe.topology().dp_rank(rank) == 0;
        let load = |(layer, counts): (usize, Vec<u64>)| LayerLoad { layer: layer as u32, counts };
        let loads = global.expert_counts.into_iter().filter(|_| reports_loads).map(load).collect();
        StepReport {
            rank: rank as u32,
            generation: id.formation.generation.number(),
            step: id.step,
            loss: global.loss,
            mtp_loss: has_mtp.then(|| global.mtp_loss / mtp_weight),
            balance_loss: global.balance_loss,
            grad_norm: global.grad_norm,
            sent_bytes: self.assignment.endpoint.sent_bytes() - self.sent_before,
            link_seconds: (self.assignment.endpoint.link_time() - self.link_before).as_secs_f64(),
            loads,
            gradient_norms: (rank == 0).then_some(global.gradient_norms),
            skipped: global.skipped,
            warning: global.warning,
            validation_loss: self.validated.filter(|(at, _)| *at == id.step).map(|_| global.validation_loss),
            ends_early: global.ends_early,
            ..StepReport::default()
        }
    }
}

/// The error for a message that was not delivered.
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
) -> Result<(JoinedRank, Vec<StepReport>), ActorProcessingErr> {
    let Built { assignment, arch, plans, model, optimizer, threads, position, reports, .. } = built;
    let recipe = assignment.recipe.clone();
    let topology = recipe.topology();
    let at = topology.coordinates(rank_id);
    let probe = assignment.probe.clone();
    let context = RankContext {
        endpoint: assignment.endpoint.clone(),
        world: Arc::new(topology.ranks().collect()),
        group: ExpertGroup::new(
            &topology.expert_group(rank_id),
            at.expert,
            recipe.model_config.n_routed_experts / topology.expert,
            recipe.expert_nodes(),
        ),
        buckets: Arc::new(optimizer.groups()),
        stages: Arc::new(model.stages),
        pipeline_peers: (0..topology.pipeline).map(|at| topology.pipeline_peer(rank_id, at)).collect(),
        hidden_size: recipe.model_config.hidden_size,
        precision: Precision::of(&recipe.precision),
        flight: assignment.flight.clone(),
        probe: probe.clone(),
    };
    let cell = || myself.get_cell();
    let rank = myself.clone();
    // The rank may be gone if the job has ended: here and below.
    let report_pipeline = {
        let rank = rank.clone();
        move |event| drop(rank.cast(RankMessage::Pipeline(event)))
    };
    let setup = PipelineSetup {
        report: Arc::new(report_pipeline),
        pipeline: at.pipeline,
        arch,
        optimizer,
        context,
        threads,
    };
    let (pipeline, _) = Actor::spawn_linked(None, Pipeline, setup, cell()).await?;
    let setup =
        ExpertShardSetup { rank: rank.clone(), rank_id, experts: model.experts, probe: probe.clone() };
    let (experts, _) = Actor::spawn_linked(None, ExpertShard, setup, cell()).await?;
    let setup = LoaderSetup {
        rank: rank.clone(),
        endpoint: assignment.endpoint.clone(),
        formation: assignment.formation,
        dp_group: topology.dp_group(at.pipeline),
        dp_rank: topology.dp_rank(rank_id),
        datasets: assignment.datasets.clone(),
        seed: recipe.training.seed,
        attend_across_documents: recipe.data.attend_across_documents,
        probe: probe.clone(),
    };
    let (loader, _) = Actor::spawn_linked(None, Loader, setup, cell()).await?;
    let (checkpointer, _) = Actor::spawn_linked(None, Checkpointer, (rank.clone(), probe), cell()).await?;
    let kept = {
        let rank = rank.clone();
        move |step| drop(rank.cast(RankMessage::Kept { step }))
    };
    let fail = move |error| {
        let action = "keeping the state in memory".to_owned();
        // The rank may be gone if the job has ended.
        drop(rank.cast(RankMessage::ChildFailed { action, error }));
    };
    let start = |replicator| replica::start(replicator, position.step, kept, fail);
    let replicator = assignment.replicator.clone().map(start).transpose()?;
    let assemble = JoinedRank {
        assignment,
        plans,
        children: Children { pipeline, experts, loader, checkpointer },
        dense: Some(model.dense),
        position,
        first_step: position.step,
        replicator,
        kept: None,
        upcoming: Upcoming::default(),
        is_gathered: true,
        validated: None,
        saves: Arc::default(),
        began: Instant::now(),
        sent_before: 0,
        link_before: Duration::ZERO,
    };
    Ok((assemble, reports))
}
