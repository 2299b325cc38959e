//! A file as the bytes of its text: decompressed if it is compressed, without the mark that some programs put in front.
//!
//! What a file is its first bytes say, whatever its name. Passes through bounded memory. Knows no documents.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use bzip2::bufread::MultiBzDecoder;
use contraflow_runtime::files::{self, Reader, Refused};
use flate2::bufread::MultiGzDecoder;

use super::fault::{DataFault, unreadable};
use super::text::BYTE_ORDER_MARK;

/// How a file may be compressed, and still be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
    Bzip2,
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
        }
    }

    /// By the first bytes of a file, none of which can begin a text but those of bzip2, which are therefore ten.
    fn of_head(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    fn reader(self, file: BufReader<Reader>) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(file)),
            Self::Bzip2 => Box::new(MultiBzDecoder::new(file)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
                // What `zstd --ultra --long=31` writes; others need less.
                decoder.window_log_max(31)?;
                Box::new(decoder)
            }
        })
    }
}

/// The form of a file that is neither text nor compressed text, by its first bytes.
fn other_form(head: &[u8]) -> Option<&'static str> {
    const TAR: usize = 257;
    match head {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some("a file compressed with xz"),
        [0x04, 0x22, 0x4d, 0x18, ..] => Some("a file compressed with lz4"),
        [0x1f, 0x9d, ..] => Some("a file compressed with compress"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive: unpack it"),
        [b'7', b'z', 0xbc, 0xaf, 0x27, 0x1c, ..] => Some("a 7z archive: unpack it"),
        head if head.get(TAR..TAR + 5) == Some(b"ustar") => Some("a tar archive: unpack it"),
        _ => None,
    }
}

/// Endings of names that say how a file is compressed.
const ENDINGS: [&str; 4] = ["gz", "zst", "zstd", "bz2"];

/// The ending of a file's name that says what it holds, in small letters: `jsonl` of `a.jsonl` and of `A.JSONL.gz`.
pub(super) fn ending(path: &Path) -> Option<String> {
    let of = |path: &Path| Some(path.extension()?.to_str()?.to_ascii_lowercase());
    let last = of(path)?;
    if ENDINGS.contains(&last.as_str()) { of(Path::new(path.file_stem()?)) } else { Some(last) }
}

/// A file that is being read.
pub(super) struct Input {
    path: PathBuf,
    compression: Option<Compression>,
    reader: BufReader<Box<dyn Read + Send>>,
    /// Bytes in front of the text that are none of it.
    pub(super) skipped: usize,
}

impl Input {
    /// Opens a file at the beginning of its text.
    ///
    /// **Errors**: it cannot be read, or is in a form that is not.
    pub(super) fn open(path: &Path) -> Result<Self, DataFault> {
        let system = |error: io::Error| unreadable(path, &error);
        let mut file = BufReader::new(files::reader(path).map_err(system)?);
        let head = file.fill_buf().map_err(system)?;
        let found = other_form(head);
        let compression = Compression::of_head(head);
        let reader = match compression {
            Some(compression) => compression.reader(file).map_err(system)?,
            None => Box::new(file) as Box<dyn Read + Send>,
        };
        let mut input = Input { path: path.into(), compression, reader: BufReader::new(reader), skipped: 0 };
        let head = match input.reader.fill_buf() {
            Ok(head) => head,
            Err(error) => return Err(input.fault(&error)),
        };
        if let Some(found) = found.or(other_form(head)) {
            return Err(DataFault::OtherForm { path: path.into(), found });
        }
        if head.starts_with(&BYTE_ORDER_MARK) {
            input.skipped = BYTE_ORDER_MARK.len();
            input.reader.consume(input.skipped);
        }
        Ok(input)
    }

    /// What an error of reading is: of the system, or of what is in a compressed file.
    pub(super) fn fault(&self, error: &io::Error) -> DataFault {
        match self.compression {
            Some(compression) if error.raw_os_error().is_none() && Refused::of(error).is_none() => {
                DataFault::Compressed {
                    path: self.path.clone(),
                    form: compression.name(),
                    reason: error.to_string(),
                }
            }
            _ => unreadable(&self.path, error),
        }
    }

    /// The next byte that is no white space, which stays unread; `None` at the end.
    ///
    /// **Errors**: what the system or the decompressor says.
    pub(super) fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = buffer.get(blank).copied();
            self.reader.consume(blank);
            if next.is_some() {
                return Ok(next);
            }
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    pub(in crate::data) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    pub(in crate::data) fn bzip2(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<u8>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let mut input = Input::open(&path).map_err(|fault| fault.to_string())?;
        let mut text = Vec::new();
        match input.read_to_end(&mut text) {
            Ok(_) => Ok(text),
            Err(error) => Err(input.fault(&error).to_string()),
        }
        .map_err(|words| words.replace(&path.display().to_string(), "file"))
    }

    #[test]
    fn what_compressors_write_is_read_and_so_is_one_file_behind_another() {
        let text = "caf\u{e9} ".repeat(50_000).into_bytes();
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
        for compress in [gzip as fn(&[u8]) -> Vec<u8>, bzip2, zstd] {
            assert_eq!(read(&compress(&text)).unwrap(), text);
            let two = [compress(&text), compress(b"end")].concat();
            assert_eq!(read(&two).unwrap(), [&text[..], b"end"].concat());
            let marked = [&BYTE_ORDER_MARK[..], b"a"].concat();
            assert_eq!(read(&compress(&marked)).unwrap(), b"a");
            // Cut short, it is no text that ends earlier.
            let whole = compress(&text);
            let error_text = read(&whole[..whole.len() - 5]).unwrap_err();
            assert!(
                error_text.contains(": expected a whole ") && error_text.contains(" file, got: "),
                "{error_text}"
            );
        }
    }

    #[test]
    fn a_mark_is_no_text_at_the_beginning_and_text_elsewhere() {
        let mark = BYTE_ORDER_MARK;
        assert_eq!(read(&[&mark[..], b"a", &mark, b"b"].concat()).unwrap(), [b"a", &mark[..], b"b"].concat());
        assert_eq!(read(&mark).unwrap(), b"");
        assert_eq!(read(&mark[..2]).unwrap(), &mark[..2]);
    }

    #[test]
    fn other_forms_are_named() {
        let mut tar = vec![b'a'; 600];
        tar[257..262].copy_from_slice(b"ustar");
        for (bytes, words) in [
            (&b"\xfd7zXZ\0\0"[..], "xz"),
            (b"PK\x03\x04 and so on", "a zip archive"),
            (&tar, "a tar archive"),
            (&gzip(&tar), "a tar archive"),
        ] {
            let error_text = read(bytes).unwrap_err();
            assert!(
                error_text.contains("gzip, zstd or bzip2, got ") && error_text.contains(words),
                "{error_text}"
            );
        }
    }

    #[test]
    fn endings_are_seen_through_those_of_compressors_in_any_case() {
        let of = |name: &str| ending(Path::new(name));
        assert_eq!(of("a/b.jsonl").unwrap(), "jsonl");
        assert_eq!(of("B.JSONL.GZ").unwrap(), "jsonl");
        assert_eq!(of("b.txt.zst").unwrap(), "txt");
        assert_eq!(of("b.zst"), None);
        assert_eq!(of("b"), None);
    }
}
