//! A plan in the text form: refused, or read, written and read again as the same, and proved or not.
#![no_main]

use contraflow_fuzz as _;
use contraflow_runtime::schedule::{PlanReport, text};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    if let Ok(plan) = text::parse(input) {
        assert!(text::parse(&text::write(&plan)).is_ok_and(|again| again == plan));
        drop(PlanReport::new(&plan, None));
    }
});
