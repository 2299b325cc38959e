//! Measuring a model on one rank: the forward pass of training over sequences, with the losses summed and the experts counted.
//!
//! The components are those that train; nothing is kept for a backward pass. Knows no files and no actors.

use std::collections::BTreeMap;
use std::path::Path;

use contraflow_kernels::cross_entropy::{Targets, logits};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::sampling::{Sampling, sample};
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{embedding, norm};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::generate::{Generator, arrivals};
use crate::data::sequences::Sequences;
use crate::error::RankError;
use crate::hf::weights::file_error;
use crate::model::head::{self, LossHead};
use crate::model::micro_batch::{LossScales, MicroBatch};
use crate::model::{Layer, attention, expert_counts, experts, ffn, mtp};

/// Every sequence counts as it is: sums, not means.
const SUMS: LossScales =
    LossScales { denominator: 1.0, mtp_denominator: 0.0, mtp_weight: 0.0, balance: 0.0, batch_balance: 0.0 };

/// What has been measured so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Sum of the losses of the targets that count.
    ///
    /// **Units**: nats.
    pub nats: f64,
    /// How many targets counted.
    pub num_targets: f64,
    /// How many tokens were read.
    pub num_tokens: u64,
    /// Tokens per expert, per layer.
    pub expert_counts: BTreeMap<usize, Vec<u64>>,
}

impl Evaluation {
    /// Mean loss.
    ///
    /// **Units**: nats per target that counted.
    pub fn loss(&self) -> f64 {
        self.nats / self.num_targets
    }
}

/// How many tokens multi-token prediction proposed, and how many of them the model would have written itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Tokens that would have been taken.
    pub accepted: u64,
    /// Tokens that were proposed.
    pub proposed: u64,
}

impl Generator {
    /// What speculative decoding without sampling would accept: at each place of the text multi-token prediction proposes the token
    /// after next, and the model writes one after it has read the next. Nothing is proposed by a model without such a block.
    ///
    /// **Source**: report, section 5.4.3.
    pub fn acceptance(&self, sequences: Sequences) -> Acceptance {
        let length = sequences.sequence_length;
        let batch = MicroBatch::new(&self.arch, sequences, &SUMS);
        let (stage, head, dense) = (&self.model.stages[0], self.head(), &self.model.dense);
        let Some(block) = &stage.mtp else { return Acceptance { accepted: 0, proposed: 0 } };
        let normed =
            norm::forward(&self.hidden(&batch, &mut BTreeMap::new()), dense.weight(head.norm), head.eps);
        let written = most_likely(&logits(&normed, dense.weight(head.head)));
        let (joined, _) = mtp::forward(&self.arch, block, dense, &batch.targets, normed);
        let x = self.trained_layer(&block.layer, joined, &batch, &mut BTreeMap::new());
        let proposed = norm::forward(&x, dense.weight(block.norm), head.eps);
        let proposed = most_likely(&logits(&proposed, dense.weight(head.head)));
        let by_sequence = written.chunks_exact(length).zip(proposed.chunks_exact(length));
        let pairs = by_sequence.flat_map(|(written, proposed)| written[1..].iter().zip(proposed));
        let accepted = pairs.clone().filter(|(written, proposed)| written == proposed).count();
        Acceptance { accepted: accepted as u64, proposed: pairs.count() as u64 }
    }

    /// The first token id that the model has no row for, and where it is.
    pub fn unknown_id(&self, ids: &[u32]) -> Option<(usize, u32)> {
        let vocabulary = self.vocab_size();
        ids.iter().copied().enumerate().find(|&(_, id)| id as usize >= vocabulary)
    }

    /// Adds some sequences to what has been measured. The ids are known to the model ([`Generator::unknown_id`]).
    pub fn measure(&self, sequences: Sequences, evaluation: &mut Evaluation) {
        evaluation.num_tokens += sequences.ids.len() as u64;
        evaluation.num_targets += sequences.loss_weight();
        let batch = MicroBatch::new(&self.arch, sequences, &SUMS);
        let x = self.hidden(&batch, &mut evaluation.expert_counts);
        let targets = Targets { ids: &batch.targets, weights: &batch.loss_weights };
        let (loss, _) = head::evaluate(self.head(), &self.model.dense, &x, &targets);
        evaluation.nats += loss.sum;
    }

    /// The logits of every position. The ids are known to the model.
    ///
    /// **Shapes**: output `[T, V]`.
    pub fn logits(&self, sequences: Sequences) -> Tensor {
        let batch = MicroBatch::new(&self.arch, sequences, &SUMS);
        let (head, dense) = (self.head(), &self.model.dense);
        let x = self.hidden(&batch, &mut BTreeMap::new());
        logits(&norm::forward(&x, dense.weight(head.norm), head.eps), dense.weight(head.head))
    }

    /// Writes `input_ids` `[N, S]` and `logits` `[N, S, V]` of some sequences as a safetensors file.
    ///
    /// **Errors**: what the system says, with the path.
    pub fn write_logits(&self, path: &Path, sequences: Sequences) -> Result<(), RankError> {
        let length = sequences.sequence_length;
        let shape = vec![sequences.ids.len() / length, length];
        let ids: Vec<i64> = sequences.ids.iter().map(|&id| i64::from(id)).collect();
        let logits = self.logits(sequences);
        let values = logits.parts().next().expect("values in F32 are one part");
        let wide = [shape.as_slice(), &[self.vocab_size()]].concat();
        let views = [
            ("input_ids", TensorView::new(Dtype::I64, shape, bytemuck::cast_slice(&ids))),
            ("logits", TensorView::new(Dtype::F32, wide, values)),
        ];
        let views = views.map(|(name, view)| (name, view.expect("the shapes are those of the data")));
        let bytes = serialize(views, None).expect("two tensors of known size");
        std::fs::write(path, bytes).map_err(file_error(path))
    }

    fn head(&self) -> LossHead {
        let head = self.model.stages[0].head.as_ref().expect("the only stage has the head");
        LossHead { norm: head.norm, head: head.head, eps: self.arch.eps() }
    }

    /// The residual stream after the last layer.
    fn hidden(&self, batch: &MicroBatch, counts: &mut BTreeMap<usize, Vec<u64>>) -> Tensor {
        let stage = &self.model.stages[0];
        let table = stage.embedding.expect("the only stage has the embedding");
        let mut x = embedding::forward(&batch.ids, self.model.dense.weight(table));
        for layer in &stage.layers {
            x = self.trained_layer(layer, x, batch, counts);
        }
        x
    }

    /// One layer in the order of a training step: attention, shared expert, routed experts.
    fn trained_layer(
        &self,
        layer: &Layer,
        x: Tensor,
        batch: &MicroBatch,
        counts: &mut BTreeMap<usize, Vec<u64>>,
    ) -> Tensor {
        let (arch, dense) = (&self.arch, &self.model.dense);
        let (attended, _) = attention::forward(arch, &layer.attention, dense, x, batch);
        let (mut output, _) =
            ffn::forward(&self.arch, &layer.ffn, dense, &attended.normed, &attended.residual);
        if let (Some(routing), Some(weights)) = (attended.routing, &layer.experts) {
            expert_counts::count(counts, layer.index, &routing);
            let rows = arrivals(attended.normed, &routing);
            let (routed, _) = experts::forward(&self.arch, weights, &self.model.experts, rows);
            add_into(&mut output, &routed);
        }
        output
    }
}

/// The token of each row that is written without sampling.
fn most_likely(logits: &Tensor) -> Vec<u32> {
    const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0 };
    let width = logits.cols();
    let row = |row: usize| logits.view(row * width..(row + 1) * width);
    (0..logits.rows()).map(|index| sample(row(index), GREEDY, 0.0)).collect()
}
