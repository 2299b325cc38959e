//! A model is written tensor by tensor: in a process of its own, whose peak of memory is the export's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::model_config::builtin;
use contraflow_workers::hf::check::check;
use contraflow_workers::hf::export::{Export, ExportFormat, Written};
use contraflow_workers::hf::weights::{SINGLE_FILE, header_text};
use safetensors::Dtype;

/// Largest resident memory of this process so far.
///
/// **Units**: bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

/// A model of 226 MB whose largest tensor has one, all zero: a file with a header and a hole.
fn zeros(dir: &Path) -> ModelConfig {
    let tiny = builtin::model("tiny").unwrap();
    let config = ModelConfig {
        hidden_size: 512,
        moe_intermediate_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        n_routed_experts: 72,
        n_group: 1,
        topk_group: 1,
        num_nextn_predict_layers: 0,
        ..tiny
    };
    std::fs::write(dir.join("config.json"), config.to_hf_json()).unwrap();
    let weights = config.weights();
    assert!(weights.iter().all(|weight| 4 * weight.num_elements() <= 1 << 20));
    let listed = weights.iter().map(|weight| (weight.name.as_str(), Dtype::F32, &weight.shape[..]));
    let (header, bytes) = header_text(listed);
    let mut file = File::create(dir.join(SINGLE_FILE)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    config
}

#[test]
fn an_export_has_one_tensor_in_memory() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = zeros(from.path());
    let before = peak_bytes();
    let checked = check(from.path()).unwrap_or_else(|faults| panic!("{faults:?}"));
    let export = Export {
        source: &checked.weights,
        config: &config,
        config_json: config.to_hf_json(),
        companions: from.path(),
        format: ExportFormat::F32,
        shard_bytes: 100 << 20,
    };
    let Written { bytes, num_shards, .. } = export.write(to.path()).unwrap();
    let grown = peak_bytes() - before;
    assert!(bytes > 200 << 20 && num_shards > 1, "{bytes} {num_shards}");
    assert!(grown < 16 << 20, "{bytes} bytes of weights took {grown} bytes of memory");
}
