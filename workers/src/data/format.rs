//! How a file holds documents: by the ending of its name, of a `.json` by its first row too. One way to read them all.

use std::io::Read;
use std::path::Path;

use super::fault::DataFault;
use super::input::{Input, ending};
use super::json::{self, Content};
use super::text::{Document, first_binary};
use super::{jsonl, parquet_file};

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileFormat {
    /// A file is a document.
    Text,
    /// `.jsonl` or `.ndjson`: a line is one.
    Jsonl,
    /// `.json` with rows: a row is one.
    Json,
    /// `.parquet`: a row is one.
    Parquet,
}

/// How documents are read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading<'a> {
    /// The field or column of rows that holds the text.
    pub(super) field: &'a str,
    /// A text file that is longer counts as several documents, cut behind the last end of a line that fits.
    ///
    /// **Units**: bytes.
    pub(super) piece_bytes: u64,
}

/// Documents of text files, where they are not to fill the memory. **Units**: bytes.
pub(super) const PIECE_BYTES: u64 = 16 << 20;

/// What a file turns out to be.
pub(super) enum Looked {
    /// A file that is read.
    As(FileFormat),
    /// A `.json` of rows without the field, or of texts alone: in a folder a text like any other.
    JsonAsText,
}

impl FileFormat {
    /// The format of a file. One that the user has `named` is not read as a text if it is a dataset.
    ///
    /// **Errors**: it cannot be read, or its rows have no text in the field.
    pub(super) fn look(path: &Path, field: &str, named: bool) -> Result<Looked, DataFault> {
        let format = match ending(path).as_deref() {
            Some("jsonl" | "ndjson") => Self::Jsonl,
            Some("parquet") => Self::Parquet,
            Some("json") => match json::content(path, field)? {
                Content::Rows => Self::Json,
                Content::Texts if named => Self::Json,
                // Read as rows it is refused, with the first one.
                Content::OtherRows(_) if named => Self::Json,
                Content::Texts | Content::OtherRows(_) => return Ok(Looked::JsonAsText),
                Content::Text => Self::Text,
            },
            _ => Self::Text,
        };
        Ok(Looked::As(format))
    }

    /// Passes the documents of a file on, one by one, in bounded memory, and what is wrong with rows behind which others may be
    /// right.
    ///
    /// **Errors**: what is wrong with the file as a whole, or what `emit` says.
    pub(super) fn each<E: From<DataFault>>(
        self,
        path: &Path,
        Reading { field, piece_bytes }: Reading,
        emit: &mut dyn FnMut(Result<Document, DataFault>) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Text => each_piece(path, piece_bytes, emit),
            Self::Jsonl => jsonl::each(path, field, emit),
            Self::Json => json::each(path, field, emit),
            Self::Parquet => parquet_file::each(path, field, emit),
        }
    }
}

/// Whether a file is text from beginning to end. The first sign that it is not ends the reading.
///
/// **Errors**: it cannot be read.
pub(super) fn is_text(path: &Path) -> Result<bool, DataFault> {
    match each_piece::<DataFault>(path, 1 << 20, &mut |_| Ok(())) {
        Ok(()) => Ok(true),
        Err(DataFault::NotText { .. } | DataFault::OtherForm { .. }) => Ok(false),
        Err(fault) => Err(fault),
    }
}

fn each_piece<E: From<DataFault>>(
    path: &Path,
    piece_bytes: u64,
    emit: &mut dyn FnMut(Result<Document, DataFault>) -> Result<(), E>,
) -> Result<(), E> {
    let mut input = Input::open(path)?;
    let (mut text, mut offset) = (Vec::new(), input.skipped);
    loop {
        let wanted = piece_bytes - text.len() as u64;
        let read = input.by_ref().take(wanted).read_to_end(&mut text).map_err(|error| input.fault(&error))?;
        let is_last = (read as u64) < wanted;
        let cut = if is_last { text.len() } else { cut_within(&text) };
        if let Some((found, at)) = first_binary(&text[..cut]) {
            return Err(DataFault::NotText { path: path.into(), found, offset: offset + at }.into());
        }
        let rest = text.split_off(cut);
        let piece = std::mem::replace(&mut text, rest);
        offset += piece.len();
        if !piece.is_empty() {
            emit(Ok(Document { name: path.display().to_string(), text: piece }))?;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// Where a piece that is not the last ends: after the last line, or if there is none, before the last character.
fn cut_within(text: &[u8]) -> usize {
    let line = text.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1);
    // The first byte of a character is no 10xxxxxx.
    line.or_else(|| text.iter().rposition(|&byte| byte & 0b1100_0000 != 0b1000_0000))
        .filter(|&cut| cut > 0)
        .unwrap_or(text.len())
}
