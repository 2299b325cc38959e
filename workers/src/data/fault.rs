//! What may be wrong with text that a user names, each with its path. Knows no reader.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use contraflow_runtime::files::Refused;

/// What is wrong with one path of `--data`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataFault {
    /// Nothing is there.
    #[error("{}: no such file or folder", path.display())]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// The system refuses to read it.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// The path as given, or the one inside the folder that failed.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It is neither a regular file nor a folder, or a link leads out of the data root.
    #[error("{}: expected a file or a folder, got {why}", path.display())]
    Refused {
        /// The path as given, or the one inside the folder.
        path: PathBuf,
        /// What is there.
        why: Refused,
    },
    /// A file without a byte of text.
    #[error("{}: expected text, the file is empty", path.display())]
    Empty {
        /// The path as given.
        path: PathBuf,
    },
    /// A file that was named itself and is binary.
    #[error("{}: expected UTF-8 text, found {found} at byte {offset}", path.display())]
    NotText {
        /// The path as given.
        path: PathBuf,
        /// `a NUL byte`, `UTF-16` or `invalid UTF-8`.
        found: &'static str,
        /// Its offset in the file, of a compressed one in what it holds.
        offset: usize,
    },
    /// A file in a form that is not read.
    #[error("{}: expected text, or text compressed with gzip, zstd or bzip2, got {found}", path.display())]
    OtherForm {
        /// The path as given, or the one inside the folder.
        path: PathBuf,
        /// Which form.
        found: &'static str,
    },
    /// A compressed file that is damaged or cut short.
    #[error("{}: expected a whole {form} file, got: {reason}", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// `gzip`, `zstd` or `bzip2`.
        form: &'static str,
        /// What the reader said.
        reason: String,
    },
    /// A broken row of a JSON or JSONL file.
    #[error("{}: {fault}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Which row, and what is wrong with it.
        fault: RowFault,
    },
    /// Rows of a file that are wrong beyond those that are listed.
    #[error("{}: after {listed} broken rows the rest of the file was not read", path.display())]
    MoreRows {
        /// The file.
        path: PathBuf,
        /// How many are listed.
        listed: usize,
    },
    /// A Parquet file without the column that is read.
    #[error("{}: expected a column `{column}` of texts, found {found}", path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// The column that was wanted.
        column: String,
        /// What it has instead.
        found: String,
    },
    /// A file that is called Parquet and cannot be read as such.
    #[error("{}: expected a Parquet file, got: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// A Parquet file whose column is compressed in a way that is not read.
    #[error(
        "{}: compressed with {codec}, which is not supported; supported are snappy, gzip, brotli, lz4 and zstd",
        path.display()
    )]
    Codec {
        /// The file.
        path: PathBuf,
        /// Its compression.
        codec: String,
    },
    /// A prepared folder, or a file in one, that is not what it should be.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Prepared {
        /// The file or folder.
        path: PathBuf,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A folder with no text in it.
    #[error(
        "{}: expected at least one text file, found none (binary files {num_not_text}, hidden entries {num_hidden})",
        path.display()
    )]
    NoText {
        /// The path as given.
        path: PathBuf,
        /// Files in it that are not UTF-8 text.
        num_not_text: usize,
        /// Entries in it that were passed by for their leading dot.
        num_hidden: usize,
    },
}

/// A row that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: expected a JSON object with a text in the field `{field}`, got {got}")]
pub struct RowFault {
    /// `line 3`, or `text 3` where rows are no lines; counted from 1.
    pub place: String,
    /// The field that was wanted.
    pub field: String,
    /// What is wrong.
    pub got: String,
}

/// Everything that is wrong with what one key of a recipe names.
#[derive(Debug, PartialEq, Eq)]
pub struct TextFaults {
    /// The key.
    pub key: &'static str,
    /// What was expected and what came.
    pub faults: Vec<String>,
    /// Whether the system cannot read what is there: that says nothing of the recipe.
    pub is_of_node: bool,
}

impl fmt::Display for TextFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.faults.join("; "))
    }
}

impl TextFaults {
    /// Those of one key.
    pub(super) fn of<T: fmt::Display>(key: &'static str, faults: &[T]) -> Self {
        TextFaults { key, faults: faults.iter().map(T::to_string).collect(), is_of_node: false }
    }
}

/// What the system said of a path.
pub(super) fn unreadable(path: &Path, error: &io::Error) -> DataFault {
    match Refused::of(error) {
        Some(why) => DataFault::Refused { path: path.into(), why: why.clone() },
        None => DataFault::Unreadable { path: path.into(), reason: error.to_string() },
    }
}

/// How the user names the field of rows that holds the text.
const FIELD_NAMES: &str = "data.field (--field) names another";

/// Fields in which datasets hold conversations.
const CONVERSATIONS: [&str; 4] = ["messages", "conversations", "conversation", "dialogue"];

/// What rows have that have these `fields` (or columns), and not the wanted one; with the way on.
pub(super) fn of_fields(what: &str, fields: &[String]) -> String {
    let outer = |field: &str| field.split('.').next().unwrap_or_default().to_owned();
    match fields.iter().map(|field| outer(field)).find(|field| CONVERSATIONS.contains(&field.as_str())) {
        Some(field) => conversation(&field),
        None if fields.is_empty() => format!("no {what}"),
        None => format!("the {what} {}; {FIELD_NAMES}", fields.join(", ")),
    }
}

/// What is said of a conversation.
pub(super) fn conversation(field: &str) -> String {
    format!(
        "a conversation in `{field}`, which has no text yet; write each one as a text first, with its model's chat \
         template (apply_chat_template in transformers)"
    )
}
