//! The plan that a recipe's ranks run: that of its schedule, or the user's own (`parallel.plan`), which comes with placement and number
//! of micro-batches. Knows files only to read that one.

use std::path::Path;
use std::sync::Arc;

use super::Recipe;
use super::table::RecipeTable;
use crate::faults::Faults;
use crate::files;
use crate::schedule::forward::forward_only;
use crate::schedule::{Mode, Plan, check, csv, lower, text};

const PATH: &str = "parallel.plan";

/// The plan in the file that the recipe names, if it names one. Faults go into the table's.
pub(super) fn read(table: &mut RecipeTable) -> Option<Arc<Plan>> {
    let name = table.text(PATH);
    if name.is_empty() {
        return None;
    }
    match parse_file(Path::new(&name)) {
        Ok(plan) => Some(Arc::new(plan)),
        Err(faults) => {
            faults.into_iter().for_each(|fault| table.faults.push(PATH, format!("{name}: {fault}")));
            None
        }
    }
}

/// A plan out of a file, as a table if its name ends in `.csv`, else in the text form.
///
/// # Errors
/// The file cannot be read, or every line of it that cannot.
pub fn parse_file(path: &Path) -> Result<Plan, Vec<String>> {
    let read = files::read_to_string(path).map_err(|error| vec![error.to_string()])?;
    let is_table = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if is_table { csv::parse(&stem, &read) } else { text::parse(&read) }
}

/// **Errors** (into `faults`): an own plan that is not sound, or that does not fit the recipe.
pub(super) fn check_own(recipe: &Recipe, plan: &Plan, faults: &mut Faults) {
    if let Err(list) = check(plan, &lower(plan, None, 1)) {
        list.iter().for_each(|fault| faults.push(PATH, fault.to_string()));
    } else if plan.is_forward_only() {
        faults.expected(PATH, "a plan that trains", "one without backward passes");
    }
    let (ranks, pipeline) = (plan.ranks(), recipe.parallel.pipeline);
    if faults.spare(&["parallel.pipeline"]) && ranks != pipeline {
        faults.expected("parallel.pipeline", format!("the {ranks} ranks of {PATH}"), pipeline);
    }
    let keys =
        ["training.global_batch_size", "training.micro_batch_size", "parallel.expert", "parallel.data"];
    let batch = recipe.training.global_batch_size;
    let needed = recipe.validation_unit() * plan.micro_batches;
    if faults.spare(&keys) && batch != needed {
        let expected = format!(
            "{needed} ({} micro-batches of {PATH} x micro_batch_size {} x expert {} x data {})",
            plan.micro_batches,
            recipe.training.micro_batch_size,
            recipe.parallel.expert,
            recipe.parallel.data
        );
        faults.expected("training.global_batch_size", expected, batch);
    }
    if recipe.training.ramp_tokens > 0 {
        faults.expected(
            "training.ramp_tokens",
            format!("0, as {PATH} is of one size"),
            recipe.training.ramp_tokens,
        );
    }
}

impl Recipe {
    /// `placement[rank]` lists the stages that a pipeline rank holds.
    pub fn placement(&self) -> Vec<Vec<usize>> {
        match &self.own_plan {
            Some(plan) => plan.placement.clone(),
            None => self.parallel.schedule.placement(self.parallel.pipeline),
        }
    }

    /// Pipeline stages.
    pub fn stages(&self) -> usize {
        self.own_plan
            .as_ref()
            .map_or_else(|| self.parallel.schedule.stages(self.parallel.pipeline), |plan| plan.stages)
    }

    /// What the order of the work is called.
    pub fn schedule_name(&self) -> String {
        self.own_plan
            .as_ref()
            .map_or_else(|| self.parallel.schedule.to_string(), |plan| plan.schedule.clone())
    }

    /// The plan of a task on this many micro-batches, and why it is not that of the schedule.
    ///
    /// # Errors
    /// A schedule that there is not on these ranks; a number that the own plan does not train.
    pub fn plan(&self, micro_batches: usize, mode: Mode) -> Result<(Plan, Option<String>), String> {
        let Some(own) = &self.own_plan else {
            let made = self.parallel.schedule.plan(self.parallel.pipeline, micro_batches, mode);
            return made.map_err(|error| error.to_string());
        };
        match mode {
            Mode::ForwardOnly => Ok((forward_only(&own.schedule, &own.placement, micro_batches), None)),
            Mode::Train if micro_batches == own.micro_batches => Ok((Plan::clone(own), None)),
            Mode::Train => {
                let needed = own.micro_batches;
                Err(format!("{PATH}: expected {needed} micro-batches, got {micro_batches}"))
            }
        }
    }
}
