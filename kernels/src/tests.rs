//! Repeatable numbers for the tests beside the operations.

/// Numbers in [-1, 1), different for each seed.
pub(crate) fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mix = |i: u32| (i ^ seed << 20).wrapping_mul(0x9E37_79B1).rotate_left(15).wrapping_mul(0x85EB_CA77);
    (0..len as u32).map(|i| (mix(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
