//! A folder with texts and a model that trains in a second, and the binary at work in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use contraflow_runtime::model_config::ModelConfig;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::deadline;

/// A user's own config.json.
pub const MODEL: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
  "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
  "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
  "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
  "max_position_embeddings": 256, "num_nextn_predict_layers": 1, "initializer_range": 0.05, "hidden_act": "silu"
}"#;

/// How every run here is cut.
pub const TRAINING: [&str; 9] = [
    "--data",
    "text.txt",
    "--set",
    "training.sequence_length=32",
    "--set",
    "training.validation_sequences=1000000",
    "--set",
    "lr.warmup_steps=5",
    "--set=training.micro_batch_size=1",
];

/// The working directory of a test.
pub struct Place {
    dir: tempfile::TempDir,
}

/// The directories of the parity fixtures, each a model in the published form.
pub fn fixtures() -> Vec<PathBuf> {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity");
    ["noqlora_flat", "qlora_grouped", "yarn_mtp", "v2_lite", "v2_grouped", "moonlight", "kimi_k2", "tied"]
        .map(|name| parity.join(name))
        .to_vec()
}

pub fn text(bytes: impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(bytes.as_ref()).into_owned()
}

impl Place {
    /// With a model, a text, and the last tenth of it as far as it fills sequences, which is what a run validates on: behind
    /// the last one only the end of the document would be predicted.
    pub fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.json"), MODEL).unwrap();
        let line = |number: usize| {
            format!("the {} quick brown foxes jump over {} lazy dogs\n", number % 7, number % 5)
        };
        let text: String = (0..600).map(line).collect();
        let last_tenth = &text[text.len() - text.len() / 10..];
        let whole = (last_tenth.len() - 1) / 32 * 32 + 1;
        std::fs::write(dir.path().join("validation.txt"), &last_tenth[..whole]).unwrap();
        std::fs::write(dir.path().join("text.txt"), text).unwrap();
        Place { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Output {
        deadline::output(
            Command::new(env!("CARGO_BIN_EXE_contraflow")).args(args).current_dir(self.dir.path()),
        )
    }

    /// A folder with a model: `MODEL` with these keys, its tensors in F32 with values by name and place. What two tensors share has
    /// the values of the first of them.
    pub fn model(&self, dir: &str, keys: Value, value: impl Fn(&str, usize) -> f32) {
        let mut config: Value = serde_json::from_str(MODEL).unwrap();
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        std::fs::create_dir(self.path(dir)).unwrap();
        std::fs::write(self.path(dir).join("config.json"), config.to_string()).unwrap();
        let weights = ModelConfig::from_hf_json(&config.to_string()).unwrap().weights();
        let bytes = weights.iter().map(|weight| {
            let name = weight.tied_to.unwrap_or(&weight.name);
            (0..weight.num_elements() as usize).flat_map(|at| value(name, at).to_le_bytes()).collect()
        });
        let bytes: Vec<Vec<u8>> = bytes.collect();
        let tensors = weights.iter().zip(&bytes).map(|(weight, bytes)| {
            (&weight.name, TensorView::new(Dtype::F32, weight.shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(tensors, None, &self.path(dir).join("model.safetensors")).unwrap();
    }

    /// What a command that succeeds says.
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The message of a command that the user has to fix; it leaves no new entry in the folder.
    pub fn refused(&self, args: &[&str]) -> String {
        let before = self.entries();
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert_eq!(self.entries(), before, "{args:?}");
        text(&output.stderr)
    }

    /// Names in the folder and in `runs`.
    pub fn entries(&self) -> Vec<String> {
        let mut names = Vec::new();
        for folder in [self.dir.path().to_owned(), self.path("runs")] {
            let entries = folder.read_dir().into_iter().flatten();
            names.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        names.sort();
        names
    }

    /// A run of a few steps: `runs/tiny`.
    pub fn train(&self) {
        let args = ["train", "--set", "model.config=model.json", "--set", "training.steps=20"];
        self.done(&[&args[..], &TRAINING[..]].concat());
    }
}
