//! What a rank of another layout takes over of a state in memory, and from whom: a pure function of what it needs, of what each part
//! of the state consists of, and of who has the parts. Knows records and numbers of parts; nothing of ranks' models, no message.
//!
//! What is in the rank's own process stays where it is. So the bytes that move are the fewest that can: those that the rank needs
//! and its process has in none of the parts that it keeps.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::{Kind, Record};

/// By part of the state, ranges of its records.
pub type Ranges = BTreeMap<usize, Vec<Record>>;

/// What a rank takes over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// From parts in its own process.
    pub here: Ranges,
    /// By holder, from parts that it brings.
    pub from: BTreeMap<usize, Ranges>,
    /// **Units**: bytes from elsewhere.
    pub moved: u64,
    /// **Units**: bytes of everything that the rank needs.
    pub needed: u64,
}

/// Finds each range of `needs` in the `parts`. `holders` says by part who brings it to those who have it not; `is_here`, whether the
/// rank's own process has a part.
///
/// **Errors**: a range is in no part, or in two.
pub fn moves(
    needs: &[Record],
    parts: &[Vec<Record>],
    holders: &[usize],
    is_here: impl Fn(usize) -> bool,
) -> Result<Moves, String> {
    let mut places: BTreeMap<(Kind, &str), Vec<Place>> = BTreeMap::new();
    for (part, records) in parts.iter().enumerate() {
        for record in records {
            places.entry((record.kind, &record.name)).or_default().push((record.range.clone(), part));
        }
    }
    places.values_mut().for_each(|ranges| ranges.sort_by_key(|(range, _)| range.start));
    let mut moves = Moves::default();
    for need in needs {
        let all = places.get(&(need.kind, need.name.as_str())).map_or(&[][..], Vec::as_slice);
        let mut next = need.range.start;
        for (have, part) in &all[all.partition_point(|(have, _)| have.end <= need.range.start)..] {
            let range = need.range.start.max(have.start)..need.range.end.min(have.end);
            if range.is_empty() {
                break;
            }
            if range.start != next {
                return Err(lacks(need, next));
            }
            next = range.end;
            let bytes = (range.len() * need.format.bytes()) as u64;
            moves.needed += bytes;
            let of_part = match (is_here(*part), holders.get(*part)) {
                (true, _) => &mut moves.here,
                (false, Some(&holder)) => {
                    moves.moved += bytes;
                    moves.from.entry(holder).or_default()
                }
                (false, None) => return Err(format!("nobody brings part {part} of the state")),
            };
            of_part.entry(*part).or_default().push(Record { range, ..need.clone() });
        }
        if next != need.range.end {
            return Err(lacks(need, next));
        }
    }
    Ok(moves)
}

/// A range of a tensor's elements, and the part of the state that has it.
type Place = (Range<usize>, usize);

fn lacks(need: &Record, element: usize) -> String {
    format!("{}: expected element {element} in one part of the state", need.key())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::Storage;

    fn record(name: usize, range: Range<usize>) -> Record {
        let (kind, format) = [(Kind::Weight, Storage::F32), (Kind::ExpAvg, Storage::Bf16)][name % 2];
        Record { name: format!("t{name}"), kind, shape: vec![LEN], format, range }
    }

    const LEN: usize = 40;

    /// By tensor, where it is cut; by piece, whose it is.
    fn layout(tensors: usize, ranks: usize) -> impl Strategy<Value = Vec<Vec<Record>>> {
        let cuts = proptest::collection::vec(0..=LEN, 0..5);
        let owners = proptest::collection::vec(0..ranks, 6);
        proptest::collection::vec((cuts, owners), tensors).prop_map(move |tensors| {
            let mut all = vec![Vec::new(); ranks];
            for (name, (mut cuts, owners)) in tensors.into_iter().enumerate() {
                cuts.extend([0, LEN]);
                cuts.sort_unstable();
                cuts.dedup();
                // One range of a tensor and rank at most, as in a snapshot.
                let mut used = vec![false; ranks];
                for (pair, owner) in cuts.windows(2).zip(owners) {
                    let free = (0..ranks).map(|next| (owner + next) % ranks).find(|&rank| !used[rank]);
                    let Some(rank) = free else { panic!("fewer ranks than pieces") };
                    used[rank] = true;
                    all[rank].push(record(name, pair[0]..pair[1]));
                }
            }
            all
        })
    }

    proptest! {
        /// Against the definition, element by element: each that a rank needs comes from one part, which has it; from its own process
        /// wherever that has it, and nothing else is counted as moved.
        #[test]
        fn every_element_comes_once_from_who_has_it_and_no_byte_moves_that_is_there(
            before in layout(4, 7),
            after in layout(4, 6),
            kept in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 7), 6),
            holders in proptest::collection::vec(0_usize..9, 7),
        ) {
            let mut taken: BTreeMap<(Kind, String, usize), usize> = BTreeMap::new();
            for (needs, kept) in after.iter().zip(&kept) {
                let moves = moves(needs, &before, &holders, |part| kept[part]).unwrap();
                let (mut moved, mut least) = (0, 0);
                for need in needs {
                    for element in need.range.clone() {
                        let has = |part: usize| before[part].iter().any(|record| {
                            (record.kind, &record.name) == (need.kind, &need.name) && record.range.contains(&element)
                        });
                        let is_there = (0..before.len()).any(|part| kept[part] && has(part));
                        least += if is_there { 0 } else { need.format.bytes() as u64 };
                    }
                }
                let here = moves.here.iter().map(|(part, records)| (None, part, records));
                let from = moves.from.iter().flat_map(|(holder, ranges)| {
                    ranges.iter().map(move |(part, records)| (Some(*holder), part, records))
                });
                for (holder, &part, records) in here.chain(from) {
                    prop_assert_eq!(holder.is_none(), kept[part]);
                    prop_assert!(holder.is_none_or(|holder| holder == holders[part]));
                    for record in records {
                        let owner = before[part].iter().find(|has| (has.kind, &has.name) == (record.kind, &record.name));
                        let has = &owner.unwrap().range;
                        prop_assert!(has.start <= record.range.start && record.range.end <= has.end);
                        moved += if holder.is_some() { (record.range.len() * record.format.bytes()) as u64 } else { 0 };
                        for element in record.range.clone() {
                            *taken.entry((record.kind, record.name.clone(), element)).or_default() += 1;
                        }
                    }
                }
                prop_assert_eq!((moves.moved, moved), (least, least));
                let needed: usize = needs.iter().map(|need| need.range.len() * need.format.bytes()).sum();
                prop_assert_eq!(moves.needed, needed as u64);
            }
            // All ranks together have the whole state, once.
            prop_assert_eq!(taken.len(), 4 * LEN);
            prop_assert!(taken.values().all(|&times| times == 1));
        }
    }

    #[test]
    fn a_range_that_no_part_has_is_an_error_with_its_name() {
        let parts = [vec![record(0, 0..10)], vec![record(0, 20..40)]];
        let error = moves(&[record(0, 5..30)], &parts, &[0, 0], |_| true).unwrap_err();
        assert_eq!(error, "weight/t0: expected element 10 in one part of the state");
        let twice = [vec![record(0, 0..30)], vec![record(0, 20..40)]];
        let error = moves(&[record(0, 0..40)], &twice, &[0, 0], |_| true).unwrap_err();
        assert_eq!(error, "weight/t0: expected element 30 in one part of the state");
        assert!(moves(&[record(1, 0..1)], &parts, &[0, 0], |_| true).unwrap_err().contains("exp_avg/t1"));
        assert!(
            moves(&[record(0, 0..9)], &parts, &[], |_| false).unwrap_err().contains("nobody brings part 0")
        );
    }
}
