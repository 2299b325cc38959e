//! The files of certificates: new folders, files that are exchanged, lists that grow. Knows no contents.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// Files with their names and modes.
pub(super) type Contents<'a> = [(&'a str, u32, String)];

/// Keeps other commands from writing in a folder for as long as the result lives.
///
/// **Errors**: code 2; the folder is not there, or another command is at work in it.
pub(super) fn lock(dir: &Path) -> Result<File, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::input(format!("--dir: {}: {error}", dir.display()));
    let made_by = |error: io::Error| failed(&format!("{error}; made by contraflow certs init"));
    let folder = File::open(dir).map_err(made_by)?;
    folder.try_lock().map_err(|error| match error {
        fs::TryLockError::WouldBlock => failed(&"expected no other contraflow certs at work in it, got one"),
        fs::TryLockError::Error(error) => failed(&error),
    })?;
    Ok(folder)
}

/// Reads all of these files as text.
///
/// **Errors**: code 2 with every file that cannot be read.
pub(super) fn read<const N: usize>(dir: &Path, names: [&str; N]) -> Result<[String; N], Failure> {
    let mut faults = Vec::new();
    let texts = names.map(|name| {
        let path = dir.join(name);
        let fault =
            |error| faults.push(format!("{}: {error}; made by contraflow certs init", path.display()));
        fs::read_to_string(&path).map_err(fault).unwrap_or_default()
    });
    if faults.is_empty() { Ok(texts) } else { Err(Failure::faults("--dir", &faults)) }
}

/// Makes a folder with these files; under its name only once it is whole.
pub(super) fn create(dir: &Path, contents: &Contents<'_>) -> io::Result<()> {
    let mut part = dir.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    fs::DirBuilder::new().mode(0o700).create(&part)?;
    let fill = || {
        for (name, mode, text) in contents {
            write_new(&part.join(name), *mode, text)?;
        }
        // Takes the place of an empty folder, and of nothing else.
        fs::rename(&part, dir)
    };
    fill().inspect_err(|_| drop(fs::remove_dir_all(&part)))
}

/// Gives files of a folder, which is made if need be, another text, each of them all of it or none. Who reads a certificate and the
/// key of another one sees that they do not belong together, and reads again.
///
/// **Errors**: code 2 with the file that cannot be written.
pub(super) fn exchange(dir: &Path, contents: &Contents<'_>) -> Result<(), Failure> {
    if !dir.exists() {
        return create(dir, contents).map_err(|error| is_taken(dir, "--name", &error));
    }
    for (name, mode, text) in contents {
        let path = dir.join(name);
        replace(&path, *mode, text)
            .map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

/// Why a folder could not be made.
pub(super) fn is_taken(dir: &Path, flag: &str, error: &io::Error) -> Failure {
    let expected = match error.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
            "expected a new folder, got one that is there"
        }
        _ => "expected a folder that can be made",
    };
    Failure::input(format!("{flag}: {}: {expected}: {error}", dir.display()))
}

/// Adds a line to a list, which is begun if need be.
pub(super) fn append(path: &Path, line: &dyn std::fmt::Display) -> io::Result<()> {
    let mut file = File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
    let mut before = String::new();
    file.read_to_string(&mut before)?;
    let newline = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    file.write_all(format!("{newline}{line}\n").as_bytes())?;
    file.sync_all()
}

/// Gives a file another text, all of it or none.
pub(super) fn replace(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    let written = write_new(&part, mode, text);
    written.and_then(|()| fs::rename(&part, path)).inspect_err(|_| drop(fs::remove_file(&part)))
}

fn write_new(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
