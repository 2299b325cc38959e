//! What the recipes of jobs come to on fewer ranks than they ask for. A job that has lost ranks for good asks at every event until
//! there is room, and the answers for a large one take seconds: each is found once. Knows no worker.

use std::collections::BTreeMap;

use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::RankFigures;
use contraflow_runtime::topology::{JobId, Topology};

use super::facts::JobSpec;

/// By job and axes, what the largest rank needs of memory at the least (0: not known), where the recipe can be run on those axes.
#[derive(Default)]
pub(super) struct FewerRanks {
    known: BTreeMap<JobId, BTreeMap<Topology, Option<u64>>>,
}

impl FewerRanks {
    /// **Units**: bytes. `None` if the recipe cannot be run on these axes.
    pub fn rank_bytes(&mut self, job: JobId, spec: &JobSpec, axes: &Topology) -> Option<u64> {
        if *axes == spec.topology() {
            return Some(spec.rank_bytes);
        }
        let known = self.known.entry(job).or_default();
        // Where nobody said what the whole job needs, its parts are not measured against anything either.
        let bytes = |recipe: Recipe| if spec.rank_bytes == 0 { 0 } else { rank_bytes(&recipe) };
        *known.entry(*axes).or_insert_with(|| on_axes(spec, axes).map(bytes))
    }

    pub fn forget(&mut self, job: JobId) {
        self.known.remove(&job);
    }
}

/// The recipe of a job on other axes; nothing if it cannot be run on them.
fn on_axes(spec: &JobSpec, axes: &Topology) -> Option<Recipe> {
    let model = spec.recipe.model_config.clone();
    let text = spec.recipe.resolved_toml();
    Recipe::submitted(&text, &spec.name, &super::axes_overrides(axes), Some(model)).ok()
}

fn rank_bytes(recipe: &Recipe) -> u64 {
    let figures = recipe_figures(recipe).unwrap_or_default();
    figures.iter().map(RankFigures::bytes).max().unwrap_or_default()
}
