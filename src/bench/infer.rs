//! `contraflow bench infer`: how fast a benchmark model reads a prompt and how fast it writes, one sequence at a time.
//!
//! Knows the generator alone; no rank, no data.

use std::fmt;
use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_kernels::sampling::{Sampling, sample};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::infer::generate::{Cache, Generator};
use contraflow_workers::model::precision::Precision;
use serde::Serialize;

use super::rate::Rate;
use super::{cpu_seconds, seeded_ids, with_changes};
use crate::failure::Failure;

/// Tokens in the cache before the first one that is written, and how many are.
const CONTEXT: usize = 128;
const WRITTEN: usize = 32;

/// How fast a prompt is read and a text is written.
#[derive(Debug, Serialize)]
pub(super) struct InferSpeed {
    model: String,
    /// What differs from the model's recipe.
    changes: Vec<String>,
    threads: usize,
    repeats: usize,
    prefill_tokens: usize,
    prefill_tokens_per_second: Rate,
    /// Tokens in the cache before the first one that is written, and behind the last one.
    decode_context: [usize; 2],
    decode_tokens_per_second: Rate,
}

/// Measures both.
///
/// **Errors**: code 2 for a model that is not built in, or changes that its recipe refuses.
pub(super) fn run(
    model: &str,
    threads: usize,
    repeats: usize,
    changes: &[String],
) -> Result<InferSpeed, Failure> {
    let recipe = Recipe::load(&RecipeSource::Builtin(model.to_owned()), changes)?;
    let precision = Precision::of(&recipe.precision);
    let (config, training) = (recipe.model_config, recipe.training);
    let ids = seeded_ids(training.sequence_length, config.vocab_size);
    let generator =
        Generator::fresh(config, precision, training.seed, training.init_std).map_err(Failure::run)?;
    let (prefill, decode) = Threads::new(threads).run(|| {
        let prefill = rate(repeats, ids.len(), || {
            let clock = Clock::start();
            generator.read(&mut Cache::default(), &ids);
            clock.stop()
        });
        (prefill, rate(repeats, WRITTEN, || write(&generator, &ids[..CONTEXT])))
    });
    Ok(InferSpeed {
        model: model.to_owned(),
        changes: changes.to_vec(),
        threads,
        repeats,
        prefill_tokens: ids.len(),
        prefill_tokens_per_second: prefill,
        decode_context: [CONTEXT, CONTEXT + WRITTEN],
        decode_tokens_per_second: decode,
    })
}

impl fmt::Display for InferSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [begin, end] = self.decode_context;
        let model = with_changes(&self.model, &self.changes);
        writeln!(f, "{model}, {} thread(s), {} repeats", self.threads, self.repeats)?;
        writeln!(
            f,
            "prefill of {} tokens, tokens/s: {:.1}",
            self.prefill_tokens, self.prefill_tokens_per_second
        )?;
        writeln!(f, "decode at context {begin} to {end}, tokens/s: {:.1}", self.decode_tokens_per_second)
    }
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

/// Tokens per second over the repeats of one measurement, after one that warms up.
fn rate(repeats: usize, tokens: usize, work: impl Fn() -> Spent) -> Rate {
    work();
    let spent: Vec<Spent> = (0..repeats.max(1)).map(|_| work()).collect();
    let mut cpu: Vec<f64> = spent.iter().map(|spent| spent.cpu).collect();
    cpu.sort_by(f64::total_cmp);
    Rate::new(tokens as f64, spent.iter().map(|spent| spent.wall).collect(), cpu[cpu.len() / 2])
}
