//! Tokens per routed expert, layer by layer: read off a routing and summed.
//!
//! Plain numbers on the host, for the totals of a step, the balance rule and checkpoints. Knows no gate and no rank.

use std::collections::BTreeMap;

use contraflow_kernels::gate::{self, Routing};
use contraflow_kernels::host::HostValues;

/// Adds the choices of some tokens to the counts of their layer.
pub fn count(sums: &mut BTreeMap<usize, Vec<u64>>, layer: usize, routing: &Routing) {
    let counts = gate::counts(routing);
    let counts: &[u32] = counts.values();
    let sums = sums.entry(layer).or_insert_with(|| vec![0; counts.len()]);
    sums.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += u64::from(count));
}

/// Adds counts to those of the same layers.
pub fn add(sums: &mut BTreeMap<usize, Vec<u64>>, counts: &BTreeMap<usize, Vec<u64>>) {
    for (&layer, counts) in counts {
        let sums = sums.entry(layer).or_insert_with(|| vec![0; counts.len()]);
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}
