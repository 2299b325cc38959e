//! The layouts that the recipes of jobs can be run on with fewer ranks than they name, or more, and what those need. A job is asked
//! about at every event while it waits or may grow, and the answers for a large one take seconds: each is found once. Knows no worker.

use std::collections::BTreeMap;

use contraflow_runtime::layout::recipe_figures;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::RankFigures;
use contraflow_runtime::topology::{JobId, Topology};

use super::facts::JobSpec;
use super::jobs::JobRecord;
use crate::placement::{fewest, layout, named};
use crate::queue::Size;

/// What is known of the layouts of a job.
#[derive(Default)]
struct Known {
    /// Whether the recipe can be run on these axes.
    runs: BTreeMap<Topology, bool>,
    /// What the largest rank needs of memory at the least. **Units**: bytes.
    bytes: BTreeMap<Topology, u64>,
    /// With this target.
    size: Option<(usize, Size)>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Layouts {
    known: BTreeMap<JobId, Known>,
}

impl Layouts {
    /// What the largest rank needs of memory at the least on these axes; 0: that is not looked at. **Units**: bytes.
    pub fn rank_bytes(&mut self, job: JobId, spec: &JobSpec, axes: &Topology) -> u64 {
        // Where nobody said what the whole job needs, its parts are not measured against anything either.
        if *axes == spec.topology() || spec.rank_bytes == 0 {
            return spec.rank_bytes;
        }
        let known = self.known.entry(job).or_default();
        let bytes = || on_axes(spec, axes).map_or(0, |recipe| rank_bytes(&recipe));
        *known.bytes.entry(*axes).or_insert_with(bytes)
    }

    /// The layout for at most `available` ranks, if there is one with at least `least`.
    pub fn best(&mut self, job: JobId, spec: &JobSpec, available: usize, least: usize) -> Option<Topology> {
        let base = spec.topology();
        match &spec.named()[..] {
            [] => layout(&base, available, least, &mut |axes| self.runs(job, spec, axes)),
            layouts => named(&base, layouts, available, least),
        }
    }

    /// A layout with more ranks than these that a job may have: of named ones the next, else what it asks for, or else the largest.
    pub fn larger(&mut self, job: JobId, record: &JobRecord, axes: &Topology) -> Option<Topology> {
        let (spec, size, world) = (&record.spec, self.size(job, record), axes.world());
        let is_larger = |larger: &Topology| larger.world() > world;
        match &spec.named()[..] {
            [] => {
                let ranks = if world < size.asked { size.asked } else { size.most };
                self.best(job, spec, ranks, 1).filter(is_larger)
            }
            layouts => {
                let next = layouts
                    .iter()
                    .map(Topology::world)
                    .filter(|ranks| (world + 1..=size.most).contains(ranks))
                    .min();
                named(&spec.topology(), layouts, next?, 1).filter(is_larger)
            }
        }
    }

    fn runs(&mut self, job: JobId, spec: &JobSpec, axes: &Topology) -> bool {
        // What is seen at once is not kept: there is a great deal of it.
        *axes == spec.topology()
            || could_run(spec, axes) && {
                let runs = &mut self.known.entry(job).or_default().runs;
                *runs.entry(*axes).or_insert_with(|| on_axes(spec, axes).is_some())
            }
    }

    /// How many ranks a job may have.
    pub fn size(&mut self, job: JobId, record: &JobRecord) -> Size {
        let (spec, target) = (&record.spec, record.target);
        let known = self.known.get(&job).and_then(|known| known.size);
        if let Some((_, size)) = known.filter(|(of, _)| *of == target) {
            return size;
        }
        let world = spec.topology().world();
        let mut ranks = |available, least| self.best(job, spec, available, least).map(|axes| axes.world());
        let (asked, most) = match target {
            0 => (world, ranks(spec.max_ranks.max(world), 1).unwrap_or(world)),
            target => {
                let ranks = ranks(target, 1).unwrap_or(world);
                (ranks, ranks)
            }
        };
        let mut fewest_of = |least| match &spec.named()[..] {
            [] => fewest(&spec.topology(), least, &mut |axes| self.runs(job, spec, axes)),
            layouts => layouts.iter().map(Topology::world).filter(|ranks| *ranks >= least).min(),
        };
        let least = if spec.min_ranks < asked { fewest_of(spec.min_ranks).unwrap_or(world) } else { asked };
        let size = Size { least: least.min(asked), asked, most };
        self.known.entry(job).or_default().size = Some((target, size));
        size
    }

    /// [`Layouts::size`] if it has been asked for; else of the recipe alone.
    pub fn known_size(&self, job: JobId, record: &JobRecord) -> Size {
        let known = self.known.get(&job).and_then(|known| known.size);
        let known = known.filter(|(target, _)| *target == record.target);
        known.map_or_else(|| Size::exactly(record.spec.topology().world()), |(_, size)| size)
    }

    pub fn forget(&mut self, job: JobId) {
        self.known.remove(&job);
    }
}

/// Whether a recipe can be run on these axes as far as numbers say that are seen at once: most that cannot are found here.
fn could_run(spec: &JobSpec, axes: &Topology) -> bool {
    let (recipe, base) = (&spec.recipe, spec.topology());
    let unit = recipe.batch_unit() / base.dp_size() * axes.dp_size();
    recipe.training.global_batch_size.is_multiple_of(unit)
        && recipe.model_config.n_routed_experts.is_multiple_of(axes.expert)
        && axes.pipeline <= recipe.model_config.num_hidden_layers
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
