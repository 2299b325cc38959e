//! The watch's values as messages, and back: its memory, what it stops a step with, and the evidence for that.
//!
//! What comes from a wire may be anything: a message that lacks a part is an error with a message.

use contraflow_proto::v1;

use super::evidence::{Evidence, NamedTensor, RankEvidence};
use super::validation::{Validated, ValidationWatch};
use super::{Divergence, StabilityWatch, StepAction};

impl From<StabilityWatch> for v1::StabilityState {
    fn from(watch: StabilityWatch) -> Self {
        let StabilityWatch { losses, grad_norms, skips_in_a_row, skipped, validation } = watch;
        let ValidationWatch { step, best, without_lower } = validation;
        let validation = v1::ValidationState {
            step,
            best_step: best.map(|best| best.step),
            best_loss: best.map(|best| best.loss),
            without_lower,
        };
        let validation = (step > 0).then_some(validation);
        let (losses, grad_norms) = (losses.into(), grad_norms.into());
        v1::StabilityState { losses, grad_norms, skips_in_a_row, skipped, validation }
    }
}

impl From<v1::StabilityState> for StabilityWatch {
    fn from(state: v1::StabilityState) -> Self {
        let v1::StabilityState { losses, grad_norms, skips_in_a_row, skipped, validation } = state;
        let v1::ValidationState { step, best_step, best_loss, without_lower } =
            validation.unwrap_or_default();
        let best = best_step.zip(best_loss).map(|(step, loss)| Validated { step, loss });
        StabilityWatch {
            losses: losses.into(),
            grad_norms: grad_norms.into(),
            skips_in_a_row,
            skipped,
            validation: ValidationWatch { step, best, without_lower },
        }
    }
}

impl From<Divergence> for v1::Divergence {
    fn from(divergence: Divergence) -> Self {
        let Divergence { step, action, why, evidence } = divergence;
        let action = match action {
            StepAction::Stop => v1::StabilityAction::Stop,
            StepAction::RollBack => v1::StabilityAction::RollBack,
            // A step with one of these does not end the training.
            StepAction::Update | StepAction::Skip => v1::StabilityAction::Unspecified,
        };
        v1::Divergence { step, action: action.into(), why, evidence: evidence.map(Into::into) }
    }
}

impl TryFrom<v1::Divergence> for Divergence {
    type Error = String;

    fn try_from(message: v1::Divergence) -> Result<Self, String> {
        let action = match message.action() {
            v1::StabilityAction::Stop => StepAction::Stop,
            v1::StabilityAction::RollBack => StepAction::RollBack,
            v1::StabilityAction::Unspecified => {
                return Err(format!("action: expected to stop or to roll back, got {}", message.action));
            }
        };
        let v1::Divergence { step, why, evidence, .. } = message;
        Ok(Divergence { step, action, why, evidence: evidence.map(Into::into) })
    }
}

impl From<Evidence> for v1::Evidence {
    fn from(evidence: Evidence) -> Self {
        let Evidence { step, loss, grad_norm, ranks, .. } = evidence;
        let rank = |found: RankEvidence| v1::RankEvidence {
            rank: found.rank as u32,
            weight: found.weight.map(Into::into),
            micro_batch: found.micro_batch.map(|micro_batch| micro_batch as u32),
            first_gradient: found.first_gradient.map(Into::into),
            last_gradient: found.last_gradient.map(Into::into),
            num_gradients: found.num_gradients,
        };
        v1::Evidence { step, loss, grad_norm, ranks: ranks.into_iter().map(rank).collect() }
    }
}

impl From<v1::Evidence> for Evidence {
    fn from(evidence: v1::Evidence) -> Self {
        let v1::Evidence { step, loss, grad_norm, ranks } = evidence;
        let rank = |found: v1::RankEvidence| RankEvidence {
            rank: found.rank as usize,
            weight: found.weight.map(Into::into),
            micro_batch: found.micro_batch.map(|micro_batch| micro_batch as usize),
            first_gradient: found.first_gradient.map(Into::into),
            last_gradient: found.last_gradient.map(Into::into),
            num_gradients: found.num_gradients,
        };
        Evidence {
            step,
            loss,
            grad_norm,
            ranks: ranks.into_iter().map(rank).collect(),
            sequences: Vec::new(),
        }
    }
}

impl From<NamedTensor> for v1::NamedTensor {
    fn from(tensor: NamedTensor) -> Self {
        let NamedTensor { name, layer, num_values } = tensor;
        v1::NamedTensor { name, layer: layer.map(|layer| layer as u32), num_values }
    }
}

impl From<v1::NamedTensor> for NamedTensor {
    fn from(tensor: v1::NamedTensor) -> Self {
        let v1::NamedTensor { name, layer, num_values } = tensor;
        NamedTensor { name, layer: layer.map(|layer| layer as usize), num_values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_watch_comes_back_to_the_bit() {
        let watch = StabilityWatch {
            losses: [0.1 + 0.2, 1e-300].into(),
            grad_norms: [f64::MAX, 3.0].into(),
            skips_in_a_row: 2,
            skipped: 7,
            validation: ValidationWatch::default(),
        };
        let best = Some(Validated { step: 20, loss: 0.1 + 0.2 });
        let validation = ValidationWatch { step: 30, best, without_lower: 1 };
        for watch in [watch.clone(), StabilityWatch { validation, ..watch }] {
            assert_eq!(StabilityWatch::from(v1::StabilityState::from(watch.clone())), watch);
        }
    }

    #[test]
    fn a_divergence_comes_back_with_all_its_evidence() {
        let named = |name: &str, layer| Some(NamedTensor { name: name.into(), layer, num_values: u64::MAX });
        let found = RankEvidence {
            rank: 3,
            weight: named("model.norm.weight", None),
            micro_batch: Some(0),
            first_gradient: named("model.layers.0.mlp.up_proj.weight", Some(0)),
            last_gradient: None,
            num_gradients: 5,
        };
        let nothing = RankEvidence {
            rank: 0,
            weight: None,
            micro_batch: None,
            first_gradient: None,
            last_gradient: named("lm_head.weight", None),
            num_gradients: 1,
        };
        let evidence = Evidence {
            step: 4,
            loss: "NaN".into(),
            grad_norm: "inf".into(),
            ranks: vec![found, nothing],
            sequences: vec![],
        };
        for (action, evidence) in [(StepAction::Stop, Some(evidence)), (StepAction::RollBack, None)] {
            let divergence = Divergence { step: 4, action, why: "a spike".into(), evidence };
            assert_eq!(Divergence::try_from(v1::Divergence::from(divergence.clone())), Ok(divergence));
        }
    }

    #[test]
    fn a_divergence_that_does_not_end_the_training_is_refused() {
        for action in [0, 9] {
            let message = v1::Divergence { action, ..v1::Divergence::default() };
            let refusal = Divergence::try_from(message).unwrap_err();
            assert_eq!(refusal, format!("action: expected to stop or to roll back, got {action}"));
        }
    }
}
