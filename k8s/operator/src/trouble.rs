//! Why something could not be done: which condition says so, and in which words.

use contraflow_proto::v1;
use tonic::{Code, Status};

/// What is in the way of a job or of its looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The condition that it makes false.
    pub condition: &'static str,
    /// Why, in one word.
    pub reason: &'static str,
    /// Why, in words.
    pub words: String,
}

/// Whether the orchestrator answers.
pub const REACHABLE: &str = "Reachable";
/// Whether the orchestrator has taken the job.
pub const SUBMITTED: &str = "Submitted";
/// Whether it has been told how many ranks the job is to have.
pub const SCALED: &str = "Scaled";

impl Trouble {
    /// The recipe is not there.
    pub fn recipe(words: String) -> Self {
        Trouble { condition: SUBMITTED, reason: "NoRecipe", words }
    }

    /// It is not known how to reach the orchestrator.
    pub fn way(reason: &'static str, words: String) -> Self {
        Trouble { condition: REACHABLE, reason, words }
    }

    /// Whether it is the object that is at fault, so that asking again soon makes no difference.
    pub fn is_of_the_object(&self) -> bool {
        self.condition != REACHABLE && self.reason == "Refused"
    }

    /// What a call that failed means. `condition` is the one that it would have made true.
    pub fn of_call(condition: &'static str, status: &Status) -> Self {
        let words = || status.message().to_owned();
        match status.code() {
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::NotFound
            | Code::OutOfRange => Trouble { condition, reason: "Refused", words: words() },
            Code::ResourceExhausted => Trouble { condition, reason: "Busy", words: words() },
            Code::Unauthenticated | Code::PermissionDenied => {
                Trouble { condition: REACHABLE, reason: "Denied", words: words() }
            }
            code => {
                let cause = std::error::Error::source(status).map(describe);
                let words = cause.unwrap_or_else(|| format!("{} ({code:?})", status.message()));
                Trouble {
                    condition: REACHABLE,
                    reason: "Unreachable",
                    words: format!("the orchestrator does not answer: {words}"),
                }
            }
        }
    }
}

/// An error with its causes.
pub fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = next.source();
    }
    words
}

/// A state as it is shown.
pub fn state_name(state: v1::JobState) -> &'static str {
    match state {
        v1::JobState::Unspecified => "Pending",
        v1::JobState::Queued => "Queued",
        v1::JobState::Forming => "Forming",
        v1::JobState::Running => "Running",
        v1::JobState::Recovering => "Recovering",
        v1::JobState::Done => "Done",
        v1::JobState::Failed => "Failed",
        v1::JobState::Cancelled => "Cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_at_fault_is_told_from_the_code() {
        for (code, condition, reason, object) in [
            (Code::InvalidArgument, SUBMITTED, "Refused", true),
            (Code::FailedPrecondition, SUBMITTED, "Refused", true),
            (Code::ResourceExhausted, SUBMITTED, "Busy", false),
            (Code::PermissionDenied, REACHABLE, "Denied", false),
            (Code::Unauthenticated, REACHABLE, "Denied", false),
            (Code::Unavailable, REACHABLE, "Unreachable", false),
            (Code::DeadlineExceeded, REACHABLE, "Unreachable", false),
            (Code::Cancelled, REACHABLE, "Unreachable", false),
            (Code::Internal, REACHABLE, "Unreachable", false),
        ] {
            let trouble = Trouble::of_call(SUBMITTED, &Status::new(code, "words"));
            assert_eq!(
                (trouble.condition, trouble.reason, trouble.is_of_the_object()),
                (condition, reason, object),
                "{code:?}"
            );
            assert!(trouble.words.contains("words"));
        }
    }
}
