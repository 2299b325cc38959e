//! The words of a ring, written by several threads, and how they come into its file. Where a file can be mapped without danger they are
//! mapped: what has been stored is the system's, which writes it to the disk whatever becomes of the process. Elsewhere they are in memory
//! and are copied now and then. The one file of the flight recorder with `unsafe` in it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// File systems of a machine's own that keep blocks in their place, as `statfs` calls them: ext2 to ext4, XFS, tmpfs, and overlays of
/// these. Behind any other one a store to a mapped page may wait for a server, or end the process where there is no room or no server any
/// more.
const MAPPABLE: [u64; 4] = [0xef53, 0x5846_5342, 0x0102_1994, 0x794c_7630];

/// The words of a file that this process has made.
#[derive(Debug)]
pub(super) enum RingWords {
    /// In the file.
    Mapped(MmapRaw),
    /// In memory, and as they were at some moment in the file.
    Copied(Box<[AtomicU64]>, PathBuf),
}

impl RingWords {
    /// Makes a file of these words, little-endian.
    ///
    /// Its blocks are taken by writing them: where a disk is full that is an error here, and no signal at a store to the mapping.
    ///
    /// **Errors**: what the system says, also where the file system maps no files.
    pub(super) fn create(path: &Path, words: &[u64], is_mapped: bool) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.write_all(&bytes(words.iter().copied()))?;
        if !is_mapped {
            return Ok(RingWords::Copied(
                words.iter().copied().map(AtomicU64::new).collect(),
                path.to_owned(),
            ));
        }
        Ok(RingWords::Mapped(MmapOptions::new().len(size_of_val(words)).map_raw(&file)?))
    }

    /// All of them; those of a mapping are little-endian.
    fn words(&self) -> &[AtomicU64] {
        match self {
            RingWords::Mapped(mapped) => {
                let start = mapped.as_mut_ptr().cast::<AtomicU64>();
                // SAFETY: a mapping begins at a page, so it is aligned, and so many whole words are in it; it is this value's own and
                // lives as long. All access is atomic. No one else is to cut the file short under a running job.
                unsafe { std::slice::from_raw_parts(start, mapped.len() / size_of::<AtomicU64>()) }
            }
            RingWords::Copied(words, _) => words,
        }
    }

    /// Stores words from a place on.
    pub(super) fn store(&self, place: usize, words: &[u64]) {
        let is_mapped = matches!(self, RingWords::Mapped(_));
        for (place, word) in self.words()[place..].iter().zip(words) {
            place.store(if is_mapped { word.to_le() } else { *word }, Ordering::Relaxed);
        }
    }

    /// Brings the file up to date where it is a copy. Whoever has removed it, or its folder, has no use for it any more. It may wait for
    /// the file system.
    pub(super) fn copy(&self) {
        let RingWords::Copied(words, path) = self else { return };
        // Opened and closed each time: a network file system shows others what was there when a file was closed.
        if let Ok(file) = File::options().write(true).open(path) {
            drop(file.write_all_at(&bytes(words.iter().map(|word| word.load(Ordering::Relaxed))), 0));
        }
    }
}

/// Words as they are in a file.
fn bytes(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_le_bytes).collect()
}

/// Whether files of a folder can be mapped without danger for the process.
///
/// **Errors**: what the system says.
pub(super) fn is_mappable(folder: &Path) -> io::Result<bool> {
    // The type is signed on some machines; the names of file systems are 32 bits.
    let kind = rustix::fs::statfs(folder)?.f_type as u64 & u64::from(u32::MAX);
    Ok(MAPPABLE.contains(&kind))
}
