//! `contraflow plan --search`: the layouts that pay on a cluster, and why the others do not. Knows the command line; the search
//! itself is in `runtime`.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Instant;

use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::size;
use contraflow_runtime::simulator::{Candidate, Cluster, Search, Verdict, search};
use serde::Serialize;

use super::{PlanArgs, serde_name};
use crate::failure::Failure;
use crate::output::{Format, count, print};

/// How many reasons of refusal are printed.
const REASONS: usize = 5;

/// Searches around the recipe of the command line, and prints what was found.
///
/// **Errors**: every fault of the profile and of the recipe.
pub fn run(args: &PlanArgs, cluster: &str) -> Result<(), Failure> {
    let begun = Instant::now();
    let cluster = Cluster::load(cluster).map_err(|faults| Failure::faults("cluster", &faults.list))?;
    let source = RecipeSource::parse(&args.recipe);
    let recipe = Recipe::load(&source, &args.overrides)?;
    let found = search(&source, &args.overrides, &cluster)
        .map_err(|faults| Failure::faults(&format!("no search on {}", cluster.name), &faults))?;
    let tokens = (recipe.training.global_batch_size * recipe.training.sequence_length) as f64;
    let found = Found { search: found, tokens_per_step: tokens, seconds: begun.elapsed().as_secs_f64() };
    match args.format {
        Format::Text => print(&found.to_string()),
        Format::Json => {
            let json =
                serde_json::to_string_pretty(&found).map_err(|error| Failure::run(error.to_string()))?;
            print(&format!("{json}\n"))
        }
    }
}

/// All that is printed.
#[derive(Serialize)]
struct Found {
    #[serde(flatten)]
    search: Search,
    tokens_per_step: f64,
    /// How long it took. **Units**: seconds of this machine.
    seconds: f64,
}

/// A value of one of the choices, as the command line sets it.
fn values(candidate: &Candidate) -> [(&'static str, String); 7] {
    let choice = &candidate.choice;
    let as_it_is = |value: Option<&str>| value.unwrap_or("as the recipe has it").to_owned();
    [
        ("ranks", candidate.ranks.to_string()),
        ("pipeline", choice.pipeline.to_string()),
        ("expert", choice.expert.to_string()),
        ("schedule", serde_name(&choice.schedule)),
        ("micro-batch", choice.micro_batch_size.to_string()),
        ("recompute", as_it_is(choice.recompute)),
        ("precision", as_it_is(choice.precision)),
    ]
}

fn layout(candidate: &Candidate) -> String {
    let choice = &candidate.choice;
    let mut words = format!(
        "PP {} x EP {} x DP {}, {}, micro-batch {}",
        choice.pipeline,
        choice.expert,
        choice.data,
        serde_name(&choice.schedule),
        choice.micro_batch_size
    );
    choice.precision.iter().for_each(|precision| words.push_str(&format!(", {precision}")));
    choice.recompute.iter().for_each(|what| words.push_str(&format!(", recompute {what}")));
    words
}

fn bytes(candidate: &Candidate) -> u64 {
    candidate.memory_bytes.unwrap_or_default()
}

fn in_words(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.2} ms", 1e3 * seconds) } else { format!("{seconds:.2} s") }
}

fn time(candidate: &Candidate) -> f64 {
    candidate.step_s.or(candidate.estimated_s).unwrap_or(f64::INFINITY)
}

/// How much slower one is than another, both simulated or else both estimated.
fn slower(one: &Candidate, other: &Candidate) -> f64 {
    let both = |get: fn(&Candidate) -> Option<f64>| Some(get(one)? / get(other)?);
    both(|it| it.step_s).or_else(|| both(|it| it.estimated_s)).unwrap_or(f64::NAN) - 1.0
}

fn is_fitting(candidate: &Candidate) -> bool {
    matches!(candidate.verdict, Verdict::Front | Verdict::Dominated { .. })
}

impl Found {
    /// What makes `slow` slower than `fast`, largest first.
    fn differences(slow: &Candidate, fast: &Candidate) -> String {
        let (Some(of_slow), Some(of_fast)) = (slow.components, fast.components) else {
            return "by the estimate".to_owned();
        };
        let mut parts: Vec<(f64, &str)> = of_slow
            .named()
            .into_iter()
            .zip(of_fast.named())
            .map(|((name, slow), (_, fast))| (slow - fast, name))
            .collect();
        parts.sort_by(|a, b| b.0.abs().total_cmp(&a.0.abs()));
        let sign = |seconds: f64| if seconds < 0.0 { "-" } else { "+" };
        let part =
            |(seconds, name): (f64, &str)| format!("{name} {}{}", sign(seconds), in_words(seconds.abs()));
        let parts = parts.into_iter().take(3).map(part);
        parts.collect::<Vec<_>>().join(", ")
    }

    /// The best of those with a value, or why there is none, beside the fastest of all.
    fn of_value(&self, name: &str, value: &str, with: &[&Candidate], fastest: &Candidate) -> String {
        // What was not simulated is slower than something that was: the estimate of the best of it says by how much.
        let fitting = || with.iter().filter(|one| is_fitting(one));
        let simulated =
            fitting().filter(|one| one.step_s.is_some()).min_by(|a, b| time(a).total_cmp(&time(b)));
        let best = simulated.or_else(|| fitting().min_by(|a, b| time(a).total_cmp(&time(b))));
        let smallest = || {
            let sized = with.iter().filter(|one| one.memory_bytes.is_some());
            sized.min_by_key(|one| bytes(one))
        };
        let words = match (best, smallest()) {
            (Some(best), _) if std::ptr::eq(*best, fastest) => "the fastest".to_owned(),
            (Some(best), _) => format!(
                "{} at best ({:+.1} %): {}",
                in_words(time(best)),
                100.0 * slower(best, fastest),
                Self::differences(best, fastest)
            ),
            (None, Some(smallest)) => format!("none fits, the smallest needs {}", size(bytes(smallest))),
            (None, None) => "all refused".to_owned(),
        };
        format!("  {name:<12} {value:<40} {words}")
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Search { candidates, front, own, simulated, cluster } = &self.search;
        let counted = |is: fn(&Verdict) -> bool| candidates.iter().filter(|one| is(&one.verdict)).count();
        let too_large = counted(|verdict| matches!(verdict, Verdict::TooLarge));
        let refused = counted(|verdict| matches!(verdict, Verdict::Refused { .. }));
        writeln!(
            f,
            "{} on {cluster} in {:.1} s: {refused} refused, {too_large} too large for a device, {} fit, {} simulated",
            count(candidates.len(), "layout"),
            self.seconds,
            candidates.len() - refused - too_large,
            simulated
        )?;
        let Some(&first) = front.first() else {
            let smallest = candidates.iter().filter(|one| one.memory_bytes.is_some());
            return match smallest.min_by_key(|one| bytes(one)) {
                Some(one) => {
                    writeln!(f, "none fits: the smallest needs {}: {}", size(bytes(one)), layout(one))
                }
                None => writeln!(f, "none is legal"),
            };
        };
        let fastest = &candidates[first];
        let rate = |one: &Candidate| self.tokens_per_step / time(one) / one.ranks as f64;
        writeln!(f, "\nnothing is better in step time, memory and ranks together than one of these:")?;
        writeln!(f, "  {:>10} {:>12} {:>10} {:>6}  layout", "step", "tokens/s", "memory", "ranks")?;
        let row = |index: usize| {
            let one = &candidates[index];
            let mark = if index == *own { "  <- the recipe" } else { "" };
            format!(
                "  {:>10} {:>12.0} {:>10} {:>6}  {}{mark}",
                in_words(time(one)),
                rate(one),
                size(bytes(one)),
                one.ranks,
                layout(one)
            )
        };
        front.iter().try_for_each(|&index| writeln!(f, "{}", row(index)))?;
        writeln!(f, "  (tokens/s of a device, memory of the largest rank)")?;
        let of_recipe = &candidates[*own];
        match &of_recipe.verdict {
            Verdict::Front => writeln!(f, "\nthe recipe as it is stands among them")?,
            Verdict::Dominated { by } => {
                let better = &candidates[*by];
                let slower = 100.0 * slower(of_recipe, better);
                writeln!(f, "\nthe recipe as it is:\n{}", row(*own))?;
                writeln!(
                    f,
                    "  {slower:.1} % slower than {}: {}",
                    layout(better),
                    Self::differences(of_recipe, better)
                )?;
            }
            Verdict::TooLarge => writeln!(f, "\nthe recipe as it is needs {}", size(bytes(of_recipe)))?,
            Verdict::Refused { why } => writeln!(f, "\nthe recipe as it is is refused: {why}")?,
        }
        writeln!(f, "\nwhat each value costs, beside the fastest ({}):", layout(fastest))?;
        let mut by_value: BTreeMap<(usize, String), Vec<&Candidate>> = BTreeMap::new();
        for candidate in candidates {
            for (number, (_, value)) in values(candidate).into_iter().enumerate() {
                // Numbers in their order.
                let padded = if value.parse::<usize>().is_ok() { format!("{value:>8}") } else { value };
                by_value.entry((number, padded)).or_default().push(candidate);
            }
        }
        for ((number, value), with) in &by_value {
            let name = values(fastest)[*number].0;
            writeln!(f, "{}", self.of_value(name, value.trim(), with, fastest))?;
        }
        // By the key that a refusal begins with, with the first of its words.
        let mut reasons: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        for candidate in candidates {
            if let Verdict::Refused { why } = &candidate.verdict {
                let key = why.split(':').next().unwrap_or_default();
                reasons.entry(key).or_insert((0, why)).0 += 1;
            }
        }
        let mut reasons: Vec<(usize, &str)> = reasons.into_values().collect();
        reasons.sort_by_key(|&(times, _)| std::cmp::Reverse(times));
        let mut words = String::new();
        for (times, why) in reasons.iter().take(REASONS) {
            writeln!(words, "  {times:>6} as {why}")?;
        }
        if !words.is_empty() {
            write!(f, "\nrefused:\n{words}")?;
        }
        Ok(())
    }
}
