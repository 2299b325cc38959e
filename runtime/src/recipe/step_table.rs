//! A value that changes at given numbers of tokens.

use serde::{Deserialize, Serialize};

/// A step function of the tokens seen: one number, or a list of steps whose first starts at 0 tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct StepTable {
    steps: Vec<Step>,
}

/// One step of a [`StepTable`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The value holds from so many tokens on.
    pub from_tokens: u64,
    /// The value.
    pub value: f64,
}

/// How it is written down.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Number(f64),
    Steps(Vec<Step>),
}

impl StepTable {
    /// The same value throughout.
    pub fn constant(value: f64) -> Self {
        Self { steps: vec![Step { from_tokens: 0, value }] }
    }

    /// The value once `tokens` tokens have been seen: that of the last step that has begun.
    pub fn at(&self, tokens: u64) -> f64 {
        let begun = self.steps.iter().take_while(|step| step.from_tokens <= tokens);
        begun.last().map_or(0.0, |step| step.value)
    }

    /// Whether the value is 0 throughout.
    pub fn is_zero(&self) -> bool {
        self.steps.iter().all(|step| step.value == 0.0)
    }
}

impl From<Form> for StepTable {
    fn from(form: Form) -> Self {
        match form {
            Form::Number(value) => Self::constant(value),
            Form::Steps(steps) => Self { steps },
        }
    }
}

impl From<StepTable> for Form {
    fn from(table: StepTable) -> Self {
        match table.steps.as_slice() {
            [only] => Form::Number(only.value),
            _ => Form::Steps(table.steps),
        }
    }
}
