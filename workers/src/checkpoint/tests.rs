//! Shards in files, without ranks.

use std::path::Path;

use contraflow_kernels::host::{HostValues, HostValuesMut};
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::checkpoint::{Layout, MANIFEST_FILE, MadeBy, Manifest, Position, ShardFile};
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::Generation;

use super::*;

fn values(len: usize) -> Tensor {
    Tensor::from_vec(&[len], (0..len).map(|value| value as f32).collect())
}

/// A tensor of 4 x 3 in two ranges, on two ranks, and counts on the second.
fn write(dir: &Path, ranges: [Range<usize>; 2]) -> Vec<ShardFile> {
    let mut shards = Vec::new();
    for (rank, range) in ranges.into_iter().enumerate() {
        let mut snapshot = Snapshot::default();
        snapshot.add(Kind::Weight, ("w", &[4, 3], range.clone()), (values(12), range));
        if rank == 1 {
            snapshot.add_counts("gate".into(), vec![7, u64::MAX]);
        }
        shards.push(write_shard(dir, &shard_name(rank), snapshot).unwrap());
    }
    shards
}

fn commit(dir: &Path, shards: Vec<ShardFile>) {
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
    let manifest = Manifest {
        format_version: 2,
        generation: Generation::default(),
        position: Position::default(),
        watch: Default::default(),
        recipe: String::new(),
        model: serde_json::json!({}),
        corpus_hash: String::new(),
        made_by: MadeBy {
            layout: Layout::of(&recipe),
            binary: String::new(),
            instruction_set: String::new(),
        },
        shards,
        companions: Vec::new(),
    };
    std::fs::write(dir.join(MANIFEST_FILE), serde_json::to_string(&manifest).unwrap()).unwrap();
}

fn reported(dir: &Path) -> String {
    Checkpoint::open(dir).err().expect("it should be refused").to_string()
}

#[test]
fn any_range_is_read_across_the_shards() {
    let dir = tempfile::tempdir().unwrap();
    commit(dir.path(), write(dir.path(), [0..5, 5..12]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.records.weights().collect::<Vec<_>>(), [("w", &[4, 3][..])]);
    for range in [0..12, 3..8, 5..6, 0..0, 11..12] {
        let mut out = Tensor::zeros(&[range.len()]);
        let all = out.view_mut(0..range.len());
        checkpoint.records.read(Kind::Weight, ("w", &[4, 3]), range.clone(), all).unwrap();
        assert_eq!(out.values::<f32>(), &values(12).values::<f32>()[range]);
    }
    assert_eq!(checkpoint.records.read_counts("gate", 2).unwrap(), [7, u64::MAX]);
    let mut one = Tensor::zeros(&[1]);
    let mut refused = |kind, shape: &[usize]| {
        let out = one.view_mut(0..1);
        checkpoint.records.read(kind, ("w", shape), 0..1, out).unwrap_err().to_string()
    };
    let other = refused(Kind::Weight, &[3, 4]);
    assert!(other.contains("w: expected shape [3, 4], got [4, 3]"), "{other}");
    let none = refused(Kind::ExpAvg, &[4, 3]);
    assert!(none.contains("has no ExpAvg of w"), "{none}");
    // Other programs can read it.
    let bytes = std::fs::read(dir.path().join(shard_name(0))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("weight/w").unwrap().shape(), [5]);
}

#[test]
fn ranges_that_do_not_make_up_the_tensor_are_refused() {
    for (ranges, expected) in [
        ([0..5, 6..12], "expected element 5 next, got 6..12"),
        ([0..5, 4..12], "expected element 5 next, got 4..12"),
        ([0..5, 5..11], "expected [4, 3], got 11 elements"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        commit(dir.path(), write(dir.path(), ranges));
        assert!(reported(dir.path()).contains(expected), "{}", reported(dir.path()));
    }
}

#[test]
fn one_turned_bit_anywhere_in_a_shard_is_seen_and_the_shard_named() {
    let dir = tempfile::tempdir().unwrap();
    commit(dir.path(), write(dir.path(), [0..5, 5..12]));
    let path = dir.path().join(shard_name(1));
    let whole = std::fs::read(&path).unwrap();
    for byte in 0..whole.len() {
        let mut turned = whole.clone();
        turned[byte] ^= 1 << (byte % 8);
        std::fs::write(&path, turned).unwrap();
        assert!(reported(dir.path()).contains("rank-00001.safetensors: expected blake3"), "byte {byte}");
    }
}

#[test]
fn a_snapshot_keeps_its_values_while_training_continues() {
    let dir = tempfile::tempdir().unwrap();
    let mut weight = values(12);
    let mut snapshot = Snapshot::default();
    snapshot.add(Kind::Weight, ("w", &[12], 0..12), (weight.clone(), 0..12));
    weight.values_mut().fill(-1.0_f32);
    let shard = write_shard(dir.path(), &shard_name(0), snapshot).unwrap();
    commit(dir.path(), vec![shard]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let numbers = checkpoint.records.read_numbers(Kind::Weight, "w", &[12]).unwrap();
    assert_eq!(numbers, values(12).values::<f32>());
}
