//! What is kept, how it travels, and who waits for whom.

use std::sync::{Arc, mpsc};

use contraflow_kernels::host::HostValues;
use contraflow_kernels::tensor::Tensor;
use contraflow_proto::StepReport;
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, LocalNetwork, LocalOptions, Region};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::{FormationId, Generation, JobId};

use super::*;
use crate::checkpoint::{Kind, Records, Snapshot};
use crate::error::RankError;

const JOB: JobId = JobId::new(1, 0);
const G1: Generation = Generation::FIRST;
const G2: Generation = G1.next();
const G3: Generation = G2.next();

fn image(step: u64, len: usize) -> Arc<Image> {
    let bytes = (0..len).map(|index| (index * 7 + step as usize) as u8).collect();
    let position = Position { step, cursor: 8 * step, tokens: 256 * step };
    Arc::new(Image { position, watch: Watch::default(), bytes: Arc::new(bytes) })
}

fn report(rank: usize, step: u64) -> StepReport {
    StepReport { rank: rank as u32, step, ..StepReport::default() }
}

fn steps(reports: Vec<StepReport>) -> Vec<u64> {
    reports.into_iter().map(|report| report.step).collect()
}

#[test]
fn what_is_older_than_the_acknowledged_step_goes_and_its_memory_is_used_again() {
    let kept = Kept::default();
    for step in [4, 5, 6] {
        kept.put(G1, (G1, step, 0), image(step, 1000), [report(0, step)]);
        kept.put(G1, (G1, step, 3), image(step, 1000), [report(3, step)]);
    }
    kept.acknowledged(G1, 5);
    assert_eq!(kept.inventory(), [(G1, 5, 0), (G1, 5, 3), (G1, 6, 0), (G1, 6, 3)]);
    let buffer = kept.buffer();
    assert!(buffer.is_empty() && buffer.capacity() >= 1000);
    assert_eq!(steps(kept.reports(3, 9)), [4, 5, 6]);
    kept.durable(5);
    assert_eq!(steps(kept.reports(3, 9)), [6]);
}

#[test]
fn a_formation_that_goes_on_from_memory_has_the_steps_after_it_still_to_make() {
    let kept = Kept::default();
    for step in [4, 5] {
        kept.put(G1, (G1, step, 0), image(step, 10), [report(0, step)]);
    }
    kept.go_on_from(G2, 4);
    assert_eq!(steps(kept.reports(0, 9)), [4]);
    // A thread of the formation before comes late.
    kept.put(G1, (G1, 6, 0), image(6, 10), [report(0, 6)]);
    assert!(kept.get((G1, 6, 0)).is_none());
    // Its own, and what is brought to it.
    kept.put(G2, (G1, 4, 1), image(4, 10), [report(1, 3), report(1, 4)]);
    kept.put(G2, (G2, 5, 0), image(5, 10), [report(0, 5)]);
    assert_eq!((steps(kept.reports(0, 9)), steps(kept.reports(1, 9))), (vec![4, 5], vec![3, 4]));
}

fn endpoints(ranks: usize) -> Vec<Endpoint> {
    let network = LocalNetwork::new(LocalOptions::default());
    (0..ranks).map(|rank| network.join(rank)).collect()
}

#[test]
fn a_part_of_several_pieces_arrives_as_it_was() {
    let ends = endpoints(2);
    let id = step_id(FormationId::new(JOB, G2), 7);
    for len in [0, 1, (4 << 20) - 1, 4 << 20, (9 << 20) + 5] {
        let sent = image(7, len);
        let kind = (id, FrameKind::State);
        courier::send((&ends[0], 1), kind, &sent, vec![report(0, 6), report(0, 7)]).unwrap();
        let (came, reports) = courier::receive((&ends[1], 0), kind, Vec::new()).unwrap();
        assert_eq!((came.position, &came.bytes), (sent.position, &sent.bytes));
        assert_eq!(steps(reports), [6, 7]);
    }
}

#[test]
fn a_piece_that_is_not_what_was_announced_is_told() {
    let ends = endpoints(2);
    let kind = (step_id(FormationId::new(JOB, G2), 7), FrameKind::State);
    courier::send((&ends[0], 1), kind, &image(7, 0), Vec::new()).unwrap();
    let header = ends[1].receive(kind.0.tag(kind.1, Chunk { stage: 0, micro_batch: 0 }, 0, 0)).unwrap();
    let mut wrong = header[0].bytes().to_vec();
    // bytes = 3, as protobuf writes it.
    wrong.extend([0x18, 3]);
    for (piece, bytes) in [(0, wrong), (1, vec![1, 2])] {
        let tag = kind.0.tag(kind.1, Chunk { stage: 0, micro_batch: piece }, 0, 0);
        ends[0].send(1, tag, vec![Region::new(bytes)]).unwrap();
    }
    let error = courier::receive((&ends[1], 0), kind, Vec::new()).err().unwrap();
    assert!(error.to_string().ends_with("expected 3 bytes, got 2 bytes"), "{error}");
}

/// Three ranks in a circle, each with the one that stands `distance` further for its buddy.
#[derive(Clone, Copy)]
struct Circle {
    generation: Generation,
    first_step: u64,
    distance: usize,
}

const FIRST: Circle = Circle { generation: G1, first_step: 4, distance: 1 };

impl Circle {
    /// A rank's keeper, with what it is told and what it fails with.
    fn keeper(
        self,
        endpoint: &Endpoint,
        kept: &Arc<Kept>,
    ) -> (mpsc::Sender<Keep>, mpsc::Receiver<RankError>) {
        let own = endpoint.rank();
        let (failed, errors) = mpsc::channel();
        let keeper = Keeper {
            endpoint: endpoint.clone(),
            kept: kept.clone(),
            formation: FormationId::new(JOB, self.generation),
            buddy: (own + self.distance) % 3,
            ward: (own + 3 - self.distance) % 3,
        };
        let keeps = start(keeper, self.first_step, move |error| drop(failed.send(error))).unwrap();
        (keeps, errors)
    }

    /// Makes the steps up to this one, each when every buddy has the state before.
    fn make_steps(self, last: u64, ends: &[Endpoint], kept: &[Arc<Kept>]) {
        let keepers: Vec<_> = ends.iter().zip(kept).map(|(end, kept)| self.keeper(end, kept)).collect();
        for step in self.first_step + 1..=last {
            for (rank, (keeps, _)) in keepers.iter().enumerate() {
                keeps.send(keep(rank, step)).unwrap();
            }
            for (rank, end) in ends.iter().enumerate() {
                acknowledged(end, FormationId::new(JOB, self.generation), (rank + self.distance) % 3, step)
                    .unwrap();
            }
        }
    }
}

fn keep(rank: usize, step: u64) -> Keep {
    let mut snapshot = Snapshot::default();
    let values = Tensor::from_vec(&[2], vec![rank as f32, step as f32]);
    snapshot.add(Kind::Weight, ("w", &[6], 2 * rank..2 * rank + 2), (values, 0..2));
    Keep { position: Position { step, ..Position::default() }, snapshot, report: report(rank, step) }
}

#[test]
fn every_rank_has_its_own_state_and_that_of_its_ward_once_its_buddy_has_said_so() {
    let ends = endpoints(3);
    let kept: Vec<Arc<Kept>> = ends.iter().map(|_| Arc::default()).collect();
    FIRST.make_steps(7, &ends, &kept);
    // Of step 7 all have said that their buddies have it; what is older than step 6 nobody needs.
    for (rank, kept) in kept.iter().enumerate() {
        let ward = (rank + 2) % 3;
        let mut expected = vec![(G1, 6, rank), (G1, 6, ward), (G1, 7, rank), (G1, 7, ward)];
        expected.sort_unstable();
        assert_eq!(kept.inventory(), expected);
        let part = kept.get((G1, 7, ward)).unwrap();
        let records = Records::in_memory("memory".into(), part.bytes.clone()).unwrap();
        let mut values = Tensor::zeros(&[2]);
        records.read(Kind::Weight, ("w", &[6]), 2 * ward..2 * ward + 2, values.view_mut(0..2)).unwrap();
        assert_eq!(values.values::<f32>(), [ward as f32, 7.0]);
        let gap = records.read_numbers(Kind::Weight, "w", &[6]).unwrap_err().to_string();
        assert!(gap.contains("expected elements 0..6, got 2 of them"), "{gap}");
        assert_eq!(steps(kept.reports(ward, 9)), [5, 6, 7]);
    }
}

#[test]
fn a_buddy_that_gives_up_is_the_end_of_a_keeper_and_is_told() {
    let ends = endpoints(3);
    let kept: Arc<Kept> = Arc::default();
    let (keeps, errors) = FIRST.keeper(&ends[0], &kept);
    keeps.send(keep(0, 5)).unwrap();
    ends[0].abort("rank 2 is lost");
    let error = errors.recv().unwrap();
    assert!(matches!(error, RankError::Fabric(FabricError::Aborted { .. })), "{error}");
    // What it had by then is there for whoever goes on from it.
    assert_eq!(kept.inventory(), [(G1, 5, 0)]);
}

#[test]
fn a_rank_gets_its_part_from_whoever_has_it() {
    let ends = endpoints(3);
    let kept: Vec<Arc<Kept>> = ends.iter().map(|_| Arc::default()).collect();
    // Rank 1 is new; rank 2 keeps its state.
    kept[0].put(G1, (G1, 9, 0), image(9, 30), [report(0, 9)]);
    kept[2].put(G1, (G1, 9, 2), image(9, 32), [report(2, 9)]);
    kept[2].put(G1, (G1, 9, 1), image(9, 31), [report(1, 8), report(1, 9)]);
    let recovered =
        |rank: usize| Recovered { generation: G1, step: 9, holders: vec![0, 2, 2], kept: kept[rank].clone() };
    let got = |rank: usize| recover(&recovered(rank), &ends[rank], FormationId::new(JOB, G2));
    let (of_2, _) = got(2).unwrap();
    let (of_1, reports) = got(1).unwrap();
    let (of_0, _) = got(0).unwrap();
    assert_eq!([of_0.bytes.len(), of_1.bytes.len(), of_2.bytes.len()], [30, 31, 32]);
    assert_eq!(steps(reports), [8, 9]);
    // It is the new rank's own from now on, should the formation break before it has made a step.
    assert_eq!(kept[1].inventory(), [(G1, 9, 1)]);
    let error =
        recover(&Recovered { step: 8, ..recovered(2) }, &ends[2], FormationId::new(JOB, G3)).err().unwrap();
    assert_eq!(error.kind(), crate::error::ErrorKind::Lost);
}

#[test]
fn a_new_buddy_brings_a_lost_rank_also_the_reports_of_steps_that_were_made_before_it_was_one() {
    let ends = endpoints(3);
    let mut kept: Vec<Arc<Kept>> = ends.iter().map(|_| Arc::default()).collect();
    FIRST.make_steps(7, &ends, &kept);
    for kept in &kept {
        kept.durable(5);
        kept.go_on_from(G2, 7);
    }
    assert!(kept[2].reports(0, 9).is_empty());
    // The circle the other way round: rank 0 has rank 2 for its buddy, no longer rank 1.
    let second = Circle { generation: G2, first_step: 7, distance: 2 };
    second.make_steps(9, &ends, &kept);
    // Rank 0 is lost with all that it had in memory, and made anew from what its new buddy has.
    kept[0] = Arc::default();
    kept.iter().for_each(|kept| kept.go_on_from(G3, 9));
    let recovered =
        |rank: usize| Recovered { generation: G2, step: 9, holders: vec![2, 1, 2], kept: kept[rank].clone() };
    let got = |rank: usize| recover(&recovered(rank), &ends[rank], FormationId::new(JOB, G3)).unwrap();
    got(2);
    let (image, reports) = got(0);
    assert_eq!((image.position.step, steps(reports)), (9, vec![6, 7, 8, 9]));
}
