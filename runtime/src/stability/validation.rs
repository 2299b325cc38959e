//! How the validation loss goes while a run trains: where it was lowest, and for how long it has not been lower. Every rank
//! knows the same losses and so comes to the same answers. Knows no recipe.

use serde::{Deserialize, Serialize};

/// A validation loss, and the step after which it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validated {
    /// Optimizer updates made before it.
    pub step: u64,
    /// In nats per token.
    pub loss: f64,
}

/// What is remembered of the validations. A checkpoint holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationWatch {
    /// Step of the latest; 0: none.
    pub step: u64,
    /// The lowest loss.
    pub best: Option<Validated>,
    /// Validations since then, none of which was lower.
    pub without_lower: u64,
}

impl ValidationWatch {
    /// Whether nothing has been validated yet.
    pub fn is_new(&self) -> bool {
        self.step == 0
    }

    /// Takes note of a loss. A run that resumes measures once more what it has measured before: that changes nothing.
    pub fn note(&mut self, seen: Validated) {
        if seen.step <= self.step {
            return;
        }
        self.step = seen.step;
        if seen.loss.is_finite() && self.best.is_none_or(|best| seen.loss < best.loss) {
            (self.best, self.without_lower) = (Some(seen), 0);
        } else {
            self.without_lower += 1;
        }
    }

    /// Whether the loss has not been lower for as many validations in a row as a run waits; 0: it waits for ever.
    pub fn is_exhausted(&self, patience: u64) -> bool {
        patience > 0 && self.without_lower >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(losses: &[f64]) -> ValidationWatch {
        let mut watch = ValidationWatch::default();
        for (place, &loss) in losses.iter().enumerate() {
            watch.note(Validated { step: 10 * (place as u64 + 1), loss });
        }
        watch
    }

    #[test]
    fn the_lowest_is_remembered_and_what_is_not_lower_is_counted() {
        let seen = watch(&[3.0, 2.5, 2.5, f64::NAN, 2.75]);
        assert_eq!(
            seen,
            ValidationWatch { step: 50, best: Some(Validated { step: 20, loss: 2.5 }), without_lower: 3 }
        );
        assert!(
            seen.is_exhausted(3) && seen.is_exhausted(1) && !seen.is_exhausted(4) && !seen.is_exhausted(0)
        );
        assert!(!watch(&[3.0, 2.5, 2.75, 2.25]).is_exhausted(1));
        assert_eq!(watch(&[f64::NAN]).best, None);
    }

    #[test]
    fn a_step_that_is_measured_again_counts_once() {
        let mut again = watch(&[3.0, 3.5]);
        again.note(Validated { step: 20, loss: 3.5 });
        assert_eq!(again, watch(&[3.0, 3.5]));
    }
}
