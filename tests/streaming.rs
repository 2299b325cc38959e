//! A model is written strip by strip: in a process of its own, whose peak of memory is the export's alone.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::model_config::builtin;
use contraflow_workers::hf::check::check;
use contraflow_workers::hf::export::{Export, ExportFormat, Written};
use contraflow_workers::hf::header::header_text;
use contraflow_workers::hf::unfinished::Journal;
use contraflow_workers::hf::weights::SINGLE_FILE;
use safetensors::Dtype;

/// Largest resident memory of this process so far.
///
/// **Units**: bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

/// A model of 320 MB whose two tables have 134 MB each, all zero: a file with a header and a hole.
fn zeros(dir: &Path) -> ModelConfig {
    let tiny = builtin::model("tiny").unwrap();
    let config = ModelConfig {
        vocab_size: 1 << 16,
        hidden_size: 512,
        moe_intermediate_size: 256,
        intermediate_size: 4096,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        n_routed_experts: 8,
        n_group: 1,
        topk_group: 1,
        num_nextn_predict_layers: 0,
        ..tiny
    };
    std::fs::write(dir.join("config.json"), config.to_hf_json()).unwrap();
    let weights = config.weights();
    assert_eq!(4 * weights[0].num_elements(), 128 << 20);
    let listed = weights.iter().map(|weight| (weight.name.as_str(), Dtype::F32, &weight.shape[..]));
    let (header, bytes) = header_text(listed);
    let mut file = File::create(dir.join(SINGLE_FILE)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    config
}

#[test]
fn an_export_has_a_strip_of_a_tensor_in_memory() {
    let from = tempfile::tempdir().unwrap();
    let config = zeros(from.path());
    let before = peak_bytes();
    let mut source = from.path().to_owned();
    let mut written = Vec::new();
    let steps = [ExportFormat::Fp8, ExportFormat::Fp8, ExportFormat::Bf16, ExportFormat::F32];
    let folders = steps.map(|_| tempfile::tempdir().unwrap());
    for (format, to) in steps.into_iter().zip(&folders) {
        let checked = check(&source).unwrap_or_else(|faults| panic!("{faults:?}"));
        let export = Export {
            source: &checked.weights,
            config: &config,
            config_json: config.to_hf_json(),
            companions: &source,
            format,
            shard_bytes: 100 << 20,
        };
        let Written { bytes, num_shards, .. } = export.write(to.path(), &mut Journal::default()).unwrap();
        assert!(num_shards > 1, "{format:?}: {num_shards}");
        written.push(bytes);
        source = to.path().to_owned();
    }
    let grown = peak_bytes() - before;
    assert!(written[0] == written[1] && written[3] > 300 << 20, "{written:?}");
    assert!(grown < 16 << 20, "{written:?} bytes of weights took {grown} bytes of memory");
}
