//! JSON lines: refused with the line, or as many texts as lines that are not blank.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::data::jsonl;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(texts) = jsonl::read(bytes, "text") {
        let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
        assert_eq!(texts.len(), lines.count());
    }
});
