//! A folder of files as objects: nobody finds it before it is whole. Knows no formats.

use std::path::Path;

use super::{Created, Location, ObjectError, ObjectFault, Objects};

/// Why nothing can be written there: asked before the work that makes what is to be written.
pub fn target_fault(location: &Location) -> Option<ObjectError> {
    let refused = |message: &str| Some(ObjectError::new(location, ObjectFault::Refused, message));
    if location.is_web() {
        return refused("expected s3://, gs:// or az://, got a web server, which takes no files");
    }
    match Objects::open(location).and_then(|objects| objects.list_below("")) {
        Ok(none) if none.is_empty() => None,
        Ok(_) => refused("expected a prefix without objects below it, got one with some"),
        Err(fault) => Some(fault),
    }
}

/// Sends the files of a folder. The one by which readers find it, `last`, is created when all others are there.
///
/// **Errors**: the store or the disk refuses or fails; another process has created `last` meanwhile.
pub fn publish(dir: &Path, location: &Location, last: &str) -> Result<(), ObjectError> {
    let objects = Objects::open(location)?;
    let failed = |error: std::io::Error| {
        ObjectError::new(location, ObjectFault::Failed, format!("on this node: {}: {error}", dir.display()))
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    for name in names.iter().filter(|name| *name != last) {
        objects.put_file(name, &dir.join(name))?;
    }
    match objects.create(last, std::fs::read(dir.join(last)).map_err(failed)?)? {
        Created::Here => Ok(()),
        Created::Before => {
            let message =
                "expected to be the first to write it, got one that another process has written meanwhile";
            Err(ObjectError::new(&location.join(last), ObjectFault::Changed, message))
        }
    }
}
