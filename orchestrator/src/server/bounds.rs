//! How much each text and each list of a message from outside may hold: one table, and its use on every message. Pure.
//!
//! What a client sends is refused as a whole, with every field that is out of bounds. Of a worker, what it says for people is
//! made printable and cut, and a message with anything else out of bounds is refused. So nothing that comes in makes a record
//! that cannot be kept, an answer that cannot be read, or a line that acts on somebody's terminal. `docs/security.md` has the
//! table in words.

#[cfg(test)]
mod tests;

use contraflow_proto::v1;
use contraflow_runtime::control::text::{is_control, tidy};
use contraflow_runtime::faults::Faults;
use contraflow_runtime::recipe::Recipe;
use v1::from_worker::Message;
use v1::rank_event::Event;

/// What characters a text may have, and what happens to one that is out of bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// No control characters; refused.
    Text,
    /// Control characters only where lines end and for indents; refused.
    Document,
    /// For people: made printable and cut.
    Prose,
    /// Numbers or messages.
    List,
}

/// What a field may hold.
#[derive(Clone, Copy, Debug)]
struct Bound {
    /// Message and field.
    field: &'static str,
    kind: Kind,
    /// Entries of a list; 1 for a single text.
    entries: usize,
    /// Length of a text, or of each one in a list. **Units**: bytes.
    bytes: usize,
}

const fn text(field: &'static str, bytes: usize) -> Bound {
    Bound { field, kind: Kind::Text, entries: 1, bytes }
}

const fn document(field: &'static str, entries: usize, bytes: usize) -> Bound {
    Bound { field, kind: Kind::Document, entries, bytes }
}

const fn prose(field: &'static str, bytes: usize) -> Bound {
    Bound { field, kind: Kind::Prose, entries: 1, bytes }
}

const fn list(field: &'static str, entries: usize) -> Bound {
    Bound { field, kind: Kind::List, entries, bytes: 0 }
}

/// Ranks of one job.
const RANKS: usize = 1 << 16;

/// Layers of a model, those of multi-token prediction included.
const LAYERS: usize = 1_100;

// Of clients.
const RECIPE: Bound = document("SubmitRequest.recipe", 1, 512 << 10);
const OVERRIDES: Bound = document("SubmitRequest.overrides", 1_024, 256 << 10);
const MODEL_CONFIG: Bound = document("SubmitRequest.model_config", 1, 256 << 10);
const NAME: Bound = text("SubmitRequest.name", 256);
const KEY: Bound = text("SubmitRequest.idempotency_key", 256);
const RESUME_JOB: Bound = text("ResumeFrom.job", 64);
const RESUME_FOLDER: Bound = text("ResumeFrom.folder", 4_096);
const GET: Bound = text("GetRequest.job", 64);
const BEFORE: Bound = text("ListRequest.before", 64);
const WATCH: Bound = text("WatchRequest.job", 64);
const LOGS: Bound = text("LogsRequest.job", 64);
const CANCEL: Bound = text("CancelRequest.job", 64);
const RETRY: Bound = text("RetryRequest.job", 64);
const SCALE: Bound = text("ScaleRequest.job", 64);
const REMOVE: Bound = text("RemoveRequest.job", 64);
const REASON: Bound = text("CancelRequest.reason", 1 << 10);
const DRAIN: Bound = text("DrainRequest.node", 256);

// Of a recipe, once it is read.
const PATHS: Bound = Bound { field: "data.paths", kind: Kind::Text, entries: 4_096, bytes: 4_096 };
const VALIDATION: Bound = Bound { field: "data.validation", kind: Kind::Text, entries: 4_096, bytes: 4_096 };
const FIELD: Bound = text("data.field", 256);
const WEIGHTS: Bound = list("data.weights", 4_096);
const TOKENIZER: Bound = text("tokenizer.path", 4_096);
const END_OF_DOCUMENT: Bound = text("tokenizer.end_of_document", 256);
const INIT: Bound = text("model.init", 4_096);
const MODEL: Bound = text("model.config", 4_096);

// Of workers: who they are.
const VERSION: Bound = text("Hello.version", 64);
const WORKER: Bound = text("Hello.name", 256);
const NODE: Bound = text("Hello.node", 256);
const BLOCK: Bound = text("Hello.block", 256);
const STORAGE: Bound = text("Hello.storage_id", 256);
const MEMORY_LIMIT: Bound = text("Hello.memory_limit", 256);
const SOURCES: Bound = Bound { field: "Hello.sources", kind: Kind::Text, entries: 256, bytes: 4_096 };
const HOSTED: Bound = list("Hello.hosted", 1_024);
const LEFT: Bound = list("Hello.left", 16_384);
const HOST: Bound = text("FabricAddress.host", 256);
const TCP: Bound = text("FabricAddress.tcp", 64);
const UNIX: Bound = text("FabricAddress.unix", 256);
const HOSTED_RANKS: Bound = list("Hosted.ranks", 1_024);
const REPLICAS: Bound = list("Released.replicas", RANKS);

// Of workers: what their ranks do.
const PROGRESS: Bound = list("Beat.progress", RANKS);
const LINES: Bound = list("LogLines.lines", 10_000);
const LEVEL: Bound = prose("LogLine.level", 16);
const LINE: Bound = prose("LogLine.message", 8 << 10);
const ERROR: Bound = prose("Committed.error", 4 << 10);
const DISCARDED: Bound = prose("Discarded.error", 4 << 10);
const FLIGHT: Bound = prose("FlightRead.says", 1 << 10);
const LOADS: Bound = list("StepReport.loads", LAYERS);
const WARNING: Bound = prose("StepReport.warning", 1 << 10);
const COUNTS: Bound = list("LayerLoad.counts", 1 << 12);
const NORMS: Bound = list("GradientNorms.layers", LAYERS);
const LOSSES: Bound = list("StabilityState.losses", 1 << 16);
const GRAD_NORMS: Bound = list("StabilityState.grad_norms", 1 << 16);
const SHARD: Bound = text("ShardFile.file", 256);
const BLAKE3: Bound = text("ShardFile.blake3", 64);
const EXPORTED: Bound = text("ExportedFile.file", 256);
const TENSORS: Bound =
    Bound { field: "ExportedFile.tensors", kind: Kind::Text, entries: 1 << 18, bytes: 256 };
const WHY: Bound = prose("Divergence.why", 1 << 10);
const LOSS: Bound = prose("Evidence.loss", 64);
const GRAD_NORM: Bound = prose("Evidence.grad_norm", 64);
const EVIDENCE: Bound = list("Evidence.ranks", RANKS);
const TENSOR: Bound = prose("NamedTensor.name", 256);
const ACTION: Bound = prose("Failed.action", 256);
const CAUSE: Bound = prose("Failed.cause", 4 << 10);
const SAVE: Bound = prose("SaveFailed.cause", 4 << 10);
const FAILURE: Bound = text("Failed.kind", 32);

impl Bound {
    /// As the sender knows it: within its own request, or as part of what a message holds.
    fn path(&self) -> &'static str {
        match self.field.split_once('.') {
            Some((message, field)) if message.ends_with("Request") || message == "Hello" => field,
            _ => self.field,
        }
    }
}

/// Collects what is out of bounds.
#[derive(Default)]
struct Check(Faults);

impl Check {
    fn entries(&mut self, bound: Bound, entries: usize) -> bool {
        let fits = entries <= bound.entries;
        if !fits {
            self.0.expected(bound.path(), format!("at most {} entries", bound.entries), entries);
        }
        fits
    }

    fn text(&mut self, bound: Bound, text: &str) {
        let is_document = bound.kind == Kind::Document;
        let may_stand = |c: char| is_document && (!c.is_control() || "\n\r\t".contains(c));
        if text.len() > bound.bytes {
            self.0.expected(bound.path(), format!("at most {} bytes", bound.bytes), text.len());
        } else if let Some(c) = text.chars().find(|&c| is_control(c) && !may_stand(c)) {
            self.0.expected(bound.path(), "no control characters", c.escape_default());
        }
    }

    fn texts<'a>(&mut self, bound: Bound, texts: impl ExactSizeIterator<Item = &'a String>) {
        if self.entries(bound, texts.len()) {
            texts.for_each(|text| self.text(bound, text));
        }
    }

    /// Of a client.
    fn of_client(self) -> Result<(), Faults> {
        self.0.into_result(())
    }

    /// Of a worker.
    fn of_worker(self) -> Result<(), String> {
        self.0.into_result(()).map_err(|faults| faults.to_string())
    }
}

fn prose_of(bound: Bound, text: &mut String) {
    tidy(text, bound.bytes);
}

/// **Errors**: every field that is out of bounds.
pub fn submit(request: &v1::SubmitRequest) -> Result<(), Faults> {
    let mut check = Check::default();
    check.text(RECIPE, &request.recipe);
    check.texts(OVERRIDES, request.overrides.iter());
    check.text(MODEL_CONFIG, &request.model_config);
    check.text(NAME, &request.name);
    check.text(KEY, &request.idempotency_key);
    if let Some(resume) = &request.resume {
        check.text(RESUME_JOB, &resume.job);
        check.text(RESUME_FOLDER, &resume.folder);
    }
    check.of_client()
}

/// The texts and lists of a recipe that a client has submitted.
///
/// **Errors**: every key that is out of bounds.
pub fn recipe(recipe: &Recipe) -> Result<(), Faults> {
    let mut check = Check::default();
    check.texts(PATHS, recipe.data.paths.iter());
    check.texts(VALIDATION, recipe.data.validation.iter());
    check.text(FIELD, &recipe.data.field);
    check.entries(WEIGHTS, recipe.data.weights.len());
    check.text(TOKENIZER, &recipe.tokenizer.path);
    check.text(END_OF_DOCUMENT, &recipe.tokenizer.end_of_document);
    check.text(INIT, &recipe.model.init);
    check.text(MODEL, &recipe.model.config);
    check.of_client()
}

/// A request with no more than one text.
///
/// **Errors**: it is out of bounds.
fn one(bound: Bound, text: &str) -> Result<(), Faults> {
    let mut check = Check::default();
    check.text(bound, text);
    check.of_client()
}

/// **Errors**: the job's id is out of bounds.
pub fn get(request: &v1::GetRequest) -> Result<(), Faults> {
    one(GET, &request.job)
}

/// **Errors**: the job's id is out of bounds.
pub fn list_of(request: &v1::ListRequest) -> Result<(), Faults> {
    one(BEFORE, &request.before)
}

/// **Errors**: the job's id is out of bounds.
pub fn watch(request: &v1::WatchRequest) -> Result<(), Faults> {
    one(WATCH, &request.job)
}

/// **Errors**: the job's id is out of bounds.
pub fn logs(request: &v1::LogsRequest) -> Result<(), Faults> {
    one(LOGS, &request.job)
}

/// **Errors**: every field that is out of bounds.
pub fn cancel(request: &v1::CancelRequest) -> Result<(), Faults> {
    let mut check = Check::default();
    check.text(CANCEL, &request.job);
    check.text(REASON, &request.reason);
    check.of_client()
}

/// **Errors**: the job's id is out of bounds.
pub fn retry(request: &v1::RetryRequest) -> Result<(), Faults> {
    one(RETRY, &request.job)
}

/// **Errors**: the job's id is out of bounds.
pub fn scale(request: &v1::ScaleRequest) -> Result<(), Faults> {
    one(SCALE, &request.job)
}

/// **Errors**: the job's id is out of bounds.
pub fn remove(request: &v1::RemoveRequest) -> Result<(), Faults> {
    one(REMOVE, &request.job)
}

/// **Errors**: the label is out of bounds.
pub fn drain(request: &v1::DrainRequest) -> Result<(), Faults> {
    one(DRAIN, &request.node)
}

/// A message of a worker; what it says for people is made fit to be shown.
///
/// **Errors**: every field that is out of bounds.
pub fn from_worker(message: &mut v1::FromWorker) -> Result<(), String> {
    let mut check = Check::default();
    match message.message.as_mut() {
        Some(Message::Hello(hello)) => check.hello(hello),
        Some(Message::Beat(beat)) => {
            check.entries(PROGRESS, beat.progress.len());
        }
        Some(Message::Event(event)) => check.event(event),
        Some(Message::Released(released)) => {
            check.entries(REPLICAS, released.replicas.len());
        }
        Some(Message::Logs(logs)) => check.lines(logs),
        Some(Message::Committed(done)) => prose_of(ERROR, &mut done.error),
        Some(Message::Discarded(done)) => prose_of(DISCARDED, &mut done.error),
        Some(Message::FlightRead(read)) => prose_of(FLIGHT, &mut read.says),
        Some(Message::LeaveRequest(_) | Message::Space(_) | Message::RecordsWanted(_)) | None => {}
    }
    check.of_worker()
}

impl Check {
    fn hello(&mut self, hello: &v1::Hello) {
        self.text(VERSION, &hello.version);
        self.text(WORKER, &hello.name);
        self.text(NODE, &hello.node);
        self.text(BLOCK, &hello.block);
        self.text(STORAGE, &hello.storage_id);
        self.text(MEMORY_LIMIT, &hello.memory_limit);
        self.texts(SOURCES, hello.sources.iter());
        if let Some(address) = &hello.fabric {
            self.text(HOST, &address.host);
            self.text(TCP, &address.tcp);
            self.text(UNIX, &address.unix);
        }
        if self.entries(HOSTED, hello.hosted.len()) {
            for hosted in &hello.hosted {
                self.entries(HOSTED_RANKS, hosted.ranks.len());
            }
        }
        if self.entries(LEFT, hello.left.len()) {
            for left in &hello.left {
                self.entries(REPLICAS, left.replicas.len());
            }
        }
    }

    fn lines(&mut self, logs: &mut v1::LogLines) {
        if self.entries(LINES, logs.lines.len()) {
            for line in &mut logs.lines {
                prose_of(LEVEL, &mut line.level);
                prose_of(LINE, &mut line.message);
            }
        }
    }

    fn event(&mut self, event: &mut v1::RankEvent) {
        match event.event.as_mut() {
            Some(Event::StepDone(report)) => self.report(report),
            Some(Event::ShardSaved(saved)) => {
                if let Some(state) = &saved.watch {
                    self.entries(LOSSES, state.losses.len());
                    self.entries(GRAD_NORMS, state.grad_norms.len());
                }
                if let Some(shard) = &saved.shard {
                    self.text(SHARD, &shard.file);
                    self.text(BLAKE3, &shard.blake3);
                }
            }
            Some(Event::Exported(file)) => {
                self.text(EXPORTED, &file.file);
                self.texts(TENSORS, file.tensors.iter());
            }
            Some(Event::Diverged(v1::Diverged { divergence: Some(divergence), .. })) => {
                prose_of(WHY, &mut divergence.why);
                divergence.evidence.iter_mut().for_each(|evidence| self.evidence(evidence));
            }
            Some(Event::SaveFailed(failed)) => prose_of(SAVE, &mut failed.cause),
            Some(Event::Failed(failed)) => {
                prose_of(ACTION, &mut failed.action);
                prose_of(CAUSE, &mut failed.cause);
                self.text(FAILURE, &failed.kind);
            }
            _ => {}
        }
    }

    fn report(&mut self, report: &mut v1::StepReport) {
        if self.entries(LOADS, report.loads.len()) {
            for load in &report.loads {
                self.entries(COUNTS, load.counts.len());
            }
        }
        if let Some(norms) = &report.gradient_norms {
            self.entries(NORMS, norms.layers.len());
        }
        report.warning.iter_mut().for_each(|warning| prose_of(WARNING, warning));
    }

    fn evidence(&mut self, evidence: &mut v1::Evidence) {
        prose_of(LOSS, &mut evidence.loss);
        prose_of(GRAD_NORM, &mut evidence.grad_norm);
        if self.entries(EVIDENCE, evidence.ranks.len()) {
            for rank in &mut evidence.ranks {
                let tensors = [&mut rank.weight, &mut rank.first_gradient, &mut rank.last_gradient];
                tensors.into_iter().flatten().for_each(|tensor| prose_of(TENSOR, &mut tensor.name));
            }
        }
    }
}
