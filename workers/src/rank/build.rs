//! From an assignment to a model with an optimizer: fresh, from given weights, from a checkpoint or from the workers' memory.
//!
//! Knows no actors; may take seconds, so it runs beside them.

use std::sync::Arc;
use std::time::Duration;

use contraflow_kernels::par::Threads;
use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::{CheckpointFolder, Position};
use contraflow_runtime::control::MovedBytes;
use contraflow_runtime::fabric::Endpoint;
use contraflow_runtime::files::objects::fetch;
use contraflow_runtime::flight::Recorder;
use contraflow_runtime::layout::recipe_stages;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::{FormationId, Topology};
use contraflow_runtime::trace::TraceContext;

use crate::checkpoint::{Checkpoint, Kind, Record, Records};
use crate::comm::collectives::Collectives;
use crate::data::batches::Datasets;
use crate::engine::plans::Plans;
use crate::engine::probe::Probe;
use crate::engine::timelines::Timelines;
use crate::error::RankError;
use crate::hf::weights::HfWeights;
use crate::model::build::{Placement, RankModel, build, outline};
use crate::model::init::initialise;
use crate::model::params::RankParams;
use crate::model::precision::Precision;
use crate::model::{Architecture, Recompute};
use crate::optimizer::owned::{Kept, records};
use crate::optimizer::totals::TotalsLayout;
use crate::optimizer::update::{Moments, OptimizerSetup, OptimizerState};
use crate::replica::{self, Rearranged, Recovered, Replicator, Wanted};

/// Everything a rank gets when it joins a job.
pub struct Assignment {
    /// The formation that it joins.
    pub formation: FormationId,
    /// What to train and how.
    pub recipe: Arc<Recipe>,
    /// The rank's end of the fabric.
    pub endpoint: Endpoint,
    /// The sequences.
    pub datasets: Arc<Datasets>,
    /// The checkpoint that the run resumes from, if it is neither fresh nor recovered.
    pub resume: Option<Arc<Checkpoint>>,
    /// The state in the workers' memory that the run resumes from.
    pub recovered: Option<Recovered>,
    /// The replicator of this rank; `None` if no state is kept in memory.
    pub replicator: Option<Replicator>,
    /// Where checkpoints are kept, if anywhere.
    pub checkpoints: Option<CheckpointFolder>,
    /// For how long writing the last checkpoint is tried again while storage fails.
    pub save_timeout: Duration,
    /// The span below which the rank's belong.
    pub trace: TraceContext,
    /// Takes what the rank records of its steps.
    pub timelines: Timelines,
    /// Takes what the rank does, where that is to outlive the process.
    pub flight: Option<Arc<Recorder>>,
    /// For tests.
    pub probe: Probe,
}

/// A model with an optimizer.
pub struct Built {
    pub(super) assignment: Assignment,
    pub(super) arch: Arc<Architecture>,
    pub(super) plans: Plans,
    pub(super) model: RankModel,
    pub(super) optimizer: OptimizerState,
    pub(super) threads: Arc<Threads>,
    pub(super) position: Position,
    /// What the rank had reported before, for an orchestrator that may not have stored it.
    pub(super) reports: Vec<StepReport>,
    /// What it has taken over of a state in another layout.
    pub(super) moved: Option<MovedBytes>,
}

/// Builds the model of a rank: weights drawn or read and moments zero, or both from the checkpoint.
///
/// **Errors**: if the recipe's layers do not fit its stages; a weight or a checkpoint that cannot be read or is
/// of another model.
pub fn build_rank(rank: usize, assignment: Assignment) -> Result<Built, RankError> {
    if let Some(flight) = &assignment.flight {
        assignment.endpoint.activity().observe_with(flight.clone());
    }
    let recipe = assignment.recipe.clone();
    let wrong = |message| RankError::Content { path: "recipe".into(), message };
    let plans = Plans::new(&recipe).map_err(wrong)?;
    let circle = assignment.replicator.as_ref().and_then(|replicator| replicator.circle);
    let plans = plans.replicated(circle.is_some());
    let arch = Architecture::new(recipe.model_config.clone(), Precision::of(&recipe.precision));
    let arch = Arc::new(arch.recomputing(Recompute::of(&recipe.memory)));
    let topology = recipe.topology();
    let stages_of = recipe.placement();
    let placement = Placement { topology, stages_of: &stages_of, layouts: &plans.layouts };
    let RankModel { stages, dense, experts } = build(&arch, &placement, rank);
    let mut params = RankParams { dense, experts };
    let mut optimizer = OptimizerState::new(optimizer_setup(&recipe, rank), &mut params);
    for params in [&mut params.dense, &mut params.experts] {
        match (&assignment.resume, recipe.model.init_dir()) {
            _ if assignment.recovered.is_some() => {}
            (Some(checkpoint), _) => checkpoint.records.fill(params)?,
            (None, Some(dir)) => HfWeights::open(&fetch(dir)?)?.fill(params)?,
            (None, None) => initialise(params, recipe.training.seed, recipe.training.init_std),
        }
    }
    let threads = Arc::new(Threads::new(recipe.parallel.threads_per_rank));
    let (mut position, mut reports, mut moved) = (Position::default(), Vec::new(), None);
    if let Some(checkpoint) = &assignment.resume {
        optimizer.restore(&params, &checkpoint.records)?;
        let has_average = checkpoint.records.has(Kind::Average);
        if rank == 0 && recipe.training.ema_decay > 0.0 && !has_average {
            tracing::info!(
                "the checkpoint has no average of the weights: it begins with the weights as they are"
            );
        }
        optimizer.watch = checkpoint.manifest.watch.clone();
        position = checkpoint.manifest.position;
    }
    if assignment.recovered.is_none() {
        let records = assignment.resume.as_ref().map(|checkpoint| &checkpoint.records);
        optimizer.start_average(recipe.training.ema_decay, &params, records)?;
    }
    if let Some(recovered) = &assignment.recovered {
        (position, reports, moved) = recover((recovered, &arch), &assignment, &mut optimizer, &mut params)?;
    }
    let model = RankModel { stages, dense: params.dense, experts: params.experts };
    Ok(Built { assignment, arch, plans, model, optimizer, threads, position, reports, moved })
}

/// Fills model and optimizer from the workers' memory: where the run stood, what the rank had reported, and, if the state is in another
/// layout, how much of it moved.
fn recover(
    (recovered, arch): (&Recovered, &Architecture),
    assignment: &Assignment,
    optimizer: &mut OptimizerState,
    params: &mut RankParams,
) -> Result<(Position, Vec<StepReport>, Option<MovedBytes>), RankError> {
    let (formation, endpoint) = (assignment.formation, &assignment.endpoint);
    let (position, watch, records, mut reports, moved) = match recovered.axes {
        None => {
            let (replica, reports) = replica::recover(recovered, endpoint, formation)?;
            let of = format!("the state after step {} in memory", recovered.step);
            let records = Records::in_memory(of, [replica.bytes.clone()])?;
            (replica.position, replica.watch.clone(), records, reports, None)
        }
        Some(axes) => {
            let recipe = &assignment.recipe;
            let needs = records(params, endpoint.rank(), Kept::of(recipe));
            let wanted = Wanted { needs, parts: parts(recipe, arch, axes)? };
            let Rearranged { position, watch, records, moved } =
                replica::rearrange(recovered, endpoint, formation, &wanted)?;
            (position, watch, records, Vec::new(), Some(moved))
        }
    };
    let id = replica::step_id(formation, recovered.step);
    let world: Vec<usize> = assignment.recipe.topology().ranks().collect();
    let collectives = Collectives { endpoint, id };
    optimizer.recover(params, &records, (&collectives, &world))?;
    optimizer.start_average(assignment.recipe.training.ema_decay, params, Some(&records))?;
    optimizer.watch = watch;
    reports.iter_mut().for_each(|report| report.generation = formation.generation.number());
    Ok((position, reports, moved))
}

/// By rank of a layout, what it answers for.
///
/// **Errors**: if the recipe's layers do not fit that layout.
pub fn parts(recipe: &Recipe, arch: &Architecture, axes: Topology) -> Result<Vec<Vec<Record>>, RankError> {
    let mut recipe = recipe.clone();
    let Topology { pipeline, expert, data } = axes;
    (recipe.parallel.pipeline, recipe.parallel.expert, recipe.parallel.data) = (pipeline, expert, data);
    let wrong = |message| RankError::Content { path: "recipe".into(), message };
    let (layouts, stages_of) = (recipe_stages(&recipe).map_err(wrong)?, recipe.placement());
    let placement = Placement { topology: axes, stages_of: &stages_of, layouts: &layouts };
    let of_rank = |rank| records(&outline(arch, &placement, rank), rank, Kept::of(&recipe));
    Ok(axes.ranks().map(of_rank).collect())
}

/// What the optimizer of a recipe's rank is made with.
pub fn optimizer_setup(recipe: &Recipe, rank: usize) -> OptimizerSetup {
    OptimizerSetup {
        recipe: recipe.optimizer.clone(),
        watch: recipe.watch.clone(),
        names: published_names(&recipe.model_config),
        rank,
        layout: TotalsLayout::of(&recipe.model_config),
        moments: Moments::of(&recipe.precision, recipe.training.seed),
    }
}

/// The published list of a model's weights, without stored copies.
pub fn published_names(config: &ModelConfig) -> Vec<String> {
    let own = config.weights().into_iter().filter(|weight| weight.tied_to.is_none());
    own.map(|weight| weight.name).collect()
}

#[cfg(test)]
mod tests;
