//! What every target has in common: an allocator that ends the process where more is asked for than any input here is worth.

use std::alloc::System;

use cap::Cap;

/// All memory of a target together. An input has at most some kilobytes, and what the fuzzer itself keeps does not count.
///
/// **Units**: bytes.
const LIMIT: usize = 64 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, LIMIT);
