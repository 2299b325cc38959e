//! The folder and the manifest, without ranks.

use std::path::Path;

use super::*;
use crate::files::bytes_below;
use crate::recipe::{Recipe, RecipeSource};
use crate::topology::Generation;

fn shard(dir: &Path, rank: usize, bytes: &[u8]) -> ShardFile {
    let file = format!("rank-{rank:05}.safetensors");
    std::fs::write(dir.join(&file), bytes).unwrap();
    ShardFile::of(&file, bytes)
}

fn manifest(step: u64, shards: Vec<ShardFile>) -> Manifest {
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
    Manifest {
        format_version: manifest::FORMAT_VERSION,
        generation: Generation::default(),
        position: Position { step, cursor: 16 * step, tokens: 4096 * step },
        watch: Default::default(),
        recipe: recipe.resolved_toml(),
        model: serde_json::from_str(&recipe.model_config.to_hf_json()).unwrap(),
        corpus_hash: "0".repeat(64),
        made_by: MadeBy { layout: Layout::of(&recipe), binary: "b".into(), instruction_set: "i".into() },
        shards,
        companions: Vec::new(),
    }
}

fn commit(folder: &CheckpointFolder, step: u64, keep: usize) -> Manifest {
    let part = folder.unfinished(step);
    std::fs::create_dir_all(&part).unwrap();
    let shards = vec![shard(&part, 0, b"first"), shard(&part, 1, b"second")];
    let manifest = Manifest { generation: folder.generation(), ..manifest(step, shards) };
    folder.commit(&manifest, &[("config.json", b"{}".to_vec())].into(), keep).unwrap();
    Manifest { companions: vec![ShardFile::of("config.json", b"{}")], ..manifest }
}

#[test]
fn what_is_committed_is_listed_read_back_and_the_oldest_dropped() {
    let run = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder::of_run(run.path());
    assert_eq!(folder.list().unwrap(), [0_u64; 0]);
    let written: Vec<Manifest> = [5, 10, 100].into_iter().map(|step| commit(&folder, step, 2)).collect();
    assert_eq!(folder.list().unwrap(), [10, 100]);
    let read = Manifest::read(&folder.committed(100)).unwrap();
    assert_eq!(read, written[2]);
    assert_eq!(std::fs::read(folder.committed(100).join("config.json")).unwrap(), b"{}");
    assert!(read.shards.iter().all(|shard| shard.verify(&folder.committed(100)).is_ok()));
    std::fs::create_dir(folder.unfinished(200)).unwrap();
    assert_eq!(folder.list().unwrap(), [10, 100], "an unfinished one does not count");
    let reported = Manifest::read(&folder.unfinished(200)).unwrap_err()[0].to_string();
    assert!(reported.contains("step-00000200.part: expected a committed checkpoint"), "{reported}");
    folder.tidy(1, None).unwrap();
    assert!(!folder.unfinished(200).exists());
    assert_eq!(folder.list().unwrap(), [100]);
}

#[test]
fn every_damaged_shard_is_named_at_once() {
    let run = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder::of_run(run.path());
    commit(&folder, 3, 1);
    let dir = folder.committed(3);
    std::fs::remove_file(dir.join("rank-00000.safetensors")).unwrap();
    std::fs::write(dir.join("rank-00001.safetensors"), b"seco").unwrap();
    let reported: Vec<String> = Manifest::read(&dir).unwrap_err().iter().map(ToString::to_string).collect();
    assert!(reported[0].contains("rank-00000.safetensors: No such file"), "{reported:?}");
    assert!(reported[1].contains("rank-00001.safetensors: expected 6 bytes, got 4"), "{reported:?}");
    // As long as before, but with one bit turned: only the checksum sees it.
    std::fs::write(dir.join("rank-00000.safetensors"), b"first").unwrap();
    std::fs::write(dir.join("rank-00001.safetensors"), b"secone").unwrap();
    let manifest = Manifest::read(&dir).unwrap();
    assert!(manifest.shards[0].verify(&dir).is_ok());
    let reported = manifest.shards[1].verify(&dir).unwrap_err().to_string();
    assert!(reported.contains("rank-00001.safetensors: expected blake3"), "{reported}");
}

#[test]
fn a_checkpoint_is_committed_with_all_its_shards_or_not_at_all() {
    let run = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder::of_run(run.path()).in_generation(Generation::new(2));
    let part = folder.make_unfinished(10).unwrap();
    let shards: Vec<ShardFile> = (0..3).map(|rank| shard(&part, rank, b"state")).collect();
    let manifest = manifest(10, shards);
    let commit = || folder.commit(&manifest, &Companions::default(), 1);
    // The formation that comes next makes the folder ready; one rank of those before it still writes its part.
    folder.tidy(1, None).unwrap();
    shard(&folder.make_unfinished(10).unwrap(), 1, b"state");
    let reported = commit().unwrap_err().to_string();
    assert!(reported.contains("rank-00000.safetensors: No such file"), "{reported}");
    for (rank, bytes) in [(0, &b"state"[..]), (2, b"sta")] {
        shard(&part, rank, bytes);
    }
    let reported = commit().unwrap_err().to_string();
    assert!(reported.contains("rank-00002.safetensors: expected 5 bytes, got 3"), "{reported}");
    assert_eq!(folder.list().unwrap(), [0_u64; 0]);
    shard(&part, 2, b"state");
    commit().unwrap();
    assert_eq!(folder.list().unwrap(), [10]);
}

#[test]
fn a_manifest_of_a_newer_format_or_with_foreign_paths_is_refused() {
    let whole = serde_json::to_value(manifest(1, vec![ShardFile::default()])).unwrap();
    let reported = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = whole.clone();
        change(&mut changed);
        Manifest::parse(changed.to_string().as_bytes()).unwrap_err().to_string()
    };
    let newer = reported(&|manifest| {
        manifest["format_version"] = 7.into();
        manifest["something new"] = true.into();
    });
    assert!(newer.contains("expected format version 2 or earlier, got 7"), "{newer}");
    for name in ["", "../other/file", "/etc/passwd", "a/b", ".."] {
        let reported = reported(&|manifest| manifest["shards"][0]["file"] = name.into());
        assert!(reported.contains("a plain file name for each file"), "{name}: {reported}");
    }
    assert!(reported(&|manifest| manifest["shards"] = serde_json::json!([])).contains("at least one shard"));
    assert!(reported(&|manifest| manifest["position"] = 4.into()).contains("a damaged file"));
    assert!(Manifest::parse(b"{").unwrap_err().to_string().contains("a damaged file"));
}

#[test]
fn what_another_formation_has_committed_stands_and_nothing_is_left_in_the_way() {
    let run = tempfile::tempdir().unwrap();
    let before = CheckpointFolder::of_run(run.path()).in_generation(Generation::new(1));
    let after = before.clone().in_generation(Generation::new(2));
    let written = commit(&before, 5, 2);
    assert_ne!(before.unfinished(5), after.unfinished(5));
    // The formation that took its place makes the same step once more.
    commit(&after, 5, 2);
    assert_eq!(Manifest::read(&after.committed(5)).unwrap(), written);
    assert!(!after.unfinished(5).exists());
    // A process was killed while it dropped a checkpoint.
    let left = run.path().join("checkpoints/step-00000005.dropped.part");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("rank-00000.safetensors"), b"left").unwrap();
    commit(&after, 6, 2);
    commit(&after, 7, 2);
    assert_eq!(after.list().unwrap(), [6, 7]);
    assert!(!left.exists());
}

#[test]
fn a_rollback_leaves_no_checkpoint_of_the_abandoned_history() {
    let run = tempfile::tempdir().unwrap();
    let before = CheckpointFolder::of_run(run.path()).in_generation(Generation::new(1));
    [4, 8, 12].into_iter().for_each(|step| drop(commit(&before, step, 3)));
    std::fs::create_dir(before.unfinished(16)).unwrap();
    let after = before.clone().in_generation(Generation::new(2));
    after.tidy(1, Some(8)).unwrap();
    assert_eq!(after.list().unwrap(), [8]);
    // A process that stood still meanwhile takes nothing of it away.
    commit(&after, 12, 3);
    before.tidy(3, Some(4)).unwrap();
    assert_eq!(after.list().unwrap(), [8, 12]);
    // A process that was about to commit is too late.
    assert!(!before.unfinished(16).exists());
}

#[test]
fn the_checkpoint_that_a_job_would_resume_from_is_retained_however_many_are_newer() {
    let run = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder::of_run(run.path())
        .in_generation(Generation::new(1))
        .pinning(Pinned { newest: 4, earlier: 2 });
    [2, 4, 6, 8, 10].into_iter().for_each(|step| drop(commit(&folder, step, 2)));
    // With the one before it, should it be damaged.
    assert_eq!(folder.list().unwrap(), [2, 4, 6, 8, 10]);
    folder.clone().in_generation(Generation::new(2)).tidy(2, None).unwrap();
    assert_eq!(folder.list().unwrap(), [2, 4, 6, 8, 10]);
    // By now a later one is known to be committed; of the commit of step 8 nobody has heard.
    commit(&folder.clone().pinning(Pinned { newest: 10, earlier: 6 }), 12, 2);
    assert_eq!(folder.list().unwrap(), [6, 8, 10, 12]);
    // Later words of an earlier checkpoint take nothing back.
    commit(
        &folder.clone().pinning(Pinned { newest: 12, earlier: 10 }).pinning(Pinned { newest: 4, earlier: 2 }),
        14,
        1,
    );
    assert_eq!(folder.list().unwrap(), [10, 12, 14]);
}

#[test]
fn a_commit_removes_what_was_not_finished_before_it_and_nothing_that_may_still_be_written() {
    let run = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder::of_run(run.path());
    let of = |generation| folder.clone().in_generation(Generation::new(generation));
    let left = |parts: &[(u32, u64)]| {
        let is_there = |(generation, step): &&(u32, u64)| of(*generation).unfinished(*step).exists();
        parts.iter().filter(is_there).copied().collect::<Vec<_>>()
    };
    let parts = [(1, 4), (2, 8), (2, 16), (3, 8)];
    for (generation, step) in parts {
        std::fs::create_dir_all(of(generation).unfinished(step)).unwrap();
        std::fs::write(of(generation).unfinished(step).join("shard"), "some").unwrap();
    }
    commit(&of(2), 12, 2);
    // The next step of this formation, and all of a later one.
    assert_eq!(left(&parts), [(2, 16), (3, 8)]);
    of(2).drop_all_unfinished().unwrap();
    assert_eq!(left(&parts), [(3, 8)]);
    assert_eq!(folder.list().unwrap(), [12]);
    CheckpointFolder::of_run(&run.path().join("none")).drop_all_unfinished().unwrap();
}

/// The folder of a job in a storage of its own, with a quota of so many checkpoints as [`commit`] makes them, and some.
fn of_job_within(storage: &Path, checkpoints: u64) -> CheckpointFolder {
    let job = crate::topology::JobId::new(7, 1);
    let job = JobFolder::claim(&Storage::open(storage).unwrap(), Owner { state: 1, job }).unwrap();
    let folder = CheckpointFolder::of_job(&job);
    let unlimited = folder.clone();
    unlimited.make_unfinished(1).unwrap();
    commit(&unlimited, 1, 1);
    let (one, all) = (bytes_below(&folder.committed(1)).unwrap(), bytes_below(job.path()).unwrap());
    folder.within(Some(all - one + checkpoints * one + one / 2))
}

#[test]
fn a_quota_drops_the_oldest_checkpoints_that_nobody_needs() {
    let storage = tempfile::tempdir().unwrap();
    // Three, and the next two.
    let folder = of_job_within(storage.path(), 5);
    for step in 2..=6 {
        commit(&folder.clone().pinning(Pinned { newest: step - 1, earlier: 0 }), step, 20);
        assert!(folder.make_unfinished(step + 1).is_ok());
        std::fs::remove_dir_all(folder.unfinished(step + 1)).unwrap();
    }
    assert_eq!(folder.list().unwrap(), [4, 5, 6]);
    // Those that the orchestrator may go back to stay, whatever they take.
    for step in [7, 8] {
        commit(&folder.clone().pinning(Pinned { newest: 5, earlier: 4 }), step, 20);
    }
    assert_eq!(folder.list().unwrap(), [4, 5, 6, 7, 8]);
    let refused = folder.make_unfinished(9).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Storage);
    assert!(refused.message.contains("within the job's quota of"), "{refused}");
    assert!(!folder.unfinished(9).exists());
    // Another rank has begun: it is in time, or none is.
    std::fs::create_dir(folder.unfinished(9)).unwrap();
    assert!(folder.make_unfinished(9).is_ok());
}

#[test]
fn without_a_quota_as_many_stay_as_are_to_be_kept() {
    let storage = tempfile::tempdir().unwrap();
    let folder = of_job_within(storage.path(), 4).within(None);
    (2..=9).for_each(|step| {
        drop(commit(&folder.clone().pinning(Pinned { newest: step - 1, earlier: 0 }), step, 20))
    });
    assert_eq!(folder.list().unwrap().len(), 9);
}
