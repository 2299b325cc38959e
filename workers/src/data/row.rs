//! One JSON value as a row of a dataset: the text in one of its fields, in one pass and without what else it holds.
//!
//! Knows no files and no places in them.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::fault::{conversation, of_fields};

/// Fields that are named in a message.
const SHOWN: usize = 12;

/// What a value is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Row {
    /// An object with a text in the field.
    Text(String),
    /// A text by itself.
    Bare(String),
    /// An object without: what it has instead, as the end of a sentence.
    Object(String),
    /// Neither: its name.
    Other(&'static str),
}

/// Reads a value and takes out the text of one field.
#[derive(Clone, Copy)]
pub(super) struct RowSeed<'a> {
    /// Name of the field.
    pub(super) field: &'a str,
}

impl<'de> DeserializeSeed<'de> for RowSeed<'_> {
    type Value = Row;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Row, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RowSeed<'_> {
    type Value = Row;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with a text in the field `{}`", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
        let (mut value, mut fields) = (None, Vec::new());
        while let Some(field) = map.next_key::<String>()? {
            if field == self.field {
                // Of a field that comes twice the last one counts, as in Python and JavaScript.
                value = Some(map.next_value::<Value>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            if fields.len() < SHOWN {
                fields.push(field);
            }
        }
        Ok(match value {
            Some(Value::Text(text)) => Row::Text(text),
            Some(Value::Other("a list")) => Row::Object(conversation(self.field)),
            Some(Value::Other(what)) => Row::Object(format!("{what} in `{}`", self.field)),
            None => Row::Object(of_fields("fields", &fields)),
        })
    }

    fn visit_str<E>(self, text: &str) -> Result<Row, E> {
        Ok(Row::Bare(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Row, E> {
        Ok(Row::Bare(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Row, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Row::Other("a list"))
    }

    fn visit_unit<E>(self) -> Result<Row, E> {
        Ok(Row::Other("null"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Row, E> {
        Ok(Row::Other("true or false"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Row, E> {
        Ok(Row::Other("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Row, E> {
        Ok(Row::Other("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Row, E> {
        Ok(Row::Other("a number"))
    }
}

/// A value of the field: its text, or what it is.
enum Value {
    Text(String),
    Other(&'static str),
}

impl<'de> serde::Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A field of no name: what an object holds is not looked at.
        let row = RowSeed { field: "" }.deserialize(deserializer)?;
        Ok(match row {
            Row::Bare(text) => Value::Text(text),
            Row::Text(_) | Row::Object(_) => Value::Other("an object"),
            Row::Other(what) => Value::Other(what),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str, field: &str) -> Row {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        RowSeed { field }.deserialize(&mut deserializer).unwrap()
    }

    #[test]
    fn the_field_is_taken_and_everything_else_is_named() {
        let object = |words: &str| Row::Object(words.to_owned());
        for (json, expected) in [
            (r#"{"id": [1, {"text": "no"}], "text": "caf\u00e9"}"#, Row::Text("caf\u{e9}".into())),
            (r#"{"text": "a", "text": "b"}"#, Row::Text("b".into())),
            (r#""alone""#, Row::Bare("alone".into())),
            (
                r#"{"content": "a", "id": 1}"#,
                object("the fields content, id; data.field (--field) names another"),
            ),
            (r#"{"text": 5}"#, object("a number in `text`")),
            (r#"{"text": null}"#, object("null in `text`")),
            (r#"{"text": {"": "a"}}"#, object("an object in `text`")),
            ("{}", object("no fields")),
            ("[1, 2]", Row::Other("a list")),
            ("17", Row::Other("a number")),
        ] {
            assert_eq!(row(json, "text"), expected, "{json}");
        }
        assert_eq!(row(r#"{"text": "a", "content": "b"}"#, "content"), Row::Text("b".into()));
        let chat = r#"{"id": 1, "messages": [{"role": "user", "content": "hello"}]}"#;
        for (field, place) in [("text", "messages"), ("messages", "messages")] {
            assert_eq!(row(chat, field), Row::Object(conversation(place)));
        }
    }
}
