//! What the writer of an unknown key may have meant: by spelling, and by the names other trainers use.

use super::keys::KEYS;
use crate::model_config::ModelConfig;

/// Names of torchtitan, Megatron-LM, DeepSpeed and the HF trainer, and what they are called here. Dashes and
/// capitals have been folded.
const ALIASES: &[(&str, &str)] = &[
    ("adam_beta1", "optimizer.beta1"),
    ("adam_beta2", "optimizer.beta2"),
    ("adam_eps", "optimizer.epsilon"),
    ("adam_epsilon", "optimizer.epsilon"),
    ("aux_loss_alpha", "balance.sequence_alpha"),
    ("clip_grad", "optimizer.clip_norm"),
    ("data_parallel_replicate_degree", "parallel.data"),
    ("data_parallel_shard_degree", "parallel.data"),
    ("data_parallel_size", "parallel.data"),
    ("data_path", "data.paths"),
    ("dataset_path", "data.paths"),
    ("eps", "optimizer.epsilon"),
    ("eval_data_path", "data.validation"),
    ("expert_model_parallel_size", "parallel.expert"),
    ("expert_parallel_degree", "parallel.expert"),
    ("expert_parallel_size", "parallel.expert"),
    ("gradient_clipping", "optimizer.clip_norm"),
    ("init_method_std", "training.init_std"),
    ("json_keys", "data.field"),
    ("learning_rate", "lr.peak"),
    ("local_batch_size", "training.micro_batch_size"),
    ("lr", "lr.peak"),
    ("lr_warmup_iters", "lr.warmup_steps"),
    ("lr_warmup_steps", "lr.warmup_steps"),
    ("max_grad_norm", "optimizer.clip_norm"),
    ("max_lr", "lr.peak"),
    ("max_norm", "optimizer.clip_norm"),
    ("max_seq_len", "training.sequence_length"),
    ("max_steps", "training.steps"),
    ("min_lr", "lr.floor"),
    ("moe_aux_loss_coeff", "balance.sequence_alpha"),
    ("moe_router_bias_update_rate", "balance.bias_speed"),
    ("mtp_loss_scaling_factor", "mtp.weight"),
    ("num_threads", "parallel.threads_per_rank"),
    ("omp_num_threads", "parallel.threads_per_rank"),
    ("per_device_train_batch_size", "training.micro_batch_size"),
    ("pipeline_model_parallel_size", "parallel.pipeline"),
    ("pipeline_parallel_degree", "parallel.pipeline"),
    ("pipeline_parallel_microbatch_size", "training.micro_batch_size"),
    ("pipeline_parallel_schedule", "parallel.schedule"),
    ("pipeline_parallel_size", "parallel.pipeline"),
    ("rampup_batch_size", "training.ramp_start_batch_size"),
    ("seq_len", "training.sequence_length"),
    ("seq_length", "training.sequence_length"),
    ("text_column", "data.field"),
    ("text_field", "data.field"),
    ("text_key", "data.field"),
    ("tokenizer_type", "tokenizer.path"),
    ("train_batch_size", "training.global_batch_size"),
    ("train_data_path", "data.paths"),
    ("train_iters", "training.steps"),
    ("train_micro_batch_size_per_gpu", "training.micro_batch_size"),
    ("train_steps", "training.steps"),
    ("valid_data_path", "data.validation"),
    ("validation_split", "data.validation_share"),
];

/// Names that have no key here, and why.
const NOTES: &[(&str, &str)] = &[
    ("context_parallel_degree", NO_SPLIT),
    ("context_parallel_size", NO_SPLIT),
    ("expert_tensor_parallel_degree", NO_SPLIT),
    ("expert_tensor_parallel_size", NO_SPLIT),
    ("gradient_accumulation_steps", FOLLOWS),
    ("layers", IN_MODEL),
    ("mtp_num_layers", IN_MODEL),
    ("num_experts", IN_MODEL),
    ("num_layers", IN_MODEL),
    ("num_microbatches", FOLLOWS),
    ("tensor_model_parallel_size", NO_SPLIT),
    ("tensor_parallel_degree", NO_SPLIT),
];

const FOLLOWS: &str =
    "the number of micro-batches follows: global_batch_size / (micro_batch_size x expert x data)";
const IN_MODEL: &str = "the architecture is in the model: model.<key> sets a key of its config.json";
const NO_SPLIT: &str = "layers are not split across ranks: the axes are parallel.pipeline, expert and data";

/// No key is nearly as long as this, and comparing a longer name takes time for nothing. **Units**: bytes.
const MAX_NAME: usize = 80;

/// Below this likeness a suggestion would puzzle more than help.
const LIKENESS: f64 = 0.7;

/// A hint for an unknown key, as the rest of a sentence; empty where nothing is like it.
pub(super) fn for_key(path: &str) -> String {
    if path.len() > MAX_NAME {
        return String::new();
    }
    let folded = path.trim_start_matches('-').to_lowercase().replace('-', "_");
    let name = folded.rsplit('.').next().unwrap_or(&folded);
    let look_up = |table: &[(&str, &'static str)]| {
        table.iter().find(|(foreign, _)| *foreign == name).map(|&(_, answer)| answer)
    };
    if ModelConfig::keys().iter().any(|key| key == name) {
        return did_you_mean(&format!("model.{name}"));
    }
    if let Some(note) = look_up(NOTES) {
        return format!("; {note}");
    }
    if let Some(key) = folded.strip_prefix("model.").and_then(likest_model_key) {
        return did_you_mean(&format!("model.{key}"));
    }
    let same_name = || KEYS.iter().map(|key| key.path).find(|path| path.ends_with(&format!(".{name}")));
    let known = look_up(ALIASES).or_else(same_name).or_else(|| likest_key(&folded, name));
    known.map_or(String::new(), did_you_mean)
}

/// A hint for an unknown name out of a few; empty where none is like it.
pub(super) fn for_name(name: &str, names: &[&'static str]) -> String {
    let scored = names.iter().map(|&known| (likeness(known, name), known));
    likest(scored).map_or(String::new(), did_you_mean)
}

fn did_you_mean(known: &str) -> String {
    format!("; did you mean `{known}`?")
}

/// The key of a model's `config.json` that is spelled most alike.
fn likest_model_key(name: &str) -> Option<String> {
    let scored = ModelConfig::keys().into_iter().map(|key| (likeness(&key, name), key));
    let (likeness, key) = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness >= LIKENESS).then_some(key)
}

/// The known path whose whole or last part is spelled most alike.
fn likest_key(path: &str, name: &str) -> Option<&'static str> {
    let scored =
        KEYS.iter().map(|key| (likeness(key.path, path).max(likeness(key.parts().1, name)), key.path));
    likest(scored)
}

fn likeness(known: &str, unknown: &str) -> f64 {
    strsim::normalized_damerau_levenshtein(known, unknown)
}

fn likest(scored: impl Iterator<Item = (f64, &'static str)>) -> Option<&'static str> {
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= LIKENESS).then_some(best.1)
}
