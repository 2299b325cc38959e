//! Evidence: what was not finite in a step, by rank and published name, and the one sentence that says it.
//!
//! Every rank looks through its own tensors; the findings travel as numbers, with places in the published list of weights
//! for names, so that each rank ends up with the evidence of all. Knows names, ranks and the file that it is left in, no
//! tensors.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{UNFINISHED_SUFFIX, sync_dir, write_synced};

/// The file in the folder of a run or job that holds the evidence of the step that ended its training.
pub const EVIDENCE_FILE: &str = "evidence.json";

/// A published tensor with values that are not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BadTensor {
    /// Place in the published list of weights: embedding, layers, final norm and head, multi-token prediction.
    pub place: usize,
    /// How many values.
    pub num_values: u64,
}

/// What one rank has found among its own tensors, by place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// First weight.
    pub weight: Option<BadTensor>,
    /// First micro-batch whose loss is not finite.
    pub micro_batch: Option<usize>,
    /// First gradient, of the rank's own tokens.
    pub first_gradient: Option<BadTensor>,
    /// Last gradient. Errors flow from the last layer to the first: if all losses are finite, it is where it began.
    pub last_gradient: Option<BadTensor>,
    /// Gradients with such values, counted as published tensors.
    pub num_gradients: u64,
}

/// Numbers that a [`Found`] takes up.
pub const FOUND_LEN: usize = 8;

impl Found {
    /// As numbers: 0 for nothing, places counted from 1.
    pub fn to_numbers(&self) -> [f64; FOUND_LEN] {
        let tensor = |bad: Option<BadTensor>| {
            bad.map_or([0.0; 2], |bad| [bad.place as f64 + 1.0, bad.num_values as f64])
        };
        let [weight, weight_values] = tensor(self.weight);
        let [first, first_values] = tensor(self.first_gradient);
        let [last, last_values] = tensor(self.last_gradient);
        let micro_batch = self.micro_batch.map_or(0.0, |micro_batch| micro_batch as f64 + 1.0);
        let count = self.num_gradients as f64;
        [weight, weight_values, micro_batch, first, first_values, last, last_values, count]
    }

    /// Back from [`to_numbers`](Self::to_numbers).
    pub fn from_numbers(numbers: [f64; FOUND_LEN]) -> Self {
        let [weight, weight_values, micro_batch, first, first_values, last, last_values, count] = numbers;
        let counted_from_one = |number: f64| (number as usize).checked_sub(1);
        let tensor = |number: f64, num_values: f64| {
            let place = counted_from_one(number)?;
            Some(BadTensor { place, num_values: num_values as u64 })
        };
        Found {
            weight: tensor(weight, weight_values),
            micro_batch: counted_from_one(micro_batch),
            first_gradient: tensor(first, first_values),
            last_gradient: tensor(last, last_values),
            num_gradients: count as u64,
        }
    }
}

/// A tensor that is not finite, named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedTensor {
    /// Published name.
    pub name: String,
    /// Its layer; `None` for embedding, final norm and head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Values that are not finite.
    pub num_values: u64,
}

/// What one rank has found, by name. A rank that has found nothing is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankEvidence {
    /// The rank that saw it.
    pub rank: usize,
    /// See [`Found::weight`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<NamedTensor>,
    /// See [`Found::micro_batch`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// See [`Found::first_gradient`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_gradient: Option<NamedTensor>,
    /// See [`Found::last_gradient`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_gradient: Option<NamedTensor>,
    /// See [`Found::num_gradients`].
    pub num_gradients: u64,
}

/// A sequence of the batch, in the order of the batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceEvidence {
    /// Which data-parallel ranks read it.
    pub dp_rank: usize,
    /// In which of their micro-batches.
    pub micro_batch: usize,
    /// Its number in the training part of the data.
    pub sequence: usize,
    /// Number of the path that it is from, where `data.weights` sets their shares; else 0.
    pub source: usize,
    /// First and last document of that source's training part that it has a part of, counted from 0.
    pub documents: [usize; 2],
}

/// Everything that is known about a step that is not finite or has a spike. [`Display`](fmt::Display) is the one sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Optimizer update that was not made.
    pub step: u64,
    /// Mean loss of the global batch, as text: JSON has no NaN.
    pub loss: String,
    /// Global gradient norm, as text.
    pub grad_norm: String,
    /// By rank.
    pub ranks: Vec<RankEvidence>,
    /// The batch. Rank 0 has it written; it does not travel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sequences: Vec<SequenceEvidence>,
}

impl Evidence {
    /// Names what the ranks have found. `names` is the published list of weights.
    pub fn new(step: u64, (loss, grad_norm): (f64, f64), found: &[Found], names: &[String]) -> Self {
        let named = |bad: &Option<BadTensor>| {
            bad.map(|bad| {
                let name = names.get(bad.place).cloned().unwrap_or_default();
                NamedTensor { layer: layer_of(&name), name, num_values: bad.num_values }
            })
        };
        let by_rank = found.iter().enumerate().filter(|(_, found)| **found != Found::default());
        let ranks = by_rank.map(|(rank, found)| RankEvidence {
            rank,
            weight: named(&found.weight),
            micro_batch: found.micro_batch,
            first_gradient: named(&found.first_gradient),
            last_gradient: named(&found.last_gradient),
            num_gradients: found.num_gradients,
        });
        Evidence {
            step,
            loss: loss.to_string(),
            grad_norm: grad_norm.to_string(),
            ranks: in_order(ranks.collect(), names),
            sequences: Vec::new(),
        }
    }

    /// Writes [`EVIDENCE_FILE`], synced, in place of one of an earlier step; returns its path.
    ///
    /// **Errors**: what the system says.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        let path = dir.join(EVIDENCE_FILE);
        let part = dir.join(format!("{EVIDENCE_FILE}{UNFINISHED_SUFFIX}"));
        write_synced(&part, format!("{}\n", serde_json::to_string_pretty(self)?).as_bytes())?;
        std::fs::rename(part, &path)?;
        sync_dir(dir)?;
        Ok(path)
    }
}

/// In the order of the published list: by weight, by gradient, then by rank.
fn in_order(mut ranks: Vec<RankEvidence>, names: &[String]) -> Vec<RankEvidence> {
    let place = |tensor: &Option<NamedTensor>| {
        let name = tensor.as_ref().map(|tensor| &tensor.name);
        name.and_then(|name| names.iter().position(|other| other == name)).unwrap_or(usize::MAX)
    };
    ranks.sort_by_key(|found| (place(&found.weight), place(&found.first_gradient), found.rank));
    ranks
}

/// The layer in a published name.
pub fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

fn tensor_label(what: &str, rank: usize, tensor: &NamedTensor) -> String {
    let NamedTensor { name, layer, num_values } = tensor;
    let layer = layer.map_or_else(String::new, |layer| format!(" (layer {layer})"));
    let values =
        if *num_values == 1 { "1 value that is".into() } else { format!("{num_values} values that are") };
    format!("{what} {name} on rank {rank}{layer} has {values} not finite")
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = |words: fn(&RankEvidence) -> Option<String>| self.ranks.iter().find_map(words);
        let weight = first(|at| at.weight.as_ref().map(|tensor| tensor_label("weight", at.rank, tensor)));
        let losses = self.ranks.iter().filter_map(|at| Some((at.micro_batch?, at.rank))).min();
        let loss = losses.map(|(micro_batch, rank)| {
            format!("the loss of micro-batch {micro_batch} on rank {rank} is not finite")
        });
        let gradient =
            first(|at| at.first_gradient.as_ref().map(|tensor| tensor_label("gradient of", at.rank, tensor)));
        let found: Vec<String> = [weight, loss, gradient].into_iter().flatten().collect();
        let found = match found.as_slice() {
            [] => format!(
                "the gradient norm is {} and the loss {}, though every tensor of every rank is finite",
                self.grad_norm, self.loss
            ),
            found => found.join("; "),
        };
        write!(f, "step {}: {found}", self.step)
    }
}
