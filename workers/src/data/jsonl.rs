//! JSONL: one JSON object a line, one of its fields a document.
//!
//! Read a line at a time, so that a file of any size passes through bounded memory. Knows nothing of how documents are used.

use std::io::{BufRead, Read};
use std::path::Path;

use serde::de::DeserializeSeed;

use super::fault::{DataFault, RowFault};
use super::input::Input;
use super::row::{Row, RowSeed};
use super::text::Document;

/// No document is as long; a line without an end must not fill the memory.
const MAX_LINE_BYTES: u64 = 1 << 28;

/// The documents of a JSONL file in memory; blank lines are none.
///
/// **Errors**: the first broken line.
pub fn read(bytes: &[u8], field: &str) -> Result<Vec<String>, RowFault> {
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    lines.filter_map(|(index, line)| parse(index + 1, line, field).transpose()).collect()
}

fn parse(line: usize, bytes: &[u8], field: &str) -> Result<Option<String>, RowFault> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let row = RowSeed { field }.deserialize(&mut deserializer).and_then(|row| {
        deserializer.end()?;
        Ok(row)
    });
    let got = match row {
        Ok(Row::Text(text)) => return Ok(Some(text)),
        Ok(Row::Object(got)) => got,
        Ok(Row::Bare(_)) => "a text by itself".into(),
        Ok(Row::Other(got)) => got.into(),
        // The parser saw one line only and counts from there.
        Err(error) => error.to_string().replace(" at line 1 column", " at column"),
    };
    Err(fault(line, field, got))
}

fn fault(line: usize, field: &str, got: String) -> RowFault {
    RowFault { place: format!("line {line}"), field: field.to_owned(), got }
}

/// Passes the documents of a file on, one by one, and what is wrong with broken lines.
///
/// **Errors**: the file cannot be read, a line that is too long, or what `emit` says.
pub(super) fn each<E: From<DataFault>>(
    path: &Path,
    field: &str,
    emit: &mut dyn FnMut(Result<Document, DataFault>) -> Result<(), E>,
) -> Result<(), E> {
    let broken = |fault| DataFault::Row { path: path.into(), fault };
    let mut input = Input::open(path)?;
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes);
        let read = read.map_err(|error| input.fault(&error))?;
        if read == 0 {
            break;
        }
        if read as u64 == MAX_LINE_BYTES {
            let got = format!("a line of {MAX_LINE_BYTES} bytes or more");
            return Err(broken(fault(line, field, got)).into());
        }
        let row = parse(line, bytes.strip_suffix(b"\n").unwrap_or(&bytes), field);
        if let Some(text) = row.transpose() {
            let name = || format!("{}:{line}", path.display());
            emit(text.map(|text| Document { name: name(), text: text.into_bytes() }).map_err(broken))?;
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
        assert_eq!(read(text, "text").unwrap(), ["a\nb", "caf\u{e9}"]);
        assert_eq!(read(b"{\"text\": 1, \"content\": \"a\"}", "content").unwrap(), ["a"]);
    }

    #[test]
    fn a_broken_line_is_reported_with_its_number() {
        let error_text = |text: &str| read(text.as_bytes(), "text").unwrap_err().to_string();
        let expected = "expected a JSON object with a text in the field `text`, got";
        assert_eq!(
            error_text("{\"text\":\"a\"}\n\n{\"text\":\"b"),
            format!("line 3: {expected} EOF while parsing a string at column 10")
        );
        for (line, got) in [
            ("{\"txt\":\"a\"}", "the fields txt; data.field (--field) names another"),
            ("{\"text\":5}", "a number in `text`"),
            ("\"a\"", "a text by itself"),
            ("{\"text\":\"a\"} x", "trailing characters at column 14"),
        ] {
            assert_eq!(
                error_text(&format!("{{\"text\":\"a\"}}\n{line}")),
                format!("line 2: {expected} {got}")
            );
        }
    }

    #[test]
    fn a_file_is_read_as_the_same_bytes_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "\u{feff}{\"text\":\"one\"}\n\nnope\n{\"text\":\"two\"}\n7\n").unwrap();
        let (mut names, mut faults) = (Vec::new(), Vec::new());
        each::<DataFault>(&path, "text", &mut |document| {
            match document {
                Ok(document) => names.push(document.name),
                Err(fault) => faults.push(fault.to_string()),
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(names, [1, 4].map(|line| format!("{}:{line}", path.display())));
        assert_eq!(faults.len(), 2);
        for (fault, line) in faults.iter().zip([3, 5]) {
            assert!(fault.starts_with(&format!("{}: line {line}: expected", path.display())), "{fault}");
        }
    }

    proptest! {
        #[test]
        fn what_json_writes_is_read_back(texts in prop::collection::vec(any::<String>(), 0..8)) {
            let line = |text: &String| format!("{}\n", serde_json::json!({ "text": text }));
            let file: String = texts.iter().map(line).collect();
            prop_assert_eq!(read(file.as_bytes(), "text").unwrap(), texts);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes, "text");
        }
    }
}
