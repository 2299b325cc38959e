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
        // reader does not look at a range before it is announced through the socket.
        unsafe { copy(bytes, target.as_ptr()) };
    }
}

/// What is longer is copied past the caches: it would push out everything else and itself before anybody reads it, and a
/// cached store reads each line before it overwrites it, half as much again to and from memory. What is shorter is read from
/// the cache by a receiver that waits for it.
///
/// **Units**: bytes.
const PAST_CACHES: usize = 4 << 20;

/// Copies bytes.
// SAFETY: the caller promises that `target` has room for them and does not overlap them.
unsafe fn copy(bytes: &[u8], target: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    let streamed = if bytes.len() < PAST_CACHES {
        0
    } else {
        // SAFETY: as the caller has promised.
        unsafe { stream(bytes, target) }
    };
    #[cfg(not(target_arch = "x86_64"))]
    let streamed = 0;
    let rest = &bytes[streamed..];
    // SAFETY: as the caller has promised, and so much of it has been copied.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), target.add(streamed), rest.len()) };
}

/// Copies whole cache lines from the beginning of `bytes` without loading those of `target`, and returns how many bytes that
/// were: none if `target` is not aligned.
// SAFETY: the caller promises what it promises to `copy`.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(bytes: &[u8], target: *mut u8) -> usize {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 64;
    let target = target.cast::<__m128i>();
    if !target.is_aligned() {
        return 0;
    }
    let (lines, _) = bytes.as_chunks::<LINE>();
    for (number, line) in lines.iter().enumerate() {
        let from = line.as_ptr().cast::<__m128i>();
        // SAFETY: both are a line long, the target has room for it as the caller has promised, and is aligned. Loads need not
        // be.
        unsafe {
            let line: [__m128i; 4] = std::array::from_fn(|at| _mm_loadu_si128(from.add(at)));
            let to = target.add(4 * number);
            line.into_iter().enumerate().for_each(|(at, part)| _mm_stream_si128(to.add(at), part));
        }
    }
    // Nothing else orders these stores, and the reader is signalled right after.
    // SAFETY: every x86-64 has it, and it touches no memory.
    unsafe { _mm_sfence() };
    lines.len() * LINE
}

/// The reader's side.
pub struct SharedReader {
    mapping: Mapping,
}

impl SharedReader {
    /// Maps what a writer has made.
    ///
    /// **Errors**: if it is not sealed or not of this length; the system's.
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
        // formation, and leaves a block alone until it is signalled that the block is free, which is when the last borrow
        // of it has ended.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_what_the_writer_wrote_and_the_memory_cannot_be_truncated() {
        let mut writer = SharedWriter::new(1 << 16).unwrap();
        writer.write(100, b"seen");
        let reader = SharedReader::new(writer.file(), 1 << 16).unwrap();
        assert_eq!(reader.bytes(100..104), b"seen");
        assert!(rustix::fs::ftruncate(writer.file(), 10).is_err());
        assert!(SharedReader::new(writer.file(), 1 << 17).is_err());
    }

    #[test]
    fn bytes_arrive_whichever_way_they_are_copied() {
        let lens = [0, 1, 63, 64, PAST_CACHES - 1, PAST_CACHES, PAST_CACHES + 1, PAST_CACHES + 77];
        let bytes: Vec<u8> = (0..PAST_CACHES + 78).map(|at| (at * 7 + at / 251) as u8).collect();
        for len in lens {
            for (from, to) in [(0, 64), (1, 64), (0, 65), (1, 16)] {
                let mut writer = SharedWriter::new(2 * PAST_CACHES).unwrap();
                writer.write(to, &bytes[from..from + len]);
                let reader = SharedReader::new(writer.file(), 2 * PAST_CACHES).unwrap();
                assert!(reader.bytes(to..to + len) == &bytes[from..from + len], "{len} bytes to {to}");
                let around = [reader.bytes(0..to), reader.bytes(to + len..2 * PAST_CACHES)];
                assert!(around.iter().all(|part| part.iter().all(|&byte| byte == 0)), "{len} bytes to {to}");
            }
        }
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
