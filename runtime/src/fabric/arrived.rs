//! Where a frame from the wire lies: one aligned buffer or one block of shared memory for all its parts, none of them copied.
//!
//! Buffers are recycled, so that a link in steady state asks the system for no pages. Knows lengths and alignment, nothing of
//! what the bytes mean.

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::wire::PartHeader;
use super::{Memory, PayloadShape, Region};
use parking_lot::Mutex;

/// Where the parts of a frame begin, so that any kind of number can be read in place.
///
/// **Units**: bytes.
pub const ALIGNMENT: usize = 64;

/// Idle buffers kept for the next frame.
///
/// **Units**: bytes.
const MAX_IDLE: usize = 256 << 20;

/// The memory under a frame that has come over a wire.
pub trait Backing: Send + Sync {
    /// All of it.
    fn bytes(&self) -> &[u8];
}

/// One part of a frame that has come over a wire.
pub struct ArrivedPart {
    backing: Arc<dyn Backing>,
    range: Range<usize>,
    form: PayloadShape,
}

impl Memory for ArrivedPart {
    fn part(&self, index: usize) -> Option<&[u8]> {
        (index == 0).then(|| &self.backing.bytes()[self.range.clone()])
    }

    fn num_bytes(&self) -> usize {
        self.range.len()
    }

    fn form(&self) -> PayloadShape {
        self.form
    }
}

/// Where each part lies from the beginning of a frame's memory, and the length of all.
pub fn places(parts: &[PartHeader]) -> (Vec<Range<usize>>, usize) {
    let mut end = 0_usize;
    let mut ranges = Vec::with_capacity(parts.len());
    for part in parts {
        let start = end.next_multiple_of(ALIGNMENT);
        // No machine has memory for what it cannot count: allocating it fails with a message.
        end = start.saturating_add(usize::try_from(part.len).unwrap_or(usize::MAX));
        ranges.push(start..end);
    }
    (ranges, end)
}

/// The regions of a frame whose memory is `backing`.
pub fn regions(backing: &Arc<dyn Backing>, parts: &[PartHeader], places: &[Range<usize>]) -> Vec<Region> {
    let region = |(part, range): (&PartHeader, &Range<usize>)| {
        Region::new(ArrivedPart { backing: backing.clone(), range: range.clone(), form: part.form })
    };
    parts.iter().zip(places).map(region).collect()
}

/// Receive buffers that wait for their next use.
#[derive(Default)]
pub struct BufferPool {
    idle: Mutex<Vec<Box<[u64]>>>,
}

impl BufferPool {
    /// A buffer of at least this many bytes, with arbitrary contents.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let words = len.div_ceil(8).next_multiple_of(ALIGNMENT / 8);
        let mut idle = self.idle.lock();
        // The smallest that fits without wasting as much as it serves.
        let fits = |words_of: usize| words_of >= words && words_of / 2 <= words;
        let best = (0..idle.len()).filter(|&at| fits(idle[at].len())).min_by_key(|&at| idle[at].len());
        let memory = best.map(|at| idle.swap_remove(at));
        drop(idle);
        let memory = memory.unwrap_or_else(|| vec![0; words].into_boxed_slice());
        Buffer { memory, len, pool: Arc::downgrade(self) }
    }

    fn give_back(&self, memory: Box<[u64]>) {
        let mut idle = self.idle.lock();
        idle.push(memory);
        while idle.iter().map(|buffer| 8 * buffer.len()).sum::<usize>() > MAX_IDLE {
            idle.remove(0);
        }
    }
}

/// A receive buffer; goes back to its pool when dropped.
pub struct Buffer {
    memory: Box<[u64]>,
    len: usize,
    pool: Weak<BufferPool>,
}

impl Buffer {
    /// To be read into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.memory)[..self.len]
    }
}

impl Backing for Buffer {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.memory)[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.give_back(std::mem::take(&mut self.memory));
        }
    }
}
