//! The colours of pictures: one for each kind of action and of operation, the same in every picture. Knows no picture.
//!
//! They are those of Okabe and Ito (2008), which colour-blind readers can tell apart.

use serde::{Deserialize, Serialize};

use crate::schedule::{Action, Component, Work};

/// What has a colour. In JSON it is its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shade {
    /// `F`.
    #[serde(rename = "F")]
    Forward,
    /// `B`.
    #[serde(rename = "B")]
    Backward,
    /// `I`.
    #[serde(rename = "I")]
    BackwardInput,
    /// `W`.
    #[serde(rename = "W")]
    BackwardWeight,
    /// `F&B`.
    #[serde(rename = "F&B")]
    ForwardBackward,
    /// Tokens on their way to experts.
    Dispatch,
    /// Tokens on their way home.
    Combine,
    /// The update, its collectives among it.
    Optimizer,
    /// Between pipeline ranks.
    Transfer,
}

impl Shade {
    /// All of them.
    pub const ALL: [Shade; 9] = [
        Shade::Forward,
        Shade::Backward,
        Shade::BackwardInput,
        Shade::BackwardWeight,
        Shade::ForwardBackward,
        Shade::Dispatch,
        Shade::Combine,
        Shade::Optimizer,
        Shade::Transfer,
    ];

    /// As in the text form of plans, where it is there.
    pub fn name(self) -> &'static str {
        match self {
            Shade::Forward => "F",
            Shade::Backward => "B",
            Shade::BackwardInput => "I",
            Shade::BackwardWeight => "W",
            Shade::ForwardBackward => "F&B",
            Shade::Dispatch => "dispatch",
            Shade::Combine => "combine",
            Shade::Optimizer => "optimizer",
            Shade::Transfer => "transfer",
        }
    }

    /// As hexadecimal red, green and blue.
    pub fn colour(self) -> &'static str {
        match self {
            Shade::Forward => "#56b4e9",
            Shade::Backward => "#009e73",
            Shade::BackwardInput => "#f0e442",
            Shade::BackwardWeight => "#e69f00",
            Shade::ForwardBackward => "#0072b2",
            Shade::Dispatch => "#cc79a7",
            Shade::Combine => "#d55e00",
            Shade::Optimizer => "#000000",
            Shade::Transfer => "#999999",
        }
    }

    /// Of text on it.
    pub fn ink(self) -> &'static str {
        match self {
            Shade::ForwardBackward | Shade::Optimizer | Shade::Backward | Shade::Combine => "#ffffff",
            _ => "#000000",
        }
    }
}

/// Of an action.
pub fn shade_of_action(action: &Action) -> Shade {
    match action {
        Action::Forward(_) | Action::ForwardForward { .. } => Shade::Forward,
        Action::Backward(_) => Shade::Backward,
        Action::BackwardInput(_) | Action::InputWeight { .. } => Shade::BackwardInput,
        Action::BackwardWeight(_) => Shade::BackwardWeight,
        Action::ForwardBackward { .. } => Shade::ForwardBackward,
    }
}

/// Of an operation that stands for itself; nothing of one that is a piece of an action.
pub fn shade_of(work: &Work) -> Option<Shade> {
    match work {
        Work::Component { component: Component::Dispatch, .. } => Some(Shade::Dispatch),
        Work::Component { component: Component::Combine, .. } => Some(Shade::Combine),
        Work::Component { .. } => None,
        Work::Send { .. } | Work::Receive { .. } => Some(Shade::Transfer),
        _ => Some(Shade::Optimizer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_name_of_every_colour() {
        for shade in Shade::ALL {
            assert_eq!(serde_json::to_value(shade).unwrap(), shade.name());
        }
    }
}
