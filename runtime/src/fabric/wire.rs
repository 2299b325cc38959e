//! The bytes between two sites: the header before a frame's payload; the other direction is in `signal`.
//!
//! Pure: reads from anything that reads, trusts nothing, and allocates nothing whose size a peer has chosen. All numbers are
//! little-endian. Knows no sockets and no credits.

mod signal;

use std::io::{self, Read};

use super::{FrameKind, PayloadShape, Phase, Tag};
use crate::topology::{FormationId, Generation, JobId};
use crate::trace::TraceContext;

pub use self::signal::{LaneKey, SIGNAL_BYTES, Signal, encode_signal, read_signal};

/// Version of everything that is said on a link, handshake included. Both ends have to have the same.
pub const VERSION: u8 = 3;
/// Most parts in a frame.
pub const MAX_PARTS: usize = 16;
/// **Units**: payload bytes of the largest frame.
pub const MAX_FRAME_BYTES: u64 = 4 << 30;
/// **Units**: bytes of what every message begins with.
pub const PREFIX_BYTES: usize = 96;

const PART_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 8;
const MAGIC: [u8; 4] = *b"cfFr";
const INLINE: u64 = u64::MAX;

/// What comes from the sending side of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkMessage {
    /// A frame; its payload follows, or lies in shared memory.
    Frame(FrameHeader),
    /// Nothing to send, but alive.
    Beat,
    /// Everything has been sent, nothing will follow.
    Bye,
}

/// The header of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Destination rank.
    pub to: u32,
    /// The address.
    pub tag: Tag,
    /// The span that sent it.
    pub trace: TraceContext,
    /// Where in the link's shared memory the payload lies; `None` if it follows.
    pub block: Option<u64>,
    /// What the payload is made of.
    pub parts: Vec<PartHeader>,
}

/// One part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartHeader {
    /// How to interpret the bytes, as declared by the sender.
    pub form: PayloadShape,
    /// **Units**: bytes.
    pub len: u64,
}

impl FrameHeader {
    /// **Units**: payload bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }
}

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error("{0}")]
    Bad(String),
}

fn bad<T>(what: impl Into<String>) -> Result<T, ReadError> {
    Err(ReadError::Bad(what.into()))
}

fn checksum(pieces: &[&[u8]]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    for piece in pieces {
        hasher.update(piece);
    }
    let mut short = [0; CHECKSUM_BYTES];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    short
}

/// Reads fields one after another from bytes that are known to be there.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut bytes = [0; N];
        bytes.copy_from_slice(head);
        bytes
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

const FRAME: u8 = 1;
const BEAT: u8 = 2;
const BYE: u8 = 3;

fn kind_of(code: u8) -> Result<FrameKind, ReadError> {
    FrameKind::ALL
        .get(usize::from(code))
        .copied()
        .map_or_else(|| bad(format!("no kind of frame has number {code}")), Ok)
}

/// The bytes of a message, without payload.
pub fn encode(message: &LinkMessage) -> Vec<u8> {
    let (what, num_parts) = match message {
        LinkMessage::Frame(header) => (FRAME, header.parts.len()),
        LinkMessage::Beat => (BEAT, 0),
        LinkMessage::Bye => (BYE, 0),
    };
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + num_parts * PART_BYTES);
    bytes.extend(MAGIC);
    bytes.extend([VERSION, what]);
    // A frame with more parts is refused by its reader.
    bytes.extend(u16::try_from(num_parts).unwrap_or(u16::MAX).to_le_bytes());
    let mut parts = Vec::with_capacity(num_parts * PART_BYTES);
    if let LinkMessage::Frame(FrameHeader { to, tag, trace, block, parts: list }) = message {
        let numbers =
            [*to, tag.formation.generation.number(), tag.stage, tag.micro_batch, tag.layer, tag.source];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        let long = [tag.formation.job.bits(), tag.step, block.unwrap_or(INLINE)];
        bytes.extend(long.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend([tag.phase as u8, tag.kind as u8, tag.hop]);
        bytes.extend(trace.trace_id);
        bytes.extend(trace.span_id);
        bytes.push(trace.flags);
        for PartHeader { form, len } in list {
            let fields = [*len, form.rows, form.cols, u64::from(form.kind)];
            parts.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        }
    }
    bytes.resize(PREFIX_BYTES - CHECKSUM_BYTES, 0);
    let sum = checksum(&[&bytes, &parts]);
    bytes.extend(sum);
    bytes.extend(parts);
    bytes
}

/// Reads a message; the payload of a frame is left in the reader.
///
/// **Errors**: [`ReadError::Bad`] says what is wrong with what came; [`ReadError::Io`] if nothing came.
pub fn read_message(reader: &mut impl Read) -> Result<LinkMessage, ReadError> {
    let mut prefix = [0; PREFIX_BYTES];
    reader.read_exact(&mut prefix)?;
    let (body, sum) = prefix.split_at(PREFIX_BYTES - CHECKSUM_BYTES);
    let mut fields = Fields(body);
    if fields.take() != MAGIC {
        return bad("not a frame");
    }
    let (version, what) = (fields.u8(), fields.u8());
    if version != VERSION {
        return bad(format!("expected a frame of version {VERSION}, got version {version}"));
    }
    let num_parts = usize::from(fields.u16());
    if num_parts > MAX_PARTS {
        return bad(format!("expected at most {MAX_PARTS} parts in a frame, got {num_parts}"));
    }
    let mut parts = [0; MAX_PARTS * PART_BYTES];
    let parts = &mut parts[..num_parts * PART_BYTES];
    reader.read_exact(parts)?;
    if checksum(&[body, parts]) != sum {
        return bad("the checksum of a frame's header does not match");
    }
    match what {
        FRAME => frame(fields, parts).map(LinkMessage::Frame),
        BEAT => Ok(LinkMessage::Beat),
        BYE => Ok(LinkMessage::Bye),
        other => bad(format!("no message has number {other}")),
    }
}

fn frame(mut fields: Fields<'_>, parts: &[u8]) -> Result<FrameHeader, ReadError> {
    let [to, generation, stage, micro_batch, layer, source] = std::array::from_fn(|_| fields.u32());
    let [job, step, block] = std::array::from_fn(|_| fields.u64());
    let (phase, kind, hop) = (fields.u8(), fields.u8(), fields.u8());
    let trace = TraceContext { trace_id: fields.take(), span_id: fields.take(), flags: fields.u8() };
    let Some(&phase) = Phase::ALL.get(usize::from(phase)) else {
        return bad(format!("no phase has number {phase}"));
    };
    let kind = kind_of(kind)?;
    let formation = FormationId::new(JobId::of(job), Generation::new(generation));
    let tag = Tag { formation, phase, step, kind, stage, micro_batch, layer, hop, source };
    let mut list = Vec::with_capacity(parts.len() / PART_BYTES);
    let mut total = 0_u64;
    for part in parts.chunks_exact(PART_BYTES) {
        let mut fields = Fields(part);
        let [len, rows, cols, kind] = std::array::from_fn(|_| fields.u64());
        total = total.saturating_add(len);
        let kind = u8::try_from(kind).or_else(|_| bad(format!("no kind of part has number {kind}")))?;
        list.push(PartHeader { form: PayloadShape { kind, rows, cols }, len });
    }
    if total > MAX_FRAME_BYTES {
        return bad(format!("expected at most {MAX_FRAME_BYTES} bytes in a frame, got {total}"));
    }
    Ok(FrameHeader { to, tag, trace, block: (block != INLINE).then_some(block), parts: list })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = FrameHeader> {
        let parts = proptest::collection::vec(
            (any::<u8>(), any::<u64>(), any::<u64>(), 0..1_u64 << 28),
            0..=MAX_PARTS,
        );
        let numbers =
            (any::<[u32; 6]>(), any::<[u64; 2]>(), 0..Phase::ALL.len(), 0..FrameKind::ALL.len(), any::<u8>());
        let trace = any::<([u8; 16], [u8; 8], u8)>();
        let trace = trace.prop_map(|(trace_id, span_id, flags)| TraceContext { trace_id, span_id, flags });
        let all = (numbers, trace, proptest::option::of(0..u64::MAX), parts);
        all.prop_map(|(numbers, trace, block, parts)| {
            let ([to, generation, stage, micro_batch, layer, source], [job, step], phase, kind, hop) =
                numbers;
            let (phase, kind) = (Phase::ALL[phase], FrameKind::ALL[kind]);
            let formation = FormationId::new(JobId::of(job), Generation::new(generation));
            let tag = Tag { formation, phase, step, kind, stage, micro_batch, layer, hop, source };
            let part = |(kind, rows, cols, len)| PartHeader { form: PayloadShape { kind, rows, cols }, len };
            FrameHeader { to, tag, trace, block, parts: parts.into_iter().map(part).collect() }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(header in any_header(), rest in any::<[u8; 5]>()) {
            let message = LinkMessage::Frame(header);
            let bytes = [encode(&message), rest.to_vec()].concat();
            let mut reader = &bytes[..];
            prop_assert_eq!(read_message(&mut reader).unwrap(), message);
            prop_assert_eq!(reader, &rest[..]);
        }

        #[test]
        fn a_header_with_any_bit_flipped_or_cut_short_is_none(header in any_header(), at in any::<proptest::sample::Index>(),
                                                              bit in 0..8) {
            let bytes = encode(&LinkMessage::Frame(header));
            let at = at.index(bytes.len());
            prop_assert!(matches!(read_message(&mut &bytes[..at]), Err(ReadError::Io(_))));
            let mut flipped = bytes;
            flipped[at] ^= 1_u8 << bit;
            prop_assert!(read_message(&mut &flipped[..]).is_err());
        }
    }

    #[test]
    fn every_kind_and_phase_has_its_own_number() {
        for (number, kind) in FrameKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number);
        }
        for (number, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, number);
        }
    }

    #[test]
    fn a_frame_of_another_version_is_refused_with_a_message() {
        let mut bytes = encode(&LinkMessage::Beat);
        bytes[4] = 1;
        let error = read_message(&mut &bytes[..]).unwrap_err().to_string();
        assert_eq!(error, "expected a frame of version 3, got version 1");
    }

    #[test]
    fn frames_larger_than_any_are_refused_whatever_their_parts_say() {
        for lens in [vec![MAX_FRAME_BYTES + 1], vec![u64::MAX, 2], vec![MAX_FRAME_BYTES, 1]] {
            let part = |len| PartHeader { form: PayloadShape::default(), len };
            let tag = Tag {
                formation: FormationId::default(),
                phase: Phase::ALL[0],
                step: 0,
                kind: FrameKind::ALL[0],
                stage: 0,
                micro_batch: 0,
                layer: 0,
                hop: 0,
                source: 0,
            };
            let (trace, parts) = (TraceContext::default(), lens.into_iter().map(part).collect());
            let header = FrameHeader { to: 0, tag, trace, block: None, parts };
            let error = read_message(&mut &encode(&LinkMessage::Frame(header))[..]).unwrap_err().to_string();
            assert!(error.starts_with("expected at most 4294967296 bytes"), "{error}");
        }
    }
}
