//! The forward pass: the tensors between the components of a forward-only program, and what they compute from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_kernels::cross_entropy::{Targets, logits};
use contraflow_kernels::gate::{GateSpec, Routing, Scoring};
use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::Tensor;
use contraflow_kernels::{linear, norm};
use contraflow_runtime::schedule::{Component, Pass, TransferKind, Work};
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::model::attention;
use contraflow_workers::model::head::{self, LossHead};
use contraflow_workers::model::micro_batch::MicroBatch;
use contraflow_workers::model::params::ParamId;
use contraflow_workers::optimizer::totals::Totals;

use crate::findings::{ACTIVATIONS, Findings, LOGITS, LOSS, Mark};
use crate::fixture::{Fixture, Truth};
use crate::one_rank::{Batch, OneRank, PLAIN};

/// What a forward-only program left between its operations, and the rank it ran on.
pub struct Walk {
    pub rank: OneRank,
    pub batch: Batch,
    pub totals: Totals,
    /// Output of each layer; of multi-token prediction's block too.
    pub outputs: BTreeMap<usize, Tensor>,
    /// What each layer with routed experts sent to them: normed rows and where they go.
    pub routed: BTreeMap<usize, (Tensor, Arc<Routing>)>,
    /// Input of multi-token prediction's block.
    pub joined: Option<Tensor>,
    embedded: Option<Tensor>,
}

impl Walk {
    pub fn new(rank: OneRank, rows: &[Vec<u32>], mtp_weight: f64) -> Walk {
        let mut walk = Walk {
            rank,
            batch: Batch::new(rows, PLAIN, mtp_weight),
            totals: Totals::default(),
            outputs: BTreeMap::new(),
            routed: BTreeMap::new(),
            joined: None,
            embedded: None,
        };
        let Walk { rank, batch, outputs, routed, joined, embedded, .. } = &mut walk;
        let config = rank.arch.config.clone();
        walk.totals = rank.run(TaskKind::Evaluate, 0, batch, |op, in_flight| {
            let Work::Component { pass: Pass::Forward, chunk, layer, component } = op.work else { return };
            let end = || in_flight.share(TransferKind::Activation, chunk).unwrap();
            match component {
                Component::Embedding => *embedded = Some(end()),
                Component::Attention if config.is_moe_layer(layer) => {
                    let sent = in_flight.layer(chunk, layer, |in_flight| in_flight.normed.clone());
                    routed.insert(layer, sent.unwrap());
                }
                Component::SharedExpert if !config.is_moe_layer(layer) => drop(outputs.insert(layer, end())),
                Component::Combine => drop(outputs.insert(layer, end())),
                Component::MtpJoin => *joined = Some(end()),
                _ => {}
            }
        });
        walk
    }

    /// The residual stream before a layer of the main model, or after the last one.
    fn hidden(&self, layer: usize) -> Option<&Tensor> {
        layer.checked_sub(1).map_or(self.embedded.as_ref(), |below| self.outputs.get(&below))
    }

    /// The residual stream between a layer's attention and its feed-forward part.
    fn residual(&self, layer: usize) -> Tensor {
        let micro_batch =
            MicroBatch::new(&self.rank.arch, self.batch.micro_batches[0].clone(), &self.batch.scales);
        let x = self.hidden(layer).unwrap().clone();
        let weights = &self.rank.stages[0].layer(layer).attention;
        attention::forward(&self.rank.arch, weights, &self.rank.params.dense, x, &micro_batch).0.residual
    }

    /// What comes before a head and what comes out of it. The loss needs no logits; here they are made for comparison.
    pub fn through_head(&self, norm: ParamId, x: &Tensor) -> (Tensor, Tensor) {
        let dense = &self.rank.params.dense;
        let head = LossHead {
            norm,
            head: self.rank.stages[0].head.as_ref().unwrap().head,
            eps: self.rank.arch.eps(),
        };
        let batch = MicroBatch::new(&self.rank.arch, self.batch.micro_batches[0].clone(), &self.batch.scales);
        let targets = Targets { ids: &batch.targets, weights: &batch.loss_weights };
        let (_, normed) = head::evaluate(head, dense, x, &targets);
        let logits = logits(&normed, dense.weight(head.head));
        (normed, logits)
    }

    /// Compares a layer's choice of experts, by ascending id in each token.
    pub fn compare_choice(
        &self,
        findings: &mut Findings,
        key: &str,
        truth: &Truth,
        layer: usize,
        keep: impl Fn(usize) -> bool,
    ) {
        let top_k = self.rank.arch.gate.top_k;
        let routing = &self.routed[&layer].1;
        let (chosen, chosen_weights): (&[u32], &[f32]) =
            (routing.expert_ids.values(), routing.weights.values());
        let tokens = chosen.chunks(top_k).zip(chosen_weights.chunks(top_k)).enumerate();
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for (_, (token_ids, token_weights)) in tokens.filter(|(token, _)| keep(*token)) {
            let mut pairs: Vec<(u32, f32)> =
                token_ids.iter().copied().zip(token_weights.iter().copied()).collect();
            pairs.sort_by_key(|(id, _)| *id);
            ids.extend(pairs.iter().map(|(id, _)| *id as f32));
            weights.extend(pairs.iter().map(|(_, weight)| *weight));
        }
        if key.ends_with("indices") {
            findings.compare("top-k indices", key, &truth.values, &ids, Mark::Absolute(0.0));
        } else {
            findings.compare("top-k weights", key, &truth.values, &weights, ACTIVATIONS);
        }
    }
}

pub fn subtract(a: &Tensor, b: &Tensor) -> Vec<f32> {
    a.values::<f32>().iter().zip(b.values::<f32>()).map(|(a, b)| a - b).collect()
}

pub fn check(fixture: &Fixture, findings: &mut Findings) {
    let Some(rows) = fixture.sequences() else { return };
    let rank = OneRank::load(fixture.main_config(), &fixture.dir, PLAIN.schedule);
    let walk = Walk::new(rank, &rows, 0.0);
    let end = walk.hidden(fixture.config.num_hidden_layers).unwrap();
    let (normed, logits) = walk.through_head(walk.rank.stages[0].head.as_ref().unwrap().norm, end);
    for (key, truth) in &fixture.values {
        let segments: Vec<&str> = key.split('.').collect();
        let values = &truth.values;
        match segments[..] {
            ["logits"] => findings.compare("logits", key, values, logits.values::<f32>(), LOGITS),
            ["loss"] => findings.compare("loss", key, values, &[walk.totals.loss as f32], LOSS),
            ["final_norm"] => {
                findings.compare("final norm", key, values, normed.values::<f32>(), ACTIVATIONS)
            }
            ["hidden", layer] => match layer.parse().ok().and_then(|layer| walk.hidden(layer)) {
                Some(hidden) => {
                    findings.compare("hidden states", key, values, hidden.values::<f32>(), ACTIVATIONS)
                }
                None => findings.unknown(key),
            },
            ["mla", layer, what] => {
                attention_values(&walk, findings, key, truth, (layer.parse().unwrap(), what))
            }
            ["moe", layer, what] => {
                expert_values(&walk, findings, key, truth, (layer.parse().unwrap(), what))
            }
            ["rope" | "softmax_scale", ..] => constants(&walk, findings, key, truth),
            _ => {}
        }
    }
}

fn constants(walk: &Walk, findings: &mut Findings, key: &str, truth: &Truth) {
    let arch = &walk.rank.arch;
    let found = match key {
        "rope.inv_freq" => arch.rope.inv_freq.values().to_vec(),
        "rope.cos_sin_scale" => vec![arch.rope.cos_sin_scale],
        "softmax_scale" => vec![arch.heads.scale],
        _ => return findings.unknown(key),
    };
    findings.compare(key, key, &truth.values, &found, Mark::Relative(1e-6));
}

fn attention_values(
    walk: &Walk,
    findings: &mut Findings,
    key: &str,
    truth: &Truth,
    (layer, what): (usize, &str),
) {
    let x = walk.hidden(layer).unwrap();
    let found = match what {
        "input" => {
            let weights = &walk.rank.stages[0].layer(layer).attention;
            norm::forward(x, walk.rank.params.dense.weight(weights.input_norm), walk.rank.arch.eps())
                .values::<f32>()
                .to_vec()
        }
        "output" => subtract(&walk.residual(layer), x),
        _ => return findings.unknown(key),
    };
    findings.compare(&format!("mla {what}"), key, &truth.values, &found, ACTIVATIONS);
}

/// Scores of the router's logits, in f64.
fn scores(logits: &[f64], gate: &GateSpec) -> Vec<f64> {
    match gate.scoring {
        Scoring::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        Scoring::Softmax => {
            let tokens = logits.chunks(gate.num_experts);
            let sum = |token: &[f64]| token.iter().map(|logit| logit.exp()).sum::<f64>();
            tokens.flat_map(|token| token.iter().map(move |logit| logit.exp() / sum(token))).collect()
        }
    }
}

fn expert_values(
    walk: &Walk,
    findings: &mut Findings,
    key: &str,
    truth: &Truth,
    (layer, what): (usize, &str),
) {
    let (normed, routing) = &walk.routed[&layer];
    match what {
        "input" => findings.compare("moe input", key, &truth.values, normed.values::<f32>(), ACTIVATIONS),
        "output" => {
            let found = subtract(&walk.outputs[&layer], &walk.residual(layer));
            findings.compare("moe output", key, &truth.values, &found, ACTIVATIONS);
        }
        "router_logits" => {
            let gate = walk.rank.stages[0].layer(layer).attention.gate.unwrap();
            let found = linear::forward(normed, walk.rank.params.dense.weight(gate));
            findings.compare("router logits", key, &truth.values, found.values::<f32>(), ACTIVATIONS);
            // What the gate really worked with. Neither scoring is anywhere steeper than a quarter.
            let scores = scores(&truth.values, &walk.rank.arch.gate);
            findings.compare(
                "router scores",
                key,
                &scores,
                routing.scores.values::<f32>(),
                Mark::Absolute(1.25e-5),
            );
        }
        "topk_indices" | "topk_weights" => walk.compare_choice(findings, key, truth, layer, |_| true),
        _ => findings.unknown(key),
    }
}
