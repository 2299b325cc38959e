//! `--dtype` of `export` and `import`: what weights are written as, and what `config.json` says of it.

use clap::ValueEnum;
use contraflow_workers::hf::export::ExportFormat;
use serde_json::{Map, Value, json};

/// What weights are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As they are trained
    F32,
    /// Rounded: half the size
    Bf16,
    /// As DeepSeek-V3 is published, a quarter of the size: matrices of attention and FFNs in E4M3 with a scale per block of
    /// 128 x 128, all else in bf16
    Fp8,
}

impl Dtype {
    /// What tensors become.
    pub fn format(self) -> ExportFormat {
        match self {
            Dtype::F32 => ExportFormat::F32,
            Dtype::Bf16 => ExportFormat::Bf16,
            Dtype::Fp8 => ExportFormat::Fp8,
        }
    }

    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            Dtype::Fp8 => "float8_e4m3fn in blocks of 128 x 128",
        }
    }

    /// The `config.json` of weights of this type, from that of others.
    ///
    /// **Errors**: a text that is no JSON object.
    pub fn config_json(self, text: &str) -> Result<String, String> {
        let mut config: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        // The published FP8 files name the type of what is not in FP8.
        let named = if self == Dtype::F32 { "float32" } else { "bfloat16" };
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.into(), named.into());
        let given = config.remove(QUANTIZATION).filter(|given| !given.is_null());
        if self == Dtype::Fp8 {
            config.insert(QUANTIZATION.into(), given.unwrap_or_else(published_quantization));
        }
        Ok(format!("{:#}\n", Value::Object(config)))
    }
}

/// The key under which a `config.json` says that its weights are not plain numbers.
pub const QUANTIZATION: &str = "quantization_config";

/// **Source**: the published `config.json` of DeepSeek-V3.
fn published_quantization() -> Value {
    json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    })
}
