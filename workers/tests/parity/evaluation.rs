//! Measuring: the loss and the logits of `contraflow eval`'s forward pass.

use contraflow_kernels::host::HostValues;
use contraflow_workers::infer::evaluate::Evaluation;
use contraflow_workers::infer::generate::Generator;

use crate::findings::{Findings, LOGITS, LOSS};
use crate::fixture::Fixture;
use crate::one_rank::{Batch, PLAIN};

pub fn check(fixture: &Fixture, findings: &mut Findings) {
    let Some(rows) = fixture.sequences() else { return };
    let model = Generator::load(&fixture.dir).unwrap();
    let vocabulary = fixture.config.vocab_size as u32;
    findings.check(
        model.unknown_id(&[0, vocabulary - 1, vocabulary]) == Some((2, vocabulary))
            && model.unknown_id(&rows.concat()).is_none(),
        || "expected the first id beyond the vocabulary".into(),
    );
    let batch = Batch::new(&rows, PLAIN, 0.0);
    let mut evaluation = Evaluation::default();
    for sequences in &batch.micro_batches {
        model.measure(sequences.clone(), &mut evaluation);
    }
    let num_tokens = rows.concat().len() as u64;
    findings.check(evaluation.num_tokens == num_tokens, || format!("{evaluation:?}"));
    findings.check(evaluation.num_targets == batch.scales.denominator, || format!("{evaluation:?}"));
    let per_token = fixture.config.num_experts_per_tok as u64;
    for layer in (0..fixture.config.num_hidden_layers).filter(|&layer| fixture.config.is_moe_layer(layer)) {
        let routed = evaluation.expert_counts.get(&layer).map(|counts| counts.iter().sum::<u64>());
        findings.check(routed == Some(per_token * num_tokens), || format!("layer {layer}: {routed:?}"));
    }
    if let Some(truth) = fixture.values.get("loss") {
        findings.compare("loss of eval", "loss", &truth.values, &[evaluation.loss() as f32], LOSS);
    }
    if let Some(truth) = fixture.values.get("logits") {
        let logits = model.logits(batch.micro_batches[0].clone());
        findings.compare("logits of eval", "logits", &truth.values, logits.values::<f32>(), LOGITS);
    }
}
