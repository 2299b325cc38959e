//! Objects as local files: fetched once, whole, into a folder that is named after what they are.
//!
//! `<cache>/objects/<id>/<name>`, with an id made of location and contents' identities (ETag, size). Another process that
//! fetches the same has a folder of its own until it is whole; the first one to rename it wins. What nobody has used goes
//! again: after a month, and after a day where the disk is short of space. Within a process a location means the same contents
//! until it is forgotten. Knows no formats.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::{Listed, Location, ObjectError, ObjectFault, Objects};
use crate::files::{UNFINISHED_SUFFIX, sync_dir};
use crate::random::from_system;

/// After so long without use an entry goes.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// After so long it goes where its space is needed, and so does what an interrupted process has left.
const KEPT_IF_SHORT: Duration = Duration::from_secs(24 * 3600);

/// Space that is left to others. **Units**: bytes.
const MARGIN: u64 = 256 << 20;

/// What this process has fetched.
static FETCHED: Mutex<Fetched> = Mutex::new(Fetched { current: BTreeMap::new(), names: BTreeMap::new() });

struct Fetched {
    /// By location, where its contents are.
    current: BTreeMap<String, PathBuf>,
    /// By path, the location; also of contents that are forgotten.
    names: BTreeMap<PathBuf, String>,
}

/// The local path of what a text names: the path itself, or where the objects of a location are, fetched if need be. The file
/// or folder has the name that the location ends with.
///
/// **Errors**: no valid location; nothing is there, access is denied, it changes meanwhile, the store or the disk fails or has
/// no space.
pub fn fetch(text: &Path) -> Result<PathBuf, ObjectError> {
    let Some(parsed) = text.to_str().and_then(Location::parse) else { return Ok(text.to_owned()) };
    let location = parsed.map_err(|message| ObjectError {
        location: String::new(),
        message,
        kind: ObjectFault::Refused,
    })?;
    // One at a time: ranks that want the same wait for the first one of them.
    static TURN: OnceLock<Mutex<()>> = OnceLock::new();
    let _turn = TURN.get_or_init(Mutex::default).lock();
    let key = location.to_string();
    if let Some(known) = FETCHED.lock().current.get(&key) {
        return Ok(known.clone());
    }
    let path = fetch_into(&root(), &Objects::open(&location)?)?;
    let mut fetched = FETCHED.lock();
    fetched.names.insert(path.clone(), key.clone());
    fetched.current.insert(key, path.clone());
    Ok(path)
}

/// Whoever fetches the location next gets what the store has then; paths of what was fetched before stay as they are.
pub fn forget(text: &str) {
    if let Some(Ok(location)) = Location::parse(text) {
        FETCHED.lock().current.remove(&location.to_string());
    }
}

/// The same for several, all faults at once.
///
/// **Errors**: as [`fetch`], of each.
pub fn fetch_all<P: AsRef<Path>>(texts: &[P]) -> Result<Vec<PathBuf>, Vec<ObjectError>> {
    let (mut paths, mut faults) = (Vec::new(), Vec::new());
    for text in texts {
        match fetch(text.as_ref()) {
            Ok(path) => paths.push(path),
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() { Ok(paths) } else { Err(faults) }
}

/// The same text with locations in place of the cached paths of what this process has fetched: for messages, and for what is
/// to be found from elsewhere.
pub fn fetched_name(text: &str) -> String {
    let fetched = FETCHED.lock();
    let names = fetched.names.iter().map(|(path, location)| (path.to_string_lossy(), location));
    names.fold(text.to_owned(), |text, (path, location)| text.replace(&*path, location))
}

/// A folder in which files are made before they go to a store; removed when it is dropped.
#[derive(Debug)]
pub struct Staging(PathBuf);

impl Staging {
    /// A new one, beside what is fetched.
    ///
    /// **Errors**: what the system says.
    pub fn create() -> io::Result<Self> {
        let random = u64::from_le_bytes(from_system()?);
        let dir = root().join(format!("staging.{random:016x}{UNFINISHED_SUFFIX}"));
        fs::create_dir_all(&dir)?;
        Ok(Staging(dir))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What is left goes with what is old.
        drop(fs::remove_dir_all(&self.0));
    }
}

/// The folder of the cache: `$CONTRAFLOW_CACHE`, or `contraflow` in the user's own.
fn root() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let own =
        || Some(set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?.join("contraflow"));
    set("CONTRAFLOW_CACHE")
        .or_else(own)
        .unwrap_or_else(|| std::env::temp_dir().join("contraflow"))
        .join("objects")
}

fn fetch_into(root: &Path, objects: &Objects) -> Result<PathBuf, ObjectError> {
    let location = objects.location();
    let listed = objects.list()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(location.to_string().as_bytes());
    for object in &listed {
        hasher.update(object.identity().as_bytes());
        hasher.update(b"\n");
    }
    let id = hasher.finalize().to_hex()[..32].to_owned();
    let (entry, name) = (root.join(&id), location.name());
    let failed = |error: io::Error| {
        let message = format!("cannot be kept in {}: {error}", root.display());
        ObjectError::new(location, ObjectFault::Failed, message)
    };
    if entry.join(name).exists() {
        touch(&entry).map_err(failed)?;
        return Ok(entry.join(name));
    }
    fs::create_dir_all(root).map_err(failed)?;
    make_room(root, listed.iter().map(|object| object.size).sum())
        .map_err(|message| ObjectError::new(location, ObjectFault::Failed, message))?;
    let random = u64::from_le_bytes(from_system().map_err(failed)?);
    let part = root.join(format!("{id}.{random:016x}{UNFINISHED_SUFFIX}"));
    let fetched = download_all(objects, &listed, &part.join(name)).and_then(|()| {
        sync_dir(&part).map_err(failed)?;
        match fs::rename(&part, &entry) {
            // Another process was faster: what it has is the same.
            Err(_) if entry.join(name).exists() => Ok(()),
            renamed => renamed.map_err(failed),
        }
    });
    // Gone already if all went well.
    drop(fs::remove_dir_all(&part));
    fetched.map(|()| entry.join(name))
}

fn download_all(objects: &Objects, listed: &[Listed], to: &Path) -> Result<(), ObjectError> {
    let place = |object: &Listed| match object.name.as_str() {
        "" => to.to_owned(),
        name => to.join(name),
    };
    for object in listed {
        let path = place(object);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        made.map_err(|error| {
            ObjectError::new(objects.location(), ObjectFault::Failed, format!("{}: {error}", path.display()))
        })?;
    }
    objects.download(listed, place)
}

/// An entry is as old as its last use.
fn touch(entry: &Path) -> io::Result<()> {
    fs::File::open(entry)?.set_modified(SystemTime::now())
}

/// Removes what is old, and makes room for so many bytes.
///
/// **Errors**: there is not enough, in words.
fn make_room(root: &Path, wanted: u64) -> Result<(), String> {
    let mut entries = entries(root).unwrap_or_default();
    entries.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
    for (age, entry) in entries {
        let short = || free(root).is_ok_and(|free| free < wanted.saturating_add(MARGIN));
        let is_left_over = entry.to_string_lossy().ends_with(UNFINISHED_SUFFIX);
        if age > KEPT || (age > KEPT_IF_SHORT && (is_left_over || short())) {
            // Another process may remove it at the same time.
            drop(fs::remove_dir_all(entry));
        }
    }
    match free(root) {
        Ok(free) if free < wanted.saturating_add(MARGIN) => Err(format!(
            "expected room for {wanted} bytes in {}, with {MARGIN} to spare, got {free}; CONTRAFLOW_CACHE names another folder",
            root.display()
        )),
        _ => Ok(()),
    }
}

/// Every entry with how long it has not been used.
fn entries(root: &Path) -> io::Result<Vec<(Duration, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let used = entry.metadata()?.modified()?;
        found.push((used.elapsed().unwrap_or_default(), entry.path()));
    }
    Ok(found)
}

fn free(dir: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(dir)?;
    Ok(space.f_bavail * space.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_used_goes_and_what_is_used_stays() {
        let root = tempfile::tempdir().unwrap();
        let day = Duration::from_secs(24 * 3600);
        for (name, age) in
            [("month", 31 * day), ("week", 7 * day), ("x.0.part", 2 * day), ("y.0.part", day / 2)]
        {
            let entry = root.path().join(name);
            fs::create_dir(&entry).unwrap();
            fs::File::open(&entry).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
        make_room(root.path(), 1).unwrap();
        let left = |dir: &Path| {
            let mut names: Vec<String> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(left(root.path()), ["week", "y.0.part"]);
        let reported = make_room(root.path(), u64::MAX / 2).unwrap_err();
        assert!(
            reported.starts_with("expected room for ") && reported.contains("CONTRAFLOW_CACHE"),
            "{reported}"
        );
        assert_eq!(left(root.path()), ["y.0.part"], "what is a week old makes room");
    }
}
