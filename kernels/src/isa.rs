//! Which vector extensions the kernels find on this machine: what their choice of code, and so the bits of a sum, depends
//! on.

/// The extensions as text, for instance `x86_64 avx2 fma avx512f avx512bf16`.
pub fn instruction_set() -> String {
    let mut words = vec![std::env::consts::ARCH];
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx", std::arch::is_x86_feature_detected!("avx")),
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ];
        words.extend(found.iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name));
    }
    words.join(" ")
}
