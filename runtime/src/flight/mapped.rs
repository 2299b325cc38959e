//! The words of a ring, written by several threads, and how they come into its file. Where a file can be mapped without danger they are
//! mapped: what has been stored is the system's, which writes it to the disk whatever becomes of the process. Elsewhere they are in memory,
//! and what has changed is copied now and then. The one file of the flight recorder with `unsafe` in it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};

use super::record;

/// File systems of a machine's own that keep blocks in their place, as `statfs` calls them: ext2 to ext4, XFS, tmpfs, and overlays of
/// these. Behind any other one a store to a mapped page may wait for a server, or end the process where there is no room or no server any
/// more.
const MAPPABLE: [u64; 4] = [0xef53, 0x5846_5342, 0x0102_1994, 0x794c_7630];

/// **Units**: bytes.
const WORD: usize = size_of::<u64>();

/// The words of a file that this process has made.
#[derive(Debug)]
pub(super) enum RingWords {
    /// In the file.
    Mapped(MmapRaw),
    /// In memory, and as they were at some moment in the file.
    Copied(Box<[AtomicU64]>, Mutex<Copied>),
}

/// A file that is brought up to date now and then.
#[derive(Debug)]
pub(super) struct Copied {
    /// Open as long as the ring lives.
    file: File,
    /// The words that the file has; none where that is not known. How many records there were would not do: a thread that has taken its
    /// number may store its record later than one with a higher number.
    written: Option<Vec<u64>>,
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
            flush(&file)?;
            let copied = Copied { file, written: Some(words.to_vec()) };
            return Ok(RingWords::Copied(
                words.iter().copied().map(AtomicU64::new).collect(),
                Mutex::new(copied),
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

    /// Brings the file up to date where it is a copy: writes what has changed since the last time. Whoever has removed it, or its folder, has
    /// no use for it any more. It may wait for the file system.
    pub(super) fn copy(&self) {
        let RingWords::Copied(words, copied) = self else { return };
        let now = words.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        copied.lock().unwrap_or_else(PoisonError::into_inner).update(now);
    }
}

impl Copied {
    /// After an error nobody knows what the file has: the next time all is written.
    fn update(&mut self, now: Vec<u64>) {
        let changed = changed(self.written.take().as_deref(), &now);
        let mut writes = changed.into_iter().map(|(from, to)| {
            self.file.write_all_at(&bytes(now[from..to].iter().copied()), (from * WORD) as u64)
        });
        let is_written = writes.try_for_each(|write| write).and_then(|()| flush(&self.file));
        self.written = is_written.is_ok().then_some(now);
    }
}

/// The words, from one to before another, that a file lacks, by whole records: a record is one write, and several beside each other are, too.
fn changed(written: Option<&[u64]>, now: &[u64]) -> Vec<(usize, usize)> {
    let Some(written) = written else { return vec![(0, now.len())] };
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let pairs = written.chunks(record::WORDS).zip(now.chunks(record::WORDS)).enumerate();
    for (index, (_, after)) in pairs.filter(|(_, (before, after))| before != after) {
        let from = index * record::WORDS;
        let to = from + after.len();
        match runs.last_mut() {
            Some((_, end)) if *end == from => *end = to,
            _ => runs.push((from, to)),
        }
    }
    runs
}

/// Has others see what was written to a file that stays open: a network file system shows them what was there when somebody closed it. So
/// one of two names of the open file is closed; elsewhere that costs nothing, and no disk is waited for.
fn flush(file: &File) -> io::Result<()> {
    let second = file.try_clone()?.into_raw_fd();
    // SAFETY: it is this function's own, and nobody uses it after this.
    Ok(unsafe { rustix::io::try_close(second) }?)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight records.
    const WORDS: usize = 8 * record::WORDS;

    #[test]
    fn only_what_has_changed_is_written_and_all_of_it_where_a_write_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let words = RingWords::create(&path, &[1; WORDS], false).unwrap();
        let file = || std::fs::read(&path).unwrap();
        // What the file alone has shows where it was written.
        let mark = [0xff; WORDS * WORD];
        std::fs::write(&path, mark).unwrap();
        words.copy();
        assert_eq!(file(), mark, "nothing has changed");
        words.store(2 * record::WORDS + 1, &[5]);
        words.store(3 * record::WORDS, &[6]);
        words.store(7 * record::WORDS, &[7]);
        words.copy();
        let is_written: Vec<bool> =
            file().chunks(record::BYTES).map(|record| record != &mark[..record::BYTES]).collect();
        assert_eq!(is_written, [false, false, true, true, false, false, false, true]);
        let RingWords::Copied(now, copied) = &words else { panic!("no copy") };
        let now: Vec<u64> = now.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        // It cannot be written to for a while.
        let writable = std::mem::replace(&mut copied.lock().unwrap().file, File::open(&path).unwrap());
        words.store(0, &[8]);
        words.copy();
        copied.lock().unwrap().file = writable;
        words.copy();
        assert_eq!(file(), bytes([8].into_iter().chain(now[1..].iter().copied())));
    }
}
