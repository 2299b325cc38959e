//! Files mapped into memory: the one place outside of the kernels with `unsafe`.
//!
//! Pages of a file are read when they are first touched and may be dropped again, so a file larger than memory can be
//! read at any place. Knows nothing of what the bytes mean.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::path::Path;

use contraflow_runtime::files;

/// The bytes of a file, read only.
#[derive(Debug)]
pub(super) struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps a whole file. **Errors**: as [`files::open`].
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = files::open(path)?;
        // SAFETY: the mapping is read only and private to this value. Shards come into being by a rename of a finished
        // file and nothing of ours writes to one again; no one else is to cut a file short under a running job.
        Ok(Self(unsafe { memmap2::Mmap::map(&file)? }))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
