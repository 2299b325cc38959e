//! Who did what: a line for every call that changes something and for every one that was refused, as JSON, in files of the state's
//! folder that are exchanged when they are full. Knows no credentials: it is told who calls.

use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contraflow_runtime::control::text::printable;
use parking_lot::Mutex;
use serde::Serialize;

/// The file that is written; those before it have a number after it.
const FILE_NAME: &str = "audit.jsonl";

/// A file that is longer than this is full. **Units**: bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Full files that stay.
const KEPT: u32 = 4;

/// A call.
#[derive(Debug, Serialize)]
pub(super) struct Call<'a> {
    /// **Units**: milliseconds since 1970.
    pub(super) unix_ms: u64,
    /// The name of the caller's token; empty where none is needed or none was good.
    pub(super) user: &'a str,
    pub(super) address: IpAddr,
    pub(super) call: &'a str,
    /// The job, the node or the worker that it was about, if it is known.
    pub(super) target: &'a str,
    /// `ok`, or why it was refused.
    pub(super) result: &'a str,
}

/// The audit log. Clones are the same.
#[derive(Clone)]
pub(super) struct Audit {
    path: Arc<Path>,
    open: Arc<Mutex<Option<(File, u64)>>>,
    max_bytes: u64,
}

impl Audit {
    /// In the state's folder; nothing is made before the first line.
    pub(super) fn in_folder(dir: &Path) -> Self {
        Audit { path: dir.join(FILE_NAME).into(), open: Arc::default(), max_bytes: MAX_BYTES }
    }

    /// Writes a line, on a thread that may block. A line that cannot be written stops no call: the log says so.
    pub(super) fn write(&self, call: &Call<'_>) {
        let Ok(mut line) = serde_json::to_string(call) else { return };
        line = printable(&line).into_owned();
        line.push('\n');
        if let Err(error) = self.append(line.as_bytes()) {
            tracing::error!("{}: {error}; not audited: {}", self.path.display(), line.trim());
        }
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        let mut open = self.open.lock();
        let (mut file, bytes) = match open.take() {
            Some((file, bytes)) if bytes < self.max_bytes => (file, bytes),
            full => {
                if full.is_some() {
                    self.rotate()?;
                }
                let file = File::options().append(true).create(true).mode(0o600).open(&self.path)?;
                let bytes = file.metadata()?.len();
                (file, bytes)
            }
        };
        file.write_all(line)?;
        *open = Some((file, bytes + line.len() as u64));
        Ok(())
    }

    fn rotate(&self) -> io::Result<()> {
        for number in (1..KEPT).rev() {
            match std::fs::rename(self.numbered(number), self.numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(&self.path, self.numbered(1))
    }

    fn numbered(&self, number: u32) -> PathBuf {
        self.path.with_file_name(format!("{FILE_NAME}.{number}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(target: &str) -> Call<'_> {
        let address = IpAddr::from([10, 0, 0, 1]);
        Call { unix_ms: 5, user: "ann", address, call: "cancel", target, result: "ok" }
    }

    #[test]
    fn a_line_is_json_and_full_files_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit { max_bytes: 300, ..Audit::in_folder(dir.path()) };
        (0..40).for_each(|number| audit.write(&call(&format!("job-{number}"))));
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let lines: Vec<String> =
            ["audit.jsonl.4", "audit.jsonl.3", "audit.jsonl.2", "audit.jsonl.1", FILE_NAME]
                .iter()
                .flat_map(|name| text(name).lines().map(str::to_owned).collect::<Vec<_>>())
                .collect();
        let last = r#"{"unix_ms":5,"user":"ann","address":"10.0.0.1","call":"cancel","target":"job-39","result":"ok"}"#;
        assert_eq!(lines.last().unwrap(), last);
        let first = 40 - lines.len();
        assert!((10..30).contains(&first), "the oldest are gone: {first}");
        assert!(lines.iter().zip(first..).all(|(line, number)| line.contains(&format!("\"job-{number}\""))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_line_goes_on_in_the_file_of_an_earlier_start_and_shows_no_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        Audit::in_folder(dir.path()).write(&call("job-1"));
        Audit::in_folder(dir.path()).write(&call("a\u{1b}[2Jb\u{202e}"));
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("\"job-1\"") && !text.contains(['\u{1b}', '\u{202e}']), "{text}");
    }
}
