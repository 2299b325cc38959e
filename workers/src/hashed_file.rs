//! A file that is hashed while it is written. Knows bytes, no format.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// A new file whose checksum is known when it is finished.
pub struct HashedFile {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

/// What was written.
pub struct Sealed {
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
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        Ok(HashedFile { file, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Adds bytes.
    ///
    /// **Errors**: what the system says.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    /// Hands the bytes to the system and waits until they are on disk.
    ///
    /// **Errors**: what the system says.
    pub fn finish(self) -> io::Result<Sealed> {
        self.file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        Ok(Sealed { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}
