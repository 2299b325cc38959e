//! Memory that two processes have mapped: one writes, the other reads. The one file of the fabric with `unsafe` in it.
//!
//! The writer makes it and sends its file descriptor; the reader maps it read-only, after it has seen that it is sealed, so
//! that it can never become shorter than its mapping. Knows nothing of who may write where: that is [`super::blocks`].

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

impl Mapping {
    fn new(file: impl AsFd, len: usize, access: ProtFlags) -> io::Result<Mapping> {
        // SAFETY: a fresh mapping at an address of the system's choice touches no memory that exists; the file is sealed
        // against shrinking, so that every page of it stays backed.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, 0)? };
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapping { start, len })
    }

    /// Where a range begins.
    ///
    /// **Errors**: panics if it does not lie within the mapping.
    fn at(&self, range: &Range<usize>) -> NonNull<u8> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        // SAFETY: the offset is within the mapping, as the line before has seen.
        unsafe { self.start.cast::<u8>().add(range.start) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrowed from it outlives it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.len) };
    }
}

// SAFETY: a mapping is an address range of the process, not of a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared access reads, or writes through the writer's exclusive borrow only.
unsafe impl Sync for Mapping {}

/// The writer's side.
pub struct SharedWriter {
    mapping: Mapping,
    file: OwnedFd,
}

impl SharedWriter {
    /// Makes memory of `len` bytes; pages cost nothing until they are written.
    ///
    /// **Errors**: the system's.
    pub fn new(len: usize) -> io::Result<SharedWriter> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("contraflow-fabric", flags)?;
        rustix::fs::ftruncate(&file, len as u64)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        let mapping = Mapping::new(&file, len, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok(SharedWriter { mapping, file })
    }

    /// What the reader maps.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Copies bytes to an offset.
    ///
    /// **Errors**: panics if they do not fit behind it.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let target = self.mapping.at(&(offset..offset + bytes.len()));
        // SAFETY: the target has room for them, and `bytes` cannot lie in it: nobody borrows from a writer's mapping. The
        // reader does not look at a range before it has been told of it through the socket.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
    }
}

/// The reader's side.
pub struct SharedReader {
    mapping: Mapping,
}

impl SharedReader {
    /// Maps what a writer has made.
    ///
    /// **Errors**: in words, if it is not sealed or not of this length; the system's.
    pub fn new(file: &OwnedFd, len: usize) -> io::Result<SharedReader> {
        let seals = rustix::fs::fcntl_get_seals(file)?;
        let size = rustix::fs::fstat(file)?.st_size as u64;
        if !seals.contains(SEALS) || size != len as u64 || len == 0 {
            return Err(io::Error::other(format!(
                "expected sealed memory of {len} bytes, got {size} bytes, {seals:?}"
            )));
        }
        Ok(SharedReader { mapping: Mapping::new(file, len, ProtFlags::READ)? })
    }

    /// **Units**: bytes of all of it.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// What the writer has put into a range.
    ///
    /// **Errors**: panics if it does not lie within the memory.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        let start = self.mapping.at(&range);
        // SAFETY: the range is mapped and stays so while `self` is borrowed. Its writer has proven that it belongs to the
        // formation, and leaves a block alone until it has been told that the block is free, which is when the last borrow
        // of it has ended.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_what_the_writer_wrote_and_nobody_can_shorten_it() {
        let mut writer = SharedWriter::new(1 << 16).unwrap();
        writer.write(100, b"seen");
        let reader = SharedReader::new(writer.file(), 1 << 16).unwrap();
        assert_eq!(reader.bytes(100..104), b"seen");
        assert!(rustix::fs::ftruncate(writer.file(), 10).is_err());
        assert!(SharedReader::new(writer.file(), 1 << 17).is_err());
    }

    #[test]
    fn memory_that_could_be_shortened_is_refused() {
        let file = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let error = SharedReader::new(&file, 4096).err().unwrap().to_string();
        assert!(error.contains("expected sealed memory"), "{error}");
    }

    #[test]
    #[should_panic(expected = "of 4096 bytes")]
    fn nothing_is_read_beyond_the_end() {
        let writer = SharedWriter::new(4096).unwrap();
        let reader = SharedReader::new(writer.file(), 4096).unwrap();
        reader.bytes(4000..4097);
    }
}
