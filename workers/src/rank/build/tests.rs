//! What a rank of any layout answers for, known from shapes alone, against what it really writes; and a state that ranks of another
//! layout take over from each other, element by element.

use std::collections::BTreeSet;
use std::sync::Arc;

use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::fabric::{LocalNetwork, LocalOptions};
use contraflow_runtime::random::mix;
use contraflow_runtime::recipe::RecipeSource;
use contraflow_runtime::topology::{Generation, JobId};

use super::*;
use crate::checkpoint::{RecordValues, Snapshot, SnapshotPiece, Storage, shard_bytes};
use crate::replica::{ReplicaStore, ShardReplica, bring, rearrange};

const LAYOUTS: [Topology; 5] = [
    Topology { pipeline: 1, expert: 1, data: 1 },
    Topology { pipeline: 1, expert: 1, data: 3 },
    Topology { pipeline: 1, expert: 2, data: 2 },
    Topology { pipeline: 2, expert: 1, data: 1 },
    Topology { pipeline: 2, expert: 2, data: 2 },
];

/// Two stages a rank, moments in BF16, an average.
const NARROW: &[&str] = &["parallel.schedule=dualpipev", "precision.moments=bf16", "training.ema_decay=0.9"];

const STEP: u64 = 7;
const G1: Generation = Generation::FIRST;

fn recipe(axes: Topology, changes: &[&str]) -> Recipe {
    let fixed = ["training.global_batch_size=24", "training.micro_batch_size=1", "parallel.schedule=1f1b"];
    let axes = [
        format!("parallel.pipeline={}", axes.pipeline),
        format!("parallel.expert={}", axes.expert),
        format!("parallel.data={}", axes.data),
    ];
    let changes: Vec<String> =
        fixed.iter().chain(changes).map(|change| (*change).to_owned()).chain(axes).collect();
    let loaded = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes);
    loaded.unwrap_or_else(|faults| panic!("{faults}"))
}

fn architecture(recipe: &Recipe) -> Architecture {
    Architecture::new(recipe.model_config.clone(), Precision::of(&recipe.precision))
}

fn sorted(mut records: Vec<Record>) -> Vec<Record> {
    records.sort_by_cached_key(Record::key);
    records
}

#[test]
fn what_a_rank_answers_for_is_known_without_its_tensors() {
    for changes in [&[][..], NARROW] {
        for axes in LAYOUTS {
            let recipe = recipe(axes, changes);
            let arch = architecture(&recipe);
            let parts = parts(&recipe, &arch, axes).unwrap();
            let (layouts, stages_of) = (recipe_stages(&recipe).unwrap(), recipe.placement());
            let placement = Placement { topology: axes, stages_of: &stages_of, layouts: &layouts };
            for rank in axes.ranks() {
                let RankModel { dense, experts, .. } = build(&arch, &placement, rank);
                let mut params = RankParams { dense, experts };
                let mut optimizer = OptimizerState::new(optimizer_setup(&recipe, rank), &mut params);
                optimizer.start_average(recipe.training.ema_decay, &params, None).unwrap();
                let averages = optimizer.average(&params, true, true).unwrap();
                let written = optimizer.snapshot(&params, averages).pieces;
                let written = sorted(written.into_iter().map(|piece| piece.record).collect());
                assert_eq!(sorted(parts[rank].clone()), written, "rank {rank} of {axes:?}");
                // The same, asked for by a rank that has its model.
                assert_eq!(sorted(records(&params, rank, Kept::of(&recipe))), written);
            }
        }
    }
}

/// The values of a record's elements: other ones for each tensor and kind.
fn values(record: &Record) -> impl Iterator<Item = u64> {
    let name = record.key().bytes().fold(7, |hash, byte| mix(hash ^ u64::from(byte)));
    // Few bits, so that BF16 holds them.
    record.range.clone().map(move |element| mix(name ^ element as u64) % 251)
}

/// The part of a rank in which every element has its value.
fn part(records: &[Record]) -> Arc<ShardReplica> {
    let mut snapshot = Snapshot::default();
    for record in records {
        let len = record.range.len();
        let stored = match record.format {
            Storage::U64 => RecordValues::Counts(values(record).collect()),
            format => {
                let numbers = values(record).map(|value| value as f32).collect();
                let numbers = Tensor::from_vec(&[len], numbers);
                let narrow = format == Storage::Bf16;
                let numbers =
                    if narrow { numbers.to(contraflow_kernels::tensor::Format::BF16) } else { numbers };
                RecordValues::Floats(numbers, 0..len)
            }
        };
        snapshot.pieces.push(SnapshotPiece { record: record.clone(), values: stored });
    }
    let bytes = Arc::new(shard_bytes(snapshot, Vec::new()).unwrap());
    let position = Position { step: STEP, cursor: 56, tokens: 1_792 };
    Arc::new(ShardReplica { position, watch: Default::default(), bytes })
}

/// Fails, and leaves nobody waiting.
fn give_up<T>(ends: &[Endpoint], error: &RankError) -> T {
    ends.iter().for_each(|end| end.abort(&error.to_string()));
    panic!("{error}")
}

/// A state in one layout is taken over by another one. Worker w has part w and its buddy's before it; rank n of the new layout is on
/// worker n + `shift`, so that some of the new ranks are on workers without a part, and some workers with a part have no rank.
fn takes_over(from: Topology, to: Topology, shift: usize, changes: &[&str]) {
    let (before, after) = (recipe(from, changes), recipe(to, changes));
    let arch = architecture(&after);
    let (parts, needs) = (parts(&before, &arch, from).unwrap(), parts(&after, &arch, to).unwrap());
    let (world, old) = (to.world(), from.world());
    let workers = old.max(world + shift);
    let stores: Vec<Arc<ReplicaStore>> = (0..workers).map(|_| Arc::default()).collect();
    let keeps = |worker: usize, rank: usize| worker == rank || old > 1 && worker == (rank + 1) % old;
    for (rank, records) in parts.iter().enumerate() {
        for worker in (0..workers).filter(|&worker| keeps(worker, rank)) {
            stores[worker].put(G1, (G1, STEP, rank), part(records), []);
        }
    }
    // The number of a worker among those of the formation: its rank, or one after them.
    let bringers: Vec<usize> = (0..old).filter(|worker| !(shift..world + shift).contains(worker)).collect();
    let number = |worker: usize| match worker.checked_sub(shift).filter(|rank| *rank < world) {
        Some(rank) => rank,
        None => world + bringers.iter().position(|bringer| *bringer == worker).unwrap(),
    };
    let holders: Vec<usize> = (0..old).map(number).collect();
    let network = LocalNetwork::new(LocalOptions::default());
    let formation = FormationId::new(JobId::new(1, 0), G1.next());
    let recovered = |worker: usize| Recovered {
        generation: G1,
        step: STEP,
        holders: holders.clone(),
        axes: Some(from),
        world,
        store: stores[worker].clone(),
    };
    // Who has joined can be sent to.
    let ends: Vec<Endpoint> = (0..world + bringers.len()).map(|number| network.join(number)).collect();
    let ends = &ends;
    std::thread::scope(|scope| {
        for &worker in &bringers {
            let (recovered, endpoint) = (recovered(worker), &ends[number(worker)]);
            scope.spawn(move || {
                bring(&recovered, endpoint, formation).unwrap_or_else(|error| give_up(ends, &error))
            });
        }
        let taken: Vec<_> = (0..world)
            .map(|rank| {
                let recovered = recovered(rank + shift);
                let wanted = Wanted { needs: needs[rank].clone(), parts: parts.clone() };
                scope.spawn(move || {
                    let taken = rearrange(&recovered, &ends[rank], formation, &wanted);
                    taken.unwrap_or_else(|error| give_up(ends, &error))
                })
            })
            .collect();
        for (rank, taken) in taken.into_iter().enumerate() {
            let Rearranged { position, records, moved, .. } = taken.join().unwrap();
            assert_eq!((position.step, position.cursor), (STEP, 56));
            for need in &needs[rank] {
                let tensor = (need.name.as_str(), need.shape.as_slice());
                if need.format == Storage::U64 {
                    let counts = records.read_counts(&need.name, need.range.len()).unwrap();
                    let expected: Vec<u64> = values(need).collect();
                    assert_eq!(counts, expected);
                    continue;
                }
                let got = records.read_range(need.kind, tensor, need.range.clone()).unwrap();
                let expected: Vec<f32> = values(need).map(|value| value as f32).collect();
                assert!(got == expected, "{} of rank {rank}", need.key());
            }
            // Counted here from scratch: what the rank needs and no part on its worker has.
            let here: BTreeSet<usize> = (0..old).filter(|&part| keeps(rank + shift, part)).collect();
            let mut least = 0;
            for need in &needs[rank] {
                let has = |element: usize| {
                    here.iter().any(|&part| {
                        parts[part]
                            .iter()
                            .any(|have| have.key() == need.key() && have.range.contains(&element))
                    })
                };
                // Whole tensors of the tiny model are long: their ends say where each part begins.
                let missing = parts.iter().flatten().filter(|have| have.key() == need.key());
                for have in missing {
                    let range = have.range.start.max(need.range.start)..have.range.end.min(need.range.end);
                    if !range.is_empty() && !has(range.start) {
                        least += (range.len() * need.format.bytes()) as u64;
                    }
                }
            }
            assert_eq!((moved.moved, moved.least), (least, least), "rank {rank}, {from:?} to {to:?}");
            let needed: usize = needs[rank].iter().map(|need| need.range.len() * need.format.bytes()).sum();
            assert_eq!(moved.needed, needed as u64);
        }
    });
}

#[test]
fn a_state_is_taken_over_in_any_other_layout_and_no_byte_moves_that_is_there() {
    for (index, from) in LAYOUTS.into_iter().enumerate() {
        for to in [1, 2].map(|next| LAYOUTS[(index + next) % LAYOUTS.len()]) {
            takes_over(from, to, index % 3, if index % 2 == 0 { &[] } else { NARROW });
        }
    }
}

#[test]
fn a_worker_that_has_lost_its_part_is_an_error_of_those_that_need_it() {
    let (from, to) = (LAYOUTS[1], LAYOUTS[0]);
    let arch = architecture(&recipe(to, &[]));
    let (parts, needs) =
        (parts(&recipe(from, &[]), &arch, from).unwrap(), parts(&recipe(to, &[]), &arch, to).unwrap());
    let network = LocalNetwork::new(LocalOptions::default());
    let formation = FormationId::new(JobId::new(1, 0), G1.next());
    let (empty, own): (Arc<ReplicaStore>, Arc<ReplicaStore>) = Default::default();
    own.put(G1, (G1, STEP, 0), part(&parts[0]), []);
    let recovered = |store: &Arc<ReplicaStore>| Recovered {
        generation: G1,
        step: STEP,
        holders: vec![0, 1, 1],
        axes: Some(from),
        world: 1,
        store: store.clone(),
    };
    std::thread::scope(|scope| {
        let (rank, bringer) = (network.join(0), network.join(1));
        let (its, at_rank) = (recovered(&empty), rank.clone());
        scope.spawn(move || {
            let error = bring(&its, &bringer, formation).unwrap_err();
            assert!(error.to_string().contains("is not in memory here"), "{error}");
            // As a process does whose network closes.
            at_rank.abort("rank 1 has left");
        });
        let wanted = Wanted { needs: needs[0].clone(), parts };
        let error = rearrange(&recovered(&own), &rank, formation, &wanted).err().unwrap();
        assert!(error.to_string().contains("rank 1 has left"), "{error}");
    });
}
