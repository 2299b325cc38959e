//! Parity with independent implementations: every fixture directory holds a model and what another implementation
//! computes with it (tests/fixtures/parity, and `$CONTRAFLOW_PARITY_DIR`).
//!
//! The model runs as a rank runs it: plan, program, lanes, optimizer. Each check takes the values it knows out of a
//! fixture, whichever there are, and compares them; a fixture may hold more, which is then reported.
#![allow(clippy::unwrap_used, missing_docs)]

mod documents;
mod evaluation;
mod findings;
mod fixture;
mod forward;
mod generation;
mod gradients;
mod mtp;
mod one_rank;
mod optimizer;
mod tied;
mod weights;

use findings::Findings;
use fixture::Fixture;

/// First segment of the values' names that some check here looks at.
const KNOWN: [&str; 13] = [
    "input_ids",
    "logits",
    "loss",
    "hidden",
    "final_norm",
    "mla",
    "moe",
    "rope",
    "softmax_scale",
    "grad",
    "gen",
    "mtp",
    "balance",
];

/// Runs one check over every fixture before it fails for any of them.
fn over_all(check: impl Fn(&Fixture, &mut Findings)) {
    let mut findings = Findings::default();
    for fixture in fixture::all() {
        findings.begin(&fixture.name());
        check(&fixture, &mut findings);
    }
    findings.finish();
}

#[test]
fn parity_fixtures_are_there_and_what_they_hold_is_known() {
    over_all(|fixture, findings| {
        findings.check(!fixture.values.is_empty(), || "no value to compare with".into());
        for key in fixture.values.keys() {
            if !KNOWN.contains(&key.split('.').next().unwrap()) {
                findings.unknown(key);
            }
        }
    });
}

#[test]
fn parity_of_both_spellings_of_the_configuration() {
    over_all(weights::spellings);
}

#[test]
fn parity_of_weights_read_and_written() {
    over_all(weights::round_trip);
}

#[test]
fn parity_of_the_forward_pass() {
    over_all(forward::check);
}

#[test]
fn parity_of_gradients() {
    over_all(gradients::of_the_main_loss);
}

#[test]
fn parity_of_a_tied_head_with_two_equal_tables() {
    over_all(tied::gradients_add_up);
}

#[test]
fn parity_of_the_balance_loss() {
    over_all(gradients::of_the_balance_loss);
}

#[test]
fn parity_of_multi_token_prediction() {
    over_all(mtp::forward);
}

#[test]
fn parity_of_gradients_with_multi_token_prediction() {
    over_all(mtp::gradients);
}

#[test]
fn parity_of_generation() {
    over_all(generation::check);
}

#[test]
fn parity_of_evaluation() {
    over_all(evaluation::check);
}

#[test]
fn parity_of_twenty_updates() {
    over_all(optimizer::check);
}

#[test]
fn parity_of_packed_documents_with_documents_alone() {
    over_all(documents::alone_and_packed);
}
