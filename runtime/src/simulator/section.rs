//! Sections of a TOML file read key by key: every fault is noted with its path, and reading goes on with a stand-in.
//!
//! Knows no cluster: what keys there are, the caller says.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;

use toml::{Table, Value};

use crate::faults::Faults;

/// Which numbers a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    /// More than 0.
    Positive,
    /// 0 or more.
    NotNegative,
    /// From 0 to below 1.
    Share,
}

impl Range {
    fn text(self) -> &'static str {
        match self {
            Range::Positive => "a number greater than 0",
            Range::NotNegative => "a number of 0 or more",
            Range::Share => "a number from 0 to below 1",
        }
    }

    fn admits(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Range::Positive => number > 0.0,
                Range::NotNegative => number >= 0.0,
                Range::Share => (0.0..1.0).contains(&number),
            }
    }

    fn stand_in(self) -> f64 {
        if self == Range::Positive { 1.0 } else { 0.0 }
    }
}

/// A table of the file, the keys of it that were asked for, and where faults go.
pub(super) struct Section<'a> {
    path: String,
    table: Option<&'a Table>,
    known: BTreeSet<&'static str>,
    faults: &'a RefCell<Faults>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub fn root(table: &'a Table, faults: &'a RefCell<Faults>) -> Self {
        Section { path: String::new(), table: Some(table), known: BTreeSet::new(), faults }
    }

    fn below(&self, path: String, table: Option<&'a Table>) -> Section<'a> {
        Section { path, table, known: BTreeSet::new(), faults: self.faults }
    }

    fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn fault(&self, key: &str, expected: impl Display, got: Option<&Value>) {
        let got = got.map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.faults.borrow_mut().expected(self.at(key), expected, got);
    }

    /// The value of a key, which is known from now on.
    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.insert(key);
        self.table.and_then(|table| table.get(key))
    }

    /// Whether the file has this key.
    pub fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// A number that has to be there.
    pub fn number(&mut self, key: &'static str, range: Range) -> f64 {
        let value = self.value(key);
        let number =
            value.and_then(|value| value.as_float().or(value.as_integer().map(|whole| whole as f64)));
        number.filter(|&number| range.admits(number)).unwrap_or_else(|| {
            // Where a whole section is missing, that is the one fault.
            if self.table.is_some() {
                self.fault(key, range.text(), value);
            }
            range.stand_in()
        })
    }

    /// A number that is `default` if it is not there.
    pub fn number_or(&mut self, key: &'static str, range: Range, default: f64) -> f64 {
        if self.has(key) {
            return self.number(key, range);
        }
        self.known.insert(key);
        default
    }

    /// A whole number of 1 or more.
    pub fn whole(&mut self, key: &'static str) -> u64 {
        let value = self.value(key);
        let number = value.and_then(Value::as_integer).and_then(|number| u64::try_from(number).ok());
        number.filter(|&number| number > 0).unwrap_or_else(|| {
            if self.table.is_some() {
                self.fault(key, "a whole number of 1 or more", value);
            }
            1
        })
    }

    /// One of a few words; the first one if it is wrong or missing.
    pub fn word(&mut self, key: &'static str, words: &[&'static str]) -> &'static str {
        let value = self.value(key);
        let text = value.and_then(Value::as_str);
        let found = text.and_then(|text| words.iter().find(|word| **word == text));
        found.copied().unwrap_or_else(|| {
            if self.table.is_some() {
                self.fault(key, format!("one of {}", words.join(", ")), value);
            }
            words[0]
        })
    }

    /// A text that has to be there.
    pub fn text(&mut self, key: &'static str) -> String {
        let value = self.value(key);
        value.and_then(Value::as_str).map_or_else(
            || {
                self.fault(key, "a text", value);
                String::new()
            },
            str::to_owned,
        )
    }

    /// A section that has to be there.
    pub fn section(&mut self, key: &'static str) -> Section<'a> {
        let value = self.value(key);
        let table = value.and_then(Value::as_table);
        if table.is_none() && self.table.is_some() {
            self.fault(key, format!("a section, [{}]", self.at(key)), value);
        }
        self.below(self.at(key), table)
    }

    /// A section that may be left out.
    pub fn section_or_empty(&mut self, key: &'static str) -> Option<Section<'a>> {
        if self.has(key) {
            return Some(self.section(key));
        }
        self.known.insert(key);
        None
    }

    /// The rows of a list of tables; none if it is not there.
    pub fn rows(&mut self, key: &'static str) -> Vec<Section<'a>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let rows = value.as_array().map(Vec::as_slice).unwrap_or_default();
        if !value.is_array() || rows.iter().any(|row| !row.is_table()) {
            self.fault(key, format!("rows, [[{}]]", self.at(key)), Some(value));
        }
        let row = |(index, row): (usize, &'a Value)| {
            self.below(format!("{}[{index}]", self.at(key)), row.as_table())
        };
        rows.iter().enumerate().map(row).collect()
    }

    /// Notes the keys that nobody has asked for.
    pub fn close(self) {
        let unknown =
            self.table.into_iter().flat_map(Table::keys).filter(|key| !self.known.contains(key.as_str()));
        for key in unknown {
            let known: Vec<&str> = self.known.iter().copied().collect();
            let hint = format!("unknown key; known here: {}", known.join(", "));
            self.faults.borrow_mut().push(self.at(key), hint);
        }
    }
}
