//! Gradients out of whole training programs: with one micro-batch, with one per sequence, with two stages on the rank.

use contraflow_kernels::gate;
use contraflow_workers::data::batches::TaskKind;

use crate::findings::{Findings, LOSS, Mark};
use crate::fixture::Fixture;
use crate::forward::Walk;
use crate::one_rank::{Batch, OneRank, PLAIN, Variant, ways};

/// Compares the gradients of every tensor that the fixture has under `prefix`.
pub fn compare(fixture: &Fixture, findings: &mut Findings, rank: &OneRank, prefix: &str, variant: Variant) {
    let Variant { schedule, micro_batch_size } = variant;
    let size = micro_batch_size.map_or_else(|| "all".to_owned(), |size| size.to_string());
    let kind = format!("{prefix}* ({schedule}, {size} in a micro-batch)");
    for (name, truth) in fixture.under(prefix) {
        match rank.gradient(name) {
            Some(found) => findings.compare(&kind, name, &truth.values, &found, Mark::Gradient),
            None => findings.check(false, || format!("{prefix}{name}: the model has no such tensor")),
        }
    }
}

pub fn of_the_main_loss(fixture: &Fixture, findings: &mut Findings) {
    let Some(rows) = fixture.sequences() else { return };
    for variant in ways(&fixture.config) {
        let mut rank = OneRank::load(fixture.main_config(), &fixture.dir, variant.schedule);
        let totals = rank.run(TaskKind::Train, 1, &Batch::new(&rows, variant, 0.0), |_, _| {});
        if let Some(truth) = fixture.values.get("loss") {
            findings.compare("loss in training", "loss", &truth.values, &[totals.loss as f32], LOSS);
        }
        compare(fixture, findings, &rank, "grad.", variant);
    }
}

/// The sequence-wise balance loss of the main model's layers, alone and with factor 1.
pub fn of_the_balance_loss(fixture: &Fixture, findings: &mut Findings) {
    let (Some(rows), Some(per_layer)) = (fixture.sequences(), fixture.values.get("balance.per_layer")) else {
        return;
    };
    let load = |variant: Variant| OneRank::load(fixture.main_config(), &fixture.dir, variant.schedule);
    let walk = Walk::new(load(PLAIN), &rows, 0.0);
    let of_layer = |(_, routing): &(_, std::sync::Arc<gate::Routing>)| {
        let sum = gate::balance_loss(routing, rows[0].len(), &walk.rank.arch.gate, 0.0, None);
        (sum / rows.len() as f64) as f32
    };
    let found: Vec<f32> = walk.routed.values().map(of_layer).collect();
    findings.compare("balance loss", "balance.per_layer", &per_layer.values, &found, LOSS);
    for variant in ways(&fixture.config) {
        let mut rank = load(variant);
        let totals = rank.run(TaskKind::Train, 1, &Batch::new(&rows, variant, 0.0).balance_only(), |_, _| {});
        findings.check(totals.loss == 0.0, || format!("expected no loss but balance, got {}", totals.loss));
        let sum = per_layer.values.iter().sum();
        findings.compare(
            "balance loss, summed",
            "balance.per_layer",
            &[sum],
            &[totals.balance_loss as f32],
            LOSS,
        );
        compare(fixture, findings, &rank, "balance.grad.", variant);
    }
    for (rest, _) in
        fixture.under("balance.").filter(|(rest, _)| *rest != "per_layer" && !rest.starts_with("grad."))
    {
        findings.unknown(&format!("balance.{rest}"));
    }
}
