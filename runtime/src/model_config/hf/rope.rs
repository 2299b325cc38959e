//! The rotary settings of an HF `config.json`, wherever the file has them.
//!
//! Published checkpoints write `rope_theta` beside `rope_scaling`; newer files put everything into `rope_parameters`;
//! edited files mix the two. What counts is what counts in transformers 5: `rope_scaling`, unless it is empty, before
//! `rope_parameters`; a `rope_theta` inside before one beside; `rope_type` before `type`; `max_position_embeddings` where
//! YaRN has no `original_max_position_embeddings`. Statements that contradict what counts are refused, and so is every
//! key inside that is not known, because nothing says that it leaves the numbers alone. The older spelling is written.

#[cfg(test)]
mod tests;

use serde_json::{Value, json};

use super::{ConfigReader, POSITIONS};
use crate::model_config::Yarn;

/// Base of the rotary frequencies of a file that has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Keys that stretch the context, and mean nothing without a type that does so.
const SCALING_KEYS: [&str; 7] =
    ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"];

/// The other keys that may stand inside.
const PLAIN_KEYS: [&str; 5] =
    ["rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"];

const ORIGINAL: &str = "original_max_position_embeddings";

/// Where theta may stand.
const THETA_PATHS: [&str; 3] = ["rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"];

/// What `rope_scaling` or `rope_parameters` says.
struct Settings {
    key: &'static str,
    theta: Option<f64>,
    yarn: Option<Yarn>,
}

/// Where the original context of YaRN is given, if not inside.
#[derive(Clone, Copy)]
struct Outside {
    /// `original_max_position_embeddings` beside.
    original: Option<usize>,
    /// `max_position_embeddings`.
    longest: usize,
}

/// Theta and scaling. Faults are noted in `file`.
pub(super) fn read(file: &mut ConfigReader, max_position_embeddings: usize) -> (f64, Option<Yarn>) {
    refuse_partial(file);
    let original = file.optional_count(ORIGINAL, POSITIONS);
    let outside = Outside { original, longest: max_position_embeddings };
    let scaling = section(file, ("rope_scaling", "rope_scaling."), outside);
    let parameters = section(file, ("rope_parameters", "rope_parameters."), outside);
    let (counts, other) = match (scaling, parameters) {
        (None, parameters) => (parameters, None),
        both => both,
    };
    let theta = theta(file, counts.as_ref(), other.as_ref());
    let yarn = counts.and_then(|settings| settings.yarn);
    let ignored = other.and_then(|settings| settings.yarn);
    if ignored.is_some() && ignored != yarn && file.faults.spare(&["rope_scaling", "rope_parameters"]) {
        let expected = "the scaling of rope_scaling, which counts where both are given";
        file.fault("rope_parameters", expected, file.given("rope_parameters"));
    }
    if yarn.is_some() && theta <= 1.0 && file.faults.spare(&THETA_PATHS) {
        file.faults.expected("rope_theta", "a number above 1 with YaRN", theta);
    }
    (theta, yarn)
}

/// Theta, from inside what counts or from beside it; the other statements must agree.
fn theta(file: &mut ConfigReader, counts: Option<&Settings>, other: Option<&Settings>) -> f64 {
    let beside = file.given("rope_theta").map(|_| file.positive("rope_theta", None));
    let inside = counts.and_then(|settings| settings.theta);
    let theta = inside.or(beside).unwrap_or(DEFAULT_THETA);
    if inside.is_none() && beside.is_none() && file.object.contains_key("rope_theta") {
        file.fault("rope_theta", "a number above 0", Some(&Value::Null));
    }
    if !file.faults.spare(&THETA_PATHS) {
        return theta;
    }
    let source = match (counts, beside) {
        (Some(Settings { key, theta: Some(_), .. }), _) => format!("as {key}.rope_theta says"),
        (_, Some(_)) => "as rope_theta says".to_owned(),
        _ => "the default, as rope_scaling counts and has none".to_owned(),
    };
    let ignored = other.and_then(|settings| Some((format!("{}.rope_theta", settings.key), settings.theta?)));
    let statements = beside.map(|beside| ("rope_theta".to_owned(), beside)).into_iter().chain(ignored);
    for (path, got) in statements.filter(|(_, got)| *got != theta) {
        file.faults.expected(path, format!("{theta}, {source}"), got);
    }
    theta
}

/// What one of the two objects says; `None` if it is not given or, as in transformers, empty.
fn section(
    file: &mut ConfigReader,
    (key, prefix): (&'static str, &'static str),
    outside: Outside,
) -> Option<Settings> {
    let given = file.given(key)?;
    let Value::Object(object) = given else {
        file.fault(key, "an object", Some(given));
        return None;
    };
    if object.is_empty() {
        return None;
    }
    let mut section = ConfigReader { object, prefix, faults: std::mem::take(&mut file.faults) };
    let theta = section.given("rope_theta").map(|_| section.positive("rope_theta", None));
    let yarn = scaling(&mut section, outside);
    file.faults = section.faults;
    Some(Settings { key, theta, yarn })
}

fn scaling(section: &mut ConfigReader, outside: Outside) -> Option<Yarn> {
    let (newer, older) = (section.given("rope_type"), section.given("type"));
    if let (Some(newer), Some(older)) = (newer, older)
        && newer != older
    {
        section.fault("type", &format!("{newer}, as rope_type says"), Some(older));
        return None;
    }
    let key = if newer.is_some() { "rope_type" } else { "type" };
    match newer.or(older) {
        None => refuse_scaling(section, "nothing without a rope_type"),
        Some(kind) if kind == "default" => refuse_scaling(section, "nothing with rope_type \"default\""),
        Some(kind) if kind == "yarn" => {
            refuse_unknown(section);
            return Some(yarn(section, outside));
        }
        // The other types have keys of their own.
        Some(kind) => section.fault(key, "\"yarn\" or \"default\"", Some(kind)),
    }
    None
}

/// Refuses keys that would stretch the context if the type did not say that nothing does.
fn refuse_scaling(section: &mut ConfigReader, expected: &str) {
    refuse_unknown(section);
    for key in SCALING_KEYS {
        if let Some(given) = section.given(key) {
            section.fault(key, expected, Some(given));
        }
    }
}

fn refuse_unknown(section: &mut ConfigReader) {
    refuse_partial(section);
    let known = [&SCALING_KEYS[..], &PLAIN_KEYS].concat();
    for (key, value) in
        section.object.iter().filter(|(key, value)| !value.is_null() && !known.contains(&key.as_str()))
    {
        section.fault(key, &format!("no key but {}", known.join(", ")), Some(value));
    }
}

/// A part of each head's rotary columns that is not turned is not built.
fn refuse_partial(reader: &mut ConfigReader) {
    const KEY: &str = "partial_rotary_factor";
    if let Some(given) = reader.given(KEY).filter(|given| given.as_f64() != Some(1.0)) {
        reader.fault(KEY, "1, the only form that is supported", Some(given));
    }
}

fn yarn(section: &mut ConfigReader, outside: Outside) -> Yarn {
    if let Some(given) = section.given("attention_factor") {
        section.fault("attention_factor", "null, the only form that is supported", Some(given));
    }
    // Null does not stand for the default here: transformers takes it for false.
    if let Some(given) = section.object.get("truncate").filter(|&given| *given != json!(true)) {
        section.fault("truncate", "true, the only form that is supported", Some(given));
    }
    let mscale = section.given("mscale").map(|_| section.number("mscale", None));
    let mscale_all_dim = section.given("mscale_all_dim").map(|_| section.number("mscale_all_dim", None));
    Yarn {
        factor: section.positive("factor", None),
        beta_fast: section.positive("beta_fast", Some(32.0)),
        beta_slow: section.positive("beta_slow", Some(1.0)),
        mscale,
        mscale_all_dim,
        original_max_position_embeddings: original(section, outside),
    }
}

fn original(section: &mut ConfigReader, outside: Outside) -> usize {
    let inside = section.optional_count(ORIGINAL, POSITIONS);
    if let (Some(inside), Some(beside)) = (inside, outside.original)
        && inside != beside
    {
        let expected = format!("{beside}, as {ORIGINAL} beside says");
        section.fault(ORIGINAL, &expected, section.given(ORIGINAL));
    }
    inside.or(outside.original).unwrap_or(outside.longest)
}

/// `rope_scaling` of a model with YaRN.
pub(super) fn scaling_json(yarn: &Yarn) -> Value {
    let mut scaling = json!({
        "type": "yarn",
        "factor": yarn.factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
    });
    let temperature = [("mscale", yarn.mscale), ("mscale_all_dim", yarn.mscale_all_dim)];
    for (key, value) in temperature.into_iter().filter_map(|(key, value)| Some((key, value?))) {
        scaling[key] = json!(value);
    }
    scaling
}
