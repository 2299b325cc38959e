//! What the model writes while it trains: after every so many steps a sample of the checkpoint of that step, made beside the
//! training. Knows when a checkpoint is there, not how it came there.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use contraflow_runtime::checkpoint::{CheckpointFolder, MANIFEST_FILE};
use contraflow_runtime::recipe::Recipe;
use serde::Serialize;

use crate::generate;

/// File with a sample a line.
const FILE: &str = "samples.jsonl";

/// A sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Optimizer updates made.
    pub step: u64,
    /// What it begins with, and what the model has made of it.
    pub text: String,
}

/// The samples of a run.
pub struct Samples {
    recipe: Recipe,
    run: PathBuf,
    prompt: String,
    /// The step whose checkpoint is waited for.
    due: Option<u64>,
    /// The sample under way.
    written: Option<Receiver<Result<Sample, String>>>,
}

impl Samples {
    /// Of a run in a folder; none where its recipe wants none.
    pub fn of(recipe: &Recipe, run: &Path, prompt: String) -> Option<Self> {
        let (recipe, run) = (recipe.clone(), run.to_owned());
        (recipe.sample.every > 0).then_some(Samples { recipe, run, prompt, due: None, written: None })
    }

    /// After a step: the sample that has come meanwhile, or why it could not be made. The next one is begun if it can be.
    pub fn after(&mut self, step: u64) -> Option<Result<Sample, String>> {
        if self.recipe.samples_after(step) {
            self.due = Some(step);
        }
        let came = self.written.as_ref().and_then(|written| written.try_recv().ok());
        if came.is_some() {
            self.written = None;
        }
        if self.written.is_none() {
            self.begin();
        }
        came
    }

    /// One at a time: a machine that is busy with one gets no second.
    fn begin(&mut self) {
        let Some(step) = self.due else { return };
        let dir = CheckpointFolder::of_run(&self.run).committed(step);
        if !dir.join(MANIFEST_FILE).is_file() {
            return;
        }
        self.due = None;
        let (prompt, seed) = (self.prompt.clone(), self.recipe.training.seed);
        let file = self.run.join(FILE);
        let (send, receive) = channel();
        let write = move || {
            let sample = generate::sample(&dir, &prompt, seed).map(|text| Sample { step, text });
            let sample = sample.map_err(|failure| failure.message);
            let kept = sample.and_then(|sample| keep(&file, &sample).map(|()| sample));
            // The run may have ended.
            drop(send.send(kept.map_err(|error| format!("no sample of step {step}: {error}"))));
        };
        if std::thread::Builder::new().name("sample".into()).spawn(write).is_ok() {
            self.written = Some(receive);
        }
    }
}

fn keep(file: &Path, sample: &Sample) -> Result<(), String> {
    let line = serde_json::to_string(sample).map_err(|error| error.to_string())? + "\n";
    let opened = File::options().create(true).append(true).open(file);
    let written = opened.and_then(|mut file| file.write_all(line.as_bytes()));
    written.map_err(|error| format!("{}: {error}", file.display()))
}
