//! Recycled memory: the buffers under every tensor, so that a training step in steady state neither asks the
//! operating system for pages nor clears them.
//!
//! Buffers are kept by size class; a dropped buffer waits in its class for the next request. It knows bytes, not
//! shapes or formats.

#![allow(unsafe_code)]

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::par::{self, MIN_PARALLEL};
use parking_lot::{Mutex, MutexGuard};

/// Bytes in one line, the unit of size: a cache line and an AVX-512 register.
const LINE: usize = 64;
/// Fewer bytes than this are not worth a second thread.
const MIN_PARALLEL_BYTES: usize = 4 * MIN_PARALLEL;
/// Classes per doubling of the size: a buffer is at most an eighth larger than the lines asked for.
const STEPS: usize = 8;
/// Enough for every size that an address space can hold.
const NUM_CLASSES: usize = 60 * STEPS;

/// One lock per class: threads meet only where they want buffers of one size.
static IDLE: [Mutex<Vec<Box<[Line]>>>; NUM_CLASSES] = [const { Mutex::new(Vec::new()) }; NUM_CLASSES];

/// **Units**: bytes that tensors hold, without what a size class adds; and the most of it.
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// **Units**: bytes that the tensors of this process have held at most since the last [`forget_peak`]. What has arrived in frames
/// and lies in their memory does not count.
pub fn peak_bytes() -> usize {
    MOST.load(Ordering::Relaxed)
}

/// The peak begins again with what tensors hold now.
pub fn forget_peak() {
    MOST.store(HELD.load(Ordering::Relaxed), Ordering::Relaxed);
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// A run of bytes, aligned to 64, that goes back to the pool when dropped.
pub(crate) struct Buffer {
    lines: Box<[Line]>,
    len: usize,
}

impl Buffer {
    /// All bytes 0.
    pub(crate) fn zeros(len: usize) -> Buffer {
        let num_lines = class_lines(len.div_ceil(LINE));
        match recycled(num_lines) {
            Some(lines) => {
                let mut buffer = Buffer::of(lines, len);
                par::for_each_chunk(buffer.as_mut_slice(), 1, MIN_PARALLEL_BYTES, |_, part| part.fill(0));
                buffer
            }
            None => Buffer::of(fresh(num_lines), len),
        }
    }

    /// Bytes unspecified, namely what the last owner left: for a buffer that is going to be written in full.
    pub(crate) fn for_overwrite(len: usize) -> Buffer {
        let num_lines = class_lines(len.div_ceil(LINE));
        Buffer::of(recycled(num_lines).unwrap_or_else(|| fresh(num_lines)), len)
    }

    fn of(lines: Box<[Line]>, len: usize) -> Buffer {
        let held = HELD.fetch_add(len, Ordering::Relaxed) + len;
        MOST.fetch_max(held, Ordering::Relaxed);
        Buffer { lines, len }
    }

    /// A copy of some bytes.
    pub(crate) fn copy_of(bytes: &[u8]) -> Buffer {
        let mut copy = Buffer::for_overwrite(bytes.len());
        par::for_each_chunk(copy.as_mut_slice(), 1, MIN_PARALLEL_BYTES, |range, part| {
            part.copy_from_slice(&bytes[range]);
        });
        copy
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: a line is 64 bytes without padding, and `len` is at most 64 times the number of lines.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// The bytes, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        Buffer::copy_of(self.as_slice())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        HELD.fetch_sub(self.len, Ordering::Relaxed);
        let lines = mem::take(&mut self.lines);
        if !lines.is_empty() {
            idle(class(lines.len())).push(lines);
        }
    }
}

fn recycled(num_lines: usize) -> Option<Box<[Line]>> {
    if num_lines == 0 {
        return Some(Box::default());
    }
    idle(class(num_lines)).pop()
}

fn fresh(num_lines: usize) -> Box<[Line]> {
    // SAFETY: a line of zero bytes is a line.
    unsafe { Box::new_zeroed_slice(num_lines).assume_init() }
}

fn idle(class: usize) -> MutexGuard<'static, Vec<Box<[Line]>>> {
    IDLE[class].lock()
}

/// How many low bits of a size its class does without.
fn shift(num_lines: usize) -> u32 {
    (num_lines / STEPS).checked_ilog2().unwrap_or(0)
}

/// The size of the class that holds `num_lines`.
fn class_lines(num_lines: usize) -> usize {
    num_lines.next_multiple_of(1 << shift(num_lines))
}

/// The class of a size that [`class_lines`] returned.
fn class(num_lines: usize) -> usize {
    let shift = shift(num_lines);
    shift as usize * STEPS + (num_lines >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_class_has_one_size_and_wastes_at_most_an_eighth() {
        let mut sizes = [None; NUM_CLASSES];
        for num_lines in (1..5000).chain([1 << 20, (1 << 20) + 1, (1 << 40) - 1, usize::MAX >> 6]) {
            let size = class_lines(num_lines);
            assert!(num_lines <= size && size - num_lines <= num_lines / 8, "{num_lines} lines got {size}");
            assert_eq!(*sizes[class(size)].get_or_insert(size), size, "{num_lines} lines");
        }
    }

    #[test]
    fn zeros_are_zero_after_another_use_and_buffers_are_aligned() {
        // A size that no other test uses, so that the buffer that comes back is the one that went.
        const LEN: usize = 77_777;
        let mut used = Buffer::for_overwrite(LEN);
        used.as_mut_slice().fill(3);
        let address = used.as_slice().as_ptr() as usize;
        drop(used);

        let recycled = Buffer::zeros(LEN);

        assert_eq!(recycled.as_slice().as_ptr() as usize, address);
        assert_eq!(address % 64, 0);
        assert!(recycled.as_slice().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn threads_never_share_a_buffer() {
        let work = |seed: usize| {
            for round in 0..200 {
                let mark = (seed * 50 + round % 50) as u8;
                let mut buffers = [Buffer::for_overwrite(3333), Buffer::for_overwrite(3333)];
                buffers.iter_mut().for_each(|buffer| buffer.as_mut_slice().fill(mark));
                thread::yield_now();
                assert!(buffers.iter().all(|buffer| buffer.as_slice().iter().all(|&byte| byte == mark)));
            }
        };
        thread::scope(|scope| (0..4).for_each(|seed| drop(scope.spawn(move || work(seed)))));
    }
}
