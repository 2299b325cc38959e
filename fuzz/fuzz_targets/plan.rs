//! A plan in the text form: refused, or read, written and read again, and proved or not.
#![no_main]

use contraflow_fuzz as _;
use contraflow_runtime::schedule::{PlanReport, text};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    if let Ok(plan) = text::parse(input) {
        let written = text::write(&plan);
        // Not the plan itself: white space within its name is written as one blank.
        assert!(text::parse(&written).is_ok_and(|again| text::write(&again) == written));
        drop(PlanReport::new(&plan, None));
    }
});
