//! What a page shows of a run, as JSON: one function a page, each from the state of a [`Shown`] alone. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::history::{FIGURES, History, Sample, figure};
use super::shown::{Facts, Shown, State};
use super::thin::{Axis, thinned};

/// Points of a plot that does not say how many it has room for.
const POINTS: usize = 1_200;

/// Most points of one answer.
const MAX_POINTS: usize = 10_000;

/// Steps by which the rest of a run is estimated.
const WINDOW: usize = 20;

/// A run in a list.
pub fn entry(shown: &Shown) -> Value {
    let facts = &shown.facts;
    shown.read(|state| {
        let history = &state.history;
        json!({
            "id": facts.id, "name": facts.name, "phase": state.phase, "outcome": state.outcome,
            "step": history.step(), "steps": facts.steps, "loss": number(history, "loss"),
            "validation_loss": number(history, "validation_loss"), "seconds_left": seconds_left(facts, history),
        })
    })
}

/// What stands above the plots of a run, which has checkpoints of these steps.
pub fn overview(shown: &Shown, checkpoints: &[u64]) -> Value {
    let facts = &shown.facts;
    let recipe = facts.recipe.as_ref();
    let layout = recipe.map(|recipe| {
        let parallel = &recipe.parallel;
        json!({
            "pipeline": parallel.pipeline, "expert": parallel.expert, "data": parallel.data,
            "world": recipe.topology().world(), "schedule": parallel.schedule.to_string(), "model": recipe.model.config,
            "layers": recipe.model_config.num_hidden_layers, "experts": recipe.model_config.n_routed_experts,
            "sequence_length": recipe.training.sequence_length, "batch": recipe.training.global_batch_size,
        })
    });
    shown.read(|state| {
        let history = &state.history;
        let figures: Vec<Value> = FIGURES
            .iter()
            .map(|figure| {
                let last = history.last(figure.key);
                json!({"key": figure.key, "title": figure.title, "unit": figure.unit, "last": last.map(|(_, value)| value),
                    "at": last.map(|(step, _)| step)})
            })
            .collect();
        let last = history.points().last();
        let (skipped, rollbacks, warnings) = history.counts();
        json!({
            "id": facts.id, "name": facts.name, "phase": state.phase, "outcome": state.outcome,
            "step": history.step(), "steps": facts.steps, "generation": history.generation(),
            "tokens": last.map_or(0, |last| last.tokens), "seconds": last.map_or(0.0, |last| last.seconds),
            "unix_ms": last.map(|last| last.unix_ms), "seconds_left": seconds_left(facts, history),
            "planned_memory": facts.planned_memory(), "planned_ranks": facts.planned_ranks, "peak_memory": Some(history.peak_memory()).filter(|bytes| *bytes > 0),
            "skipped": skipped, "rollbacks": rollbacks, "warnings": warnings, "layout": layout, "figures": figures,
            "annotations": history.annotations(), "checkpoints": checkpoints, "has_plan": facts.plan.is_some(), "has_recording": state.timelines.is_some() && last.is_some(),
            "has_loads": !history.latest().loads.is_empty() || history.samples().iter().any(|sample| !sample.loads.is_empty()),
        })
    })
}

fn number(history: &History, key: &str) -> Option<f64> {
    history.last(key).map(|(_, value)| value)
}

/// By the time of the latest steps; none for a run that makes none.
fn seconds_left(facts: &Facts, history: &History) -> Option<f64> {
    let points = history.points();
    let recent = &points[points.len().saturating_sub(WINDOW)..];
    let (first, last) = (recent.first()?, recent.last()?);
    let left = facts.steps?.saturating_sub(last.step) as f64;
    let made = (recent.len() - 1) as f64;
    (made > 0.0).then(|| left * (last.seconds - first.seconds) / made)
}

/// Which part of a history is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct SeriesQuery {
    /// Keys of figures.
    pub figures: Vec<String>,
    /// What stands on the axis.
    pub axis: Axis,
    /// The first and the last place on it.
    pub range: (f64, f64),
    /// How many points are wanted.
    pub points: usize,
}

impl SeriesQuery {
    /// From the parameters of a request.
    ///
    /// **Errors**: every parameter that makes no sense.
    pub fn parse(parameters: &BTreeMap<String, String>) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let text = |key: &str| parameters.get(key).map(String::as_str).filter(|text| !text.is_empty());
        let figures: Vec<String> = text("figures").unwrap_or("loss").split(',').map(str::to_owned).collect();
        for unknown in figures.iter().filter(|key| figure(key).is_none()) {
            let known: Vec<&str> = FIGURES.iter().map(|figure| figure.key).collect();
            faults.push(format!("figures: expected some of {}, got {unknown:?}", known.join(", ")));
        }
        let axis = text("axis").map_or(Some(Axis::Step), Axis::parse);
        if axis.is_none() {
            faults.push("axis: expected step, tokens or time".to_owned());
        }
        let mut place = |key: &str, otherwise: f64| match text(key).map(str::parse::<f64>) {
            None => otherwise,
            Some(Ok(place)) if !place.is_nan() => place,
            Some(_) => {
                faults.push(format!("{key}: expected a number"));
                otherwise
            }
        };
        let range = (place("from", f64::NEG_INFINITY), place("to", f64::INFINITY));
        let points = match text("points").map(str::parse::<usize>) {
            None => POINTS,
            Some(Ok(points)) if (1..=MAX_POINTS).contains(&points) => points,
            Some(_) => {
                faults.push(format!("points: expected 1 to {MAX_POINTS}"));
                POINTS
            }
        };
        match axis {
            Some(axis) if faults.is_empty() => Ok(SeriesQuery { figures, axis, range, points }),
            _ => Err(faults),
        }
    }
}

/// Figures of a run over an axis; `null` is a gap.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Series {
    /// Places on the axis.
    x: Vec<f64>,
    /// Steps there.
    step: Vec<u64>,
    /// Values, by key.
    figures: BTreeMap<String, Vec<Option<f32>>>,
    /// Steps in the range, of which these are the ones to show.
    of: usize,
}

/// The series.
pub fn series(shown: &Shown, query: &SeriesQuery) -> Series {
    shown.read(|state| {
        let points = state.history.points();
        let begin = points.partition_point(|point| query.axis.of(point) < query.range.0);
        let end = points.partition_point(|point| query.axis.of(point) <= query.range.1).max(begin);
        // One more on either side: a line goes on beyond what is seen of it.
        let points = &points[begin.saturating_sub(1)..(end + 1).min(points.len())];
        let places: Vec<usize> = query.figures.iter().filter_map(|key| figure(key)).collect();
        let chosen = thinned(points, &places, query.points);
        let of = |place: usize| {
            let value = |&index: &usize| Some(points[index].values[place]).filter(|value| value.is_finite());
            chosen.iter().map(value).collect()
        };
        Series {
            x: chosen.iter().map(|&index| query.axis.of(&points[index])).collect(),
            step: chosen.iter().map(|&index| points[index].step).collect(),
            figures: query.figures.iter().cloned().zip(places.iter().map(|&place| of(place))).collect(),
            of: points.len(),
        }
    })
}

/// Load of the experts at a step (the latest if none is named), and of one layer over the sampled steps.
pub fn experts(shown: &Shown, layer: Option<u32>, step: Option<u64>) -> Value {
    shown.read(|state| {
        let history = &state.history;
        let loaded = |sample: &&Sample| !sample.loads.is_empty();
        let at = match step {
            Some(step) => history.samples().iter().filter(loaded).min_by_key(|sample| sample.step.abs_diff(step)),
            None => Some(history.latest()).filter(loaded).or_else(|| history.samples().iter().rev().find(loaded)),
        };
        let loads: Vec<Value> = at.into_iter().flat_map(|sample| &sample.loads).map(load).collect();
        let layer = layer.or_else(|| at?.loads.first().map(|(layer, _)| *layer));
        let over_time: Vec<Value> = history
            .samples()
            .iter()
            .filter_map(|sample| {
                let (_, counts) = sample.loads.iter().find(|(own, _)| Some(*own) == layer)?;
                Some(json!({"step": sample.step, "counts": counts}))
            })
            .collect();
        let vio: Vec<Value> = history
            .samples()
            .iter()
            .map(|sample| json!({"step": sample.step, "layers": BTreeMap::from_iter(sample.max_vio.iter().copied())}))
            .collect();
        json!({
            "step": at.map(|sample| sample.step), "layers": loads, "layer": layer, "over_time": over_time, "max_vio": vio,
            "steps": history.samples().iter().filter(loaded).map(|sample| sample.step).collect::<Vec<_>>(),
            "not_recorded": ["gate biases by step", "bytes across nodes per token"],
        })
    })
}

fn load((layer, counts): &(u32, Vec<u64>)) -> Value {
    let max_vio = contraflow_orchestrator::metrics::record::max_vio(counts);
    let idle = counts.iter().filter(|count| **count == 0).count();
    json!({"layer": layer, "counts": counts, "max_vio": max_vio, "idle": idle})
}

/// Norms of the gradient by layer over the sampled steps.
pub fn layers(shown: &Shown) -> Value {
    shown.read(|state| {
        let samples: Vec<&Sample> =
            state.history.samples().iter().filter(|sample| !sample.norms.is_empty()).collect();
        let parts = samples.last().map_or(0, |last| last.norms.len());
        let name = |part: usize| match part {
            0 => "embedding".to_owned(),
            last if last + 1 == parts => "head".to_owned(),
            layer => format!("layer {}", layer - 1),
        };
        json!({
            "names": (0..parts).map(name).collect::<Vec<_>>(),
            "samples": samples.iter().map(|sample| json!({"step": sample.step, "norms": sample.norms})).collect::<Vec<_>>(),
            "not_recorded": ["norms of the weights", "update-to-weight ratios", "outliers of activations",
                "saturation and underflow of FP8 tensors"],
        })
    })
}

/// The first line of a run's values, separated by commas: names of the columns.
pub fn csv_head() -> String {
    let keys: Vec<&str> = FIGURES.iter().map(|figure| figure.key).collect();
    format!("step,tokens,training_seconds,unix_ms,{}\n", keys.join(","))
}

/// The next so many steps after one with every figure, as comma-separated values, and the last of these steps; an empty field is a gap.
/// None behind the last step.
pub fn csv_rows(shown: &Shown, after: u64, most: usize) -> Option<(String, u64)> {
    shown.read(|state| {
        let points = state.history.since(after);
        let points = &points[..points.len().min(most)];
        let last = points.last()?.step;
        let mut text = String::with_capacity(128 * points.len());
        for point in points {
            // Writing to a string does not fail.
            let _ = write!(text, "{},{},{},{}", point.step, point.tokens, point.seconds, point.unix_ms);
            for value in point.values {
                let _ = if value.is_finite() { write!(text, ",{value}") } else { write!(text, ",") };
            }
            text.push('\n');
        }
        Some((text, last))
    })
}

/// Texts that a run has generated, the latest first.
pub fn samples(shown: &Shown) -> Vec<Value> {
    const MOST: usize = 20;
    let Some(folder) = &shown.facts.folder else { return Vec::new() };
    let text = contraflow_runtime::files::read_to_string(&folder.join("samples.jsonl")).unwrap_or_default();
    text.lines().rev().filter_map(|line| serde_json::from_str(line).ok()).take(MOST).collect()
}

/// Whether a run may still make steps, as far as is known.
pub fn is_open(state: &State) -> bool {
    use super::shown::Phase;
    matches!(state.phase, Phase::Loading | Phase::Queued | Phase::Starting | Phase::Training)
}

#[cfg(test)]
mod tests {
    use contraflow_orchestrator::metrics::record::StepRecord;
    use contraflow_proto::{GradientNorms, LayerLoad};

    use super::*;

    fn shown(steps: u64) -> std::sync::Arc<Shown> {
        let shown = Shown::starting(Facts { id: "r".into(), steps: Some(100), ..Facts::default() });
        for step in 1..=steps {
            shown.step(&StepRecord {
                step,
                tokens: 10,
                seconds: 2.0,
                loss: if step == 3 { f64::NAN } else { 1.0 / step as f64 },
                loads: vec![LayerLoad { layer: 1, counts: vec![3, 1, 0, step] }],
                max_vio: BTreeMap::from([(1, 0.5)]),
                gradient_norms: Some(GradientNorms { embedding: 1.0, layers: vec![2.0, 3.0], head: 4.0 }),
                ..StepRecord::default()
            });
        }
        shown
    }

    fn query(pairs: &[(&str, &str)]) -> Result<SeriesQuery, Vec<String>> {
        SeriesQuery::parse(
            &pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        )
    }

    #[test]
    fn an_overview_has_the_latest_figures_and_says_how_long_it_will_take() {
        let overview = overview(&shown(5), &[2, 4]);
        assert_eq!(
            (&overview["step"], &overview["tokens"], &overview["seconds"]),
            (&json!(5), &json!(50), &json!(10.0))
        );
        assert_eq!(overview["seconds_left"], json!(190.0), "95 steps of 2 s");
        assert_eq!(overview["checkpoints"], json!([2, 4]));
        assert_eq!(overview["figures"][0]["unit"], "nats/token");
        assert_eq!((&overview["phase"], &overview["has_loads"]), (&json!("training"), &json!(true)));
        assert_eq!(entry(&shown(0))["seconds_left"], Value::Null);
    }

    #[test]
    fn a_series_is_of_the_range_that_is_asked_for_and_what_is_no_number_is_a_gap() {
        let asked =
            query(&[("figures", "loss,seconds"), ("axis", "tokens"), ("from", "25"), ("to", "41")]).unwrap();
        let series = series(&shown(6), &asked);
        // Tokens 30 and 40 are in the range; one more on either side.
        assert_eq!((series.step, series.x), (vec![2, 3, 4, 5], vec![20.0, 30.0, 40.0, 50.0]));
        assert_eq!(series.figures["loss"], [Some(0.5), None, Some(0.25), Some(0.2)]);
        assert_eq!(series.figures["seconds"], [Some(2.0); 4]);
    }

    #[test]
    fn every_parameter_that_makes_no_sense_is_named_at_once() {
        let pairs = [("figures", "loss,x"), ("axis", "depth"), ("from", "now"), ("points", "0")];
        let faults = query(&pairs).unwrap_err();
        let keys: Vec<&str> = faults.iter().map(|fault| fault.split(':').next().unwrap()).collect();
        assert_eq!(keys, ["figures", "axis", "from", "points"]);
        assert!(faults[0].contains("got \"x\""), "{faults:?}");
        assert_eq!(query(&[]).unwrap().points, POINTS);
    }

    #[test]
    fn experts_are_shown_at_a_step_and_over_time_and_those_without_a_token_are_counted() {
        let view = experts(&shown(4), None, Some(2));
        assert_eq!((&view["step"], &view["layer"]), (&json!(2), &json!(1)));
        assert_eq!(
            (&view["layers"][0]["counts"], &view["layers"][0]["idle"]),
            (&json!([3, 1, 0, 2]), &json!(1))
        );
        assert_eq!(view["over_time"].as_array().unwrap().len(), 4);
        assert_eq!(experts(&shown(4), None, None)["step"], 4);
        let empty = experts(&shown(0), None, None);
        assert_eq!((&empty["step"], &empty["layers"]), (&Value::Null, &json!([])));
    }

    #[test]
    fn layers_have_their_names() {
        let view = layers(&shown(2));
        assert_eq!(view["names"], json!(["embedding", "layer 0", "layer 1", "head"]));
        assert_eq!(view["samples"][1]["norms"], json!([1.0, 2.0, 3.0, 4.0]));
    }
}
