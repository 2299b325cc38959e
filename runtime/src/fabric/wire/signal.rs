//! What comes back on a link, from the side that takes frames: credit, blocks of shared memory that are free again. Pure, as
//! the headers of frames are.

use std::io::Read;

use super::{CHECKSUM_BYTES, Fields, FrameKind, ReadError, VERSION, bad, checksum, kind_of};

/// **Units**: bytes of a signal.
pub const SIGNAL_BYTES: usize = 40;

const SIGNAL_MAGIC: [u8; 4] = *b"cfSi";

/// Frames of one kind from one rank to another: what has a window of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaneKey {
    /// Rank that sends.
    pub source: u32,
    /// Rank that receives.
    pub to: u32,
    /// What the frames carry.
    pub kind: FrameKind,
}

/// What comes back from the receiving side of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// So much of a lane has been taken.
    Credit {
        /// The lane.
        lane: LaneKey,
        /// **Units**: bytes, as frames are counted against the window.
        bytes: u64,
    },
    /// A block of shared memory is free again.
    Free {
        /// Where it begins.
        block: u64,
    },
    /// Alive.
    Beat,
    /// No frame will be taken any more.
    Bye,
}

/// The bytes of a signal.
pub fn encode_signal(signal: &Signal) -> [u8; SIGNAL_BYTES] {
    let nowhere = LaneKey { source: 0, to: 0, kind: FrameKind::Activation };
    let (what, lane, value) = match *signal {
        Signal::Credit { lane, bytes } => (1, lane, bytes),
        Signal::Free { block } => (2, nowhere, block),
        Signal::Beat => (3, nowhere, 0),
        Signal::Bye => (4, nowhere, 0),
    };
    let mut bytes = [0; SIGNAL_BYTES];
    bytes[..4].copy_from_slice(&SIGNAL_MAGIC);
    bytes[4..8].copy_from_slice(&[VERSION, what, lane.kind as u8, 0]);
    bytes[8..12].copy_from_slice(&lane.source.to_le_bytes());
    bytes[12..16].copy_from_slice(&lane.to.to_le_bytes());
    bytes[16..24].copy_from_slice(&value.to_le_bytes());
    let sum = checksum(&[&bytes[..SIGNAL_BYTES - CHECKSUM_BYTES]]);
    bytes[SIGNAL_BYTES - CHECKSUM_BYTES..].copy_from_slice(&sum);
    bytes
}

/// Reads a signal.
///
/// **Errors**: as [`super::read_message`].
pub fn read_signal(reader: &mut impl Read) -> Result<Signal, ReadError> {
    let mut bytes = [0; SIGNAL_BYTES];
    reader.read_exact(&mut bytes)?;
    let (body, sum) = bytes.split_at(SIGNAL_BYTES - CHECKSUM_BYTES);
    let mut fields = Fields(body);
    if fields.take() != SIGNAL_MAGIC || fields.u8() != VERSION {
        return bad("not a signal of this version");
    }
    if checksum(&[body]) != sum {
        return bad("the checksum of a signal does not match");
    }
    let (what, kind, _) = (fields.u8(), kind_of(fields.u8())?, fields.u8());
    let lane = LaneKey { source: fields.u32(), to: fields.u32(), kind };
    let value = fields.u64();
    match what {
        1 => Ok(Signal::Credit { lane, bytes: value }),
        2 => Ok(Signal::Free { block: value }),
        3 => Ok(Signal::Beat),
        4 => Ok(Signal::Bye),
        other => bad(format!("no signal has number {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::FrameKind;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn signals_are_received(source in any::<u32>(), to in any::<u32>(), kind in 0..FrameKind::ALL.len(), bytes in any::<u64>(),
                                      at in 0..SIGNAL_BYTES, bit in 0..8) {
            let lane = LaneKey { source, to, kind: FrameKind::ALL[kind] };
            for signal in [Signal::Credit { lane, bytes }, Signal::Free { block: bytes }, Signal::Beat, Signal::Bye] {
                let mut encoded = encode_signal(&signal);
                prop_assert_eq!(read_signal(&mut &encoded[..]).unwrap(), signal);
                encoded[at] ^= 1_u8 << bit;
                prop_assert!(read_signal(&mut &encoded[..]).is_err());
            }
        }
    }
}
