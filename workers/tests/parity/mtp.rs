//! Multi-token prediction: its block, its loss, and the gradients of both losses together.
//!
//! The truth has one row less per sequence, as the last position has no next token to join; ours is there and weighs
//! nothing, and no earlier row sees it.

use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::Tensor;
use contraflow_workers::data::batches::TaskKind;

use crate::findings::{ACTIVATIONS, Findings, LOGITS, LOSS};
use crate::fixture::Fixture;
use crate::forward::Walk;
use crate::gradients::compare;
use crate::one_rank::{Batch, OneRank, PLAIN, ways};

/// The batch and the loss's weight, where the fixture has multi-token prediction.
fn task(fixture: &Fixture) -> Option<(Vec<Vec<u32>>, f64)> {
    fixture.config.mtp_layer()?;
    let weight = fixture.values.get("mtp.lambda").map_or(0.3, |lambda| lambda.scalar());
    Some((fixture.sequences()?, weight))
}

pub fn forward(fixture: &Fixture, findings: &mut Findings) {
    let Some((rows, weight)) = task(fixture) else { return };
    let layer = fixture.config.num_hidden_layers;
    let walk = Walk::new(OneRank::load(fixture.config.clone(), &fixture.dir, PLAIN.schedule), &rows, weight);
    let block_output = &walk.outputs[&layer];
    let (_, logits) = walk.through_head(walk.rank.stages[0].mtp.as_ref().unwrap().norm, block_output);
    let has_next = |token: usize| !(token + 1).is_multiple_of(rows[0].len());
    let kept = |tensor: &Tensor| -> Vec<f32> {
        let rows = tensor.values::<f32>().chunks(tensor.cols()).enumerate();
        rows.filter(|&(row, _)| has_next(row)).flat_map(|(_, values)| values.to_vec()).collect()
    };
    let loss = walk.totals.mtp_loss / weight;
    for (name, truth) in fixture.under("mtp.").filter(|(name, _)| !name.starts_with("grad.")) {
        let (key, values) = (format!("mtp.{name}"), &truth.values);
        let mut losses = |found: f64| findings.compare("mtp losses", &key, values, &[found as f32], LOSS);
        match name {
            "loss" => losses(loss),
            "main_loss" => losses(walk.totals.loss),
            "total_loss" => losses(walk.totals.loss + walk.totals.mtp_loss),
            "logits" => findings.compare("mtp logits", &key, values, &kept(&logits), LOGITS),
            "h_prime" => {
                findings.compare(
                    "mtp block input",
                    &key,
                    values,
                    &kept(walk.joined.as_ref().unwrap()),
                    ACTIVATIONS,
                );
            }
            "block_output" => {
                findings.compare("mtp block output", &key, values, &kept(block_output), ACTIVATIONS)
            }
            "topk_indices" | "topk_weights" => walk.compare_choice(findings, &key, truth, layer, has_next),
            // Ours is the loss of the hidden state after the final norm; what the other reading gives must be another.
            "loss_if_h_before_final_norm" => {
                let other = truth.scalar();
                findings.check((loss - other).abs() > 1e-4, || {
                    format!("{loss} is the loss without the final norm")
                });
            }
            "lambda" => {}
            _ => findings.unknown(&key),
        }
    }
}

pub fn gradients(fixture: &Fixture, findings: &mut Findings) {
    let Some((rows, weight)) = task(fixture) else { return };
    for variant in ways(&fixture.config) {
        let mut rank = OneRank::load(fixture.config.clone(), &fixture.dir, variant.schedule);
        let totals = rank.run(TaskKind::Train, 1, &Batch::new(&rows, variant, weight), |_, _| {});
        if let Some(truth) = fixture.values.get("mtp.loss") {
            let found = (totals.mtp_loss / weight) as f32;
            findings.compare("mtp loss in training", "mtp.loss", &truth.values, &[found], LOSS);
        }
        compare(fixture, findings, &rank, "mtp.grad.", variant);
    }
}
