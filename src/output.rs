//! The way to stdout. A reader that has read enough (`| head`) ends the output, not the command.

use std::io::{ErrorKind, Write, stdout};

use crate::failure::Failure;

/// What a command prints.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Human-readable
    Text,
    /// JSON: one document, or one per line for lists and streams
    Json,
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
