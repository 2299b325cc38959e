//! The pool: fixed partitions, every piece once.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[test]
fn a_pool_counts_inside_of_itself_only() {
    assert_eq!(num_threads(), 1);
    assert_eq!(Threads::new(3).run(num_threads), 3);
    assert_eq!(Threads::new(1).run(num_threads), 1);
}

#[test]
fn partitions_cover_every_row_once_in_fair_parts() {
    Threads::new(4).run(|| {
        for (num_rows, min_rows) in [(0, 1), (1, 1), (3, 1), (10, 1), (10, 4), (10, 11), (4001, 0)] {
            let ranges = partition(num_rows, min_rows);
            assert_eq!(
                ranges.iter().cloned().flatten().collect::<Vec<_>>(),
                (0..num_rows).collect::<Vec<_>>()
            );
            let lens = ranges.iter().map(|range| range.len());
            assert!(lens.clone().max().unwrap() - lens.clone().min().unwrap() <= 1);
            assert!(ranges.len() == 1 || lens.min().unwrap() >= min_rows);
        }
        assert_eq!(partition(4001, 0).len(), 4);
    });
    assert_eq!(partition(4001, 1).len(), 1);
}

#[test]
fn each_chunk_knows_its_rows() {
    for threads in [1, 3].map(Threads::new) {
        let mut data = vec![0.0; 35];
        threads.run(|| {
            for_each_chunk(&mut data, 5, 1, |rows, chunk| {
                rows.zip(chunk.chunks_mut(5)).for_each(|(row, values)| values.fill(row as f32));
            });
        });
        assert!(data.iter().enumerate().all(|(index, &value)| value == (index / 5) as f32));
    }
}

#[test]
fn every_task_is_done_once() {
    let sum = AtomicUsize::new(0);
    Threads::new(2).run(|| {
        for_each((1..=100).collect(), |task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
    });
    assert_eq!(sum.into_inner(), 5050);
}

#[test]
fn splitting_keeps_the_order() {
    let mut data = [1, 2, 3, 4, 5, 6];
    let parts = split(&mut data, 2, &[0..1, 1..1, 1..3]);
    assert_eq!(parts, [&[1, 2][..], &[], &[3, 4, 5, 6]]);
}
