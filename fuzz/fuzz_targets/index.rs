//! The index of an HF directory, the file with its checksums, and the journal of one that is being written.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::hf::check::parse_checksums;
use contraflow_workers::hf::header::parse_index;
use contraflow_workers::hf::unfinished::parse_journal;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(files) = parse_index(text) {
        assert!(files.keys().all(|file| !file.contains('/') && file != ".."));
    }
    drop(parse_checksums(text));
    if let Ok(parsed) = parse_journal(text.as_bytes()) {
        assert!(parsed.whole <= text.len() && (parsed.becomes.is_some() || parsed.done.is_empty()));
    }
});
