//! The manifest of a checkpoint: refused, or shards with plain names, each once.
#![no_main]

use contraflow_fuzz as _;
use contraflow_runtime::checkpoint::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes) {
        assert!(!manifest.shards.is_empty());
        for shard in &manifest.shards {
            assert!(!shard.file.contains('/') && shard.file != "..");
        }
        let again = serde_json::to_vec(&manifest).expect("a manifest is texts and numbers");
        assert!(Manifest::parse(&again).is_ok());
    }
});
