//! What a finished run leaves and says: summary.json, the comparison with simple compressors, a sample.

use std::time::Instant;

use contraflow_orchestrator::metrics::record::mean_max_vio;
use contraflow_runtime::cost;
use contraflow_workers::data::Baselines;
use contraflow_workers::data::batches::{Datasets, Predicted, validation_index};
use contraflow_workers::engine::plans::validation_shape;
use serde::Serialize;

use crate::failure::Failure;
use crate::generate;
use crate::output::{print, quoted};
use crate::progress::minutes;
use crate::run::{Run, Tally};

/// What is left of a run in summary.json.
#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    steps: u64,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    mfu: f64,
    flops_per_token: f64,
    peak_gflops: f64,
    bubble_share: f64,
    oversubscribed: bool,
    final_loss: f64,
    max_vio: f64,
    validation_bits_per_byte: Option<f64>,
    validation_bytes: usize,
    baseline_bigram_bits_per_byte: Option<f64>,
    baseline_trigram_bits_per_byte: Option<f64>,
    baseline_zstd_bits_per_byte: Option<f64>,
    corpus: String,
    corpus_hash: String,
    parameters: u64,
    active_parameters: u64,
    world: usize,
    schedule: String,
}

impl Run {
    /// Measures the baselines, writes the summary and says it.
    ///
    /// **Errors**: a file cannot be written.
    pub fn finish(&self, datasets: &Datasets, tally: Tally, began: Instant) -> Result<(), Failure> {
        let available = datasets.validation.num_sequences();
        let taken = validation_shape(&self.recipe, available).map_or(0, |shape| shape.global_batch);
        let across = self.recipe.data.attend_across_documents;
        let predicted = Predicted::count(datasets, taken, &self.text.tokenizer, across);
        let baselines = self.baselines(datasets, taken, available);
        let parameters = cost::parameters(&self.recipe.model_config);
        let tokens_per_second = tally.tokens as f64 / tally.seconds.max(1e-9);
        let summary = Summary {
            name: self.name.clone(),
            steps: self.frame.steps,
            tokens: self.position().tokens + tally.tokens,
            seconds: began.elapsed().as_secs_f64(),
            tokens_per_second,
            mfu: tokens_per_second * self.frame.flops_per_token / self.frame.peak_flops,
            flops_per_token: self.frame.flops_per_token,
            peak_gflops: self.frame.peak_flops / 1e9,
            bubble_share: tally.bubble / (tally.steps.max(1) as f64),
            oversubscribed: self.frame.oversubscribed,
            final_loss: tally.last.loss,
            max_vio: mean_max_vio(&tally.last),
            validation_bits_per_byte: tally.validation_loss.and_then(|loss| predicted.bits_per_byte(loss)),
            validation_bytes: predicted.bytes,
            baseline_bigram_bits_per_byte: baselines.map(|b| b.bigram_bits_per_byte),
            baseline_trigram_bits_per_byte: baselines.map(|b| b.trigram_bits_per_byte),
            baseline_zstd_bits_per_byte: baselines.map(|b| b.zstd_bits_per_byte),
            corpus: self.text.corpus.name.clone(),
            corpus_hash: self.text.corpus.hash.clone(),
            parameters: parameters.total + parameters.mtp,
            active_parameters: parameters.active,
            world: self.recipe.topology().world(),
            schedule: self.recipe.parallel.schedule.to_string(),
        };
        let text = serde_json::to_string_pretty(&summary).map_err(|error| Failure::run(error.to_string()))?;
        self.write("summary.json", &format!("{text}\n"))?;
        self.print_figures(&summary)
    }

    /// The yardsticks, where the same bytes can be read by them: bytes as tokens, in memory, documents not apart.
    fn baselines(&self, datasets: &Datasets, taken: usize, available: usize) -> Option<Baselines> {
        let ids: Vec<usize> = (0..taken).map(|place| validation_index(place, taken, available)).collect();
        let comparable = self.text.tokenizer.json().is_none() && self.recipe.data.attend_across_documents;
        comparable.then(|| Baselines::measure(&datasets.train, &datasets.validation, &ids)).flatten()
    }

    /// The results, on stdout.
    fn print_figures(&self, summary: &Summary) -> Result<(), Failure> {
        let crowded = if summary.oversubscribed { " (oversubscribed)" } else { "" };
        let mut text = format!(
            "{} steps, {} tokens in {}\n{:.0} tokens/s, MFU {:.0}% of {:.0} GFLOP/s ({:.1} MFLOP per token: causal, with MTP), \
             bubble {:.0}%{crowded}\n",
            summary.steps,
            summary.tokens,
            minutes(summary.seconds),
            summary.tokens_per_second,
            100.0 * summary.mfu,
            summary.peak_gflops,
            summary.flops_per_token / 1e6,
            100.0 * summary.bubble_share,
        );
        if let Some(bits) = summary.validation_bits_per_byte {
            text += &format!(
                "validation on {} bytes of {}, bits per byte:\n  this model    {bits:.3}\n",
                summary.validation_bytes, summary.corpus,
            );
            let baselines = [
                ("byte bigram ", summary.baseline_bigram_bits_per_byte),
                ("byte trigram", summary.baseline_trigram_bits_per_byte),
                ("zstd -19    ", summary.baseline_zstd_bits_per_byte),
            ];
            for (name, bits) in baselines {
                text += &bits.map_or(String::new(), |bits| format!("  {name}  {bits:.3}\n"));
            }
            if summary.baseline_zstd_bits_per_byte.is_none() {
                text += "  (n-gram and zstd baselines are for bytes as tokens, from one text in memory)\n";
            }
        }
        if self.recipe.checkpoint.save_model {
            let sample = generate::sample(&self.dir.join("model"), self.recipe.training.seed)?;
            text += &format!("a sample, after \"{}\":\n", generate::SAMPLE_PROMPT.trim_end());
            sample.lines().for_each(|line| text += &format!("  | {line}\n"));
            let (run, dir) = (quoted(&self.dir), self.dir.display());
            text += &format!(
                "next: contraflow generate {run} --prompt \"impl \"   (weights in HF format: {dir}/model)\n"
            );
        }
        print(&text)
    }
}
