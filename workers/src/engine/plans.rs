//! The plans and programs of a job, made on demand: one per number of micro-batches, training and forward-only.
//!
//! Pure: every rank makes the same ones for itself. Knows the recipe's layout, no tensors.

use std::collections::HashMap;
use std::sync::Arc;

use contraflow_runtime::layout::split_layers;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{Mode, Plan, Program, Report, ScheduleKind, StageLayout, check, lower};

use crate::data::batches::BatchShape;

/// A plan and what it becomes on every pipeline rank.
pub struct Planned {
    /// The plan.
    pub plan: Arc<Plan>,
    /// By pipeline rank.
    pub programs: Vec<Arc<Program>>,
    /// What the check found: peak activations and the like.
    pub report: Report,
    /// Why another schedule runs than the recipe's, in words.
    pub fallback: Option<String>,
}

/// Makes plans for one layout.
pub struct Plans {
    kind: ScheduleKind,
    pipeline: usize,
    expert: usize,
    /// What each stage consists of.
    pub layouts: Vec<StageLayout>,
    made: HashMap<(usize, bool), Arc<Planned>>,
}

impl Plans {
    /// For a recipe.
    ///
    /// **Errors**: in words, if the layers cannot be spread over the stages.
    pub fn new(recipe: &Recipe) -> Result<Self, String> {
        let layouts = split_layers(&recipe.model_config, recipe.stages(), recipe.training.sequence_length)?;
        let parallel = &recipe.parallel;
        let (kind, pipeline, expert) = (parallel.schedule, parallel.pipeline, parallel.expert);
        Ok(Plans { kind, pipeline, expert, layouts, made: HashMap::new() })
    }

    /// The plan for so many micro-batches, checked.
    ///
    /// **Errors**: in words, if the schedule has none, or if what it has is not sound.
    pub fn get(&mut self, micro_batches: usize, mode: Mode) -> Result<Arc<Planned>, String> {
        let key = (micro_batches, mode == Mode::Train);
        if let Some(planned) = self.made.get(&key) {
            return Ok(planned.clone());
        }
        let (plan, fallback) =
            self.kind.plan(self.pipeline, micro_batches, mode).map_err(|error| error.to_string())?;
        let programs = lower(&plan, Some(&self.layouts), self.expert);
        let report = check(&plan, &programs).map_err(|faults| {
            let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
            format!(
                "the {} plan of {micro_batches} micro-batches is wrong: {}",
                plan.schedule,
                faults.join("; ")
            )
        })?;
        let programs = programs.into_iter().map(Arc::new).collect();
        let planned = Arc::new(Planned { plan: Arc::new(plan), programs, report, fallback });
        self.made.insert(key, planned.clone());
        Ok(planned)
    }
}

/// How a training batch of so many sequences is cut.
pub fn train_shape(recipe: &Recipe, global_batch: usize) -> BatchShape {
    let micro_batches = recipe.micro_batches(global_batch);
    BatchShape { global_batch, micro_batches, micro_batch_size: recipe.training.micro_batch_size }
}

/// How the validation sequences are cut: as many as the recipe asks for and the corpus has, less what the layout cannot
/// divide. `None` if there are too few.
pub fn validation_shape(recipe: &Recipe, available: usize) -> Option<BatchShape> {
    let unit = recipe.training.micro_batch_size * recipe.topology().columns();
    let micro_batches = recipe.training.validation_sequences.min(available) / unit;
    let shape = train_shape(recipe, micro_batches * unit);
    (micro_batches > 0).then_some(BatchShape { micro_batches, ..shape })
}
