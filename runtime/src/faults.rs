//! What is wrong with a recipe or a model file: a list, so that the user can fix everything in one go.
//!
//! Knows no recipe: paths are text.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The user has to fix it.
    Config,
    /// Trying again may help.
    Transient,
    /// A rank is gone: re-form.
    Lost,
    /// The node of a rank does not do its part (its disk, a mount): its operator acts, and the job continues elsewhere.
    Node,
    /// The shared storage is gone, or does not take what is to be written: the job goes on from memory, and what was to be
    /// written is tried again.
    Storage,
    /// A checkpoint is damaged or gone: the one before it is taken.
    Damaged,
    /// A number is not finite: stop or roll back, keep the evidence.
    Numeric,
    /// A broken invariant: a defect of this program.
    Bug,
}

impl ErrorKind {
    const NAMES: [(ErrorKind, &str); 8] = [
        (ErrorKind::Config, "config"),
        (ErrorKind::Transient, "transient"),
        (ErrorKind::Lost, "lost"),
        (ErrorKind::Node, "node"),
        (ErrorKind::Storage, "storage"),
        (ErrorKind::Damaged, "damaged"),
        (ErrorKind::Numeric, "numeric"),
        (ErrorKind::Bug, "bug"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(kind, _)| *kind == self).map_or("bug", |(_, name)| name)
    }

    /// The kind of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }
}

/// A fault of the surroundings that comes again and again, as long as they are as they are: worth a line in the log at first, and
/// one a minute from then on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Repeated {
    told: Option<Instant>,
    times: u64,
}

impl Repeated {
    /// It has come again. How often since the last line, if another one is due.
    pub fn again(&mut self, now: Instant) -> Option<u64> {
        self.times += 1;
        let is_due = self.told.is_none_or(|told| now.saturating_duration_since(told) >= A_WHILE);
        is_due.then(|| {
            self.told = Some(now);
            std::mem::take(&mut self.times)
        })
    }
}

/// Between two lines about the same.
const A_WHILE: Duration = Duration::from_secs(60);

/// A number of things: `1 rank`, `4 ranks`.
pub fn count(number: impl fmt::Display, thing: &str) -> String {
    let number = number.to_string();
    let plural = match number.as_str() {
        "1" => "",
        _ if thing.ends_with("ch") => "es",
        _ => "s",
    };
    format!("{number} {thing}{plural}")
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where: `section.key`, or the name of a file.
    pub path: String,
    /// What was expected and what came.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let colon = if self.path.is_empty() { "" } else { ": " };
        write!(f, "{}{colon}{}", self.path, self.message)
    }
}

/// Faults that are listed; further ones are counted. More than these help nobody, and each costs time and memory.
pub const MAX_FAULTS: usize = 100;

/// Everything that is wrong, in the order it was found. Nothing is wrong with an empty list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The first [`MAX_FAULTS`].
    pub list: Vec<Fault>,
    /// How many more there are.
    pub more: usize,
}

impl Faults {
    /// Adds a fault with a message of its own.
    pub fn push(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push_with(path, || message.into());
    }

    /// The same of a message that takes time: it is made only if the fault is listed.
    pub fn push_with(&mut self, path: impl Into<String>, message: impl FnOnce() -> String) {
        if self.list.len() < MAX_FAULTS {
            self.list.push(Fault { path: path.into(), message: message() });
        } else {
            self.more += 1;
        }
    }

    /// Notes a fault as "expected ..., got ...".
    pub fn expected(&mut self, path: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) {
        self.push(path, format!("expected {expected}, got {got}"));
    }

    /// Takes over the faults of a part, whose paths continue `prefix`.
    pub fn adopt(&mut self, prefix: &str, part: Faults) {
        for fault in part.list {
            let separator = if fault.path.is_empty() { "" } else { "." };
            self.push(format!("{prefix}{separator}{}", fault.path), fault.message);
        }
        self.more += part.more;
    }

    /// Whether none of these paths, nor anything under them, has a fault yet: only then does a relation
    /// between their values mean something. Faults that are not listed may be of any path.
    pub fn spare(&self, paths: &[&str]) -> bool {
        self.more == 0
            && !self.list.iter().any(|fault| {
                paths.iter().any(|path| {
                    fault.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                })
            })
    }

    /// The value, if nothing is wrong.
    pub fn into_result<T>(self, value: T) -> Result<T, Faults> {
        if self.list.is_empty() { Ok(value) } else { Err(self) }
    }

    /// Always [`ErrorKind::Config`]: the user has to fix it.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Config
    }
}

impl fmt::Display for Faults {
    /// One line per fault, and one for those that are not listed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.list.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_again_and_again_is_told_at_once_and_then_once_a_minute() {
        let (mut repeated, began) = (Repeated::default(), Instant::now());
        // Files are short for two minutes, ten times a second.
        let lines: Vec<u64> =
            (0..1_200).filter_map(|at| repeated.again(began + Duration::from_millis(100 * at))).collect();
        assert_eq!(lines, [1, 600]);
        assert_eq!(repeated.again(began + Duration::from_secs(3_600)), Some(600));
    }
}
