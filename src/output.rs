//! The way to stdout. A reader that has read enough (`| head`) ends the output, not the command.

use std::io::{ErrorKind, Write, stdout};
use std::path::Path;

use crate::failure::Failure;

/// What a command prints.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Human-readable
    Text,
    /// JSON: one document, or one per line for lists and streams
    Json,
}

/// A path as a shell takes it for one word, for commands that are to be typed next.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "_-./+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// Writes a command's result.
///
/// **Errors**: what the system says, but for a reader that has gone.
pub fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

/// Writes bytes that need not be whole characters: a model's.
///
/// **Errors**: as [`print()`].
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::run(format!("stdout: {error}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_to_a_shell() {
        for (path, word) in [
            ("runs/tiny-2", "runs/tiny-2"),
            ("runs/x y", "'runs/x y'"),
            ("it's", "'it'\\''s'"),
            ("$HOME", "'$HOME'"),
        ] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}
