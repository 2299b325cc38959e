//! The figures of a run as event files of TensorBoard: every number of a line of metrics.jsonl, under its name.
//!
//! An event file is records of a length, a message and a checksum of each (TensorFlow's record format and its `event.proto`, of which
//! only the fields used here are spelled out). Knows no run; what cannot be written is left out.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crc_fast::CrcAlgorithm;
use prost::Message;
use serde_json::Value;

/// Where the event files of a run are, below its folder.
const FOLDER: &str = "tensorboard";

/// One event file that grows.
pub struct EventFile<W = File> {
    file: W,
    has_steps: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, tag = "3")]
    file_version: String,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session: Option<Session>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    // Absent it would be no number: a zero is written too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct Session {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A session that starts at a step: what an earlier file has from there on is shown no more.
const START: i32 = 1;

impl EventFile {
    /// Begins a file of its own in the folder of a run.
    ///
    /// **Errors**: what the system says about the file.
    pub fn create(run_dir: &Path) -> io::Result<EventFile> {
        let folder = run_dir.join(FOLDER);
        std::fs::create_dir_all(&folder)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.{}", now.as_secs(), std::process::id());
        EventFile::begin(File::create(folder.join(name))?, now.as_secs_f64())
    }
}

impl<W: Write> EventFile<W> {
    fn begin(file: W, wall_time: f64) -> io::Result<EventFile<W>> {
        let mut events = EventFile { file, has_steps: false };
        events.write(&Event { wall_time, file_version: "brain.Event:2".to_owned(), ..Event::default() })?;
        Ok(events)
    }

    /// Adds a line of metrics.jsonl.
    ///
    /// **Errors**: what the system says about the file.
    pub fn step(&mut self, line: &Value) -> io::Result<()> {
        let step = line["step"].as_i64().unwrap_or(0);
        let wall_time = line["unix_ms"].as_f64().unwrap_or(0.0) / 1e3;
        if !std::mem::replace(&mut self.has_steps, true) {
            let session = Some(Session { status: START });
            self.write(&Event { wall_time, step, session, ..Event::default() })?;
        }
        let mut values = Vec::new();
        for (name, value) in line.as_object().into_iter().flatten() {
            if name != "step" && name != "unix_ms" {
                collect(name, value, &mut values);
            }
        }
        self.write(&Event { wall_time, step, summary: Some(Summary { values }), ..Event::default() })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        let message = event.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let parts = [&length[..], &masked(&length), &message, &masked(&message)];
        self.file.write_all(&parts.concat())
    }
}

/// Every number in a value, by its path.
fn collect(path: &str, value: &Value, values: &mut Vec<Scalar>) {
    match value {
        Value::Number(number) => {
            let simple_value = number.as_f64().map(|number| number as f32);
            values.push(Scalar { tag: path.to_owned(), simple_value });
        }
        Value::Object(entries) => {
            entries.iter().for_each(|(name, value)| collect(&format!("{path}/{name}"), value, values));
        }
        Value::Array(entries) => {
            let named = entries.iter().enumerate();
            named.for_each(|(index, value)| collect(&format!("{path}/{index}"), value, values));
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The checksum of the record format: CRC-32C, rotated and shifted so that checksums of checksums differ.
fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Three events as the package `tensorboard` 2.21 writes them: version, start of a session, two scalars.
    const WRITTEN: [&str; 3] = [
        "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
        "0f000000000000006d532b0909000000000000044010293a0208016b44df34",
        "2c00000000000000f4aecc4509000000000000044010292a1f0a0b0a046c6f7373150000b0400a100a096d61785f76696f2f30150000803e2768edf0",
    ];

    #[test]
    fn events_are_the_bytes_that_tensorboard_itself_writes() {
        let mut events = EventFile::begin(Vec::new(), 1.5).unwrap();
        let line = json!({"step": 41, "unix_ms": 2500, "loss": 5.5, "skipped": false, "warnings": [], "max_vio": {"0": 0.25}});
        events.step(&line).unwrap();
        let hex: String = events.file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, WRITTEN.concat());
    }
}
