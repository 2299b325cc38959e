//! A folder with a recipe, a model and a text, and runs of the binary in it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use tempfile::TempDir;

use crate::deadline;

/// A model that makes a hundred steps a second.
const MODEL: &str = include_str!("../fixtures/small-model.json");

/// Two ranks under DualPipe.
const RECIPE: &str = r#"
model.config = "model.json"
parallel = { pipeline = 2, schedule = "dualpipe" }
training = { steps = 12, sequence_length = 16, global_batch_size = 8, micro_batch_size = 1, validation_sequences = 4 }
lr.peak = 1e-2
balance.bias_speed = 0.01
data.paths = ["text.txt"]
checkpoint = { every = 4, save_model = false }
"#;

pub struct Workplace {
    dir: TempDir,
}

/// What the losses of a run are made of, as bits, by step.
pub type Curve = Vec<(u64, [u64; 4])>;

impl Workplace {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.json"), MODEL).unwrap();
        std::fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
        let line =
            |number: usize| format!("the {} quick foxes jump over {} lazy dogs\n", number % 7, number % 5);
        std::fs::write(dir.path().join("text.txt"), (0..600).map(line).collect::<String>()).unwrap();
        Workplace { dir }
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
        command.args(args).current_dir(self.dir.path());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        deadline::output(&mut self.command(args))
    }

    /// Runs a command that has to go well.
    pub fn succeed(&self, args: &[&str]) {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    }

    /// Starts a command with failpoints; its messages can be read from stderr.
    pub fn start(&self, args: &[&str], failpoints: &str) -> Child {
        let mut command = self.command(args);
        deadline::spawn(command.env("FAILPOINTS", failpoints).stdout(Stdio::null()).stderr(Stdio::piped()))
    }

    /// The curve that a run has left in its metrics.
    pub fn curve(&self, run: &str) -> Curve {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let point = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let bits = |key: &str| line[key].as_f64().unwrap().to_bits();
            let step = line["step"].as_u64().unwrap();
            (step, ["loss", "mtp_loss", "balance_loss", "grad_norm"].map(bits))
        };
        text.lines().map(point).collect()
    }

    /// Folder of a checkpoint.
    pub fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.path(run).join(format!("checkpoints/step-{step:08}"))
    }

    /// Every file below a folder with its bytes.
    pub fn files(&self, folder: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.path(folder), &mut files);
        files
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.file_name().is_some_and(|name| name != ".lock") {
            let bytes = std::fs::read(&path).unwrap();
            files.insert(path, bytes);
        }
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits for a line of stderr that holds a text; the lines after it.
pub fn wait_for(child: &mut Child, text: &str) -> BufReader<ChildStderr> {
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "stderr ended before {text:?}");
    }
    lines
}
