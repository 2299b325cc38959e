//! `contraflow bench infer`: how fast a benchmark model reads a prompt and how fast it writes, one sequence at a time.
//!
//! Knows the generator alone; no rank, no data.

use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_kernels::sampling::{Sampling, sample};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::infer::generate::{Cache, Generator};

use super::{cpu_seconds, seeded_ids};
use crate::failure::Failure;
use crate::output::print;

/// Tokens in the cache before the first one that is written, and how many are.
const CONTEXT: usize = 128;
const WRITTEN: usize = 32;

/// Measures both and prints the figures.
///
/// **Errors**: code 2 for a model that is not built in.
pub fn run(model: &str, threads: usize, repeats: usize) -> Result<(), Failure> {
    let recipe = Recipe::load(&RecipeSource::Builtin(model.to_owned()), &[])?;
    let (config, training) = (recipe.model_config, recipe.training);
    let ids = seeded_ids(training.sequence_length, config.vocab_size);
    let generator = Generator::fresh(config, training.seed, training.init_std).map_err(Failure::run)?;
    let (prefill, decode) = Threads::new(threads).run(|| {
        let prefill = Figure::of(repeats, ids.len(), || {
            let clock = Clock::start();
            generator.read(&mut Cache::default(), &ids);
            clock.stop()
        });
        (prefill, Figure::of(repeats, WRITTEN, || write(&generator, &ids[..CONTEXT])))
    });
    let end = CONTEXT + WRITTEN;
    print(&format!(
        "{model}, {threads} thread(s), {repeats} repeats\n\
         prefill of {} tokens, tokens/s: {prefill}\n\
         decode at context {CONTEXT} to {end}, tokens/s: {decode}\n",
        ids.len(),
    ))
}

/// The time to write after a prompt, that of the prompt itself not counted.
fn write(generator: &Generator, prompt: &[u32]) -> Spent {
    let mut cache = Cache::default();
    let mut logits = generator.read(&mut cache, prompt);
    let clock = Clock::start();
    for _ in 0..WRITTEN {
        let token = sample(logits.view(0..logits.len()), Sampling { temperature: 0.0, top_p: 1.0 }, 0.0);
        logits = generator.read(&mut cache, &[token]);
    }
    clock.stop()
}

/// **Units**: seconds, by the wall and of the process's CPU time.
struct Spent {
    wall: f64,
    cpu: f64,
}

struct Clock {
    wall: Instant,
    cpu: f64,
}

impl Clock {
    fn start() -> Clock {
        Clock { cpu: cpu_seconds(), wall: Instant::now() }
    }

    fn stop(self) -> Spent {
        Spent { wall: self.wall.elapsed().as_secs_f64(), cpu: cpu_seconds() - self.cpu }
    }
}

/// Tokens per second over the repeats of one measurement.
struct Figure {
    median: f64,
    best: f64,
    per_cpu_second: f64,
}

impl Figure {
    fn of(repeats: usize, tokens: usize, work: impl Fn() -> Spent) -> Figure {
        work();
        let spent: Vec<Spent> = (0..repeats.max(1)).map(|_| work()).collect();
        let sorted = |seconds: fn(&Spent) -> f64| {
            let mut seconds: Vec<f64> = spent.iter().map(seconds).collect();
            seconds.sort_by(f64::total_cmp);
            seconds
        };
        let (wall, cpu) = (sorted(|spent| spent.wall), sorted(|spent| spent.cpu));
        let (middle, tokens) = (wall.len() / 2, tokens as f64);
        Figure { median: tokens / wall[middle], best: tokens / wall[0], per_cpu_second: tokens / cpu[middle] }
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Figure { median, best, per_cpu_second } = self;
        write!(f, "{median:.1} median, {best:.1} best; {per_cpu_second:.1} per CPU second")
    }
}
