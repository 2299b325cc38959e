//! A file of words, mapped into memory and written by several threads: what has been stored is the system's, which writes it
//! to the disk whatever becomes of the process. The one file of the flight recorder with `unsafe` in it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

/// The words of a file that this process has made.
#[derive(Debug)]
pub(super) struct MappedWords(MmapRaw);

impl MappedWords {
    /// Makes a file of these words, little-endian.
    ///
    /// Its blocks are taken by writing them: where a disk is full that is an error here, and no signal at a store to the mapping.
    ///
    /// **Errors**: what the system says, also where the file system maps no files.
    pub(super) fn create(path: &Path, words: &[u64]) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes)?;
        Ok(MappedWords(MmapOptions::new().len(bytes.len()).map_raw(&file)?))
    }

    /// All of them.
    pub(super) fn words(&self) -> &[AtomicU64] {
        let start = self.0.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: a mapping begins at a page, so it is aligned, and so many whole words are in it; it is this value's own and
        // lives as long. All access is atomic. No one else is to cut the file short under a running job.
        unsafe { std::slice::from_raw_parts(start, self.0.len() / size_of::<AtomicU64>()) }
    }
}
