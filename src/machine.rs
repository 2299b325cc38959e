//! This machine: how fast its matrix products are, what the system grants this process, and whether a run fits into that.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use contraflow_kernels::isa::instruction_set;
use contraflow_kernels::linear;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::files::objects::cache_dir;
use contraflow_runtime::files::{UNFINISHED_SUFFIX, write_synced};
use contraflow_runtime::layout::{MemoryLimit, recipe_figures};
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::schedule::{RankFigures, size};
use rustix::process::{Resource, Rlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::failure::Failure;
use crate::output::count;

/// Lets this process have as many files open as it may; their number, where there is a limit.
pub fn raise_file_limit() -> Option<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// FLOP/s that this many threads could reach in f32: what MFU is measured against.
///
/// That of one core times the threads. It is measured by CPU time, so that waiting for a core does not count; shared caches and
/// the neighbours of a virtual machine still slow it, by up to a third as seen. So the best that was measured on such a machine
/// before is kept in the cache folder: a busy moment lowers only the first figure of a machine.
pub fn peak(num_threads: usize) -> f64 {
    peak_in(Format::F32, num_threads)
}

/// The same in another format of products.
pub fn peak_in(format: Format, num_threads: usize) -> f64 {
    let now = measured_per_core(format);
    let kept = cache_dir().join("peaks.json");
    let of = if format == Format::F32 { String::new() } else { format!(" {format:?}") };
    let name = format!("{} {}{of}", processor(), instruction_set());
    let best = keep_best(&kept, &name, now).unwrap_or(now);
    best * num_threads as f64
}

/// FLOP per CPU second of a large product on the calling thread.
fn measured_per_core(format: Format) -> f64 {
    const SIZE: usize = 1024;
    /// The best of many is the peak; more than these change little.
    const PRODUCTS: usize = 10;
    let values: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 13) as f32).collect();
    let [dy, w] = [(); 2].map(|()| Tensor::from_vec(&[SIZE, SIZE], values.clone()).to(format));
    let mut best = f64::INFINITY;
    for _ in 0..PRODUCTS {
        let before = thread_cpu_seconds();
        linear::backward_input(&dy, &w);
        best = best.min(thread_cpu_seconds() - before);
    }
    2.0 * (SIZE as f64).powi(3) / best
}

/// How fast this many threads together read from memory, in the best of several times. **Units**: bytes/s.
pub fn read_speed(num_threads: usize) -> f64 {
    /// Of each thread: more than caches hold.
    const VALUES: usize = 64 << 20;
    let parts: Vec<Vec<f32>> = (0..num_threads).map(|_| vec![1.0; VALUES]).collect();
    let sum = |part: &[f32]| {
        let mut sums = [0.0_f32; 64];
        for values in part.chunks_exact(sums.len()) {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        std::hint::black_box(sums);
    };
    let round = || {
        let began = Instant::now();
        std::thread::scope(|scope| parts.iter().for_each(|part| drop(scope.spawn(|| sum(part)))));
        began.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| round()).fold(f64::INFINITY, f64::min);
    (num_threads * VALUES * size_of::<f32>()) as f64 / best
}

/// CPU time of the calling thread so far.
fn thread_cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

/// The model of the processor as the system calls it, where it does.
fn processor() -> String {
    let lines = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = lines.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "unknown processor".into(), |(_, name)| name.trim().to_owned())
}

/// The larger of a figure and what a file keeps under its name; where it is larger the file keeps it from now on. `None` if the
/// file cannot be used: then there is no memory of earlier runs.
fn keep_best(path: &Path, name: &str, now: f64) -> Option<f64> {
    let mut kept: BTreeMap<String, f64> =
        std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let before = kept.get(name).copied().unwrap_or_default();
    // What is written is believed for ever: no more than twice what was just seen.
    if before > now && before < 2.0 * now {
        return Some(before);
    }
    kept.insert(name.to_owned(), now);
    let text = serde_json::to_vec_pretty(&kept).ok()?;
    std::fs::create_dir_all(path.parent()?).ok()?;
    let unfinished = path.with_extension(format!("{}{UNFINISHED_SUFFIX}", std::process::id()));
    write_synced(&unfinished, &text).ok()?;
    std::fs::rename(&unfinished, path).ok()?;
    Some(now)
}

/// Refuses a run whose ranks, all in this process, need more memory than it may use; one that is forced has a warning instead.
pub(crate) fn check_memory(
    recipe: &Recipe,
    limit: Option<MemoryLimit>,
    force: bool,
) -> Result<Option<String>, Failure> {
    let figures = recipe_figures(recipe).map_err(Failure::input)?;
    let topology = recipe.topology();
    // All ranks at one pipeline coordinate need the same.
    let needed = topology.dp_size() as u64 * figures.iter().map(RankFigures::bytes).sum::<u64>();
    match limit {
        Some(MemoryLimit { bytes, by }) if bytes < needed => {
            let (ranks, needed, has) = (topology.world(), size(needed), size(bytes));
            let ranks = if ranks == 1 { "rank".to_owned() } else { count(ranks, "rank") };
            let words = format!(
                "memory: expected at least {needed} for the {ranks} of this run, got {has} ({by}); \
                 contraflow plan shows what each needs"
            );
            if force { Ok(Some(words)) } else { Err(Failure::input(format!("{words}, --force tries it"))) }
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::layout::LimitedBy;
    use contraflow_runtime::recipe::RecipeSource;

    use super::*;

    #[test]
    fn the_best_is_kept_by_machine_and_a_damaged_file_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache").join("peaks.json");
        assert_eq!(keep_best(&path, "a", 90.0), Some(90.0));
        assert_eq!(keep_best(&path, "a", 70.0), Some(90.0), "a busy moment");
        assert_eq!(keep_best(&path, "b", 70.0), Some(70.0), "another machine");
        assert_eq!(keep_best(&path, "a", 95.0), Some(95.0));
        assert_eq!(
            keep_best(&path, "a", 40.0),
            Some(40.0),
            "more than twice as fast was another machine of that name"
        );
        std::fs::write(&path, "{").unwrap();
        assert_eq!(keep_best(&path, "a", 50.0), Some(50.0));
        assert_eq!(dir.path().join("cache").read_dir().unwrap().count(), 1, "nothing unfinished is left");
        // A folder that cannot be made: a file is in its place.
        assert_eq!(keep_best(&path.join("below"), "a", 50.0), None);
    }

    #[test]
    fn a_run_that_does_not_fit_is_refused_with_what_it_needs_and_what_there_is() {
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        let limit = |bytes| Some(MemoryLimit { bytes, by: LimitedBy::Cgroup });
        let reported =
            |bytes| check_memory(&recipe, limit(bytes), false).err().map(|failure| failure.to_string());
        let words = reported(1 << 20).unwrap();
        assert!(words.starts_with("error: memory: expected at least "), "{words}");
        assert!(words.contains(" MiB for the 4 ranks of this run, got 1.0 MiB (its cgroup)"), "{words}");
        assert_eq!(reported(1 << 40), None);
        assert!(check_memory(&recipe, None, false).is_ok_and(|warning| warning.is_none()));
        let warning = check_memory(&recipe, limit(1 << 20), true).unwrap().unwrap();
        assert!(words.contains(&warning), "{warning}");
        assert!(check_memory(&recipe, limit(1 << 40), true).is_ok_and(|warning| warning.is_none()));
    }
}
