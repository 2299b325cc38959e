//! The plans and programs of a job, made on demand: one per number of micro-batches, training and forward-only.
//!
//! Pure: every rank makes the same ones for itself. Knows the recipe's layout, no tensors.

use std::collections::HashMap;
use std::sync::Arc;

use contraflow_runtime::layout::{recipe_plan, recipe_stages};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{
    Overlap, Plan, PlanFault, Program, Report, Sharding, StageLayout, StepPrograms, buckets, check,
    check_step, lower_with,
};
use contraflow_runtime::topology::Topology;

use super::step::ProgramKind;
use crate::data::batches::{BatchShape, TaskKind};

/// A plan and what it becomes on every pipeline rank.
pub struct Planned {
    /// The plan.
    pub plan: Arc<Plan>,
    /// By part of a task and pipeline rank; an evaluation has passes alone.
    programs: HashMap<ProgramKind, Vec<Arc<Program>>>,
    /// What the check found: peak activations and the like.
    pub report: Report,
    /// Why another schedule runs than the recipe's.
    pub fallback: Option<String>,
}

impl Planned {
    /// What a pipeline rank runs in a part of the task; nothing, if the task has no such part.
    pub fn program(&self, pipeline: usize, part: ProgramKind) -> Arc<Program> {
        let programs = self.programs.get(&part).and_then(|programs| programs.get(pipeline));
        programs.cloned().unwrap_or_default()
    }

    /// Every operation of a task that goes well, with its pipeline rank; that of the gathering is in the task itself,
    /// though it may run in the next one.
    pub fn ops(&self) -> impl Iterator<Item = (usize, &contraflow_runtime::schedule::Op)> {
        let parts = [ProgramKind::Passes, ProgramKind::Update, ProgramKind::Gather]
            .into_iter()
            .filter_map(|part| self.programs.get(&part));
        let programs = parts.flat_map(|programs| programs.iter().enumerate());
        programs.flat_map(|(pipeline, program)| program.ops.iter().map(move |op| (pipeline, op)))
    }
}

/// Makes plans for one layout.
pub struct Plans {
    recipe: Recipe,
    topology: Topology,
    /// What each stage consists of.
    pub layouts: Vec<StageLayout>,
    /// How the state is spread over the ranks.
    pub sharding: Sharding,
    made: HashMap<(usize, TaskKind), Arc<Planned>>,
}

impl Plans {
    /// For a recipe, in a formation whose workers do not replicate state in memory.
    ///
    /// **Errors**: if the layers cannot be spread over the stages.
    pub fn new(recipe: &Recipe) -> Result<Self, String> {
        let layouts = recipe_stages(recipe)?;
        let topology = recipe.topology();
        let buckets = buckets(&recipe.placement(), &layouts, &topology);
        let sharding = Sharding { buckets, replicated: false, overlap: recipe.parallel.overlap };
        Ok(Plans { recipe: recipe.clone(), topology, layouts, sharding, made: HashMap::new() })
    }

    /// The same, where each rank's state may be replicated: then a step waits for the replicas of the one before.
    pub fn replicated(mut self, replicated: bool) -> Self {
        self.sharding.replicated = replicated;
        self
    }

    /// The passes of a plan, by pipeline rank.
    pub fn passes(&self, plan: &Plan) -> Vec<Program> {
        let overlap = Overlap::of(self.sharding.overlap);
        lower_with(plan, Some(&self.layouts), self.topology.expert, overlap)
    }

    /// The plan for this number of micro-batches, checked.
    ///
    /// **Errors**: if the schedule has none, or if what it has is not sound.
    pub fn get(&mut self, micro_batches: usize, kind: TaskKind) -> Result<Arc<Planned>, String> {
        if let Some(planned) = self.made.get(&(micro_batches, kind)) {
            return Ok(planned.clone());
        }
        let planned = Arc::new(self.make(micro_batches, kind)?);
        self.made.insert((micro_batches, kind), planned.clone());
        Ok(planned)
    }

    fn make(&self, micro_batches: usize, kind: TaskKind) -> Result<Planned, String> {
        let overlap = Overlap::of(self.sharding.overlap);
        let (plan, fallback) = recipe_plan(&self.recipe, micro_batches, kind.mode(), overlap)?;
        let wrong = |faults: Vec<PlanFault>| {
            let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
            let faults = faults.join("; ");
            format!("the {} plan of {micro_batches} micro-batches is wrong: {faults}", plan.schedule)
        };
        let passes = self.passes(&plan);
        let (report, parts) = match kind {
            TaskKind::Evaluate => {
                let report = check(&plan, &passes).map_err(wrong)?;
                (report, vec![(ProgramKind::Passes, passes)])
            }
            TaskKind::Train => {
                let step = StepPrograms::new(&passes, &self.sharding);
                let report = check_step(&plan, &step).map_err(wrong)?;
                let parts = [
                    (ProgramKind::Passes, step.gradients),
                    (ProgramKind::Gathering, step.gathering),
                    (ProgramKind::Evidence, step.evidence),
                    (ProgramKind::Update, step.update),
                    (ProgramKind::Skip, step.skip),
                    (ProgramKind::Gather, step.gather),
                ];
                (report, Vec::from(parts))
            }
        };
        let shared = |(part, programs): (ProgramKind, Vec<Program>)| {
            (part, programs.into_iter().map(Arc::new).collect::<Vec<_>>())
        };
        let programs = parts.into_iter().map(shared).collect();
        Ok(Planned { plan: Arc::new(plan), programs, report, fallback })
    }
}

/// How a training batch of this many sequences is cut.
pub fn train_shape(recipe: &Recipe, global_batch: usize) -> BatchShape {
    let micro_batches = recipe.micro_batches(global_batch);
    BatchShape { global_batch, micro_batches, micro_batch_size: recipe.training.micro_batch_size }
}

/// How the validation sequences are cut: as many as the recipe asks for and the corpus has, less what the layout cannot
/// divide. `None` if there are too few.
pub fn validation_shape(recipe: &Recipe, available: usize) -> Option<BatchShape> {
    let unit = recipe.validation_unit();
    let micro_batches = recipe.training.validation_sequences.min(available) / unit;
    let shape = train_shape(recipe, micro_batches * unit);
    (micro_batches > 0).then_some(BatchShape { micro_batches, ..shape })
}
