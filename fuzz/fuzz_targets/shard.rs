//! The header of a checkpoint's shard: refused, or every record lies in the file.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::checkpoint::parse_header;
use libfuzzer_sys::fuzz_target;

/// As if so many bytes of values followed.
const DATA: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    for (record, start) in parse_header(bytes, DATA).unwrap_or_default() {
        assert!(start + (record.range.len() * record.format.bytes()) as u64 <= DATA);
    }
});
