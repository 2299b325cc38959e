//! SIGKILL at every named place of an export: what has its name is whole, and the same command makes the rest of it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;

use crate::deadline;
use crate::place::{Place, text};

const SIGKILL: i32 = 9;

/// Every failpoint on the way of an export, and how many shards are kept; `None` for all.
const FAILPOINTS: [(&str, Option<usize>); 6] = [
    ("export.shard-written=2*off->return", Some(2)),
    ("export.shard-synced=2*off->return", Some(2)),
    ("export.shard-named=2*off->return", Some(2)),
    ("export.shard-noted=2*off->return", Some(3)),
    ("export.texts-written=return", None),
    ("export.whole=return", None),
];

const FP8: [&str; 4] = ["--dtype", "fp8", "--shard-size", "150KB"];

/// A model whose export in FP8 has several files.
fn model(place: &Place) {
    let keys = json!({"hidden_size": 136, "intermediate_size": 140, "moe_intermediate_size": 40});
    place.model("from", keys, |name, at| ((at * 7 + name.len()) % 251) as f32 / 1000.0 - 0.1);
}

fn killed(place: &Place, args: &[&str], failpoints: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
    let output =
        deadline::output(command.args(args).env("FAILPOINTS", failpoints).current_dir(place.path("")));
    assert_eq!(output.status.signal(), Some(SIGKILL), "{failpoints}: {}", text(&output.stderr));
}

/// Bytes and inode of every file.
fn files(dir: &Path) -> BTreeMap<String, (Vec<u8>, u64)> {
    let entries = dir.read_dir().unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.path().is_file()).map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        (name, (std::fs::read(entry.path()).unwrap(), entry.metadata().unwrap().ino()))
    });
    files.collect()
}

fn bytes(files: &BTreeMap<String, (Vec<u8>, u64)>) -> BTreeMap<&str, &[u8]> {
    files.iter().map(|(name, (bytes, _))| (name.as_str(), bytes.as_slice())).collect()
}

fn is_shard(name: &str) -> bool {
    name.starts_with("model-") && name.ends_with(".safetensors")
}

/// A command that goes on: every file comes out as if nothing had happened, and those that were done are the same files.
fn goes_on(
    place: &Place,
    args: &[&str],
    (part, to): (&str, &str),
    kept: Option<usize>,
    whole: &Path,
) -> Output {
    let before = files(&place.path(part));
    let output = place.run(args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (after, expected) = (files(&place.path(to)), files(whole));
    assert!(bytes(&after) == bytes(&expected), "{:?} {:?}", after.keys(), expected.keys());
    let all = expected.keys().filter(|name| is_shard(name)).count();
    let kept = kept.unwrap_or(all);
    let same = before.iter().filter(|(name, (_, inode))| is_shard(name) && after[*name].1 == *inode);
    assert_eq!(same.count(), kept);
    let note =
        format!("note: {kept} of {all} weight files had been made before this was stopped, and are kept");
    assert_eq!(text(&output.stderr).contains(&note), kept > 0, "{}", text(&output.stderr));
    assert!(!place.path(part).exists());
    output
}

#[test]
fn an_export_that_is_killed_anywhere_is_taken_up_and_ends_with_the_same_files() {
    let place = Place::new();
    model(&place);
    place.done(&[&["export", "from", "--to", "whole"][..], &FP8].concat());
    let whole = files(&place.path("whole"));
    assert!(whole.keys().filter(|name| is_shard(name)).count() > 3);
    for (failpoints, kept) in FAILPOINTS {
        let args = [&["export", "from", "--to", "to"][..], &FP8].concat();
        killed(&place, &args, failpoints);
        assert!(!place.path("to").exists());
        let left = files(&place.path("to.part"));
        for (name, (bytes, _)) in left.iter().filter(|(name, _)| is_shard(name)) {
            assert!(*bytes == whole[name].0, "{failpoints}: {name} has its name and is not whole");
        }
        goes_on(&place, &args, ("to.part", "to"), kept, &place.path("whole"));
        std::fs::remove_dir_all(place.path("to")).unwrap();
    }
    let args = [&["export", "from", "--to", "to"][..], &FP8].concat();
    killed(&place, &args, "export.named=return");
    assert!(place.refused(&args).contains("--to: to: expected a new or an empty folder"));
    place.done(&["import", "to"]);
}

#[test]
fn what_is_taken_up_is_checked_and_has_to_become_the_same() {
    let place = Place::new();
    model(&place);
    place.done(&[&["export", "from", "--to", "whole"][..], &FP8].concat());
    let args = [&["export", "from", "--to", "to"][..], &FP8].concat();
    killed(&place, &args, "export.shard-noted=2*off->return");
    let another = "to.part/.journal: expected the beginning of the same model, got that of another one";
    for change in [["--dtype", "bf16", "--shard-size", "150KB"], ["--dtype", "fp8", "--shard-size", "100KB"]]
    {
        let stderr = place.refused(&[&["export", "from", "--to", "to"][..], &change].concat());
        assert!(stderr.contains(another), "{stderr}");
    }
    // A model that has other files by now, of the same names and sizes.
    let file = place.path("from/model.safetensors");
    let time = file.metadata().unwrap().modified().unwrap();
    let stamp = |time| std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    stamp(time + std::time::Duration::from_nanos(1_000));
    assert!(place.refused(&args).contains(another));
    stamp(time);
    // A file that was damaged meanwhile is made again.
    let whole = files(&place.path("whole"));
    let second = whole.keys().filter(|name| is_shard(name)).nth(1).unwrap();
    let shard = place.path("to.part").join(second);
    let mut damaged = std::fs::read(&shard).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, damaged).unwrap();
    goes_on(&place, &args, ("to.part", "to"), Some(2), &place.path("whole"));
}

#[test]
fn an_import_that_is_killed_is_taken_up() {
    let place = Place::new();
    model(&place);
    place.done(&[&["export", "from", "--to", "fp8"][..], &FP8].concat());
    place.done(&["import", "fp8", "--name", "whole", "--dtype", "bf16"]);
    let args = ["import", "fp8", "--name", "half", "--dtype", "bf16"];
    killed(&place, &args, "export.texts-written=return");
    assert!(!place.path("runs/half").exists());
    let output = place.run(&args);
    assert!(
        text(&output.stderr).contains("note: 1 of 1 weight file had been made"),
        "{}",
        text(&output.stderr)
    );
    let model = |run: &str| files(&place.path("runs").join(run).join("model"));
    assert!(bytes(&model("half")) == bytes(&model("whole")));
    let runs = place.path("runs").read_dir().unwrap().map(|entry| entry.unwrap().file_name());
    let mut runs: Vec<_> = runs.map(|name| name.into_string().unwrap()).collect();
    runs.sort();
    assert_eq!(runs, ["half", "latest", "whole"]);
    assert_eq!(place.path("runs/half").read_dir().unwrap().count(), 1);
}
