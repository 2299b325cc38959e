//! A tokenizer.json: refused, or read. Panics of the library that reads it are refusals too; one that gets through to here
//! is a failure.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::data::hf_tokenizer::{EndOfDocument, HfTokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // The fuzzer's own hook would end the process at a panic that is caught.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |bytes: &[u8]| {
        drop(HfTokenizer::from_json(bytes, &EndOfDocument::named("", "the recipe")));
    }
);
