//! The way to stdout and stderr, and how words, tables and names are written there. A reader that has read enough (`| head`)
//! or has gone (a lost terminal) ends the output, not the command.

use std::borrow::Cow;
use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::ops::Range;

use comfy_table::{CellAlignment, Row, Table};
use contraflow_runtime::control::text::is_control;
pub use contraflow_runtime::faults::count;

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

/// A line of progress on stderr. Nobody has to read it: training goes on without a reader.
pub fn say(line: impl fmt::Display) {
    // One write for the whole line, so that those of several threads do not mix.
    drop(stderr().lock().write_all(format!("{line}\n").as_bytes()));
}

/// Whether what is written to stderr is coloured: on a terminal, unless `NO_COLOR` says no.
pub fn is_coloured() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stderr().is_terminal() && !refused
}

/// How wide a line on stdout may be, and whether it is coloured: as wide as the terminal, and coloured there unless `NO_COLOR` says no.
pub fn line_style() -> (usize, bool) {
    /// Of a file or a pipe. **Units**: characters.
    const WIDTH: usize = 110;
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let terminal = console::Term::stdout();
    let width = terminal.size_checked().map_or(WIDTH, |(_, columns)| usize::from(columns));
    (width, stdout().is_terminal() && !refused)
}

/// A word of a command line as a shell reads it: in quotes where it has to be.
pub fn quoted(word: impl fmt::Display) -> String {
    let word = word.to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word;
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Columns as wide as what they hold; those of `numbers` end where they end.
pub fn table<R: Into<Row>>(
    header: impl Into<Row>,
    numbers: Range<usize>,
    rows: impl IntoIterator<Item = R>,
) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_header(header).add_rows(rows);
    let of_numbers = table.column_iter_mut().enumerate().filter(|(index, _)| numbers.contains(index));
    of_numbers.for_each(|(_, column)| column.set_cell_alignment(CellAlignment::Right));
    format!("{}\n", table.trim_fmt())
}

/// The way of a model's bytes to stdout. A terminal gets characters that act on it written out (`\x1b`), as a young model's
/// bytes can be any; a file and a pipe get the bytes as they are.
pub struct ModelText {
    escapes: bool,
    /// The beginning of a character whose other bytes have yet to come.
    pending: Vec<u8>,
}

impl ModelText {
    /// To the stdout of this process.
    pub fn to_stdout() -> Self {
        ModelText { escapes: stdout().is_terminal(), pending: Vec::new() }
    }

    /// Writes the next bytes.
    ///
    /// **Errors**: as [`print()`].
    pub fn print(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.escapes { print(&self.escaped(bytes)) } else { print_bytes(bytes) }
    }

    /// What a terminal is shown of the next bytes.
    fn escaped(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.pending);
        let mut shown = String::new();
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            shown += &escaped(chunk.valid());
            let rest = chunk.invalid();
            let may_go_on = std::str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && may_go_on {
                self.pending = rest.to_vec();
            } else {
                rest.iter().for_each(|byte| shown += &format!("\\x{byte:02x}"));
            }
        }
        shown
    }
}

/// A text with what acts on a terminal written out, but for line ends and tabs.
pub fn escaped(text: &str) -> Cow<'_, str> {
    let acts = |c: char| is_control(c) && c != '\n' && c != '\t';
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let write = |c: char| match c {
        '\0'..='\u{7f}' if acts(c) => format!("\\x{:02x}", u32::from(c)),
        c if acts(c) => c.escape_unicode().to_string(),
        c => c.to_string(),
    };
    Cow::Owned(text.chars().map(write).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_read_something_else() {
        for (word, shown) in [
            ("runs/tiny-2", "runs/tiny-2"),
            ("runs/größer", "runs/größer"),
            ("runs/x y", "'runs/x y'"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(word), shown);
        }
    }

    #[test]
    fn a_terminal_is_shown_escapes_and_characters_that_come_in_parts_stay_whole() {
        let shown = |parts: &[&[u8]]| {
            let mut text = ModelText { escapes: true, pending: Vec::new() };
            parts.iter().map(|part| text.escaped(part)).collect::<String>()
        };
        assert_eq!(shown(&[b"a\x1b[31m\x0e\r\tb\n"]), "a\\x1b[31m\\x0e\\x0d\tb\n");
        assert_eq!(shown(&["gr\u{f6}\u{df}er".as_bytes()]), "größer");
        assert_eq!(shown(&[b"gr\xc3", b"\xb6\xc3", b"\x9fer"]), "größer");
        assert_eq!(shown(&[b"\xe6\x9d", b"x\xff"]), "\\xe6\\x9dx\\xff");
        // C1 controls are characters of two bytes.
        assert_eq!(shown(&["\u{9b}31m".as_bytes()]), "\\u{9b}31m");
    }
}
