//! How a command fails: an exit code, and what it says to stderr.
//!
//! Every subcommand ends in one of these; `main` prints it. Knows no command.

use std::fmt;

use contraflow_runtime::faults::{ErrorKind, Faults, MAX_FAULTS};
use contraflow_runtime::files::objects::{ObjectError, ObjectFault, fetched_name};
use contraflow_workers::error::RankError;

/// Exit code of an interrupted command, as shells have it: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// A command that did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Exit code: 2 where the user has to fix it, 1 where the run failed, 130 where it was interrupted.
    pub code: u8,
    /// What was expected and what came, in one or more lines.
    pub message: String,
}

impl Failure {
    /// The user has to fix it: recipe, data, arguments.
    pub fn input(message: impl Into<String>) -> Self {
        Failure { code: 2, message: message.into() }
    }

    /// The run failed.
    pub fn run(message: impl Into<String>) -> Self {
        Failure { code: 1, message: message.into() }
    }

    /// The user interrupted it.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Failure { code: INTERRUPTED, message: message.into() }
    }

    /// Several things the user has to fix, all at once; `what` has them. A directory of another model has one for each of
    /// its thousands of tensors: the first are listed.
    pub fn faults<T: fmt::Display>(what: &str, faults: &[T]) -> Self {
        let shown = faults.len().min(MAX_FAULTS);
        Self::listed(what, &faults[..shown], faults.len() - shown)
    }

    fn listed<T: fmt::Display>(what: &str, faults: &[T], more: usize) -> Self {
        if let ([only], 0) = (faults, more) {
            return Failure::input(format!("{what}: {only}"));
        }
        let mut lines: String = faults.iter().map(|fault| format!("\n  {fault}")).collect();
        if more > 0 {
            lines += &format!("\n  and {more} more");
        }
        Failure::input(format!("{what}: {} faults{lines}", faults.len() + more))
    }
}

impl From<RankError> for Failure {
    /// Files are the user's, all else is ours.
    fn from(error: RankError) -> Self {
        match error.kind() {
            ErrorKind::Config | ErrorKind::Node | ErrorKind::Storage | ErrorKind::Damaged => {
                Failure::input(error.to_string())
            }
            _ => Failure::run(error.to_string()),
        }
    }
}

impl From<ObjectError> for Failure {
    fn from(error: ObjectError) -> Self {
        match error.kind {
            ObjectFault::Failed => Failure::run(error.to_string()),
            _ => Failure::input(error.to_string()),
        }
    }
}

impl From<Faults> for Failure {
    /// The faults of a recipe.
    fn from(faults: Faults) -> Self {
        Failure::listed("recipe", &faults.list, faults.more)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // To be interrupted is no error.
        let prefix = if self.code == INTERRUPTED { "" } else { "error: " };
        // What was fetched from a store is known by where it came from.
        write!(f, "{prefix}{}", fetched_name(&self.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fault_stands_on_the_line_and_several_below_it() {
        let one = Failure::faults("recipe", &["a: expected 1, got 2"]);
        assert_eq!(one.to_string(), "error: recipe: a: expected 1, got 2");
        let mut faults = Faults::default();
        faults.expected("a", 1, 2);
        faults.push("b", "unknown key");
        let two = Failure::from(faults);
        assert_eq!(two.to_string(), "error: recipe: 2 faults\n  a: expected 1, got 2\n  b: unknown key");
        assert_eq!(two.code, 2);
        let many: Vec<usize> = (0..1234).collect();
        let reported = Failure::faults("model", &many).message;
        assert!(
            reported.starts_with("model: 1234 faults\n  0\n")
                && reported.ends_with("\n  99\n  and 1134 more")
        );
    }
}
