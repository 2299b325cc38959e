//! JSON files that hold rows: an array of objects, or one object behind the other. Read row by row, in bounded memory.
//!
//! Not every `.json` is a dataset: [`content`] looks at its first row. Knows nothing of how documents are used.

use std::fmt;
use std::io;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};

use super::fault::{DataFault, RowFault};
use super::input::Input;
use super::row::{Row, RowSeed};
use super::text::Document;

/// What a `.json` file holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Objects with a text in the field.
    Rows,
    /// An array of texts.
    Texts,
    /// Objects that are rows, but have no text in the field: what the first one has.
    OtherRows(String),
    /// Anything else: a text like any other.
    Text,
}

/// Looks at the beginning of a file.
///
/// **Errors**: it cannot be read.
pub(super) fn content(path: &Path, field: &str) -> Result<Content, DataFault> {
    let mut input = Input::open(path)?;
    let seed = RowSeed { field };
    match input.peek().map_err(|error| input.fault(&error))? {
        Some(b'[') => {
            let mut first = None;
            let take = &mut |row: Row| {
                first = Some(row);
                false
            };
            // What comes behind the first row is not read: that is no error here.
            drop(Rows { seed, take }.deserialize(&mut deserializer(&mut input)));
            Ok(match first {
                Some(Row::Text(_)) => Content::Rows,
                Some(Row::Bare(_)) => Content::Texts,
                Some(Row::Object(got)) => Content::OtherRows(got),
                _ => Content::Text,
            })
        }
        Some(b'{') => {
            let first = seed.deserialize(&mut deserializer(&mut input));
            // One object is a file of settings; two are rows.
            let has_second = input.peek().is_ok_and(|next| next == Some(b'{'));
            Ok(match first {
                Ok(Row::Text(_)) => Content::Rows,
                Ok(Row::Object(got)) if has_second => Content::OtherRows(got),
                _ => Content::Text,
            })
        }
        _ => Ok(Content::Text),
    }
}

/// Reads no further than to the end of an object.
fn deserializer(input: &mut Input) -> serde_json::Deserializer<serde_json::de::IoRead<&mut Input>> {
    serde_json::Deserializer::from_reader(input)
}

/// Passes the documents of a file on, one by one, and what is wrong with rows without a text in the field.
///
/// **Errors**: the file cannot be read, it is no JSON from some row on, or what `emit` says.
pub(super) fn each<E: From<DataFault>>(
    path: &Path,
    field: &str,
    emit: &mut dyn FnMut(Result<Document, DataFault>) -> Result<(), E>,
) -> Result<(), E> {
    let mut input = Input::open(path)?;
    let seed = RowSeed { field };
    let (mut number, mut stopped) = (0, None);
    let broken = |number: usize, got: String| {
        let fault = RowFault { place: format!("text {number}"), field: field.to_owned(), got };
        DataFault::Row { path: path.into(), fault }
    };
    let take = &mut |row: Row| {
        number += 1;
        let document = match row {
            Row::Text(text) | Row::Bare(text) => {
                let name = format!("{}:{number}", path.display());
                Ok(Document { name, text: text.into_bytes() })
            }
            Row::Object(got) => Err(broken(number, got)),
            Row::Other(got) => Err(broken(number, got.to_owned())),
        };
        stopped = emit(document).err();
        stopped.is_none()
    };
    let read = read_rows(&mut input, seed, take);
    match (stopped, read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => {
            match error.get_ref().and_then(|inner| inner.downcast_ref::<serde_json::Error>()) {
                Some(syntax) => Err(broken(number + 1, syntax.to_string()).into()),
                None => Err(input.fault(&error).into()),
            }
        }
    }
}

/// **Errors**: what the system says, or within it what the parser does.
fn read_rows(input: &mut Input, seed: RowSeed, take: &mut dyn FnMut(Row) -> bool) -> io::Result<()> {
    if input.peek()? == Some(b'[') {
        let mut array = deserializer(input);
        Rows { seed, take }.deserialize(&mut array)?;
        return Ok(array.end()?);
    }
    while input.peek()?.is_some() {
        if !take(seed.deserialize(&mut deserializer(input))?) {
            break;
        }
    }
    Ok(())
}

/// Passes the elements of an array on until `take` wants no more.
struct Rows<'a> {
    seed: RowSeed<'a>,
    take: &'a mut dyn FnMut(Row) -> bool,
}

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(row) = list.next_element_seed(self.seed)? {
            if !(self.take)(row) {
                return Err(A::Error::custom("a row that is not taken"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(json: &str, look: impl FnOnce(&Path) -> T) -> T {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        std::fs::write(&path, json).unwrap();
        look(&path)
    }

    fn read(json: &str) -> Result<Vec<String>, String> {
        with(json, |path| {
            let mut texts = Vec::new();
            let done = each::<DataFault>(path, "text", &mut |document| {
                texts.push(String::from_utf8(document?.text).unwrap());
                Ok(())
            });
            let words = |fault: DataFault| fault.to_string().replace(&path.display().to_string(), "a.json");
            done.map_err(words).map(|()| texts)
        })
    }

    #[test]
    fn arrays_lines_and_objects_over_several_lines_are_the_same_rows() {
        for json in [
            r#" [ {"text": "a", "id": 1}, {"id": 2, "text": "b"} ] "#,
            "{\"text\": \"a\"}\n{\"text\": \"b\"}\n",
            "{\n \"text\": \"a\"\n}\r\n\r\n{\n \"text\": \"b\"\n}",
            r#"{"text": "a"}{"text": "b"}"#,
            r#"["a", "b"]"#,
        ] {
            assert_eq!(read(json).unwrap(), ["a", "b"], "{json}");
        }
        assert_eq!(read("[]").unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_wrong_comes_with_its_row() {
        let expected = "expected a JSON object with a text in the field `text`, got";
        for (json, place, got) in [
            (r#"[{"text": "a"}, {"txt": "b"}]"#, 2, "the fields txt; data.field (--field) names another"),
            (r#"[{"text": "a"}, 5]"#, 2, "a number"),
            (r#"[{"text": "a"}, {"text": "b""#, 2, "EOF while parsing an object at line 1 column 28"),
            ("{\"text\": \"a\"}\nnope", 2, "expected ident at line 1 column 2"),
            (r#"[{"text": "a"}] x"#, 2, "trailing characters at line 1 column 17"),
        ] {
            assert_eq!(read(json).unwrap_err(), format!("a.json: text {place}: {expected} {got}"));
        }
    }

    #[test]
    fn a_file_of_settings_is_a_text_and_rows_without_the_field_are_named() {
        let look = |json: &str| with(json, |path| content(path, "text").unwrap());
        let other = |words: &str| Content::OtherRows(words.to_owned());
        let fields = "the fields content; data.field (--field) names another";
        for (json, expected) in [
            (r#"[{"text": "a"}, 5]"#, Content::Rows),
            (r#"{"text": "a"}"#, Content::Rows),
            (r#"["a"]"#, Content::Texts),
            (r#"[{"content": "a"}]"#, other(fields)),
            ("{\"content\": \"a\"}\n{\"content\": \"b\"}", other(fields)),
            ("{\n \"name\": \"a package\",\n \"version\": \"1\"\n}\n", Content::Text),
            ("[1, 2]", Content::Text),
            ("[]", Content::Text),
            ("[", Content::Text),
            ("{ not json", Content::Text),
            ("text", Content::Text),
            ("", Content::Text),
        ] {
            assert_eq!(look(json), expected, "{json}");
        }
    }
}
