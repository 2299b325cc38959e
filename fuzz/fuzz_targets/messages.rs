//! Messages of every service, as bytes: refused with a message, or within bounds, and then good for what is made of them.
//!
//! The first byte chooses the message, the rest is its bytes.
#![no_main]

use std::path::Path;

use contraflow_fuzz as _;
use contraflow_orchestrator::server::bounds;
use contraflow_proto::{Message as _, v1};
use contraflow_runtime::control::text::is_control;
use contraflow_runtime::control::wire::{decode_command, decode_event};
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use libfuzzer_sys::fuzz_target;
use v1::from_worker::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    match kind % 9 {
        0 | 1 => of_worker(bytes),
        2 | 3 => submission(bytes),
        4 => to_worker(bytes),
        5 => drop(v1::CancelRequest::decode(bytes).map(|request| bounds::cancel(&request))),
        6 => drop(v1::ListRequest::decode(bytes).map(|request| bounds::list_of(&request))),
        7 => drop(v1::DrainRequest::decode(bytes).map(|request| bounds::drain(&request))),
        _ => {
            drop(v1::GetRequest::decode(bytes).map(|request| bounds::get(&request)));
            drop(v1::RetryRequest::decode(bytes).map(|request| bounds::retry(&request)));
            drop(v1::WatchRequest::decode(bytes).map(|request| bounds::watch(&request)));
            drop(v1::LogsRequest::decode(bytes).map(|request| bounds::logs(&request)));
        }
    }
});

/// What is within bounds stays as it is, and its lines are fit to be shown.
fn of_worker(bytes: &[u8]) {
    let Ok(mut message) = v1::FromWorker::decode(bytes) else { return };
    if bounds::from_worker(&mut message).is_err() {
        return;
    }
    let mut again = message.clone();
    assert_eq!(bounds::from_worker(&mut again), Ok(()));
    assert_eq!(again.encode_to_vec(), message.encode_to_vec());
    match message.message {
        Some(Message::Event(event)) => drop(decode_event(event)),
        Some(Message::Logs(logs)) => {
            assert!(!logs.lines.iter().any(|line| line.message.contains(is_control)))
        }
        _ => {}
    }
}

/// What is taken comes back from its text, as the event log keeps it.
fn submission(bytes: &[u8]) {
    let Ok(request) = v1::SubmitRequest::decode(bytes) else { return };
    if bounds::submit(&request).is_err() {
        return;
    }
    let v1::SubmitRequest { recipe, overrides, model_config, name, .. } = request;
    let model = ModelConfig::from_hf_json(&model_config).ok();
    let Ok(recipe) = Recipe::submitted(&recipe, &name, &overrides, model) else { return };
    if bounds::recipe(&recipe).is_ok() {
        let model = Some(recipe.model_config.clone());
        let again = Recipe::submitted(&recipe.resolved_toml(), &name, &[], model);
        assert!(again.is_ok_and(|again| again == recipe));
    }
}

fn to_worker(bytes: &[u8]) {
    let Ok(message) = v1::ToWorker::decode(bytes) else { return };
    if let Some(v1::to_worker::Message::Command(command)) = message.message {
        drop(decode_command(command, Path::new("/nowhere")));
    }
}
