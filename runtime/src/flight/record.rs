//! One record of a ring as eight words: what happened, when, on which thread; and the check sum by which a torn one is known.
//!
//! Records have one size and are little-endian. Knows no file and no order between records.

use std::fmt;

use crate::fabric::{FrameKind, Phase, Tag};
use crate::schedule::{Chunk, Component, Pass, TransferKind, Work};

/// Words of a record.
pub(super) const WORDS: usize = 8;

/// **Units**: bytes.
pub(super) const BYTES: usize = WORDS * size_of::<u64>();

/// Where a record's check sum is: over all words before it.
const SUM: usize = WORDS - 1;

/// A frame, as one of the two ranks sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The other rank: where it goes or comes from.
    pub peer: u32,
    /// What it carries.
    pub kind: FrameKind,
    /// Part of the step.
    pub phase: Phase,
    /// Optimizer update.
    pub step: u64,
    /// Stage of its chunk.
    pub stage: u32,
    /// Micro-batch of its chunk.
    pub micro_batch: u32,
    /// Layer, or the number of the bucket.
    pub layer: u32,
    /// Leg of its journey.
    pub hop: u8,
}

impl Frame {
    /// Under a tag, to or from `peer`.
    pub fn new(tag: &Tag, peer: u32) -> Self {
        let &Tag { phase, step, kind, stage, micro_batch, layer, hop, .. } = tag;
        Frame { peer, kind, phase, step, stage, micro_batch, layer, hop }
    }
}

impl fmt::Display for Frame {
    /// `Dispatch of stage 0, micro-batch 2, layer 3 from rank 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Frame { peer, kind, stage, micro_batch, layer, .. } = self;
        match kind {
            FrameKind::ReduceScatter | FrameKind::AllGather => {
                write!(f, "{kind:?} of bucket {layer} from rank {peer}")
            }
            FrameKind::AllReduce | FrameKind::State | FrameKind::StateReplicated | FrameKind::StateWanted => {
                write!(f, "{kind:?} from rank {peer}")
            }
            _ => write!(
                f,
                "{kind:?} of stage {stage}, micro-batch {micro_batch}, layer {layer} from rank {peer}"
            ),
        }
    }
}

/// What happened on a thread of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An operation of this step begins, with all that it waited for in its rank done.
    Began(Work, u64),
    /// It has ended.
    Ended(Work, u64),
    /// It has failed, of itself: not because another rank is gone or all of them give up.
    Failed(Work, u64),
    /// A frame is handed over.
    Sent(Frame),
    /// A frame is waited for.
    Awaited(Frame),
    /// It is there.
    Received(Frame),
    /// Something is read from storage or written to it, by any thread.
    StorageBegan,
    /// That is done.
    StorageEnded,
    /// The rank has done all that it was asked.
    Finished,
}

/// One line of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Counts the records of a ring, from 1.
    pub number: u64,
    /// Since the ring was begun. **Units**: ns.
    pub at: u64,
    /// The thread; a lane of the rank has one of its own.
    pub lane: u16,
    /// What happened.
    pub event: Event,
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight];
const TRANSFERS: [TransferKind; 2] = [TransferKind::Activation, TransferKind::Gradient];
const COMPONENTS: [Component; 10] = [
    Component::Chunk,
    Component::Embedding,
    Component::Attention,
    Component::Dispatch,
    Component::SharedExpert,
    Component::Experts,
    Component::Combine,
    Component::Head,
    Component::MtpJoin,
    Component::MtpHead,
];

/// The fields that records have, whatever they tell.
#[derive(Clone, Copy, Debug, Default)]
struct Fields {
    /// Which [`Event`].
    event: u8,
    /// Which [`Work`].
    work: u8,
    /// What kind of it: component, or frame.
    kind: u8,
    /// Which pass or phase.
    part: u8,
    hop: u8,
    step: u64,
    stage: u32,
    micro_batch: u32,
    /// Layer or bucket.
    layer: u32,
    peer: u32,
}

impl Record {
    /// As it is written.
    pub(super) fn words(&self) -> [u64; WORDS] {
        let Fields { event, work, kind, part, hop, step, stage, micro_batch, layer, peer } =
            fields_of(&self.event);
        let [lane, lane_high] = self.lane.to_le_bytes();
        let kinds = u64::from_le_bytes([event, work, kind, part, hop, 0, lane, lane_high]);
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let mut words =
            [self.number, self.at, kinds, step, pair(stage, micro_batch), pair(layer, peer), 0, 0];
        words[SUM] = check_sum(&words[..SUM]);
        words
    }

    /// What was written; `None` if it is torn, damaged, or of a kind that this program does not know.
    pub(super) fn of(words: &[u64; WORDS]) -> Option<Record> {
        if words[0] == 0 || words[SUM] != check_sum(&words[..SUM]) {
            return None;
        }
        let [event, work, kind, part, hop, _, lane, lane_high] = words[2].to_le_bytes();
        let low = |word: u64| (word & u64::from(u32::MAX)) as u32;
        let high = |word: u64| (word >> 32) as u32;
        let (stage, micro_batch) = (low(words[4]), high(words[4]));
        let (layer, peer) = (low(words[5]), high(words[5]));
        let fields = Fields { event, work, kind, part, hop, step: words[3], stage, micro_batch, layer, peer };
        let lane = u16::from_le_bytes([lane, lane_high]);
        Some(Record { number: words[0], at: words[1], lane, event: event_of(&fields)? })
    }
}

/// Tells words that were written together from those that were not: every bit of every word changes it.
pub(super) fn check_sum(words: &[u64]) -> u64 {
    let mix = |sum: u64, word: &u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    words.iter().fold(0x436f_6e74_7261_666c, mix)
}

/// A number of a plan. None comes near the end of the range.
fn number(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn fields_of(event: &Event) -> Fields {
    match event {
        Event::Began(work, step) => Fields { event: 1, step: *step, ..fields_of_work(work) },
        Event::Ended(work, step) => Fields { event: 2, step: *step, ..fields_of_work(work) },
        Event::Failed(work, step) => Fields { event: 3, step: *step, ..fields_of_work(work) },
        Event::Sent(frame) => Fields { event: 4, ..fields_of_frame(frame) },
        Event::Awaited(frame) => Fields { event: 5, ..fields_of_frame(frame) },
        Event::Received(frame) => Fields { event: 6, ..fields_of_frame(frame) },
        Event::StorageBegan => Fields { event: 7, ..Fields::default() },
        Event::StorageEnded => Fields { event: 8, ..Fields::default() },
        Event::Finished => Fields { event: 9, ..Fields::default() },
    }
}

fn event_of(fields: &Fields) -> Option<Event> {
    Some(match fields.event {
        1 => Event::Began(work_of(fields)?, fields.step),
        2 => Event::Ended(work_of(fields)?, fields.step),
        3 => Event::Failed(work_of(fields)?, fields.step),
        4 => Event::Sent(frame_of(fields)?),
        5 => Event::Awaited(frame_of(fields)?),
        6 => Event::Received(frame_of(fields)?),
        7 => Event::StorageBegan,
        8 => Event::StorageEnded,
        9 => Event::Finished,
        _ => return None,
    })
}

fn fields_of_frame(frame: &Frame) -> Fields {
    let &Frame { peer, kind, phase, step, stage, micro_batch, layer, hop } = frame;
    let (kind, part) = (kind as u8, phase as u8);
    Fields { kind, part, hop, step, stage, micro_batch, layer, peer, ..Fields::default() }
}

fn frame_of(fields: &Fields) -> Option<Frame> {
    let &Fields { kind, part, hop, step, stage, micro_batch, layer, peer, .. } = fields;
    let kind = *FrameKind::ALL.get(usize::from(kind))?;
    let phase = *Phase::ALL.get(usize::from(part))?;
    Some(Frame { peer, kind, phase, step, stage, micro_batch, layer, hop })
}

fn fields_of_work(work: &Work) -> Fields {
    let plain = |work| Fields { work, ..Fields::default() };
    let of_bucket = |work, bucket| Fields { layer: number(bucket), ..plain(work) };
    let of_chunk = |work, chunk: Chunk| Fields {
        stage: number(chunk.stage),
        micro_batch: number(chunk.micro_batch),
        ..plain(work)
    };
    match *work {
        Work::Component { pass, chunk, layer, component } => {
            Fields { kind: component as u8, part: pass as u8, layer: number(layer), ..of_chunk(1, chunk) }
        }
        Work::Send { kind, chunk } => Fields { kind: kind as u8, ..of_chunk(2, chunk) },
        Work::Receive { kind, chunk } => Fields { kind: kind as u8, ..of_chunk(3, chunk) },
        Work::Pack { bucket } => of_bucket(4, bucket),
        Work::Reduce { bucket } => of_bucket(5, bucket),
        Work::GradNorm { bucket } => of_bucket(6, bucket),
        Work::Apply { bucket } => of_bucket(7, bucket),
        Work::Gather { bucket } => of_bucket(8, bucket),
        Work::Unpack { bucket } => of_bucket(9, bucket),
        Work::AwaitReplica => plain(10),
        Work::Totals => plain(11),
        Work::Inspect => plain(12),
        Work::Evidence => plain(13),
        Work::Balance => plain(14),
        Work::Snapshot => plain(15),
    }
}

fn work_of(fields: &Fields) -> Option<Work> {
    let chunk = Chunk { stage: fields.stage as usize, micro_batch: fields.micro_batch as usize };
    let (layer, kind) = (fields.layer as usize, usize::from(fields.kind));
    let transfer = || TRANSFERS.get(kind).copied();
    Some(match fields.work {
        1 => {
            let pass = *PASSES.get(usize::from(fields.part))?;
            Work::Component { pass, chunk, layer, component: *COMPONENTS.get(kind)? }
        }
        2 => Work::Send { kind: transfer()?, chunk },
        3 => Work::Receive { kind: transfer()?, chunk },
        4 => Work::Pack { bucket: layer },
        5 => Work::Reduce { bucket: layer },
        6 => Work::GradNorm { bucket: layer },
        7 => Work::Apply { bucket: layer },
        8 => Work::Gather { bucket: layer },
        9 => Work::Unpack { bucket: layer },
        10 => Work::AwaitReplica,
        11 => Work::Totals,
        12 => Work::Inspect,
        13 => Work::Evidence,
        14 => Work::Balance,
        15 => Work::Snapshot,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every event with every kind of operation and frame.
    fn events() -> Vec<Event> {
        let chunk = Chunk { stage: 3, micro_batch: 70_000 };
        let mut works = vec![Work::AwaitReplica, Work::Totals, Work::Inspect, Work::Evidence];
        works.extend([Work::Balance, Work::Snapshot]);
        for component in COMPONENTS {
            works.extend(PASSES.map(|pass| Work::Component { pass, chunk, layer: 61, component }));
        }
        for kind in TRANSFERS {
            works.extend([Work::Send { kind, chunk }, Work::Receive { kind, chunk }]);
        }
        let bucket = 7;
        works.extend([Work::Pack { bucket }, Work::Reduce { bucket }, Work::GradNorm { bucket }]);
        works.extend([Work::Apply { bucket }, Work::Gather { bucket }, Work::Unpack { bucket }]);
        let mut events = vec![Event::StorageBegan, Event::StorageEnded, Event::Finished];
        for work in works {
            let step = u64::MAX - 1;
            events.extend([Event::Began(work, step), Event::Ended(work, step), Event::Failed(work, step)]);
        }
        for kind in FrameKind::ALL {
            for phase in Phase::ALL {
                let (peer, step, stage, micro_batch, layer, hop) = (4_095, 1 << 40, 2, 1, 60, 3);
                let frame = Frame { peer, kind, phase, step, stage, micro_batch, layer, hop };
                events.extend([Event::Sent(frame), Event::Awaited(frame), Event::Received(frame)]);
            }
        }
        events
    }

    #[test]
    fn every_event_is_read_as_it_was_written() {
        for (number, event) in (1..).zip(events()) {
            let record = Record { number, at: number * 1_000, lane: 513, event };
            assert_eq!(Record::of(&record.words()), Some(record));
        }
    }

    #[test]
    fn a_record_with_any_bit_changed_is_none() {
        let event = Event::Began(Work::Reduce { bucket: 2 }, 9);
        let words = Record { number: 5, at: 77, lane: 1, event }.words();
        for bit in 0..64 * WORDS {
            let mut torn = words;
            torn[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(Record::of(&torn), None, "bit {bit}");
        }
    }

    #[test]
    fn a_kind_that_this_program_does_not_know_is_none() {
        let mut words = Record { number: 5, at: 77, lane: 1, event: Event::Finished }.words();
        words[2] = (words[2] & !0xff) | 200;
        words[SUM] = check_sum(&words[..SUM]);
        assert_eq!(Record::of(&words), None);
    }
}
