//! A ring as bytes: a header, and records that overwrite the oldest. The reader takes any bytes, and says what it cannot read.
//!
//! Knows no file and no mapping.

use super::record::{self, Record, check_sum};

/// Records of a ring, so that it is 128 KiB.
pub(super) const NUM_RECORDS: usize = 2046;

/// Words of the header.
pub(super) const HEADER_WORDS: usize = 16;

/// **Units**: bytes.
pub(super) const HEADER_BYTES: usize = HEADER_WORDS * size_of::<u64>();

/// More than any ring. **Units**: bytes.
pub(super) const MAX_BYTES: u64 = 16 << 20;

const MAGIC: u64 = u64::from_le_bytes(*b"CfFlight");

/// What this program writes and reads.
const VERSION: u32 = 1;

/// The words that a header's check sum covers; it follows them.
const FACTS: usize = 11;

/// The word of the header that changes: how long after its beginning the process was last known to be alive, in ns.
pub(super) const ALIVE: usize = FACTS + 1;

/// Whose ring it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The rank.
    pub rank: u32,
    /// All ranks of the formation.
    pub world: u32,
    /// The job; 0 where all ranks are in one process.
    pub job: u64,
    /// Count of the job's formations.
    pub generation: u32,
    /// The process.
    pub process: u32,
    /// When the ring was begun, by the machine's clock. **Units**: ns since 1970.
    pub began: u64,
    /// Version of the program.
    pub program: String,
}

/// Bytes that are no ring, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub String);

/// What a ring says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Whose it is.
    pub header: Header,
    /// How long after its beginning the process was last known to be alive. **Units**: ns.
    pub alive: u64,
    /// The records that are there, in order.
    pub records: Vec<Record>,
    /// Records that are torn, damaged, cut off, or of a kind that this program does not know.
    pub unreadable: usize,
}

impl Header {
    /// As it is written: with nothing recorded.
    pub(super) fn words(&self) -> [u64; HEADER_WORDS] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let mut words = [0; HEADER_WORDS];
        words[0] = MAGIC;
        words[1] = pair(VERSION, NUM_RECORDS as u32);
        words[2] = pair(self.rank, self.world);
        words[3] = self.job;
        words[4] = pair(self.generation, self.process);
        words[5] = self.began;
        let mut program = [0; 32];
        let bytes = self.program.as_bytes();
        let length = bytes.len().min(program.len());
        program[..length].copy_from_slice(&bytes[..length]);
        for (word, bytes) in words[6..FACTS].iter_mut().zip(program.chunks_exact(8)) {
            *word = word_of(bytes);
        }
        words[FACTS] = check_sum(&words[..FACTS]);
        words
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

impl Ring {
    /// As a file of this program's: what was read, and nothing that could not be.
    pub fn bytes(&self) -> Vec<u8> {
        let mut words = self.header.words().to_vec();
        words[ALIVE] = self.alive;
        words.resize(HEADER_WORDS + NUM_RECORDS * record::WORDS, 0);
        for record in &self.records {
            let slot = ((record.number - 1) % NUM_RECORDS as u64) as usize;
            let at = HEADER_WORDS + slot * record::WORDS;
            words[at..at + record::WORDS].copy_from_slice(&record.words());
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads what a recorder has written, whenever its process ended.
    ///
    /// **Errors**: the header is none of this program's, or damaged. A record that cannot be read is counted.
    pub fn read(bytes: &[u8]) -> Result<Ring, Unreadable> {
        let unreadable = |words: &str| Err(Unreadable(words.to_owned()));
        let words: Vec<u64> = bytes.chunks_exact(8).map(word_of).collect();
        let Some((head, rest)) = words.split_at_checked(HEADER_WORDS) else {
            return unreadable("expected the header of a ring, got fewer bytes");
        };
        let low = |word: u64| (word & u64::from(u32::MAX)) as u32;
        let high = |word: u64| (word >> 32) as u32;
        if head[0] != MAGIC {
            return unreadable("expected a ring of the flight recorder, got other bytes");
        }
        let version = low(head[1]);
        if version != VERSION {
            return Err(Unreadable(format!("expected format version {VERSION}, got {version}")));
        }
        let slots = high(head[1]) as usize;
        if head[FACTS] != check_sum(&head[..FACTS]) || !(1..=1 << 16).contains(&slots) {
            return unreadable("its header is damaged");
        }
        let program: Vec<u8> = head[6..FACTS].iter().flat_map(|word| word.to_le_bytes()).collect();
        let header = Header {
            rank: low(head[2]),
            world: high(head[2]),
            job: head[3],
            generation: low(head[4]),
            process: high(head[4]),
            began: head[5],
            program: String::from_utf8_lossy(&program).trim_end_matches('\0').to_owned(),
        };
        let (records, unreadable) = records_of(rest, slots);
        Ok(Ring { header, alive: head[ALIVE], records, unreadable })
    }
}

/// The records in the slots of a ring, in order, and how many cannot be read.
fn records_of(words: &[u64], slots: usize) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let mut unreadable = slots.saturating_sub(words.len() / record::WORDS);
    for (slot, words) in words.chunks_exact(record::WORDS).take(slots).enumerate() {
        let Ok(words) = <&[u64; record::WORDS]>::try_from(words) else { continue };
        // No record has come here yet.
        if words.iter().all(|&word| word == 0) {
            continue;
        }
        match Record::of(words).filter(|record| (record.number - 1) % slots as u64 == slot as u64) {
            Some(record) => records.push(record),
            None => unreadable += 1,
        }
    }
    records.sort_by_key(|record| record.number);
    // What a thread had begun to overwrite when the process ended is of the lap before.
    let newest = records.last().map_or(0, |record| record.number);
    records.retain(|record| record.number + slots as u64 > newest);
    (records, unreadable)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::record::Event;
    use super::*;

    fn header() -> Header {
        let program = "0.1.0".to_owned();
        Header { rank: 3, world: 8, job: 7, generation: 2, process: 99, began: 1 << 60, program }
    }

    /// A ring after as many records.
    fn bytes(num_records: u64) -> Vec<u8> {
        let mut words = header().words().to_vec();
        words.resize(HEADER_WORDS + NUM_RECORDS * record::WORDS, 0);
        for number in 1..=num_records {
            let record = Record { number, at: number * 10, lane: 0, event: Event::StorageBegan };
            let at = HEADER_WORDS + ((number - 1) % NUM_RECORDS as u64) as usize * record::WORDS;
            words[at..at + record::WORDS].copy_from_slice(&record.words());
        }
        words[ALIVE] = 12_345;
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn numbers(ring: &Ring) -> Vec<u64> {
        ring.records.iter().map(|record| record.number).collect()
    }

    #[test]
    fn the_newest_records_are_there_in_order_however_often_the_ring_has_gone_round() {
        let slots = NUM_RECORDS as u64;
        for count in [0, 1, 5, slots - 1, slots, slots + 1, 3 * slots + 17] {
            let ring = Ring::read(&bytes(count)).unwrap();
            let first = count.saturating_sub(slots) + 1;
            assert_eq!(numbers(&ring), (first..=count).collect::<Vec<_>>());
            assert_eq!((&ring.header, ring.alive, ring.unreadable), (&header(), 12_345, 0));
            assert_eq!(ring.bytes(), bytes(count));
        }
    }

    #[test]
    fn a_torn_record_is_counted_and_costs_no_other() {
        let mut torn = bytes(20);
        // Half of the twelfth is as if it had not been written.
        let at = HEADER_BYTES + 11 * record::BYTES;
        torn[at + 24..at + record::BYTES].fill(0);
        let ring = Ring::read(&torn).unwrap();
        assert_eq!(ring.unreadable, 1);
        assert_eq!(numbers(&ring), (1..=11).chain(13..=20).collect::<Vec<_>>());
        assert_eq!(Ring::read(&ring.bytes()), Ok(Ring { unreadable: 0, ..ring }));
    }

    #[test]
    fn what_a_thread_was_about_to_overwrite_is_left_out() {
        let slots = NUM_RECORDS as u64;
        let whole = bytes(slots + 2);
        let before = bytes(slots);
        // The last but one was claimed and not written: its slot holds the first record.
        let mut bytes = whole;
        bytes[HEADER_BYTES..HEADER_BYTES + record::BYTES]
            .copy_from_slice(&before[HEADER_BYTES..HEADER_BYTES + record::BYTES]);
        let ring = Ring::read(&bytes).unwrap();
        assert_eq!((ring.records[0].number, ring.records.len()), (3, NUM_RECORDS - 1));
    }

    #[test]
    fn a_file_that_is_cut_off_says_how_much_is_missing() {
        let whole = bytes(20);
        let ring = Ring::read(&whole[..HEADER_BYTES + 10 * record::BYTES + 7]).unwrap();
        assert_eq!((ring.records.len(), ring.unreadable), (10, NUM_RECORDS - 10));
        let words = |bytes: &[u8]| Ring::read(bytes).unwrap_err().to_string();
        assert!(words(&whole[..HEADER_BYTES - 1]).contains("fewer bytes"));
        assert!(words(&vec![1; 4096]).contains("other bytes"));
        let mut damaged = whole.clone();
        damaged[17] ^= 1;
        assert!(words(&damaged).contains("damaged"));
        damaged[8] = 9;
        assert_eq!(words(&damaged), "expected format version 1, got 9");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(noise in prop::collection::vec(any::<u8>(), 0..4096)) {
            drop(Ring::read(&noise));
        }

        #[test]
        fn a_ring_with_any_damage_is_read_or_refused(
            count in 0..3000_u64,
            damage in prop::collection::vec((0..super::super::RING_BYTES, any::<u8>()), 0..64),
            length in 0..=super::super::RING_BYTES,
        ) {
            let mut bytes = bytes(count);
            damage.iter().for_each(|&(at, byte)| bytes[at] = byte);
            if let Ok(ring) = Ring::read(&bytes[..length]) {
                prop_assert!(ring.records.len() + ring.unreadable <= NUM_RECORDS);
                prop_assert!(ring.records.windows(2).all(|pair| pair[0].number < pair[1].number));
            }
        }
    }
}
