//! This machine: how fast its matrix products are, and what the system grants this process.

use std::time::{Duration, Instant};

use contraflow_kernels::linear;
use contraflow_kernels::par::Threads;
use contraflow_kernels::tensor::Tensor;
use rustix::process::{Resource, Rlimit};

/// Lets this process have as many files open as it may; their number, where there is a limit.
pub fn raise_file_limit() -> Option<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// FLOP/s of a large f32 product on `num_threads` threads: what MFU is measured against.
pub fn measure_peak(num_threads: usize) -> f64 {
    const SIZE: usize = 1024;
    /// On a shared machine the best of many is the peak; more than these change little.
    const PRODUCTS: usize = 10;
    let threads = Threads::new(num_threads);
    let values: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 13) as f32).collect();
    let (dy, w) = (Tensor::from_vec(&[SIZE, SIZE], values.clone()), Tensor::from_vec(&[SIZE, SIZE], values));
    let mut best = Duration::MAX;
    for _ in 0..PRODUCTS {
        let started = Instant::now();
        threads.run(|| linear::backward_input(&dy, &w));
        best = best.min(started.elapsed());
    }
    2.0 * (SIZE as f64).powi(3) / best.as_secs_f64()
}
