//! The totals of a step: what a rank counts while its passes run, and what every rank knows once they are summed over the world.
//!
//! One vector of numbers travels; how it is laid out is known here alone.

use std::collections::BTreeMap;

use contraflow_proto::GradientNorms;
use contraflow_runtime::model_config::ModelConfig;

use super::squares::{SquaresByPlace, gradient_norms};
use crate::checkpoint::saves::SaveWish;

/// What a rank counts while a program runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// This rank's share of the mean loss, in nats per token.
    pub loss: f64,
    /// This rank's share of the mean MTP loss, times lambda.
    pub mtp_loss: f64,
    /// This rank's share of the balance loss, scaled.
    pub balance_loss: f64,
    /// First micro-batch whose loss is not finite.
    pub bad_micro_batch: Option<usize>,
    /// Tokens per expert, per layer, of this rank's tokens.
    pub expert_counts: BTreeMap<usize, Vec<u64>>,
    /// Largest number of chunks with live activations.
    pub peak_live_chunks: usize,
}

impl Totals {
    /// Notes the first micro-batch whose loss is not finite.
    pub fn note_if_bad(&mut self, micro_batch: usize, loss: f64) {
        if !loss.is_finite() {
            self.bad_micro_batch.get_or_insert(micro_batch);
        }
    }
}

/// What a rank was told of an end after the running step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopWish {
    /// All stop after this step.
    pub stops: bool,
    /// The state is kept in memory then, and not written to storage.
    pub in_memory: bool,
}

/// What every rank knows before the verdict on a step, and after it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GlobalTotals {
    /// Mean loss of the global batch.
    pub loss: f64,
    /// Mean MTP loss times lambda.
    pub mtp_loss: f64,
    /// Balance loss, scaled.
    pub balance_loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// The same by the place of the parameters.
    pub gradient_norms: GradientNorms,
    /// Tokens per expert and layer, over the global batch.
    pub expert_counts: BTreeMap<usize, Vec<u64>>,
    /// Some rank was told to stop: this step is the last.
    pub stop: bool,
    /// The ranks stop, and keep the state in memory.
    pub in_memory: bool,
    /// What some rank wants of a save after this step.
    pub save: SaveWish,
    /// Sum of what the ranks have measured on validation sequences before the step, in nats per token; 0 where they have not.
    pub validation_loss: f64,
    /// Whether the run ends after this step, as that has not fallen for long.
    pub ends_early: bool,
    /// Whether no update was made: the watch skipped the batch.
    pub skipped: bool,
    /// Warnings of the stability watch about the step.
    pub warning: Option<String>,
}

impl GlobalTotals {
    /// Whether every number of the step is finite.
    pub fn is_finite(&self) -> bool {
        [self.loss, self.mtp_loss, self.balance_loss, self.grad_norm].iter().all(|total| total.is_finite())
    }
}

/// How the numbers lie: squares of the gradient by place, losses, the wish to stop and those about saves, the validation loss,
/// tokens per expert of each layer.
#[derive(Clone, Copy, Debug)]
pub struct TotalsLayout {
    /// Routed experts of the model.
    pub num_experts: usize,
    /// Layers of the model, MTP included.
    pub num_layers: usize,
}

impl TotalsLayout {
    /// Of a model.
    pub fn of(config: &ModelConfig) -> Self {
        let num_layers = config.num_hidden_layers + config.num_nextn_predict_layers;
        TotalsLayout { num_experts: config.n_routed_experts, num_layers }
    }

    /// What a rank gives into the sum.
    pub fn encode(
        &self,
        squares: SquaresByPlace,
        totals: &Totals,
        (StopWish { stops, in_memory }, save): (StopWish, SaveWish),
        validation_loss: f64,
    ) -> Vec<f64> {
        let mut numbers = squares.into_sums();
        numbers.extend([totals.loss, totals.mtp_loss, totals.balance_loss]);
        numbers.extend([stops, in_memory, save.skips, save.retries].map(|wish| f64::from(u8::from(wish))));
        numbers.push(validation_loss);
        let first_count = numbers.len();
        numbers.resize(first_count + self.num_experts * self.num_layers, 0.0);
        for (&layer, counts) in &totals.expert_counts {
            let of_layer = numbers[first_count + layer * self.num_experts..].iter_mut();
            of_layer.zip(counts).for_each(|(number, &count)| *number = count as f64);
        }
        numbers
    }

    /// What a rank gets out of the sum, with the expert counts of `layers`.
    ///
    /// # Panics
    /// If the numbers are fewer than the layout says.
    pub fn decode(&self, sums: &[f64], layers: impl Iterator<Item = usize>) -> GlobalTotals {
        let (squares, rest) = sums.split_at(SquaresByPlace::len(self.num_layers));
        let (&[loss, mtp_loss, balance_loss, stop, in_memory, skips, retries, validation_loss], counts) =
            rest.split_first_chunk().expect("the losses follow the squares");
        let counts_of = |layer: usize| {
            let counts = &counts[layer * self.num_experts..(layer + 1) * self.num_experts];
            (layer, counts.iter().map(|&count| count as u64).collect())
        };
        GlobalTotals {
            grad_norm: squares.iter().sum::<f64>().sqrt(),
            gradient_norms: gradient_norms(squares),
            loss,
            mtp_loss,
            balance_loss,
            expert_counts: layers.map(counts_of).collect(),
            stop: stop > 0.0,
            in_memory: in_memory > 0.0,
            save: SaveWish { skips: skips > 0.0, retries: retries > 0.0 },
            validation_loss,
            ends_early: false,
            skipped: false,
            warning: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ranks_put_in_comes_out_as_the_sum() {
        let layout = TotalsLayout { num_experts: 3, num_layers: 2 };
        let totals = |loss: f64, layer: usize, counts: [u64; 3]| Totals {
            loss,
            mtp_loss: 2.0 * loss,
            balance_loss: 4.0 * loss,
            expert_counts: BTreeMap::from([(layer, counts.to_vec())]),
            ..Totals::default()
        };
        let squares = |place: usize, square: f64| {
            let mut squares = SquaresByPlace::new(2);
            squares.add(&[(place, square)]);
            squares
        };
        let wish = SaveWish { skips: false, retries: true };
        let one = layout.encode(squares(1, 9.0), &totals(0.5, 1, [1, 2, 3]), Default::default(), 1.5);
        let stop = StopWish { stops: true, in_memory: true };
        let other = layout.encode(squares(3, 16.0), &totals(0.25, 1, [4, 0, 7]), (stop, wish), 0.25);
        assert_eq!(one.len(), 4 + 8 + 6);
        let sums: Vec<f64> = one.iter().zip(&other).map(|(one, other)| one + other).collect();
        let global = layout.decode(&sums, [0, 1].into_iter());
        assert_eq!((global.loss, global.mtp_loss, global.balance_loss), (0.75, 1.5, 3.0));
        assert_eq!((global.grad_norm, global.stop, global.save), (5.0, true, wish));
        assert!(global.in_memory);
        assert_eq!(global.validation_loss, 1.75);
        let norms = GradientNorms { embedding: 0.0, layers: vec![3.0, 0.0], head: 4.0 };
        assert_eq!(global.gradient_norms, norms);
        assert_eq!(global.expert_counts, BTreeMap::from([(0, vec![0; 3]), (1, vec![5, 2, 10])]));
        assert!(global.is_finite() && !layout.decode(&one, std::iter::empty()).stop);
    }
}
