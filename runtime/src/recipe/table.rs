//! From TOML text and `--set` overrides to a complete table: every key present and of the right type.
//!
//! A faulty or missing value is noted and replaced by a stand-in, so that the rest of the recipe can still be
//! checked. Knows the keys and nothing of what they mean together.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::keys::{KEYS, KeyDefault, KeyDoc};
use super::{FRESH, suggest};
use crate::faults::Faults;
use crate::files::objects::Location;
use crate::model_config::{ModelConfig, builtin as models};

/// A recipe on its way from text to types.
pub(super) struct RecipeTable {
    pub(super) values: Table,
    /// Keys of the model's `config.json` that stand in its section.
    pub(super) model_keys: Table,
    pub(super) faults: Faults,
    /// Paths the recipe itself sets, and where: the line of the file, or `None` for `--set`.
    origins: BTreeMap<String, Option<usize>>,
}

impl RecipeTable {
    /// **Errors**: text that is no TOML; `name` is used for the file in the message. All else goes into
    /// `faults`: overrides that are no `section.key=value`, unknown keys, missing ones, wrong types, values
    /// out of range.
    pub(super) fn read(name: &str, text: &str, overrides: &[String]) -> Result<Self, Faults> {
        let lines = LineStarts::of(text);
        let values = text.parse::<Table>().map_err(|error| {
            let at =
                error.span().map_or(String::new(), |span| format!(" in line {}", lines.line(span.start)));
            let mut faults = Faults::default();
            faults.expected(
                name,
                "valid TOML",
                format!("an error{at}: {}", error.message().replace('\n', ", ")),
            );
            faults
        })?;
        let (faults, origins) = (Faults::default(), BTreeMap::new());
        let mut table = Self { values, model_keys: Table::new(), faults, origins };
        table.note_lines(text, &lines);
        for entry in overrides {
            table.override_with(entry);
        }
        table.take_model_keys();
        table.refuse_unknown_keys();
        for key in KEYS {
            table.check(key);
        }
        Ok(table)
    }

    /// The value at `section.key`.
    pub(super) fn get(&self, path: &str) -> Option<&Value> {
        let (section, key) = path.split_once('.')?;
        self.values.get(section)?.get(key)
    }

    /// Whether the recipe or an override sets this path.
    pub(super) fn is_given(&self, path: &str) -> bool {
        self.origins.contains_key(path)
    }

    /// The text at `section.key`, empty where there is none.
    pub(super) fn text(&self, path: &str) -> String {
        self.get(path).and_then(Value::as_str).unwrap_or_default().to_string()
    }

    /// The sections without unknown keys.
    pub(super) fn sections(&self) -> Table {
        let mut sections = Table::new();
        for key in KEYS {
            let (section, name) = key.parts();
            let value = self.get(key.path).cloned().unwrap_or_else(|| key.stand_in());
            if let Value::Table(entries) = sections.entry(section).or_insert_with(|| Table::new().into()) {
                entries.insert(name.to_string(), value);
            }
        }
        sections
    }

    /// Makes file names absolute: those of the recipe start from its folder, those of overrides from the
    /// working directory.
    pub(super) fn resolve_paths(&mut self, folder: &Path) {
        let resolve = |path: &str, name: &str| {
            if Location::is(name) {
                return name.to_owned();
            }
            let start = if self.origins.get(path) == Some(&None) { Path::new("") } else { folder };
            let joined = start.join(name);
            // Only an empty path has no absolute form; it is reported where it is read.
            std::path::absolute(&joined).unwrap_or(joined).to_string_lossy().into_owned()
        };
        let mut resolved = Vec::new();
        if let Some(Value::String(name)) = self.get("model.config")
            && !models::model_names().contains(&name.as_str())
        {
            resolved.push(("model.config", Value::String(resolve("model.config", name))));
        }
        if let Some(Value::String(name)) = self.get("model.init")
            && name != FRESH
        {
            resolved.push(("model.init", Value::String(resolve("model.init", name))));
        }
        if let Some(Value::String(name)) = self.get("tokenizer.path")
            && !name.is_empty()
        {
            resolved.push(("tokenizer.path", Value::String(resolve("tokenizer.path", name))));
        }
        if let Some(Value::String(name)) = self.get("parallel.plan")
            && !name.is_empty()
        {
            resolved.push(("parallel.plan", Value::String(resolve("parallel.plan", name))));
        }
        for path in ["data.paths", "data.validation"] {
            if let Some(Value::Array(names)) = self.get(path) {
                let names = names.iter().filter_map(Value::as_str);
                let list = names.map(|name| Value::String(resolve(path, name))).collect();
                resolved.push((path, Value::Array(list)));
            }
        }
        for (path, value) in resolved {
            self.set(path, value);
        }
    }

    /// Puts a value in place. A section that is no table is replaced: the fault has been noted.
    pub(super) fn set(&mut self, path: &str, value: Value) {
        let (section, key) = path.split_once('.').unwrap_or((path, ""));
        let section = self.values.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if !section.is_table() {
            *section = Value::Table(Table::new());
        }
        if let Value::Table(section) = section {
            section.insert(key.to_string(), value);
        }
    }

    /// Notes a fault of a value, with what came and where.
    pub(super) fn fault(&mut self, path: &str, expected: &str) {
        let got = self.get(path).map_or_else(|| "nothing".to_string(), value_text);
        let got = format!("{got}{}", self.origin(path));
        self.faults.expected(path, expected, got);
    }

    fn origin(&self, path: &str) -> String {
        match self.origins.get(path) {
            Some(Some(line)) => format!(" (line {line})"),
            Some(None) => " (--set)".to_string(),
            None => String::new(),
        }
    }

    fn note_lines(&mut self, text: &str, lines: &LineStarts) {
        let Ok(root) = DeTable::parse(text) else { return };
        for (section, value) in root.get_ref() {
            let at = lines.line(section.span().start);
            self.origins.insert(section.get_ref().to_string(), Some(at));
            let DeValue::Table(entries) = value.get_ref() else { continue };
            for key in entries.keys() {
                let path = format!("{}.{}", section.get_ref(), key.get_ref());
                self.origins.insert(path, Some(lines.line(key.span().start)));
            }
        }
    }

    fn override_with(&mut self, entry: &str) {
        let Some((path, text)) = entry.split_once('=') else {
            self.faults.expected("--set", "section.key=value", format!("`{entry}`"));
            return;
        };
        let (path, text) = (path.trim(), text.trim());
        if path.split('.').count() != 2 {
            let hint = suggest::for_key(path);
            self.faults.expected("--set", "section.key=value", format!("`{entry}`{hint}"));
            return;
        }
        let value = text.parse().unwrap_or_else(|_| Value::String(text.to_string()));
        self.set(path, value);
        self.origins.insert(path.to_string(), None);
    }

    /// Sets those apart that are the model's own.
    fn take_model_keys(&mut self) {
        let Some(Value::Table(model)) = self.values.get_mut("model") else { return };
        let known = ModelConfig::keys();
        let (own, rest): (Table, Table) =
            std::mem::take(model).into_iter().partition(|(key, _)| known.contains(key));
        (self.model_keys, *model) = (own, rest);
    }

    fn refuse_unknown_keys(&mut self) {
        let mut unknown = Vec::new();
        for (section, value) in &self.values {
            let is_section = KEYS.iter().any(|key| key.parts().0 == section);
            match value {
                Value::Table(entries) if !entries.is_empty() => {
                    let paths = entries.keys().map(|key| format!("{section}.{key}"));
                    unknown.extend(paths.filter(|path| KEYS.iter().all(|key| key.path != path)));
                }
                Value::Table(_) if is_section => {}
                _ if is_section => {
                    let expected = format!("a section, [{section}]");
                    let got = format!("{}{}", value_text(value), self.origin(section));
                    self.faults.expected(section, expected, got);
                }
                _ => unknown.push(section.clone()),
            }
        }
        for path in unknown {
            let origin = self.origin(&path);
            self.faults.push_with(&path, || format!("unknown key{origin}{}", suggest::for_key(&path)));
        }
    }

    fn check(&mut self, key: &KeyDoc) {
        match (self.get(key.path), key.default) {
            (Some(value), _) if key.kind.admits(value) => {
                let wrong = wrong_entries(key, value);
                if wrong.is_empty() {
                    return;
                }
                let origin = self.origin(key.path);
                let expected = key.kind.entry_text().unwrap_or_default();
                for (at, got) in wrong {
                    self.faults.expected(format!("{}[{at}]", key.path), &expected, format!("{got}{origin}"));
                }
            }
            (Some(_), _) | (None, KeyDefault::Required) => self.fault(key.path, &key.kind.range_text()),
            (None, _) => {}
        }
        self.set(key.path, key.stand_in());
    }
}

/// The entries of a list that are not what they have to be, with their places.
fn wrong_entries(key: &KeyDoc, value: &Value) -> Vec<(usize, String)> {
    let entries = value.as_array().into_iter().flatten().enumerate();
    let wrong = entries.filter(|(_, entry)| !key.kind.admits_entry(entry));
    wrong.map(|(at, entry)| (at, value_text(entry))).collect()
}

/// Where the lines of a text begin, so that finding one does not mean to read the text again.
struct LineStarts(Vec<usize>);

impl LineStarts {
    fn of(text: &str) -> Self {
        let ends = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        LineStarts(std::iter::once(0).chain(ends.map(|(at, _)| at + 1)).collect())
    }

    /// The line, counted from 1, of a place.
    fn line(&self, at: usize) -> usize {
        self.0.partition_point(|&start| start <= at)
    }
}

/// A value as a reader of the message would name it.
fn value_text(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::Array(_) | Value::Table(_) if value.to_string().len() > LONGEST => {
            return format!("a long {}", value.type_str());
        }
        other => other.to_string(),
    };
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
