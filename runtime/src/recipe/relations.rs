//! What the values of a recipe must be to one another and to the model.

use super::sections::{Accumulation, BYTE_TOKENS, GradientScales, NumberFormat};
use super::{Recipe, own_plan};
use crate::faults::Faults;
use crate::files::objects::Location;
use crate::schedule::ScheduleKind;

/// Whether these keys of the model are what its file says: a key that is wrong, or a file that is not there, has a stand-in.
fn knows(faults: &Faults, keys: &[&str]) -> bool {
    let is_wrong = |key: &&str| !faults.spare(&[&format!("model.config.{key}"), &format!("model.{key}")]);
    faults.more == 0
        && !faults.list.iter().any(|fault| fault.path == "model.config")
        && !keys.iter().any(is_wrong)
}

/// **Errors** (into `faults`): every contradiction between values that are right by themselves.
pub(super) fn check(recipe: &Recipe, faults: &mut Faults) {
    check_axes(recipe, faults);
    check_model(recipe, faults);
    check_studies(recipe, faults);
    check_rates(recipe, faults);
    check_data(recipe, faults);
    check_store(recipe, faults);
    check_validation(recipe, faults);
}

/// What its layout has to be to the model, the batch and the plan.
pub(super) fn check_axes(recipe: &Recipe, faults: &mut Faults) {
    check_stages(recipe, faults);
    check_experts(recipe, faults);
    check_batch(recipe, faults);
    check_ramp(recipe, faults);
}

fn check_stages(recipe: &Recipe, faults: &mut Faults) {
    if !faults.spare(&["parallel.pipeline", "parallel.schedule"]) {
        return;
    }
    let (pipeline, layers) = (recipe.parallel.pipeline, recipe.model_config.num_hidden_layers);
    let (schedule, per_rank) = (recipe.parallel.schedule, recipe.parallel.virtual_stages);
    if per_rank != 2 && !matches!(schedule, ScheduleKind::Interleaved(_)) {
        let expected =
            format!("2, as {schedule} has stages of its own; or parallel.schedule = \"interleaved\"");
        faults.expected("parallel.virtual_stages", expected, per_rank);
    }
    if let Some(plan) = &recipe.own_plan {
        own_plan::check_own(recipe, plan, faults);
    }
    let validated = schedule.validate(pipeline);
    if let Err(message) = validated.or_else(|error| recipe.own_plan.as_ref().map(drop).ok_or(error)) {
        faults.push("parallel.pipeline", message.to_string());
    } else if knows(faults, &["num_hidden_layers"]) && recipe.stages() > layers {
        let expected = format!("at most one stage for each of the {layers} layers of the model");
        let got = format!("{} stages ({} over {pipeline} ranks)", recipe.stages(), recipe.schedule_name());
        faults.expected("parallel.pipeline", expected, got);
    } else if faults.spare(&["parallel.stages"]) && !recipe.parallel.stages.layers().is_empty() {
        check_layers_of_stages(recipe, faults);
    }
}

fn check_layers_of_stages(recipe: &Recipe, faults: &mut Faults) {
    let (counts, stages) = (recipe.parallel.stages.layers(), recipe.stages());
    if counts.len() != stages {
        let schedule = recipe.schedule_name();
        let expected = format!(
            "layers of {stages} stages ({schedule} over {} ranks), balanced or even",
            recipe.parallel.pipeline
        );
        faults.expected("parallel.stages", expected, format!("those of {}", counts.len()));
    }
    let (layers, sum) = (recipe.model_config.num_hidden_layers, counts.iter().sum::<usize>());
    if knows(faults, &["num_hidden_layers"]) && sum != layers {
        faults.expected("parallel.stages", format!("the {layers} layers of the model in all"), sum);
    }
}

fn check_experts(recipe: &Recipe, faults: &mut Faults) {
    let (expert, experts) = (recipe.parallel.expert, recipe.model_config.n_routed_experts);
    let is_known = faults.spare(&["parallel.expert"]) && knows(faults, &["n_routed_experts"]);
    if is_known && experts % expert != 0 {
        faults.expected(
            "parallel.expert",
            format!("a divisor of the model's {experts} routed experts"),
            expert,
        );
    }
}

const BATCH_KEYS: [&str; 5] = [
    "training.global_batch_size",
    "training.micro_batch_size",
    "parallel.expert",
    "parallel.data",
    "parallel.schedule",
];

/// How the unit of the batch comes about.
fn unit_as_text(recipe: &Recipe) -> String {
    let parallel = &recipe.parallel;
    let directions = if recipe.directions() == 2 { " x 2 directions" } else { "" };
    format!(
        "micro_batch_size {} x expert {} x data {}{directions}",
        recipe.training.micro_batch_size, parallel.expert, parallel.data
    )
}

fn check_batch(recipe: &Recipe, faults: &mut Faults) {
    let (batch, unit) = (recipe.training.global_batch_size, recipe.batch_unit());
    if faults.spare(&BATCH_KEYS) && batch % unit != 0 {
        let expected = format!("a multiple of {unit} ({})", unit_as_text(recipe));
        faults.expected("training.global_batch_size", expected, batch);
    }
}

fn check_ramp(recipe: &Recipe, faults: &mut Faults) {
    let training = &recipe.training;
    let keys = ["training.ramp_start_batch_size", "training.ramp_tokens"];
    if !faults.spare(&keys) || !faults.spare(&BATCH_KEYS) {
        return;
    }
    let (start, unit) = (training.ramp_start_batch_size, recipe.batch_unit());
    if training.ramp_tokens == 0 {
        if start != 0 {
            faults.expected("training.ramp_tokens", "above 0 where ramp_start_batch_size is set", 0);
        }
    } else if start < unit || start > training.global_batch_size {
        let expected = format!("from {unit} ({}) to global_batch_size", unit_as_text(recipe));
        faults.expected("training.ramp_start_batch_size", expected, start);
    }
}

fn check_model(recipe: &Recipe, faults: &mut Faults) {
    let model = &recipe.model_config;
    let (length, longest) = (recipe.training.sequence_length, model.max_position_embeddings);
    let is_known = faults.spare(&["training.sequence_length"]) && knows(faults, &["max_position_embeddings"]);
    if is_known && length > longest {
        let expected = format!("at most the model's max_position_embeddings ({longest})");
        faults.expected("training.sequence_length", expected, length);
    }
    // Prepared folders and the weights that training starts from may bring a tokenizer: it is checked where it is read.
    let is_bytes =
        recipe.tokenizer.path.is_empty() && recipe.data.paths.is_empty() && recipe.model.init_dir().is_none();
    let is_known = faults.spare(&["tokenizer.path"]) && knows(faults, &["vocab_size"]);
    if is_bytes && is_known && model.vocab_size < BYTE_TOKENS {
        let expected = format!("at least {BYTE_TOKENS} for the byte tokenizer");
        faults.expected("model.config.vocab_size", expected, model.vocab_size);
    }
    let is_known = faults.spare(&["mtp.weight"]) && knows(faults, &["num_nextn_predict_layers"]);
    if is_known && model.num_nextn_predict_layers == 0 && !recipe.mtp.weight.is_zero() {
        let got = "a weight above 0";
        faults.expected("mtp.weight", "0, as the model has no multi-token prediction", got);
    }
    let is_known = faults.spare(&["balance.bias_speed"]) && knows(faults, &["topk_method", "model_type"]);
    if is_known && !model.has_gate_bias() && !recipe.balance.bias_speed.is_zero() {
        let expected = format!(
            "0, as gates of topk_method \"{}\" have no bias (balance.sequence_alpha balances them)",
            model.topk_method.name()
        );
        faults.expected("balance.bias_speed", expected, "a speed above 0");
    }
}

/// Studies change products of FP8, so there have to be some.
fn check_studies(recipe: &Recipe, faults: &mut Faults) {
    let precision = &recipe.precision;
    if !faults.spare(&["precision.linear", "precision.recipe"]) || precision.linear == NumberFormat::Fp8 {
        return;
    }
    let mut refuse = |key, usual: &str, got: &str| {
        if faults.spare(&[key]) {
            faults.expected(key, format!("\"{usual}\" where precision.linear is not \"fp8\""), got);
        }
    };
    if precision.accumulate != Accumulation::Promoted {
        refuse("precision.accumulate", "promoted", "\"tensor-core\"");
    }
    if precision.gradient_scales != GradientScales::Tile {
        refuse("precision.gradient_scales", "tile", "\"block\"");
    }
}

fn check_rates(recipe: &Recipe, faults: &mut Faults) {
    let lr = &recipe.lr;
    if faults.spare(&["lr.floor", "lr.peak"]) && lr.floor.largest() > lr.peak {
        faults.expected("lr.floor", format!("at most lr.peak ({})", lr.peak), lr.floor.largest());
    }
}

fn check_store(recipe: &Recipe, faults: &mut Faults) {
    let store = recipe.checkpoint.store.as_str();
    let expected = "s3://BUCKET/RUN, gs://BUCKET/RUN, az://CONTAINER/RUN or nothing";
    match Location::parse(store) {
        _ if store.is_empty() => {}
        Some(Ok(location)) if !location.is_web() => {}
        Some(Err(why)) => faults.push("checkpoint.store", why),
        _ => faults.expected("checkpoint.store", expected, format!("{store:?}")),
    }
}

fn check_data(recipe: &Recipe, faults: &mut Faults) {
    let data = &recipe.data;
    if !faults.spare(&["data.paths", "data.weights"]) {
        return;
    }
    let (paths, weights) = (data.paths.len(), data.weights.len());
    if weights != 0 && weights != paths {
        faults.expected("data.weights", format!("one for each of the {paths} paths, or none"), weights);
    }
}

fn check_validation(recipe: &Recipe, faults: &mut Faults) {
    let (validate, sequences) = (&recipe.validate, recipe.training.validation_sequences);
    if faults.spare(&["validate.every", "training.validation_sequences"])
        && validate.every > 0
        && sequences == 0
    {
        let expected = "0 where training.validation_sequences is 0";
        faults.expected("validate.every", expected, validate.every);
    }
    if faults.spare(&["validate.every", "validate.patience"]) && validate.patience > 0 && validate.every == 0
    {
        let expected = "0 where validate.every is 0";
        faults.expected("validate.patience", expected, validate.patience);
    }
}
