//! Threads: how an operation shares its work among the pool it is called from.
//!
//! A rank's compute lane runs its operations inside [`Threads::run`]; everywhere else the same operations run
//! serially. The cut depends on sizes and on the number of threads alone, never on who is idle, so results repeat
//! bit for bit.

use std::ops::Range;

use rayon::prelude::*;

/// Fewer values than this are not worth a second thread.
pub(crate) const MIN_PARALLEL: usize = 1 << 14;

/// The threads that one rank computes with.
pub struct Threads {
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// `num_threads` threads; one means the caller's own.
    ///
    /// **Errors**: panics if `num_threads` is 0 or the system refuses the threads.
    pub fn new(num_threads: usize) -> Threads {
        assert!(num_threads > 0, "expected at least 1 thread per rank, got 0");
        if num_threads == 1 {
            return Threads { pool: None };
        }
        let name = |index| format!("compute-{index}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).thread_name(name).build();
        Threads {
            pool: Some(pool.unwrap_or_else(|error| panic!("expected {num_threads} threads, got: {error}"))),
        }
    }

    /// Runs `work` so that the operations in it use these threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// Threads that an operation called here may use: those of the pool, or 1 outside of one.
pub(crate) fn num_threads() -> usize {
    if rayon::current_thread_index().is_some() { rayon::current_num_threads() } else { 1 }
}

/// Cuts `0..num_rows` into one range per thread, fewer if that would leave less than `min_rows` in each.
pub(crate) fn partition(num_rows: usize, min_rows: usize) -> Vec<Range<usize>> {
    let num_parts = (num_rows / min_rows.max(1)).clamp(1, num_threads());
    (0..num_parts).map(|part| part * num_rows / num_parts..(part + 1) * num_rows / num_parts).collect()
}

/// Cuts a matrix with rows of `width` values into the parts that adjoining ranges of rows, from row 0 on, stand for.
///
/// **Errors**: panics if the ranges go beyond the matrix.
pub(crate) fn split<'a, T>(mut data: &'a mut [T], width: usize, ranges: &[Range<usize>]) -> Vec<&'a mut [T]> {
    let part =
        |rows: &Range<usize>| data.split_off_mut(..rows.len() * width).expect("the ranges lie in the matrix");
    ranges.iter().map(part).collect()
}

/// Does every task, on all threads. Tasks must not depend on each other.
pub(crate) fn for_each<T: Send>(tasks: Vec<T>, work: impl Fn(T) + Send + Sync) {
    if tasks.len() == 1 || num_threads() == 1 {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().with_max_len(1).for_each(work);
    }
}

/// Works on each part of a matrix with rows of `width` values, cut by [`partition`], given the part's rows.
pub(crate) fn for_each_chunk<T: Send>(
    data: &mut [T],
    width: usize,
    min_rows: usize,
    work: impl Fn(Range<usize>, &mut [T]) + Send + Sync,
) {
    let ranges = partition(data.len() / width.max(1), min_rows);
    let parts = split(data, width, &ranges);
    for_each(ranges.into_iter().zip(parts).collect(), |(rows, part)| work(rows, part));
}

#[cfg(test)]
mod tests;
