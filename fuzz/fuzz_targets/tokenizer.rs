//! A tokenizer.json: refused, or every id it gives is below its limit.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::data::hf_tokenizer::HfTokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    drop(HfTokenizer::from_json(bytes, ""));
});
