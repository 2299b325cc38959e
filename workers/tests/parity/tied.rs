//! A head that is the embedding: what one table gets is the sum of what two equal ones would get apart.

use contraflow_runtime::model_config::ModelConfig;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::optimizer::totals::Totals;

use crate::findings::{Findings, Mark};
use crate::fixture::Fixture;
use crate::one_rank::{Batch, OneRank, Variant, ways};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Of the loss of multi-token prediction, which uses both tables once more.
const MTP_WEIGHT: f64 = 0.3;

fn run(rank: &mut OneRank, rows: &[Vec<u32>], variant: Variant) -> Totals {
    let mtp_weight = if rank.arch.config.mtp_layer().is_some() { MTP_WEIGHT } else { 0.0 };
    rank.run(TaskKind::Train, 1, &Batch::new(rows, variant, mtp_weight), |_, _| {})
}

/// The model with a head of its own that has the values of the embedding.
fn apart(fixture: &Fixture, variant: Variant) -> OneRank {
    let mut rank = OneRank::load(fixture.config.clone(), &fixture.dir, variant.schedule);
    let of = |rank: &OneRank, name: &str| {
        rank.params.dense.iter().position(|param| param.parts[0].name == name).unwrap()
    };
    let (embedding, head) = (of(&rank, EMBEDDING), of(&rank, HEAD));
    *rank.params.dense.get_mut(head).master_mut() = rank.params.dense.get(embedding).master().clone();
    rank
}

pub fn gradients_add_up(fixture: &Fixture, findings: &mut Findings) {
    let Some(rows) = fixture.sequences().filter(|_| !fixture.config.tie_word_embeddings) else { return };
    let tied_config = ModelConfig { tie_word_embeddings: true, ..fixture.config.clone() };
    for variant in ways(&fixture.config) {
        let mut apart = apart(fixture, variant);
        let mut tied = OneRank::load(tied_config.clone(), &fixture.dir, variant.schedule);
        let (expected, got) = (run(&mut apart, &rows, variant), run(&mut tied, &rows, variant));
        findings.check((expected.loss, expected.mtp_loss) == (got.loss, got.mtp_loss), || {
            format!("expected losses {expected:?}, got {got:?}")
        });
        findings.check(tied.gradient(HEAD).is_none(), || "expected no head of its own".to_owned());
        for weight in tied_config.weights().into_iter().filter(|weight| weight.tied_to.is_none()) {
            // Gate biases have no gradient.
            let (Some(expected), Some(found)) = (apart.gradient(&weight.name), tied.gradient(&weight.name))
            else {
                continue;
            };
            let mut truth: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let mut mark = Mark::Absolute(0.0);
            if weight.name == EMBEDDING {
                let of_head = apart.gradient(HEAD).unwrap();
                truth.iter_mut().zip(of_head).for_each(|(sum, gradient)| *sum += f64::from(gradient));
                mark = Mark::Gradient;
            }
            findings.compare("gradients of a tied model", &weight.name, &truth, &found, mark);
        }
    }
}
