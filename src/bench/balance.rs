//! `contraflow bench balance`: how even the experts' load is, with loss-free balancing off and on.

use std::fmt;

use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Corpus, PackedDataset};
use serde::Serialize;

use super::train_quietly;
use crate::failure::Failure;

/// Both runs.
#[derive(Debug, Serialize)]
pub(super) struct BalanceFigures {
    steps: usize,
    off: MeanMaxVio,
    on: MeanMaxVio,
}

/// Means over the steps of a quarter and the layers.
#[derive(Debug, Serialize)]
struct MeanMaxVio {
    second_quarter: f64,
    last_quarter: f64,
}

/// **Errors**: code 1 if a run fails.
pub(super) fn run(steps: usize) -> Result<BalanceFigures, Failure> {
    let corpus = Corpus::load_default();
    Ok(BalanceFigures {
        steps,
        off: train(&corpus, steps, &["balance.bias_speed=0".to_owned()])?,
        on: train(&corpus, steps, &[])?,
    })
}

fn train(corpus: &Corpus, steps: usize, overrides: &[String]) -> Result<MeanMaxVio, Failure> {
    let common = [
        format!("training.steps={steps}"),
        "balance.sequence_alpha=0".to_owned(),
        "checkpoint.save_model=false".to_owned(),
    ];
    let overrides = [&common[..], overrides].concat();
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".to_owned()), &overrides)?;
    let length = recipe.training.sequence_length;
    let datasets = Datasets {
        train: PackedDataset::pack(&corpus.train, length),
        validation: PackedDataset::pack(&corpus.validation, length),
    };
    let (records, _) = train_quietly(recipe, datasets)?;
    let mean = |part: &[StepRecord]| part.iter().map(mean_max_vio).sum::<f64>() / part.len().max(1) as f64;
    let quarter = (records.len() / 4).max(1);
    let second = &records[quarter.min(records.len())..(2 * quarter).min(records.len())];
    Ok(MeanMaxVio {
        second_quarter: mean(second),
        last_quarter: mean(&records[records.len().saturating_sub(quarter)..]),
    })
}

impl fmt::Display for BalanceFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, MeanMaxVio { second_quarter, last_quarter }) in [("off", &self.off), ("on", &self.on)] {
            writeln!(
                f,
                "balance {what}: MaxVio {second_quarter:.2} in the second quarter, {last_quarter:.2} in the last"
            )?;
        }
        Ok(())
    }
}
