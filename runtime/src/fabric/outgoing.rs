//! The sending end of a link: frames wait here, by handle, until their lane has credit and the socket takes them.
//!
//! One thread connects and writes, one reads what comes back. Knows windows and sockets; a lost peer is handled by the
//! network's business.

use std::io::{BufReader, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handshake::{self, Carrier, Hello};
use super::incoming::describe;
use super::segment::{self, FreeBlocks};
use super::stream::{Stream, Until, write_all_vectored};
use super::window::{SendWindows, cost};
use super::wire::{self, FrameHeader, LaneKey, LinkMessage, PartHeader, ReadError, Signal};
use super::wired::WiredNetwork;
use super::{Phase, Region, Tag};
use crate::trace::TraceContext;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// Longest silence on a link that has nothing to send.
const MAX_BEAT: Duration = Duration::from_secs(10);

/// Longest time to connect and to be let in; a peer's process may still be about to join.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// A frame that has not gone yet; keeps its memory alive.
pub struct Outgoing {
    to: u32,
    tag: Tag,
    trace: TraceContext,
    parts: Vec<Region>,
}

#[derive(Default)]
struct LinkState {
    windows: SendWindows<Outgoing>,
    /// Say goodbye once nothing waits.
    closing: bool,
    /// Nothing goes any more.
    ended: bool,
    stream: Option<Arc<Stream>>,
}

/// The sending end of a link.
pub struct OutLink {
    site: usize,
    state: Mutex<LinkState>,
    changed: Condvar,
}

enum Next {
    Frame(Outgoing),
    Beat,
    Bye,
    End,
}

impl OutLink {
    /// A link to the process `site`; connects as soon as it runs.
    pub fn new(site: usize) -> Self {
        OutLink { site, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock()
    }

    /// Queues a frame. Never blocks.
    pub fn push(&self, to: u32, tag: Tag, parts: Vec<Region>, trace: TraceContext) {
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        let lane = LaneKey { source: tag.source, to, kind: tag.kind };
        self.lock().windows.push(lane, Outgoing { to, tag, trace, parts }, cost(bytes));
        self.changed.notify_one();
    }

    /// Says goodbye after what waits, or without it.
    pub fn close(&self, flush: bool) {
        let mut state = self.lock();
        state.closing = true;
        let forgotten = if flush { Vec::new() } else { state.windows.forget_waiting() };
        drop(state);
        // Their memory may be large: not under the lock.
        drop(forgotten);
        self.changed.notify_one();
    }

    /// Ends the link at once; what waits is dropped.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.ended = true;
        let dropped = std::mem::take(&mut state.windows);
        if let Some(stream) = &state.stream {
            stream.shutdown(Shutdown::Both);
        }
        drop(state);
        drop(dropped);
        self.changed.notify_one();
    }

    fn next(&self, last_beat: &mut Instant, interval: Duration) -> Next {
        let mut state = self.lock();
        loop {
            if state.ended {
                return Next::End;
            }
            let silent = last_beat.elapsed();
            if silent >= interval {
                *last_beat = Instant::now();
                return Next::Beat;
            }
            if let Some(frame) = state.windows.next() {
                return Next::Frame(frame);
            }
            if state.closing && state.windows.num_waiting() == 0 {
                return Next::Bye;
            }
            self.changed.wait_for(&mut state, interval - silent);
        }
    }

    /// Connects and sends until the network closes or the peer is lost.
    pub fn run(self: &Arc<Self>, network: &Arc<WiredNetwork>) {
        let (stream, mut memory) = match self.dial(network) {
            Ok(dialled) => dialled,
            Err(reason) => {
                network.fault(self.site, &reason);
                return self.cut();
            }
        };
        let (link, listening, its) = (self.clone(), network.clone(), stream.clone());
        let blocks = memory.as_ref().map(segment::Sender::blocks);
        network.spawn(false, move || link.receive_signals(&its, blocks.as_ref(), &listening));
        if let Err(error) = self.write(&stream, &mut memory, network) {
            // A peer that leaves says so before it closes, and the reading thread knows. Where the peer is silent, this is
            // the thread that knows.
            if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) {
                let waited = network.timeout().as_secs_f64();
                network.fault(self.site, &format!("read nothing for {waited:.1} s"));
            }
            stream.shutdown(Shutdown::Write);
        }
    }

    fn dial(&self, network: &WiredNetwork) -> Result<(Arc<Stream>, Option<segment::Sender>), String> {
        let timeout = network.timeout().min(DIAL_TIMEOUT);
        let (address, carrier) = network.route(self.site);
        let connected = match carrier {
            None => Stream::connect_tcp(address, timeout),
            Some(_) => Stream::connect_unix(address),
        };
        let stream = connected.map_err(|error| format!("cannot be reached: {error}"))?;
        let stream = Arc::new(stream);
        let mut state = self.lock();
        if state.ended {
            return Err("the network is closed".into());
        }
        state.stream = Some(stream.clone());
        drop(state);
        let hello = network.hello(self.site, carrier.unwrap_or(Carrier::Socket))?;
        self.shake(&stream, &hello, network, timeout).map_err(|error| error.to_string())?;
        let memory = match hello.carrier {
            Carrier::Socket => None,
            Carrier::SharedMemory => {
                let memory = segment::Sender::new(&stream);
                Some(memory.map_err(|error| format!("memory could not be shared: {error}"))?)
            }
        };
        Ok((stream, memory))
    }

    fn shake(
        &self,
        stream: &Stream,
        hello: &Hello,
        network: &WiredNetwork,
        timeout: Duration,
    ) -> Result<(), handshake::HandshakeError> {
        let mut until = Until { stream, deadline: Instant::now() + timeout };
        handshake::connect(&mut until, hello, network.secret())?;
        Ok(stream.set_timeout(network.timeout())?)
    }

    fn write(
        &self,
        stream: &Stream,
        memory: &mut Option<segment::Sender>,
        network: &WiredNetwork,
    ) -> std::io::Result<()> {
        let interval = (network.timeout() / 4).min(MAX_BEAT);
        let mut last_beat = Instant::now();
        loop {
            match self.next(&mut last_beat, interval) {
                Next::Frame(frame) => {
                    let began = Instant::now();
                    frame.write(stream, memory.as_mut())?;
                    if frame.tag.phase != Phase::Replicate {
                        network.carried(frame.tag.source as usize, began.elapsed());
                    }
                }
                Next::Beat => write_message(stream, &LinkMessage::Beat)?,
                Next::Bye => {
                    write_message(stream, &LinkMessage::Bye)?;
                    stream.shutdown(Shutdown::Write);
                    return Ok(());
                }
                Next::End => return Ok(()),
            }
        }
    }

    /// Reads the receiver's signals until it has left, has closed the connection after our goodbye, or is lost.
    fn receive_signals(&self, stream: &Stream, blocks: Option<&FreeBlocks>, network: &Arc<WiredNetwork>) {
        let mut reader = BufReader::with_capacity(4 << 10, stream);
        loop {
            let heard =
                wire::read_signal(&mut reader).and_then(|signal| self.act_on(signal, blocks, network));
            match heard {
                Ok(true) => {}
                Ok(false) => return self.cut(),
                Err(error) => {
                    let over = self.lock().closing;
                    if !over {
                        network.fault(self.site, &describe(&error, network));
                    }
                    return self.cut();
                }
            }
        }
    }

    /// Does what a signal says; false after the last.
    fn act_on(
        &self,
        signal: Signal,
        blocks: Option<&FreeBlocks>,
        network: &WiredNetwork,
    ) -> Result<bool, ReadError> {
        match signal {
            Signal::Credit { lane, bytes } => {
                self.lock().windows.credit(lane, bytes).map_err(ReadError::Bad)?;
                self.changed.notify_one();
            }
            Signal::Free { block } => {
                let blocks = blocks.ok_or_else(|| ReadError::Bad("no memory is shared".into()))?;
                segment::give_back(blocks, block).map_err(ReadError::Bad)?;
            }
            Signal::Beat => {}
            Signal::Bye => {
                network.left_without_sending(self.site);
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn write_message(stream: &Stream, message: &LinkMessage) -> std::io::Result<()> {
    write_all_vectored(stream, &mut [IoSlice::new(&wire::encode(message))])
}

impl Outgoing {
    fn write(&self, stream: &Stream, memory: Option<&mut segment::Sender>) -> std::io::Result<()> {
        let part = |region: &Region| PartHeader { form: region.form(), len: region.len() as u64 };
        let parts: Vec<PartHeader> = self.parts.iter().map(part).collect();
        let block = memory.and_then(|memory| memory.put(&self.parts, &parts));
        let Outgoing { to, tag, trace, .. } = *self;
        let header = wire::encode(&LinkMessage::Frame(FrameHeader { to, tag, trace, block, parts }));
        let payload = if block.is_some() { &[][..] } else { &self.parts };
        let mut slices = vec![IoSlice::new(&header)];
        slices.extend(payload.iter().flat_map(Region::parts).map(IoSlice::new));
        write_all_vectored(stream, &mut slices)
    }
}
