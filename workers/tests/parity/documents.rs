//! Documents packed into one sequence without attention across them: the same losses as of each document by itself.

use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::data::sequences::Sequences;
use contraflow_workers::model::micro_batch::LossScales;

use crate::findings::{Findings, LOSS};
use crate::fixture::Fixture;
use crate::one_rank::{Batch, OneRank, PLAIN};

/// A row cut in three by an end of document, which no other token is.
fn three_documents(row: &[u32], end: u32) -> Vec<u32> {
    let third = row.len() / 3;
    let other = |id: u32| if id == end { 0 } else { id };
    let is_end = |place: usize| place == third || place == 2 * third + 1 || place + 1 == row.len();
    row.iter().enumerate().map(|(place, &id)| if is_end(place) { end } else { other(id) }).collect()
}

/// Summed losses of one sequence, main and MTP.
fn losses(fixture: &Fixture, ids: &[u32], end: u32, step: u64, rank: &mut OneRank) -> (f64, f64) {
    let targets = ids[1..].iter().copied().chain([0]).collect();
    let sequences = Sequences::new(ids.to_vec(), targets, ids.len()).cut_at(end);
    let mtp_weight = if fixture.config.mtp_layer().is_some() { 1.0 } else { 0.0 };
    let scales =
        LossScales { denominator: 1.0, mtp_denominator: 1.0, mtp_weight, balance: 0.0, batch_balance: 0.0 };
    let totals =
        rank.run(TaskKind::Train, step, &Batch { micro_batches: vec![sequences], scales }, |_, _| {});
    (totals.loss, totals.mtp_loss)
}

pub fn alone_and_packed(fixture: &Fixture, findings: &mut Findings) {
    let Some(rows) = fixture.sequences() else { return };
    let end = fixture.config.vocab_size as u32 - 1;
    let packed = three_documents(&rows[0], end);
    let mut rank = OneRank::load(fixture.config.clone(), &fixture.dir, PLAIN.schedule);
    let (loss, mtp_loss) = losses(fixture, &packed, end, 1, &mut rank);
    let documents = packed.split_inclusive(|&id| id == end).filter(|document| document.len() > 1);
    let alone: Vec<(f64, f64)> =
        documents.zip(2..).map(|(document, step)| losses(fixture, document, end, step, &mut rank)).collect();
    findings.check(alone.len() == 3, || format!("{} documents of {}", alone.len(), packed.len()));
    let sum = |side: fn(&(f64, f64)) -> f64| alone.iter().map(side).sum::<f64>();
    findings.compare("losses of documents", "packed", &[sum(|l| l.0)], &[loss as f32], LOSS);
    findings.compare("losses of documents", "packed mtp", &[sum(|l| l.1)], &[mtp_loss as f32], LOSS);
}
