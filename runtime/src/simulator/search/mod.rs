//! Which layouts of a recipe pay on a cluster: those on the Pareto front of step time, memory and ranks among all that the recipe's
//! model and batch allow, and why each of the others is not on it.
//!
//! What is legal is the recipe's own check of a list of overrides. Memory is counted for all that is legal; what fits has its step
//! estimated (`estimate`), and what could be on the front by that estimate is simulated. `space` lists the candidates. Knows no
//! output.

mod estimate;
mod space;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::breakdown::Components;
use super::cluster::Cluster;
use super::run::simulate_recipe;
use crate::layout::figures_with;
use crate::recipe::{Recipe, RecipeSource};
pub use space::Choice;

/// How much slower than a better one a candidate may be estimated and still be simulated. Estimates are worst for models that are
/// small for their cluster, whose steps are latency.
const DOUBT: f64 = 1.3;

/// What was searched and found.
#[derive(Clone, Debug, Serialize)]
pub struct Search {
    /// Name of the profile.
    pub cluster: String,
    /// All that was looked at, in the order of the search.
    pub candidates: Vec<Candidate>,
    /// Indices of the front, fastest first.
    pub front: Vec<usize>,
    /// Index of the recipe as it is.
    pub own: usize,
    /// How many steps were simulated.
    pub simulated: usize,
}

/// A choice, and how it ended.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// What was chosen.
    #[serde(flatten)]
    pub choice: Choice,
    /// **Units**: devices.
    pub ranks: usize,
    /// Of the rank that needs most, where it was counted: the choice is legal, and its layout has leaner ones that fit. **Units**: bytes.
    pub memory_bytes: Option<u64>,
    /// On a coarse clock, where it fits. **Units**: seconds.
    pub estimated_s: Option<f64>,
    /// Simulated, where it may be on the front. **Units**: seconds.
    pub step_s: Option<f64>,
    /// The parts of that step, the mean over ranks. **Units**: seconds.
    pub components: Option<Components>,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// How a candidate ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing is as good in all of step time, memory and ranks, and better in one.
    Front,
    /// The candidate of this index is.
    Dominated {
        /// The fastest of those that are.
        by: usize,
    },
    /// It does not fit a device.
    TooLarge,
    /// The recipe's check, the schedule or the simulator refuses it.
    Refused {
        /// Why.
        why: String,
    },
}

impl Candidate {
    fn refused(choice: Choice, ranks: usize, why: String) -> Candidate {
        Candidate {
            choice,
            ranks,
            memory_bytes: None,
            estimated_s: None,
            step_s: None,
            components: None,
            verdict: Verdict::Refused { why },
        }
    }

    /// Whether `self`, which takes `own_s`, is as good as `other`, which takes `other_s`, in everything, and better in something.
    fn beats(&self, own_s: f64, other: &Candidate, other_s: f64) -> bool {
        let no_worse =
            own_s <= other_s && self.memory_bytes <= other.memory_bytes && self.ranks <= other.ranks;
        let better = own_s < other_s || self.memory_bytes < other.memory_bytes || self.ranks < other.ranks;
        no_worse && better
    }
}

/// Searches the choices around a recipe and its overrides.
///
/// # Errors
/// Every fault of the recipe itself.
pub fn search(source: &RecipeSource, overrides: &[String], cluster: &Cluster) -> Result<Search, Vec<String>> {
    let recipe = Recipe::load(source, overrides).map_err(|faults| vec![faults.to_string()])?;
    let (choices, own) = space::choices(&recipe, cluster);
    let judged = judge_all(&choices, |choice| judge(source, overrides, &recipe, choice, cluster));
    let (mut candidates, recipes): (Vec<Candidate>, Vec<Option<Recipe>>) = judged.into_iter().unzip();
    let simulated: Vec<usize> = (0..candidates.len())
        .filter(|&index| index == own || is_worth_simulating(&candidates, index))
        .filter(|&index| recipes[index].is_some())
        .collect();
    let runs = parallel(&simulated, |&index| {
        let recipe = recipes[index].as_ref()?;
        Some(simulate_recipe(recipe, cluster).map(|run| (run.step_s, run.breakdown.mean)))
    });
    for (&index, run) in simulated.iter().zip(runs) {
        let candidate = &mut candidates[index];
        match run {
            Some(Ok((step_s, components))) => {
                (candidate.step_s, candidate.components) = (Some(step_s), Some(components));
            }
            Some(Err(faults)) => candidate.verdict = Verdict::Refused { why: faults.join("; ") },
            None => {}
        }
    }
    let front = conclude(&mut candidates);
    Ok(Search { cluster: cluster.name.clone(), candidates, front, own, simulated: simulated.len() })
}

/// Judges choices; of a layout whose leanest choices are all too large, only these.
fn judge_all(
    choices: &[Choice],
    judge: impl Fn(&Choice) -> (Candidate, Option<Recipe>) + Sync,
) -> Vec<(Candidate, Option<Recipe>)> {
    let (lean, rest): (Vec<usize>, Vec<usize>) =
        (0..choices.len()).partition(|&index| choices[index].is_lean());
    let mut judged: BTreeMap<usize, (Candidate, Option<Recipe>)> = BTreeMap::new();
    judged.extend(lean.iter().copied().zip(parallel(&lean, |&index| judge(&choices[index]))));
    let layout = |choice: &Choice| (choice.pipeline, choice.expert, choice.data);
    let too_large = |verdict: &Verdict| matches!(verdict, Verdict::TooLarge);
    let mut hopeless: BTreeMap<_, bool> = BTreeMap::new();
    for (candidate, _) in judged.values() {
        *hopeless.entry(layout(&candidate.choice)).or_insert(true) &= too_large(&candidate.verdict);
    }
    let others = parallel(&rest, |&index| {
        let choice = &choices[index];
        if hopeless.get(&layout(choice)) != Some(&true) {
            return judge(choice);
        }
        let mut candidate = Candidate::refused(choice.clone(), choice.ranks(), String::new());
        candidate.verdict = Verdict::TooLarge;
        (candidate, None)
    });
    judged.extend(rest.into_iter().zip(others));
    judged.into_values().collect()
}

/// Whether a choice is legal and fits, and what its step is estimated to take.
fn judge(
    source: &RecipeSource,
    overrides: &[String],
    base: &Recipe,
    choice: &Choice,
    cluster: &Cluster,
) -> (Candidate, Option<Recipe>) {
    let ranks = choice.ranks();
    let refused = |why| (Candidate::refused(choice.clone(), ranks, why), None);
    let all = [overrides, &choice.overrides(base)[..]].concat();
    let recipe = match Recipe::load(source, &all) {
        Ok(recipe) => recipe,
        Err(faults) => {
            return refused(faults.list.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
        }
    };
    let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
    // A plan of one's own is for its own number of micro-batches.
    let enough = if recipe.parallel.plan.is_empty() { 4 * choice.pipeline } else { micro_batches };
    let memory_bytes = match figures_with(&recipe, micro_batches.min(enough)) {
        Ok(figures) => figures.iter().map(|rank| rank.device_bytes).max().unwrap_or_default(),
        Err(why) => return refused(why),
    };
    let mut candidate = Candidate::refused(choice.clone(), ranks, String::new());
    candidate.memory_bytes = Some(memory_bytes);
    candidate.verdict = Verdict::TooLarge;
    if memory_bytes > cluster.memory_bytes {
        return (candidate, None);
    }
    match estimate::step_s(&recipe, cluster) {
        Ok(estimated_s) => {
            candidate.estimated_s = Some(estimated_s);
            candidate.verdict = Verdict::Front;
            (candidate, Some(recipe))
        }
        Err(faults) => refused(faults.join("; ")),
    }
}

fn is_worth_simulating(candidates: &[Candidate], index: usize) -> bool {
    let candidate = &candidates[index];
    let Some(estimated_s) = candidate.estimated_s else { return false };
    let beats = |other: &Candidate| {
        other.estimated_s.is_some_and(|other_s| other.beats(DOUBT * other_s, candidate, estimated_s))
    };
    !candidates.iter().any(beats)
}

/// Sets the verdicts of what fits. Returns the front, fastest first.
fn conclude(candidates: &mut [Candidate]) -> Vec<usize> {
    let time = |candidate: &Candidate| match candidate.verdict {
        Verdict::Front | Verdict::Dominated { .. } => candidate.step_s.or(candidate.estimated_s),
        _ => None,
    };
    let mut by_time: Vec<(f64, usize)> =
        candidates.iter().enumerate().filter_map(|(index, one)| Some((time(one)?, index))).collect();
    // Of two that take as long, the smaller one first: it may be what keeps the other from the front.
    let size = |index: usize| (candidates[index].memory_bytes, candidates[index].ranks);
    by_time.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| size(a.1).cmp(&size(b.1))));
    let (mut front, mut unsettled): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    for &(seconds, index) in &by_time {
        let better = front.iter().copied().find(|&other| {
            let other_s = time(&candidates[other]).unwrap_or(f64::INFINITY);
            candidates[other].beats(other_s, &candidates[index], seconds)
        });
        match better {
            Some(by) => candidates[index].verdict = Verdict::Dominated { by },
            None if candidates[index].step_s.is_some() => front.push(index),
            None => unsettled.push(index),
        }
    }
    // By their estimates these are slower than others, or they would have been simulated.
    for index in unsettled {
        let no_larger = |other: &usize| {
            let (own, other) = (&candidates[index], &candidates[*other]);
            other.memory_bytes <= own.memory_bytes && other.ranks <= own.ranks
        };
        if let Some(by) = front.iter().copied().find(no_larger) {
            candidates[index].verdict = Verdict::Dominated { by };
        }
    }
    front
}

/// On all cores; results in the order of the items.
fn parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(items.len())));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, item)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    items.get(index).map(|item| (index, item))
                } {
                    let result = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
