//! The receiving end of a link: reads frames into memory, delivers them to the inboxes, and acknowledges what was consumed.
//!
//! The thread that reads never waits for a receiver: what may come is bounded by credit, so one lane that is not read cannot
//! hold up the frames behind it.

use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use super::arrived::{Backing, places, regions};
use super::handshake::Carrier;
use super::inbox::Arrival;
use super::segment::{self, Borrowed};
use super::shm_memory::SharedReader;
use super::stream::Stream;
use super::window::{ReceiveWindows, cost};
use super::wire::{self, FrameHeader, LaneKey, LinkMessage, ReadError, Signal};
use super::wired::WiredNetwork;
use parking_lot::Mutex;

/// Room for a header and small payloads; large ones go past it.
const READ_AHEAD: usize = 8 << 10;

/// The receiving end of a link.
pub struct InLink {
    site: usize,
    stream: Stream,
    /// Held while a signal is written, so that two never mix.
    signals: Mutex<()>,
    windows: Mutex<ReceiveWindows>,
}

/// The sender's claim on what a frame occupies: dropped when the frame is taken, which gives the credit back.
pub struct Receipt {
    link: Arc<InLink>,
    lane: LaneKey,
    cost: u64,
}

impl Drop for Receipt {
    fn drop(&mut self) {
        let mut windows = self.link.windows.lock();
        let credit = windows.taken(self.lane, self.cost);
        drop(windows);
        if let Some(bytes) = credit {
            self.link.signal(&Signal::Credit { lane: self.lane, bytes });
        }
    }
}

impl InLink {
    /// The link whose sender is the process `site`, over a connection that has been proven.
    pub fn new(site: usize, stream: Stream) -> Self {
        InLink { site, stream, signals: Mutex::default(), windows: Mutex::default() }
    }

    /// Sends a signal to the sender. A failure means that it is gone: the reading thread notices.
    pub fn signal(&self, signal: &Signal) {
        let alone = self.signals.lock();
        drop((&self.stream).write_all(&wire::encode_signal(signal)));
        drop(alone);
    }

    /// Signals that no more frames will be accepted.
    pub fn leave(&self) {
        self.signal(&Signal::Bye);
        self.stream.shutdown(Shutdown::Write);
    }

    /// Ends the link at once.
    pub fn cut(&self) {
        self.stream.shutdown(Shutdown::Both);
    }

    /// Reads until the sender has left or is lost.
    pub fn run(self: &Arc<Self>, carrier: Carrier, network: &Arc<WiredNetwork>) {
        let memory = match carrier {
            Carrier::Socket => None,
            Carrier::SharedMemory => match segment::receive(&self.stream) {
                Ok(memory) => Some(Arc::new(memory)),
                Err(error) => {
                    network.fault(self.site, &describe(&error.into(), network));
                    return self.cut();
                }
            },
        };
        let mut reader = BufReader::with_capacity(READ_AHEAD, &self.stream);
        loop {
            match self.read(&mut reader, memory.as_ref(), network) {
                Ok(true) => {}
                Ok(false) => return self.cut(),
                Err(error) => {
                    network.fault(self.site, &describe(&error, network));
                    return self.cut();
                }
            }
        }
    }

    /// Reads one message; false after the last.
    fn read(
        self: &Arc<Self>,
        reader: &mut impl Read,
        memory: Option<&Arc<SharedReader>>,
        network: &Arc<WiredNetwork>,
    ) -> Result<bool, ReadError> {
        match wire::read_message(reader)? {
            LinkMessage::Beat => self.signal(&Signal::Beat),
            LinkMessage::Bye => {
                network.left(self.site);
                return Ok(false);
            }
            LinkMessage::Frame(header) => self.read_frame(reader, header, memory, network)?,
        }
        Ok(true)
    }

    fn read_frame(
        self: &Arc<Self>,
        reader: &mut impl Read,
        header: FrameHeader,
        memory: Option<&Arc<SharedReader>>,
        network: &Arc<WiredNetwork>,
    ) -> Result<(), ReadError> {
        let FrameHeader { to, tag, trace, ref parts, .. } = header;
        let inbox = network.inbox_for(to, tag.source, self.site).map_err(ReadError::Bad)?;
        let lane = LaneKey { source: tag.source, to, kind: tag.kind };
        let cost = cost(header.payload_bytes());
        let mut windows = self.windows.lock();
        windows.arrived(lane, cost).map_err(ReadError::Bad)?;
        drop(windows);
        let receipt = Receipt { link: self.clone(), lane, cost };
        let (places, len) = places(parts);
        let backing: Arc<dyn Backing> = match (header.block, memory) {
            (None, _) => {
                let mut buffer = network.buffers().take(len);
                for place in &places {
                    reader.read_exact(&mut buffer.bytes_mut()[place.clone()])?;
                }
                Arc::new(buffer)
            }
            (Some(block), Some(memory)) => {
                Arc::new(Borrowed::new(memory, block, len, self).map_err(ReadError::Bad)?)
            }
            (Some(_), None) => {
                return Err(ReadError::Bad("a frame that claims to be in memory that is not shared".into()));
            }
        };
        let due = network.delays().map(|delays| delays.due(to as usize, &tag, len));
        let parts = regions(&backing, parts, &places);
        let delivered = inbox.deliver(tag, Arrival { parts, trace, receipt: Some(receipt), due });
        delivered.map_err(|error| ReadError::Bad(error.to_string()))
    }
}

/// Why reading has ended.
pub fn describe(error: &ReadError, network: &WiredNetwork) -> String {
    use std::io::ErrorKind::{TimedOut, UnexpectedEof, WouldBlock};
    match error {
        ReadError::Io(error) if error.kind() == UnexpectedEof => "the connection was closed".into(),
        ReadError::Io(error) if matches!(error.kind(), TimedOut | WouldBlock) => {
            format!("nothing was received for {:.1} s", network.timeout().as_secs_f64())
        }
        ReadError::Io(error) => format!("the connection broke: {error}"),
        ReadError::Bad(what) => what.clone(),
    }
}
