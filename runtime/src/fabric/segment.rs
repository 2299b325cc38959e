//! A link's shared memory: the sender copies a payload in once, the receiver borrows it from there. Everything else about a
//! frame, its header included, goes through the socket, which is also what wakes the receiver.
//!
//! What finds no room goes through the socket whole, so that frames which are not received can fill the memory and yet block no
//! others.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::Region;
use super::arrived::{Backing, places};
use super::blocks::Blocks;
use super::incoming::InLink;
use super::shm_memory::{SharedReader, SharedWriter};
use super::stream::Stream;
use super::wire::{PartHeader, Signal};

/// **Units**: bytes of a link's shared memory; its pages cost nothing until they are used.
const SEGMENT: usize = 128 << 20;
/// Most that a receiver maps.
const MAX_SEGMENT: u64 = 1 << 30;
/// What is smaller goes through the socket: it costs less than giving a block back.
const LEAST: usize = 16 << 10;

/// The sender's side.
pub struct Sender {
    memory: SharedWriter,
    blocks: Arc<Mutex<Blocks>>,
}

/// State of the sender's side for the thread that reads free-block signals.
pub type FreeBlocks = Arc<Mutex<Blocks>>;

fn lock(blocks: &Mutex<Blocks>) -> MutexGuard<'_, Blocks> {
    blocks.lock()
}

/// A block is free again.
///
/// **Errors**: if there is no such block.
pub fn give_back(blocks: &FreeBlocks, block: u64) -> Result<(), String> {
    lock(blocks).give_back(block)
}

impl Sender {
    /// Makes memory and sends it to the other end of a proven connection.
    ///
    /// **Errors**: the system's.
    pub fn new(stream: &Stream) -> io::Result<Sender> {
        let memory = SharedWriter::new(SEGMENT)?;
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let file = [memory.file().as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&file));
        let len = (SEGMENT as u64).to_le_bytes();
        let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&len)], &mut control, SendFlags::NOSIGNAL)?;
        if sent != len.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(Sender { memory, blocks: Arc::new(Mutex::new(Blocks::new(SEGMENT))) })
    }

    /// The book of its blocks.
    pub fn blocks(&self) -> FreeBlocks {
        self.blocks.clone()
    }

    /// Copies a payload in and returns where it lies; `None` if it is small or there is no room.
    pub fn put(&mut self, regions: &[Region], parts: &[PartHeader]) -> Option<u64> {
        let (places, len) = places(parts);
        if len < LEAST {
            return None;
        }
        let start = lock(&self.blocks).take(len)?;
        for (region, place) in regions.iter().zip(places) {
            let mut at = start + place.start;
            for part in region.parts() {
                self.memory.write(at, part);
                at += part.len();
            }
        }
        Some(start as u64)
    }
}

/// Maps the memory that the other end of a proven connection sends.
///
/// **Errors**: those of the system, or a message about invalid input.
pub fn receive(stream: &Stream) -> io::Result<SharedReader> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut len = [0; 8];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let came = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut len)], &mut control, flags)?.bytes;
    let file: Option<OwnedFd> = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let len = Some(u64::from_le_bytes(len)).filter(|len| came == 8 && *len <= MAX_SEGMENT);
    match (file, len.and_then(|len| usize::try_from(len).ok())) {
        (Some(file), Some(len)) => SharedReader::new(&file, len),
        _ => Err(io::Error::other(format!("expected shared memory, got {came} bytes"))),
    }
}

/// A payload where its sender has put it; signals the sender when it is dropped.
pub struct Borrowed {
    memory: Arc<SharedReader>,
    range: Range<usize>,
    link: Arc<InLink>,
}

impl Borrowed {
    /// The payload of `len` bytes at `block`.
    ///
    /// **Errors**: if it does not lie in the memory.
    pub fn new(
        memory: &Arc<SharedReader>,
        block: u64,
        len: usize,
        link: &Arc<InLink>,
    ) -> Result<Self, String> {
        let end = usize::try_from(block).ok().and_then(|start| Some(start..start.checked_add(len)?));
        let range = end.filter(|range| range.end <= memory.len());
        let range = range.ok_or_else(|| format!("{len} bytes at {block} do not lie in the shared memory"))?;
        Ok(Borrowed { memory: memory.clone(), range, link: link.clone() })
    }
}

impl Backing for Borrowed {
    fn bytes(&self) -> &[u8] {
        self.memory.bytes(self.range.clone())
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.link.signal(&Signal::Free { block: self.range.start as u64 });
    }
}
