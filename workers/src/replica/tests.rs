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

fn replica(step: u64, len: usize) -> Arc<ShardReplica> {
    let bytes = (0..len).map(|index| (index * 7 + step as usize) as u8).collect();
    let position = Position { step, cursor: 8 * step, tokens: 256 * step };
    Arc::new(ShardReplica { position, watch: StabilityWatch::default(), bytes: Arc::new(bytes) })
}

fn report(rank: usize, step: u64) -> StepReport {
    StepReport { rank: rank as u32, step, ..StepReport::default() }
}

fn steps(reports: Vec<StepReport>) -> Vec<u64> {
    reports.into_iter().map(|report| report.step).collect()
}

#[test]
fn replicas_older_than_the_acknowledged_step_are_dropped_and_their_buffers_reused() {
    let store = ReplicaStore::default();
    for step in [4, 5, 6] {
        store.put(G1, (G1, step, 0), replica(step, 1000), [report(0, step)]);
        store.put(G1, (G1, step, 3), replica(step, 1000), [report(3, step)]);
    }
    store.acknowledged(G1, 5);
    assert_eq!(store.inventory(), [(G1, 5, 0), (G1, 5, 3), (G1, 6, 0), (G1, 6, 3)]);
    let buffer = store.buffer();
    assert!(buffer.is_empty() && buffer.capacity() >= 1000);
    assert_eq!(steps(store.reports(3, 9)), [4, 5, 6]);
    store.durable(5);
    assert_eq!(steps(store.reports(3, 9)), [6]);
}

#[test]
fn a_formation_resumed_from_memory_has_the_later_steps_still_to_do() {
    let store = ReplicaStore::default();
    for step in [4, 5] {
        store.put(G1, (G1, step, 0), replica(step, 10), [report(0, step)]);
    }
    store.resume_from(G2, 4, true);
    assert_eq!(steps(store.reports(0, 9)), [4]);
    // A thread of the formation before comes late.
    store.put(G1, (G1, 6, 0), replica(6, 10), [report(0, 6)]);
    assert!(store.get((G1, 6, 0)).is_none());
    // Its own, and what is brought to it.
    store.put(G2, (G1, 4, 1), replica(4, 10), [report(1, 3), report(1, 4)]);
    store.put(G2, (G2, 5, 0), replica(5, 10), [report(0, 5)]);
    assert_eq!((steps(store.reports(0, 9)), steps(store.reports(1, 9))), (vec![4, 5], vec![3, 4]));
}

fn endpoints(ranks: usize) -> Vec<Endpoint> {
    let network = LocalNetwork::new(LocalOptions::default());
    (0..ranks).map(|rank| network.join(rank)).collect()
}

#[test]
fn a_shard_of_several_pieces_arrives_unchanged() {
    let ends = endpoints(2);
    let id = step_id(FormationId::new(JOB, G2), 7);
    for len in [0, 1, (4 << 20) - 1, 4 << 20, (9 << 20) + 5] {
        let sent = replica(7, len);
        let kind = (id, FrameKind::State, 0);
        transfer::send((&ends[0], 1), kind, &sent, vec![report(0, 6), report(0, 7)]).unwrap();
        let (came, reports) = transfer::receive((&ends[1], 0), kind, Vec::new()).unwrap();
        assert_eq!((came.position, &came.bytes), (sent.position, &sent.bytes));
        assert_eq!(steps(reports), [6, 7]);
    }
}

#[test]
fn an_unexpected_piece_is_an_error() {
    let ends = endpoints(2);
    let kind = (step_id(FormationId::new(JOB, G2), 7), FrameKind::State, 0);
    transfer::send((&ends[0], 1), kind, &replica(7, 0), Vec::new()).unwrap();
    let header = ends[1].receive(kind.0.tag(kind.1, Chunk { stage: 0, micro_batch: 0 }, 0, 0)).unwrap();
    let mut wrong = header[0].bytes().to_vec();
    // bytes = 3, as protobuf writes it.
    wrong.extend([0x18, 3]);
    for (piece, bytes) in [(0, wrong), (1, vec![1, 2])] {
        let tag = kind.0.tag(kind.1, Chunk { stage: 0, micro_batch: piece }, 0, 0);
        ends[0].send(1, tag, vec![Region::new(bytes)]).unwrap();
    }
    let error = transfer::receive((&ends[1], 0), kind, Vec::new()).err().unwrap();
    assert!(error.to_string().ends_with("expected 3 bytes, got 2 bytes"), "{error}");
}

/// Three ranks in a circle, each with the one `distance` further as its buddy.
#[derive(Clone, Copy)]
struct Three {
    generation: Generation,
    first_step: u64,
    distance: usize,
}

const FIRST: Three = Three { generation: G1, first_step: 4, distance: 1 };

impl Three {
    /// A rank's replicator, with its input and its error.
    fn replicator(
        self,
        endpoint: &Endpoint,
        store: &Arc<ReplicaStore>,
    ) -> (mpsc::Sender<Replicate>, mpsc::Receiver<RankError>) {
        let own = endpoint.rank();
        let (failed, errors) = mpsc::channel();
        let replicator = Replicator {
            endpoint: endpoint.clone(),
            store: store.clone(),
            formation: FormationId::new(JOB, self.generation),
            circle: Some(Circle { buddy: (own + self.distance) % 3, source: (own + 3 - self.distance) % 3 }),
        };
        let keeps =
            start(replicator, self.first_step, |_| (), move |error| drop(failed.send(error))).unwrap();
        (keeps, errors)
    }

    /// Makes the steps up to this one, each when every buddy has the state before.
    fn make_steps(self, last: u64, ends: &[Endpoint], store: &[Arc<ReplicaStore>]) {
        let keepers: Vec<_> =
            ends.iter().zip(store).map(|(end, store)| self.replicator(end, store)).collect();
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

fn keep(rank: usize, step: u64) -> Replicate {
    let mut snapshot = Snapshot::default();
    let values = Tensor::from_vec(&[2], vec![rank as f32, step as f32]);
    snapshot.add(Kind::Weight, ("w", &[6], 2 * rank..2 * rank + 2), (values, 0..2));
    Replicate {
        position: Position { step, ..Position::default() },
        snapshot,
        report: report(rank, step),
        is_last: false,
    }
}

#[test]
fn every_rank_holds_its_own_state_and_its_sources_once_acknowledged() {
    let ends = endpoints(3);
    let store: Vec<Arc<ReplicaStore>> = ends.iter().map(|_| Arc::default()).collect();
    FIRST.make_steps(7, &ends, &store);
    // All have acknowledged step 7; nothing older than step 6 is needed.
    for (rank, store) in store.iter().enumerate() {
        let source = (rank + 2) % 3;
        let mut expected = vec![(G1, 6, rank), (G1, 6, source), (G1, 7, rank), (G1, 7, source)];
        expected.sort_unstable();
        assert_eq!(store.inventory(), expected);
        let part = store.get((G1, 7, source)).unwrap();
        let records = Records::in_memory("memory".into(), [part.bytes.clone()]).unwrap();
        let mut values = Tensor::zeros(&[2]);
        records.read(Kind::Weight, ("w", &[6]), 2 * source..2 * source + 2, values.view_mut(0..2)).unwrap();
        assert_eq!(values.values::<f32>(), [source as f32, 7.0]);
        let gap = records.read_numbers(Kind::Weight, "w", &[6]).unwrap_err().to_string();
        assert!(gap.contains("expected elements 0..6, got 2 of them"), "{gap}");
        assert_eq!(steps(store.reports(source, 9)), [5, 6, 7]);
    }
}

#[test]
fn a_buddy_that_aborts_ends_its_replicator_with_an_error() {
    let ends = endpoints(3);
    let store: Arc<ReplicaStore> = Arc::default();
    let (keeps, errors) = FIRST.replicator(&ends[0], &store);
    keeps.send(keep(0, 5)).unwrap();
    ends[0].abort("rank 2 is lost");
    let error = errors.recv().unwrap();
    assert!(matches!(error, RankError::Fabric(FabricError::Aborted { .. })), "{error}");
    // What it had by then is there to resume from.
    assert_eq!(store.inventory(), [(G1, 5, 0)]);
}

#[test]
fn a_rank_gets_its_shard_from_its_holder() {
    let ends = endpoints(3);
    let store: Vec<Arc<ReplicaStore>> = ends.iter().map(|_| Arc::default()).collect();
    // Rank 1 is new; rank 2 keeps its state.
    store[0].put(G1, (G1, 9, 0), replica(9, 30), [report(0, 9)]);
    store[2].put(G1, (G1, 9, 2), replica(9, 32), [report(2, 9)]);
    store[2].put(G1, (G1, 9, 1), replica(9, 31), [report(1, 8), report(1, 9)]);
    let recovered = |rank: usize| Recovered {
        generation: G1,
        step: 9,
        holders: vec![0, 2, 2],
        axes: None,
        world: 3,
        store: store[rank].clone(),
    };
    let got = |rank: usize| recover(&recovered(rank), &ends[rank], FormationId::new(JOB, G2));
    let (of_2, _) = got(2).unwrap();
    let (of_1, reports) = got(1).unwrap();
    let (of_0, _) = got(0).unwrap();
    assert_eq!([of_0.bytes.len(), of_1.bytes.len(), of_2.bytes.len()], [30, 31, 32]);
    assert_eq!(steps(reports), [8, 9]);
    // It is the new rank's own from now on, should the formation break before it has made a step.
    assert_eq!(store[1].inventory(), [(G1, 9, 1)]);
    let error =
        recover(&Recovered { step: 8, ..recovered(2) }, &ends[2], FormationId::new(JOB, G3)).err().unwrap();
    assert_eq!(error.kind(), crate::error::ErrorKind::Lost);
}

#[test]
fn a_new_buddy_also_restores_reports_of_earlier_steps() {
    let ends = endpoints(3);
    let mut store: Vec<Arc<ReplicaStore>> = ends.iter().map(|_| Arc::default()).collect();
    FIRST.make_steps(7, &ends, &store);
    for store in &store {
        store.durable(5);
        store.resume_from(G2, 7, true);
    }
    assert!(store[2].reports(0, 9).is_empty());
    // The circle the other way round: rank 0 has rank 2 for its buddy, no longer rank 1.
    let second = Three { generation: G2, first_step: 7, distance: 2 };
    second.make_steps(9, &ends, &store);
    // Rank 0 is lost with all that it had in memory, and rebuilt from what its new buddy holds.
    store[0] = Arc::default();
    store.iter().for_each(|store| store.resume_from(G3, 9, true));
    let recovered = |rank: usize| Recovered {
        generation: G2,
        step: 9,
        holders: vec![2, 1, 2],
        axes: None,
        world: 3,
        store: store[rank].clone(),
    };
    let got = |rank: usize| recover(&recovered(rank), &ends[rank], FormationId::new(JOB, G3)).unwrap();
    got(2);
    let (replica, reports) = got(0);
    assert_eq!((replica.position.step, steps(reports)), (9, vec![6, 7, 8, 9]));
}
