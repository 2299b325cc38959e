//! A file that is hashed while it is written. Knows bytes, no format.
//!
//! On Linux the bytes go to the disk past the page cache: gigabytes that are not read again soon would cost a core several
//! times what hashing them does, and push out what others read.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

/// Bytes handed to the system at once: large enough to keep a disk busy, small enough for the last-level cache.
const CHUNK: usize = 4 << 20;

/// What address, size and place of a direct write are multiples of; no device asks for more.
const BLOCK: usize = 4096;

/// A new file whose checksum is known when it is finished.
pub struct HashedFile {
    file: DirectFile,
    buffer: AlignedBuffer,
    hasher: blake3::Hasher,
    bytes: u64,
}

/// What was written.
pub struct FinishedFile {
    /// Size of the file.
    pub bytes: u64,
    /// Its blake3, 64 hex digits.
    pub blake3: String,
}

impl HashedFile {
    /// Makes the file, or empties the one that is there.
    ///
    /// **Errors**: what the system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = DirectFile::create(path)?;
        Ok(HashedFile { file, buffer: AlignedBuffer::new(), hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Adds bytes.
    ///
    /// **Errors**: what the system says.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let taken = self.buffer.fill(bytes);
            // What was just copied is in the cache.
            self.hasher.update(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.buffer.len == CHUNK {
                self.file.write_all(self.buffer.filled())?;
                self.buffer.len = 0;
            }
        }
        Ok(())
    }

    /// Hands the bytes to the system and waits until they are on disk.
    ///
    /// **Errors**: what the system says.
    pub fn finish(mut self) -> io::Result<FinishedFile> {
        let (blocks, rest) = self.buffer.filled().split_at(self.buffer.len / BLOCK * BLOCK);
        self.file.write_all(blocks)?;
        self.file.through_the_cache()?;
        self.file.write_all(rest)?;
        self.file.file.sync_all()?;
        Ok(FinishedFile { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

/// Room for one chunk that begins at a multiple of [`BLOCK`].
struct AlignedBuffer {
    memory: Vec<u8>,
    begin: usize,
    len: usize,
}

impl AlignedBuffer {
    fn new() -> Self {
        let memory = vec![0; CHUNK + BLOCK];
        let begin = memory.as_ptr().align_offset(BLOCK);
        AlignedBuffer { memory, begin, len: 0 }
    }

    /// Takes as many bytes as there is room for, and says how many.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(CHUNK - self.len);
        let at = self.begin + self.len;
        self.memory[at..at + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    fn filled(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.len]
    }
}

/// A file that is written past the page cache as long as the system allows it.
struct DirectFile {
    file: File,
    direct: bool,
}

impl DirectFile {
    #[cfg(target_os = "linux")]
    fn create(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        match options.clone().custom_flags(flags).open(path) {
            // The file system has no way past the cache.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                Ok(DirectFile { file: options.open(path)?, direct: false })
            }
            opened => Ok(DirectFile { file: opened?, direct: true }),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn create(path: &Path) -> io::Result<Self> {
        Ok(DirectFile { file: File::create(path)?, direct: false })
    }

    /// From now on writes of any size and place are good.
    fn through_the_cache(&mut self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if self.direct {
            rustix::fs::fcntl_setfl(&self.file, rustix::fs::OFlags::empty())?;
        }
        self.direct = false;
        Ok(())
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The device wants another alignment, or the rest of a write that a limit cut short begins in mid-block.
                Err(error) if error.kind() == ErrorKind::InvalidInput && self.direct => {
                    self.through_the_cache()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_pieces_of_any_size_is_in_the_file_and_in_the_checksum() {
        let dir = tempfile::tempdir().unwrap();
        for sizes in [
            &[][..],
            &[1],
            &[BLOCK],
            &[BLOCK - 1, 2, CHUNK],
            &[CHUNK, CHUNK],
            &[3, CHUNK - 3, 5],
            &[2 * CHUNK + BLOCK + 7],
        ] {
            let path = dir.path().join("file");
            let mut file = HashedFile::create(&path).unwrap();
            let mut whole = Vec::new();
            for (index, &size) in sizes.iter().enumerate() {
                let piece: Vec<u8> = (0..size).map(|at| (at * 31 + index * 7) as u8).collect();
                file.write(&piece).unwrap();
                whole.extend_from_slice(&piece);
            }
            let sealed = file.finish().unwrap();
            assert!(std::fs::read(&path).unwrap() == whole, "{sizes:?}");
            assert_eq!(sealed.bytes, whole.len() as u64);
            assert_eq!(sealed.blake3, blake3::hash(&whole).to_hex().to_string());
        }
    }
}
