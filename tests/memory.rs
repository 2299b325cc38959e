//! A run does not grow: what a step takes it gives back. The only test of its process, whose memory is the run's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/measured_run.rs"]
mod measured_run;

use measured_run::run;

/// Resident memory of this process.
///
/// **Units**: bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kibibytes
}

/// Resident bytes after each step of the default recipe on short sequences, in some layout.
fn train(layout: &[&str], steps: usize) -> Vec<u64> {
    let mut changes: Vec<String> = layout.iter().map(|&change| change.to_owned()).collect();
    changes.push(format!("training.steps={steps}"));
    changes.push("training.sequence_length=32".into());
    run("tiny", &changes, resident_bytes).1
}

#[test]
fn memory_does_not_grow_over_the_steps() {
    let alone = ["parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"];
    // One rank does the same in every step but for the number of rows of an expert. Ranks that share the cores are now
    // and then all at their peak at once: their high water comes later and depends on chance.
    for (layout, early, late, bound) in [(&alone[..], 3, 12, 1.01), (&[][..], 12, 30, 1.05)] {
        let measured = train(layout, late);
        let growth = measured[late - 1] as f64 / measured[early - 1] as f64;
        assert!(growth < bound, "{growth} from step {early} to {late}, resident bytes by step: {measured:?}");
    }
}
