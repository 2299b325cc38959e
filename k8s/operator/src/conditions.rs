//! Conditions as the API conventions of Kubernetes want them: one of each type, whose time is that of its latest change. Pure.

use k8s_openapi::jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that is so, is not so, or is not known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub type_: String,
    /// True, False or Unknown.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    pub status: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, in words.
    #[serde(default)]
    pub message: String,
    /// When `status` changed last.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// The generation of the spec that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Whether something is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Is {
    /// It is.
    True,
    /// It is not.
    False,
    /// That cannot be said.
    Unknown,
}

impl Is {
    /// True or False.
    pub fn so(so: bool) -> Self {
        if so { Is::True } else { Is::False }
    }

    /// As conditions have it.
    pub fn word(self) -> &'static str {
        match self {
            Is::True => "True",
            Is::False => "False",
            Is::Unknown => "Unknown",
        }
    }
}

/// The longest message that a condition or an event has. **Units**: bytes.
const MAX_MESSAGE: usize = 1000;

/// A text that fits into a condition and an event.
pub fn short(words: &str) -> String {
    let end = (0..=MAX_MESSAGE).rev().find(|&end| words.is_char_boundary(end)).unwrap_or(0);
    words.get(..end).unwrap_or(words).to_owned()
}

/// A time as conditions have it: whole seconds.
pub fn time(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

/// Sets one condition.
pub fn set(
    conditions: &mut Vec<Condition>,
    (type_, is): (&str, Is),
    (reason, message): (&str, &str),
    generation: Option<i64>,
    now: Timestamp,
) {
    let known = conditions.iter_mut().find(|condition| condition.type_ == type_);
    let before = known.as_ref().filter(|known| known.status == is.word());
    let since = before.map_or_else(|| time(now), |known| known.last_transition_time.clone());
    let condition = Condition {
        type_: type_.to_owned(),
        status: is.word().to_owned(),
        reason: reason.to_owned(),
        message: short(message),
        last_transition_time: since,
        observed_generation: generation,
    };
    match known {
        Some(known) => *known = condition,
        None => conditions.push(condition),
    }
}

/// The condition of a type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition of a type is so.
pub fn is(conditions: &[Condition], type_: &str, is: Is) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status == is.word())
}

/// How long a condition has been as it is. **Units**: seconds.
pub fn seconds_since(condition: &Condition, now: Timestamp) -> i64 {
    let since: Option<Timestamp> = condition.last_transition_time.parse().ok();
    since.map_or(0, |since| now.as_second().saturating_sub(since.as_second()).max(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap_or_default()
    }

    #[test]
    fn the_time_of_a_condition_is_that_of_its_latest_change() {
        let mut conditions = Vec::new();
        set(&mut conditions, ("Ready", Is::False), ("Queued", "waits"), Some(1), at(100));
        set(&mut conditions, ("Ready", Is::False), ("Forming", "forms"), Some(2), at(200));
        assert_eq!(conditions.len(), 1);
        assert_eq!(conditions[0].reason, "Forming");
        assert_eq!(conditions[0].observed_generation, Some(2));
        assert_eq!(seconds_since(&conditions[0], at(250)), 150);
        set(&mut conditions, ("Ready", Is::True), ("Running", ""), Some(2), at(300));
        assert_eq!(conditions[0].last_transition_time, "1970-01-01T00:05:00Z");
        assert!(is(&conditions, "Ready", Is::True) && !is(&conditions, "Other", Is::True));
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        assert_eq!(short("short"), "short");
        let cut = short(&"ä".repeat(800));
        assert_eq!(cut.len(), 1000);
        assert_eq!(short(&format!("x{}", "ä".repeat(800))).len(), 999);
    }
}
