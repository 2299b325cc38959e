//! JSONL: one JSON object a line, its `text` field a document.
//!
//! Read a line at a time, so that a file of any size passes through bounded memory. Knows nothing of how documents are used.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use contraflow_runtime::files::reader;
use serde::Deserialize;

use super::corpus::Document;
use super::files::{DataFault, unreadable};

/// No document is as long; a line without an end must not fill the memory.
const MAX_LINE_BYTES: u64 = 1 << 28;

/// What a line must hold; other fields are passed by.
#[derive(Deserialize)]
struct Line {
    text: String,
}

/// A line that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: expected a JSON object with a text in the field `text`, got {got}")]
pub struct LineFault {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong.
    pub got: String,
}

/// The documents of a JSONL file in memory; blank lines are none.
///
/// **Errors**: the first broken line.
pub fn read(bytes: &[u8]) -> Result<Vec<String>, LineFault> {
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    lines.filter_map(|(index, line)| parse(index + 1, line).transpose()).collect()
}

fn parse(line: usize, bytes: &[u8]) -> Result<Option<String>, LineFault> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    match serde_json::from_slice::<Line>(bytes) {
        Ok(parsed) => Ok(Some(parsed.text)),
        // The parser saw one line only and counts from there.
        Err(error) => {
            Err(LineFault { line, got: error.to_string().replace(" at line 1 column", " at column") })
        }
    }
}

/// Passes the documents of a file on, one by one.
///
/// **Errors**: the file cannot be read, the first broken line, or what `emit` says.
pub(super) fn each<E: From<DataFault>>(
    path: &Path,
    emit: &mut dyn FnMut(Document) -> Result<(), E>,
) -> Result<(), E> {
    let broken = |fault| DataFault::Line { path: path.into(), fault };
    let mut lines = BufReader::new(reader(path).map_err(|error| unreadable(path, &error))?);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = lines.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes);
        let read = read.map_err(|error| unreadable(path, &error))?;
        if read == 0 {
            break;
        }
        if read as u64 == MAX_LINE_BYTES {
            let got = format!("a line of {MAX_LINE_BYTES} bytes or more");
            return Err(broken(LineFault { line, got }).into());
        }
        if let Some(text) = parse(line, bytes.strip_suffix(b"\n").unwrap_or(&bytes)).map_err(broken)? {
            emit(Document { name: format!("{}:{line}", path.display()), text: text.into_bytes() })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_line_is_a_document_and_blank_ones_are_not() {
        let text = b"{\"text\": \"a\\nb\", \"id\": 7}\r\n\n  \n{\"id\": [1, {}], \"text\": \"caf\\u00e9\"}";
        assert_eq!(read(text).unwrap(), ["a\nb", "caf\u{e9}"]);
    }

    #[test]
    fn a_broken_line_is_reported_with_its_number() {
        let error_text = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        let expected = "expected a JSON object with a text in the field `text`, got";
        assert_eq!(
            error_text("{\"text\":\"a\"}\n\n{\"text\":\"b"),
            format!("line 3: {expected} EOF while parsing a string at column 10")
        );
        assert_eq!(
            error_text("{\"txt\":\"a\"}"),
            format!("line 1: {expected} missing field `text` at column 11")
        );
        let got = error_text("{\"text\":\"a\"}\n{\"text\":5}");
        assert!(got.starts_with("line 2:") && got.contains("invalid type: integer `5`"), "{got}");
    }

    #[test]
    fn a_file_is_read_as_the_same_bytes_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "{\"text\":\"one\"}\n\n{\"text\":\"two\"}\nnope\n").unwrap();
        let mut documents = Vec::new();
        let fault = each::<DataFault>(&path, &mut |document| {
            documents.push(document);
            Ok(())
        });
        let names: Vec<&str> = documents.iter().map(|document| document.name.as_str()).collect();
        assert_eq!(names, [format!("{}:1", path.display()), format!("{}:3", path.display())]);
        let error_text = fault.unwrap_err().to_string();
        assert!(error_text.starts_with(&format!("{}: line 4: expected", path.display())), "{error_text}");
    }

    proptest! {
        #[test]
        fn what_json_writes_is_read_back(texts in prop::collection::vec(any::<String>(), 0..8)) {
            let line = |text: &String| format!("{}\n", serde_json::json!({ "text": text }));
            let file: String = texts.iter().map(line).collect();
            prop_assert_eq!(read(file.as_bytes()).unwrap(), texts);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }
}
