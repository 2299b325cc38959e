//! `contraflow bench infer`: how fast a benchmark model reads a prompt and how fast it writes, one sequence at a time.
//!
//! Knows the generator alone; no rank, no data.

use std::fmt;
use std::time::Instant;

use contraflow_kernels::par::Threads;
use contraflow_kernels::sampling::{Sampling, sample};
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::cost;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::infer::generate::{Cache, Generator};
use contraflow_workers::model::precision::Precision;
use serde::Serialize;

use super::rate::Rate;
use super::{cpu_seconds, seeded_ids, with_changes};
use crate::failure::Failure;
use crate::machine;

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
    /// Of the median, of the products of the peak: 1024 x 1024 in the format of the linear layers on one core, times the threads.
    prefill_share_of_peak: f64,
    peak_gflops: f64,
    /// Tokens in the cache before the first one that is written, and behind the last one.
    decode_context: [usize; 2],
    decode_tokens_per_second: Rate,
    /// Of the median, of what reading each weight that a token needs once would allow.
    decode_share_of_limit: f64,
    decode_bytes_per_token: f64,
    /// How fast the threads read from memory.
    read_bytes_per_second: f64,
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
    let flops = cost::forward_flops_per_token(&config, ids.len());
    // Of the head one row alone is wanted.
    let flops = flops as f64 - cost::head_flops(&config) as f64 * (1.0 - 1.0 / ids.len() as f64);
    let bytes_per_token = weights_per_token(&config) as f64 * bytes_of_a_weight(precision.linear);
    let peak = machine::peak_in(of_products(precision.linear), threads);
    let read_speed = machine::read_speed(threads);
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
        prefill_share_of_peak: prefill.median * flops / peak,
        peak_gflops: peak / 1e9,
        decode_context: [CONTEXT, CONTEXT + WRITTEN],
        decode_tokens_per_second: decode,
        decode_share_of_limit: decode.median * bytes_per_token / read_speed,
        decode_bytes_per_token: bytes_per_token,
        read_bytes_per_second: read_speed,
    })
}

/// Weights of the matrices that one token is multiplied by: each is in one product of a forward pass.
fn weights_per_token(config: &ModelConfig) -> u64 {
    // Without scores and values, which are products with the cache.
    let core = config.num_hidden_layers as u64 * cost::attention_core_flops(config, 1);
    (cost::forward_flops_per_token(config, 1) - core) / 2
}

/// As a generator holds it. **Units**: bytes.
fn bytes_of_a_weight(format: Format) -> f64 {
    Tensor::zeros_in(format, &[128, 128]).num_bytes() as f64 / (128.0 * 128.0)
}

/// Of products with weights of this format.
fn of_products(format: Format) -> Format {
    if format == Format::F32 { Format::F32 } else { Format::BF16 }
}

impl fmt::Display for InferSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [begin, end] = self.decode_context;
        let model = with_changes(&self.model, &self.changes);
        writeln!(f, "{model}, {} thread(s), {} repeats", self.threads, self.repeats)?;
        writeln!(
            f,
            "prefill of {} tokens, tokens/s: {:.1}\n  {:.0}% of {:.0} GFLOP/s",
            self.prefill_tokens,
            self.prefill_tokens_per_second,
            100.0 * self.prefill_share_of_peak,
            self.peak_gflops
        )?;
        writeln!(
            f,
            "decode at context {begin} to {end}, tokens/s: {:.1}\n  {:.0}% of what {:.1} GB/s allow, at {:.1} MB of weights a token",
            self.decode_tokens_per_second,
            100.0 * self.decode_share_of_limit,
            self.read_bytes_per_second / 1e9,
            self.decode_bytes_per_token / 1e6
        )
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
