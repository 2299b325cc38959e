//! Opens files for reading: regular ones only, and none outside of a root through a link.
//!
//! A pipe that nobody writes to blocks whoever opens or reads it, a device may do anything. So the kind of a file is looked
//! at before it is opened, and once more at the open file: somebody may have replaced it in between, and `O_NONBLOCK` makes
//! sure that even then nothing blocks. Where an open file really is, links resolved, the system says of its descriptor.

use std::fs::{self, File, FileType, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};

use super::calls::call;

/// **Units**: bytes that one call reads at most, so that one that takes long hangs.
const CHUNK: usize = 4 << 20;

/// Folders that what is looked up in them must not lead out of.
static ROOTS: RwLock<Vec<PathBuf>> = RwLock::new(Vec::new());

/// Why this program does not read what a path names: the inner error of an [`io::Error`] of kind `InvalidInput`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no regular file.
    #[error("{0}, which is no regular file")]
    NotRegular(&'static str),
    /// A link leads out of the root that it was looked up in.
    #[error("a link that leads out of {}", root.display())]
    Outside {
        /// The root.
        root: PathBuf,
    },
}

impl Refused {
    /// The refusal in an error, if it is one.
    pub fn of(error: &io::Error) -> Option<&Refused> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        io::Error::new(ErrorKind::InvalidInput, refused)
    }
}

/// From now on, what this process opens by a path below `root` has to be below it with all links resolved too.
pub fn confine(root: &Path) {
    let mut roots = ROOTS.write();
    if !roots.iter().any(|known| known == root) {
        roots.push(root.to_owned());
    }
}

/// Opens a regular file for reading.
///
/// **Errors**: what the system says; [`Refused`] for anything but a regular file, and outside of a root; the file system
/// hangs.
pub fn open(path: &Path) -> io::Result<File> {
    let _call = call(path)?;
    check_regular(fs::metadata(path)?.file_type())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    check_regular(file.metadata()?.file_type())?;
    if let Some(root) = root_of(path) {
        check_below(&fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?, root)?;
    }
    Ok(file)
}

/// What the system says of a path, links followed.
///
/// **Errors**: what the system says; the file system hangs.
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    let _call = call(path)?;
    fs::metadata(path)
}

/// The entries of a folder, sorted by name.
///
/// **Errors**: as [`open`], of a folder.
pub fn read_dir(path: &Path) -> io::Result<Vec<fs::DirEntry>> {
    let _call = call(path)?;
    if let Some(root) = root_of(path) {
        check_below(&fs::canonicalize(path)?, root)?;
    }
    let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// A regular file, each read of which is noted as a call.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let _call = call(&self.path)?;
        let len = buffer.len().min(CHUNK);
        self.file.read(&mut buffer[..len])
    }
}

/// Opens a regular file to be read from its beginning.
///
/// **Errors**: as [`open`].
pub fn reader(path: &Path) -> io::Result<Reader> {
    Ok(Reader { file: open(path)?, path: path.to_owned() })
}

/// The contents of a regular file.
///
/// **Errors**: as [`open`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut reader = reader(path)?;
    let size = usize::try_from(reader.file.metadata()?.len()).unwrap_or(0);
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size)?;
    reader.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The contents of a regular file of text.
///
/// **Errors**: as [`open`]; it is not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let not_text = |_| io::Error::new(ErrorKind::InvalidData, "stream did not contain valid UTF-8");
    String::from_utf8(read(path)?).map_err(not_text)
}

/// What stands in the place of a regular file or a folder; `None` if it is one of them.
fn special(kind: FileType) -> Option<&'static str> {
    match kind {
        _ if kind.is_fifo() => Some("a named pipe"),
        _ if kind.is_socket() => Some("a socket"),
        _ if kind.is_char_device() => Some("a character device"),
        _ if kind.is_block_device() => Some("a block device"),
        _ => None,
    }
}

fn check_regular(kind: FileType) -> io::Result<()> {
    match special(kind) {
        _ if kind.is_file() => Ok(()),
        Some(got) => Err(Refused::NotRegular(got).into()),
        None => Err(Refused::NotRegular("a folder").into()),
    }
}

fn root_of(path: &Path) -> Option<PathBuf> {
    ROOTS.read().iter().find(|root| path.starts_with(root)).cloned()
}

fn check_below(resolved: &Path, root: PathBuf) -> io::Result<()> {
    if resolved.starts_with(fs::canonicalize(&root)?) {
        Ok(())
    } else {
        Err(Refused::Outside { root }.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn refused(path: &Path) -> Refused {
        Refused::of(&open(path).unwrap_err()).expect("a refusal").clone()
    }

    #[test]
    fn only_regular_files_are_opened_and_nothing_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        assert_eq!(read(&at("file")).unwrap(), b"text");
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), Mode::RUSR | Mode::WUSR).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        symlink(at("pipe"), at("link")).unwrap();
        symlink("link", at("link to link")).unwrap();
        for (name, got) in [
            ("pipe", "a named pipe"),
            ("link to link", "a named pipe"),
            ("socket", "a socket"),
            (".", "a folder"),
        ] {
            assert_eq!(refused(&at(name)), Refused::NotRegular(got), "{name}");
        }
        assert_eq!(refused(Path::new("/dev/null")), Refused::NotRegular("a character device"));
        let error = read_to_string(&at("pipe")).unwrap_err();
        assert_eq!(error.to_string(), "a named pipe, which is no regular file");
    }

    #[test]
    fn what_is_below_a_root_leads_nowhere_else() {
        let outside = tempfile::tempdir().unwrap();
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir(parent.path().join("real")).unwrap();
        // The root itself may be a link.
        let root = parent.path().join("root");
        symlink("real", &root).unwrap();
        fs::create_dir(root.join("folder")).unwrap();
        fs::write(root.join("folder/own"), "own").unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        symlink(outside.path().join("secret"), root.join("file")).unwrap();
        symlink(outside.path(), root.join("away")).unwrap();
        symlink("../..", root.join("folder/up")).unwrap();
        symlink("folder/own", root.join("near")).unwrap();
        symlink(root.join("folder/own"), root.join("absolute")).unwrap();
        assert_eq!(read(&root.join("file")).unwrap(), b"secret", "not confined yet");
        confine(&root);
        for own in ["folder/own", "near", "absolute", "./folder/own"] {
            assert_eq!(read(&root.join(own)).unwrap(), b"own", "{own}");
        }
        for path in ["file", "away/secret"] {
            assert_eq!(refused(&root.join(path)), Refused::Outside { root: root.clone() }, "{path}");
        }
        for folder in ["away", "folder/up"] {
            let error = read_dir(&root.join(folder)).unwrap_err();
            assert_eq!(Refused::of(&error), Some(&Refused::Outside { root: root.clone() }), "{folder}");
        }
        assert_eq!(read_dir(&root).unwrap().len(), 5);
        assert_eq!(read(&outside.path().join("secret")).unwrap(), b"secret", "other places are as before");
    }
}
