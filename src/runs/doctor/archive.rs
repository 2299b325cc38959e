//! The archive for a report: a gzipped tar of what is named here, and of nothing else that the folder of a run or a job may hold.
//!
//! What goes in is read and written anew: records as records, plans as plans, recipes as tables, so that no text comes along that
//! is none of these. Left out are what is trained on, what is generated, and what may be a secret.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use contraflow_proto::v1::LogsResponse;
use contraflow_runtime::files::{self, UNFINISHED_SUFFIX};
use contraflow_runtime::flight;
use contraflow_runtime::schedule::text;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use toml::Value;

use super::super::survey::Record;
use super::Case;
use super::redact::redacted;
use crate::run_dir::{self, METRICS};

/// So many steps before the end are told.
const METRICS_TAIL: usize = 500;

/// So many rings are in it at most, those of the first ranks: 32 MiB before they are packed.
const MAX_RINGS: usize = 256;

/// The part of the environment that is told: what changes how this program runs, and none that may be a secret.
const VARIABLES: [&str; 6] =
    ["RUST_LOG", "RUST_BACKTRACE", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "LANG", "TZ"];

/// What stands for a text of the user's.
const LEFT_OUT: &str = "[left out]";

/// What goes into an archive.
pub(super) struct Archive<'a> {
    /// What it is about.
    pub(super) case: &'a Case,
    /// The report for people.
    pub(super) text: String,
}

impl Archive<'_> {
    /// Writes it, under its name once it is whole. A file that is there is replaced.
    ///
    /// **Errors**: what the system says.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().ok_or_else(|| io::Error::other("expected the name of a file"))?;
        let mut unfinished = name.to_owned();
        unfinished.push(UNFINISHED_SUFFIX);
        let unfinished = path.with_file_name(unfinished);
        let mut tar = tar::Builder::new(GzEncoder::new(File::create(&unfinished)?, Compression::default()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for (name, bytes) in self.files() {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(now);
            tar.append_data(&mut header, format!("doctor/{name}"), bytes.as_slice())?;
        }
        let mut file = tar.into_inner()?.finish()?;
        file.flush()?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)
    }

    /// By name. What the run does not have, or what is not of its kind, is left out.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let report = super::record(self.case);
        let texts = [
            ("doctor.txt", Some(self.text.clone())),
            ("doctor.json", Some(format!("{report:#}\n"))),
            ("environment.txt", Some(environment())),
            ("recipe.toml", self.recipe()),
            ("plan.txt", self.plan()),
            ("metrics-tail.jsonl", self.metrics()),
            ("log.jsonl", self.log()),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.into_bytes())));
        let of_all = self.case.examined.rings.iter();
        let rings = of_all.flat_map(|(folder, rings)| rings.iter().map(move |ring| (folder, ring)));
        let rings = rings.filter_map(|(folder, (rank, ring))| Some((folder, rank, ring.as_ref().ok()?)));
        let rings = rings.take(MAX_RINGS).map(|(folder, rank, ring)| {
            (flight::ring_path(folder, *rank).display().to_string(), ring.bytes())
        });
        texts.chain(rings).collect()
    }

    /// Without comments, and without what samples begin with.
    fn recipe(&self) -> Option<String> {
        let mut recipe: toml::Table = self.case.recipe.as_ref()?.parse().ok()?;
        if let Some(prompt) = recipe.get_mut("sample").and_then(|sample| sample.get_mut("prompt")) {
            *prompt = Value::String(LEFT_OUT.into());
        }
        Some(redacted(&toml::to_string(&recipe).ok()?))
    }

    fn plan(&self) -> Option<String> {
        let plan =
            text::parse(&files::read_to_string(&self.case.folder.as_ref()?.join("plan.txt")).ok()?).ok()?;
        Some(redacted(&text::write(&plan)))
    }

    fn metrics(&self) -> Option<String> {
        let records = run_dir::records(&self.case.folder.as_ref()?.join(METRICS)).ok()?;
        let tail = &records[records.len().saturating_sub(METRICS_TAIL)..];
        let line = |record: &Record| Some(serde_json::to_string(record).ok()? + "\n");
        Some(redacted(&tail.iter().filter_map(line).collect::<String>()))
    }

    /// What the orchestrator has decided about a job; what its ranks say is not told.
    fn log(&self) -> Option<String> {
        let line = |line: &LogsResponse| {
            let told =
                json!({"unix_ms": line.unix_ms, "level": line.level, "message": redacted(&line.message)});
            format!("{told}\n")
        };
        let lines = &self.case.lines;
        (!lines.is_empty()).then(|| lines.iter().map(line).collect())
    }
}

fn environment() -> String {
    let told = VARIABLES.iter().filter_map(|name| Some((name, std::env::var(name).ok()?)));
    redacted(&told.map(|(name, value)| format!("{name}={value}\n")).collect::<String>())
}
