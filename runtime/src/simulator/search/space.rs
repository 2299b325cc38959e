//! What a search tries: every combination of layout, schedule, micro-batch, recomputation and formats that the numbers of ranks and
//! experts divide into. Whether a recipe allows it is the recipe's to say.

use serde::Serialize;

use crate::recipe::{Recipe, Recomputed};
use crate::schedule::ScheduleKind;
use crate::simulator::cluster::Cluster;

/// What is tried of `training.micro_batch_size`.
const MICRO_BATCH_SIZES: [usize; 3] = [1, 2, 4];
/// What is tried of `memory.recompute`.
const RECOMPUTED: [&str; 3] =
    ["[]", r#"["norms", "swiglu"]"#, r#"["norms", "mla-up-projections", "swiglu"]"#];
/// What is tried of `precision.recipe`.
const PRECISIONS: [&str; 2] = ["bf16", "fp8"];
/// How often the ranks of the cluster are halved.
const HALVED: u32 = 3;

/// One combination.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Pipeline ranks.
    pub pipeline: usize,
    /// Expert ranks.
    pub expert: usize,
    /// Data ranks.
    pub data: usize,
    /// Order of the work.
    pub schedule: ScheduleKind,
    /// Sequences of a micro-batch.
    pub micro_batch_size: usize,
    /// What is computed again, as recipes write it; nothing here is what the recipe says.
    pub recompute: Option<&'static str>,
    /// Formats, as recipes name them; nothing here is what the recipe says.
    pub precision: Option<&'static str>,
}

impl Choice {
    /// Devices.
    pub fn ranks(&self) -> usize {
        self.pipeline * self.expert * self.data
    }

    /// Whether no choice of the same layout and schedule needs less memory.
    pub fn is_lean(&self) -> bool {
        let least = |own: Option<&str>, least: &str| own.is_none_or(|own| own == least);
        self.micro_batch_size == MICRO_BATCH_SIZES[0]
            && least(self.recompute, RECOMPUTED[RECOMPUTED.len() - 1])
            && least(self.precision, PRECISIONS[PRECISIONS.len() - 1])
    }

    /// What `--set` takes to choose it; what a recipe lists for its own pipeline alone, stages or a plan, is dropped for another one.
    pub fn overrides(&self, recipe: &Recipe) -> Vec<String> {
        let Choice { pipeline, expert, data, schedule, micro_batch_size, recompute, precision } = self;
        let own = &recipe.parallel;
        let is_other = own.pipeline != *pipeline || own.schedule != *schedule;
        let stages = (is_other && !own.stages.layers().is_empty()).then(|| "parallel.stages=balanced".into());
        let plan = (is_other && !own.plan.is_empty()).then(|| "parallel.plan=".into());
        // Which layouts a job may have is not the question here.
        let named = (!recipe.elastic.layouts.is_empty()).then(|| "elastic.layouts=[]".into());
        let layout = [
            format!("parallel.pipeline={pipeline}"),
            format!("parallel.expert={expert}"),
            format!("parallel.data={data}"),
            format!("parallel.schedule={schedule}"),
            format!("training.micro_batch_size={micro_batch_size}"),
        ];
        let recompute = recompute.map(|what| format!("memory.recompute={what}"));
        let precision = precision.map(|what| format!("precision.recipe={what}"));
        layout.into_iter().chain(stages).chain(plan).chain(named).chain(recompute).chain(precision).collect()
    }
}

/// All choices for a recipe on a cluster, and the index of the recipe as it is.
pub fn choices(recipe: &Recipe, cluster: &Cluster) -> (Vec<Choice>, usize) {
    let own = Choice {
        pipeline: recipe.parallel.pipeline,
        expert: recipe.parallel.expert,
        data: recipe.parallel.data,
        schedule: recipe.parallel.schedule,
        micro_batch_size: recipe.training.micro_batch_size,
        recompute: None,
        precision: None,
    };
    let mut worlds: Vec<usize> =
        (0..=HALVED).map(|times| cluster.ranks >> times).filter(|&it| it > 0).collect();
    if !worlds.contains(&own.ranks()) {
        worlds.push(own.ranks());
    }
    let mut choices = vec![own.clone()];
    for &world in &worlds {
        for (pipeline, expert) in layouts(recipe, world) {
            for schedule in ScheduleKind::ALL {
                for micro_batch_size in MICRO_BATCH_SIZES {
                    for recompute in other_recomputations(recipe) {
                        for precision in other_precisions(recipe) {
                            let data = world / pipeline / expert;
                            let choice = Choice {
                                pipeline,
                                expert,
                                data,
                                schedule,
                                micro_batch_size,
                                recompute,
                                precision,
                            };
                            if choice != own {
                                choices.push(choice);
                            }
                        }
                    }
                }
            }
        }
    }
    (choices, 0)
}

/// Pipeline and expert ranks that divide `world`, and layers and experts into at least one each.
fn layouts(recipe: &Recipe, world: usize) -> Vec<(usize, usize)> {
    let config = &recipe.model_config;
    let pipelines =
        (1..=config.num_hidden_layers.min(world)).filter(|pipeline| world.is_multiple_of(*pipeline));
    let of_pipeline = |pipeline: usize| {
        let experts = (1..=config.n_routed_experts).filter(move |expert| {
            config.n_routed_experts.is_multiple_of(*expert) && (world / pipeline).is_multiple_of(*expert)
        });
        experts.map(move |expert| (pipeline, expert))
    };
    pipelines.flat_map(of_pipeline).collect()
}

/// The recipe's own, and those that differ from it.
fn other_recomputations(recipe: &Recipe) -> Vec<Option<&'static str>> {
    let own: Vec<String> = recipe.memory.recompute.iter().map(name).collect();
    let differs = |text: &&str| {
        let listed: Vec<String> = text.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        listed != own
    };
    std::iter::once(None).chain(RECOMPUTED.into_iter().filter(differs).map(Some)).collect()
}

fn name(what: &Recomputed) -> String {
    serde_json::to_value(what).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The recipe's own, and the others.
fn other_precisions(recipe: &Recipe) -> Vec<Option<&'static str>> {
    let own = crate::simulator::times::format_name(recipe.precision.linear);
    std::iter::once(None).chain(PRECISIONS.into_iter().filter(|&one| one != own).map(Some)).collect()
}
