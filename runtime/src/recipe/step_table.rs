//! A value that changes at given numbers of tokens.

use serde::{Deserialize, Serialize};

/// A step function of the tokens seen: one number, or a list of steps whose first starts at 0 tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "StepTableRepr", into = "StepTableRepr")]
pub struct StepTable {
    steps: Vec<TableStep>,
}

/// One step of a [`StepTable`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableStep {
    /// Tokens from which on the value holds.
    pub from_tokens: u64,
    /// The value.
    pub value: f64,
}

/// How it is written down.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum StepTableRepr {
    Number(f64),
    Steps(Vec<TableStep>),
}

impl StepTable {
    /// The same value throughout.
    pub fn constant(value: f64) -> Self {
        Self { steps: vec![TableStep { from_tokens: 0, value }] }
    }

    /// The value once `tokens` tokens have been seen: that of the last step that has begun.
    pub fn at(&self, tokens: u64) -> f64 {
        let begun = self.steps.iter().take_while(|step| step.from_tokens <= tokens);
        begun.last().map_or(0.0, |step| step.value)
    }

    /// How many numbers it is made of.
    pub fn num_steps(&self) -> usize {
        self.steps.len()
    }

    /// The largest of its values.
    pub fn largest(&self) -> f64 {
        self.steps.iter().fold(0.0, |most, step| most.max(step.value))
    }

    /// Whether the value is 0 throughout.
    pub fn is_zero(&self) -> bool {
        self.steps.iter().all(|step| step.value == 0.0)
    }
}

impl From<StepTableRepr> for StepTable {
    fn from(form: StepTableRepr) -> Self {
        match form {
            StepTableRepr::Number(value) => Self::constant(value),
            StepTableRepr::Steps(steps) => Self { steps },
        }
    }
}

impl From<StepTable> for StepTableRepr {
    fn from(table: StepTable) -> Self {
        match table.steps.as_slice() {
            [only] => StepTableRepr::Number(only.value),
            _ => StepTableRepr::Steps(table.steps),
        }
    }
}
