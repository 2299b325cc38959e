//! The index of an HF directory, and the file with its checksums.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::hf::check::parse_checksums;
use contraflow_workers::hf::header::parse_index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(files) = parse_index(text) {
        assert!(files.keys().all(|file| !file.contains('/') && file != ".."));
    }
    drop(parse_checksums(text));
});
