//! Ranks that are as if in processes of their own train to the same bits as ranks that share one.

use contraflow_runtime::fabric::Transport;

use crate::lab::{FOUR_RANKS, Finished, Lab, Layout, Setup, layout};

/// Losses and norms by step, as bits.
fn bits(finished: &Finished) -> Vec<[u64; 4]> {
    assert!(!finished.losses().is_empty());
    let numbers = finished.records.iter().map(|record| {
        [record.loss, record.mtp_loss.unwrap(), record.balance_loss, record.grad_norm].map(f64::to_bits)
    });
    numbers.collect()
}

fn assert_same_bits(layout: Layout, wires: &[Transport]) {
    let lab = Lab::new();
    let changes = ["training.steps=3"];
    let expected = bits(&lab.run(lab.setup(layout, &changes)));
    for &wire in wires {
        let finished = lab.run(Setup { wire: Some(wire), ..lab.setup(layout, &changes) });
        assert!(bits(&finished) == expected, "{layout:?} over {wire:?} differs");
        assert!(finished.frame_log.is_empty(), "frames went by the network in this process");
    }
}

#[test]
fn dualpipe_with_expert_parallelism_trains_to_the_same_bits_over_every_wire() {
    assert_same_bits(FOUR_RANKS, &[Transport::Tcp, Transport::Socket, Transport::SharedMemory]);
}

#[test]
fn all_axes_together_train_to_the_same_bits() {
    assert_same_bits(layout("dualpipe", (2, 2, 2)), &[Transport::Auto]);
}

#[test]
fn data_parallel_ranks_train_to_the_same_bits() {
    assert_same_bits(layout("1f1b", (2, 1, 2)), &[Transport::Socket]);
}
