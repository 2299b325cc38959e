//! The index of a prepared folder: refused, or one that is written back the same.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::data::shards::ShardIndex;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = ShardIndex::parse(bytes) {
        let again = serde_json::to_vec(&index).expect("an index is texts and numbers");
        assert_eq!(ShardIndex::parse(&again).map(|index| index.hash()), Ok(index.hash()));
    }
});
