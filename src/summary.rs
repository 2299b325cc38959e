//! What a finished run leaves and says: summary.json, the comparison with simple compressors, a sample.

use std::time::Instant;

use contraflow_orchestrator::metrics::record::mean_max_vio;
use contraflow_runtime::checkpoint::CheckpointFolder;
use contraflow_runtime::cost;
use contraflow_workers::data::Baselines;
use contraflow_workers::data::batches::{Datasets, Predicted, validation_index};
use contraflow_workers::engine::plans::validation_shape;
use serde::Serialize;

use crate::failure::Failure;
use crate::generate;
use crate::output::{count, escaped, print, quoted, say};
use crate::progress::hms;
use crate::run::{Run, Tally};

/// What is left of a run in summary.json.
#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    steps: u64,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    /// Absent where the run was faster than the peak.
    mfu: Option<f64>,
    flops_per_token: f64,
    peak_gflops: f64,
    bubble_share: f64,
    oversubscribed: bool,
    final_loss: f64,
    /// Whether it ended before its last step, as the validation did not improve any more.
    ended_early: bool,
    /// Lowest validation loss of the training, and after which step.
    best_validation_loss: Option<f64>,
    best_validation_step: Option<u64>,
    max_vio: f64,
    /// In nats per token.
    validation_loss: Option<f64>,
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
    /// What the sample begins with.
    sample_prompt: String,
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
        let best = self.best_validation(&tally);
        let tokens_per_second = tally.tokens as f64 / tally.seconds.max(1e-9);
        let flops = tokens_per_second * self.frame.flops_per_token;
        let peak = self.frame.peak_flops;
        let summary = Summary {
            name: self.name.clone(),
            steps: tally.last.step.max(self.position().step),
            tokens: self.position().tokens + tally.tokens,
            seconds: began.elapsed().as_secs_f64(),
            tokens_per_second,
            mfu: utilization(flops, peak),
            flops_per_token: self.frame.flops_per_token,
            peak_gflops: peak / 1e9,
            bubble_share: tally.bubble / (tally.steps.max(1) as f64),
            oversubscribed: self.frame.oversubscribed,
            final_loss: tally.last.loss,
            ended_early: tally.last.ends_early,
            best_validation_loss: best.map(|(loss, _)| loss),
            best_validation_step: best.map(|(_, step)| step),
            max_vio: mean_max_vio(&tally.last),
            validation_loss: tally.validation_loss,
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
            schedule: self.recipe.schedule_name(),
            sample_prompt: self.sample_prompt(datasets),
        };
        let text = serde_json::to_string_pretty(&summary).map_err(|error| Failure::run(error.to_string()))?;
        self.write("summary.json", &format!("{text}\n"))?;
        self.print_figures(&summary, self.no_validation(datasets))
    }

    /// Lowest validation loss that was measured while the run trained or at its end, and after which step.
    fn best_validation(&self, tally: &Tally) -> Option<(f64, u64)> {
        let at_end = tally.validation_loss.map(|loss| (loss, tally.last.step));
        tally.best_validation.into_iter().chain(at_end).min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Of the default corpus something that its text has often; of a user's own text its first words.
    pub(crate) fn sample_prompt(&self, datasets: &Datasets) -> String {
        if !self.recipe.sample.prompt.is_empty() {
            return self.recipe.sample.prompt.clone();
        }
        if self.recipe.data.paths.is_empty() {
            return generate::SAMPLE_PROMPT.to_owned();
        }
        let text = [&datasets.validation, &datasets.train].into_iter().find(|part| part.num_sequences() > 0);
        let beginning = text.map(|part| self.text.tokenizer.decode(&part.sequence(0).0)).unwrap_or_default();
        generate::opening(&beginning).unwrap_or_else(|| generate::SAMPLE_PROMPT.to_owned())
    }

    /// The yardsticks, where the same bytes can be read by them: bytes as tokens, in memory, documents not apart.
    fn baselines(&self, datasets: &Datasets, taken: usize, available: usize) -> Option<Baselines> {
        let ids: Vec<usize> = (0..taken).map(|place| validation_index(place, taken, available)).collect();
        let comparable = self.text.tokenizer.json().is_none() && self.recipe.data.attend_across_documents;
        if comparable && taken > 0 {
            say("measuring what n-grams and zstd make of the same bytes");
        }
        comparable.then(|| Baselines::measure(&datasets.train, &datasets.validation, &ids)).flatten()
    }

    /// The results, on stdout.
    fn print_figures(&self, summary: &Summary, no_validation: Option<String>) -> Result<(), Failure> {
        let crowded = if summary.oversubscribed { " (oversubscribed)" } else { "" };
        let mtp = if self.recipe.model_config.num_nextn_predict_layers > 0 { ", with MTP" } else { "" };
        let mfu = summary.mfu.map_or_else(
            || "MFU n/a: faster than the measured peak".to_owned(),
            |mfu| format!("MFU {:.0}% of {:.0} GFLOP/s", 100.0 * mfu, summary.peak_gflops),
        );
        let mut text = format!(
            "{}, {} in {}, last loss {:.3}\n{:.0} tokens/s, {mfu} ({:.1} MFLOP per token: causal{mtp}), \
             bubble {:.0}%{crowded}\n",
            count(summary.steps, "step"),
            count(summary.tokens, "token"),
            hms(summary.seconds),
            summary.final_loss,
            summary.tokens_per_second,
            summary.flops_per_token / 1e6,
            100.0 * summary.bubble_share,
        );
        if summary.ended_early {
            text += &format!(
                "ended before step {}: the validation loss did not improve any more (validate.patience)\n",
                self.frame.steps
            );
        }
        if let (Some(loss), Some(step)) = (summary.best_validation_loss, summary.best_validation_step)
            && self.recipe.validate.every > 0
        {
            text += &format!(
                "lowest validation loss {loss:.4} nats per token, after step {step}{}\n",
                self.kept(step)
            );
        }
        if let Some(note) = no_validation {
            text += &format!("{note}\n");
        }
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
            say("writing a sample");
            let prompt = &summary.sample_prompt;
            let sample = generate::sample(&self.dir.join("model"), prompt, self.recipe.training.seed)?;
            text += &format!("a sample, after \"{}\":\n", escaped(prompt.trim_end()));
            escaped(&sample).lines().for_each(|line| text += &format!("  | {line}\n"));
            let (dir, model) = (quoted(self.dir.display()), self.dir.join("model"));
            let is_given = !self.recipe.data.paths.is_empty() || !self.recipe.sample.prompt.is_empty();
            let next = if is_given { prompt.as_str() } else { "impl " };
            text += &format!(
                "next: contraflow generate {dir} --prompt {}   (weights in HF format: {})\n",
                quoted(next),
                model.display()
            );
        }
        print(&text)
    }

    /// Where the state after a step is kept as a checkpoint, if it is.
    fn kept(&self, step: u64) -> String {
        let dir = CheckpointFolder::of_run(&self.dir).committed(step);
        if dir.is_dir() { format!(": {}", dir.display()) } else { String::new() }
    }
}

/// The share of the peak that was reached; none where it is above all of it, so that the peak was not the peak.
fn utilization(reached: f64, peak: f64) -> Option<f64> {
    let share = reached / peak;
    (share <= 1.0).then_some(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_above_the_whole_is_none() {
        assert_eq!((utilization(50.0, 100.0), utilization(100.0, 100.0)), (Some(0.5), Some(1.0)));
        assert_eq!((utilization(111.0, 100.0), utilization(1.0, 0.0)), (None, None));
    }
}
