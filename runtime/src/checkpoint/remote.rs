//! A run's checkpoints in an object store: committed there by one conditional put, kept and dropped there like in the folder.
//!
//! `<location>/step-XXXXXXXX.json` is a checkpoint: its manifest, and the name of the attempt whose parts it is made of. The parts
//! lie in `<location>/step-XXXXXXXX/<attempt>/` and mean nothing without it. The store creates the manifest if there is none of its
//! name (`If-None-Match: *`), so of several writers one commits. Whoever drops a checkpoint removes its manifest before its parts.
//! Knows files and names; which checkpoints stay is the folder's business.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ManifestFault};
use crate::failpoint::failpoint;
use crate::faults::ErrorKind;
use crate::files::objects::{Created, Location, ObjectError, ObjectFault, Objects};
use crate::files::{UNFINISHED_SUFFIX, sync_dir, write_synced};
use crate::random::from_system;

/// What an interrupted commit has left of its parts goes after so long: nobody still writes them.
const LEFT_OVER: Duration = Duration::from_secs(24 * 3600);

/// Where a run's checkpoints are in an object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFolder(Location);

/// What the object of a checkpoint says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Commit {
    /// Name of the attempt.
    parts: String,
    manifest: serde_json::Value,
}

impl From<ObjectError> for CheckpointError {
    fn from(error: ObjectError) -> Self {
        let kind = match error.kind {
            ObjectFault::Missing | ObjectFault::Refused => ErrorKind::Config,
            ObjectFault::Denied | ObjectFault::Changed | ObjectFault::Failed => ErrorKind::Storage,
        };
        CheckpointError { path: error.location, message: error.message, kind }
    }
}

fn object(step: u64) -> String {
    format!("step-{step:08}.json")
}

fn step_of(object: &str) -> Option<u64> {
    object.strip_prefix("step-")?.strip_suffix(".json")?.parse().ok()
}

impl RemoteFolder {
    /// The one at a location; `None` where the text is none. Nothing is asked of the store yet.
    pub fn named(text: &str) -> Option<Self> {
        Some(RemoteFolder(Location::parse(text)?.ok()?))
    }

    /// Where it is.
    pub fn location(&self) -> &Location {
        &self.0
    }

    fn objects(&self) -> Result<Objects, CheckpointError> {
        Ok(Objects::open(&self.0)?)
    }

    /// Steps of the committed checkpoints, ascending.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn list(&self) -> Result<Vec<u64>, CheckpointError> {
        let listed = self.objects()?.list_below("")?;
        let mut steps: Vec<u64> = listed.iter().filter_map(|object| step_of(&object.name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Finds out, before the first step, whether checkpoints can be committed: an object is written, must not be replaced by one
    /// that is to be created under its name, and is removed.
    ///
    /// **Errors**: access is denied; the store fails, or does not honour the condition.
    pub fn probe(&self) -> Result<(), CheckpointError> {
        let objects = self.objects()?;
        let name = format!(".probe-{}", attempt()?);
        let created = [b"first", b"other"].map(|bytes| objects.create(&name, bytes.to_vec()));
        let removed = objects.remove(&name);
        let [first, second] = created;
        match (first?, second?) {
            (Created::Here, Created::Before) => Ok(removed?),
            _ => {
                let message = "expected a store that creates an object only where there is none (If-None-Match), got one that \
                               replaces it: two writers could commit the same checkpoint";
                Err(CheckpointError::new(Path::new(&self.0.to_string()), message))
            }
        }
    }

    /// Commits what a local folder holds, manifest and all it names. If another process has committed the step before, its
    /// checkpoint counts, and that is said.
    ///
    /// **Errors**: the store refuses or fails: nothing is committed then.
    pub fn commit(&self, manifest: &Manifest, from: &Path) -> Result<(), CheckpointError> {
        let step = manifest.position.step;
        let (objects, parts) = (self.objects()?, attempt()?);
        let name = |file: &str| format!("step-{step:08}/{parts}/{file}");
        failpoint("checkpoint.parts-begin");
        for (index, file) in manifest.files().enumerate() {
            if index == 1 {
                failpoint("checkpoint.parts-half-sent");
            }
            objects.put_file(&name(&file.file), &from.join(&file.file))?;
        }
        failpoint("checkpoint.parts-sent");
        let broken = |error| CheckpointError::new(from, error);
        let commit =
            Commit { parts: parts.clone(), manifest: serde_json::to_value(manifest).map_err(broken)? };
        let bytes = serde_json::to_vec_pretty(&commit).map_err(broken)?;
        match objects.create(&object(step), bytes)? {
            Created::Here => failpoint("checkpoint.manifest-created"),
            Created::Before => {
                let at = self.0.join(&object(step)).to_string();
                tracing::warn!(
                    step,
                    "another process has committed the checkpoint of this step, which counts: {at}"
                );
                manifest.files().try_for_each(|file| objects.remove(&name(&file.file)))?;
            }
        }
        Ok(())
    }

    /// Fetches a checkpoint into a folder that is not there yet, checked.
    ///
    /// **Errors**: the store or the disk fails; it is damaged ([`ErrorKind::Config`]).
    pub fn fetch(&self, step: u64, to: &Path) -> Result<(), CheckpointError> {
        let Commit { parts, manifest } = self.read(step)?;
        let part = to.with_extension(format!("fetched{UNFINISHED_SUFFIX}"));
        let failed = |error| CheckpointError::of_storage(&part, error);
        // A process that was killed here before may have left it.
        drop(std::fs::remove_dir_all(&part));
        std::fs::create_dir_all(&part).map_err(failed)?;
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|error| CheckpointError::new(&part, error))?;
        let at = self.0.join(&object(step)).to_string();
        let manifest = Manifest::parse(&text).map_err(|fault| {
            // Another program reads it: that says nothing of what it holds.
            let kind =
                if matches!(fault, ManifestFault::Newer(_)) { ErrorKind::Node } else { ErrorKind::Config };
            CheckpointError { kind, ..CheckpointError::new(Path::new(&at), fault) }
        })?;
        let below = format!("step-{step:08}/{parts}");
        let objects = Objects::open(&self.0.join(&below))?;
        let listed = objects.list_below("")?;
        for file in manifest.files() {
            if !listed.iter().any(|object| object.name == file.file && object.size == file.bytes) {
                let message = format!("expected {below}/{} of {} bytes, got none", file.file, file.bytes);
                return Err(CheckpointError::new(Path::new(&at), message));
            }
        }
        objects.download(&listed, |object| part.join(&object.name))?;
        manifest.files().try_for_each(|file| file.verify(&part))?;
        write_synced(&part.join(MANIFEST_FILE), &text).map_err(failed)?;
        sync_dir(&part).map_err(failed)?;
        std::fs::rename(&part, to).map_err(failed)
    }

    /// Drops a checkpoint: its manifest first, so that nobody finds one without its parts.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn remove(&self, step: u64) -> Result<(), CheckpointError> {
        let objects = self.objects()?;
        if objects.get(&object(step), MAX_MANIFEST_BYTES)?.is_none() {
            return Ok(());
        }
        let Commit { parts, .. } = self.read(step)?;
        objects.remove(&object(step))?;
        failpoint("checkpoint.manifest-removed");
        let below = format!("step-{step:08}/{parts}");
        let parts = objects.list_below(&below)?;
        Ok(parts.iter().try_for_each(|part| objects.remove(&part.name))?)
    }

    /// Takes a damaged checkpoint out of the way, so that its step can be committed anew. Its parts stay for a day.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn set_aside(&self, step: u64) -> Result<(), CheckpointError> {
        let objects = self.objects()?;
        if let Some(bytes) = objects.get(&object(step), MAX_MANIFEST_BYTES)? {
            objects.put(&format!("damaged-{}", object(step)), bytes)?;
        }
        Ok(objects.remove(&object(step))?)
    }

    /// Removes parts that no manifest names and nobody still writes.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn tidy(&self) -> Result<(), CheckpointError> {
        let objects = self.objects()?;
        let listed = objects.list_below("")?;
        let mut named = Vec::new();
        for step in listed.iter().filter_map(|object| step_of(&object.name)) {
            named.push(format!("step-{step:08}/{}/", self.read(step)?.parts));
        }
        let is_left = |name: &str| name.starts_with("step-") && name.contains('/');
        for object in listed {
            let is_named = named.iter().any(|prefix| object.name.starts_with(prefix.as_str()));
            if is_left(&object.name) && !is_named && object.age() > LEFT_OVER {
                objects.remove(&object.name)?;
            }
        }
        Ok(())
    }

    fn read(&self, step: u64) -> Result<Commit, CheckpointError> {
        let at = self.0.join(&object(step)).to_string();
        let wrong = |message: String| CheckpointError::new(Path::new(&at), message);
        let bytes = self.objects()?.get(&object(step), MAX_MANIFEST_BYTES)?;
        let bytes = bytes.ok_or_else(|| wrong("expected a checkpoint, got none".into()))?;
        let commit: Commit = serde_json::from_slice(&bytes).map_err(|error| {
            wrong(format!("expected a checkpoint's manifest, got a damaged one: {error}"))
        })?;
        let is_plain =
            !commit.parts.is_empty() && commit.parts.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if is_plain {
            Ok(commit)
        } else {
            Err(wrong(format!("expected a plain name of parts, got {:?}", commit.parts)))
        }
    }
}

/// A name that no other attempt has.
fn attempt() -> Result<String, CheckpointError> {
    let random =
        from_system().map_err(|error| CheckpointError::of_storage(Path::new("/dev/urandom"), error))?;
    Ok(format!("{:016x}", u64::from_le_bytes(random)))
}
