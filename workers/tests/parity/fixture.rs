//! The fixtures on disk: a model in the published form, and values under the names their README gives them.
//!
//! Knows files, not what the values mean.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use contraflow_runtime::model_config::ModelConfig;
use safetensors::{Dtype, SafeTensors};

/// A tensor of a fixture; f64 holds every number of the types there exactly.
pub struct Truth {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

pub type Values = BTreeMap<String, Truth>;

impl Truth {
    /// The only number of a tensor of one.
    pub fn scalar(&self) -> f64 {
        assert_eq!(self.values.len(), 1);
        self.values[0]
    }

    /// Token ids, one vector per sequence.
    pub fn sequences(&self) -> Vec<Vec<u32>> {
        let length = *self.shape.last().unwrap();
        self.values.chunks(length).map(|row| row.iter().map(|&id| id as u32).collect()).collect()
    }
}

/// One fixture directory.
pub struct Fixture {
    pub dir: PathBuf,
    pub config: ModelConfig,
    /// Of `fixture.safetensors`.
    pub values: Values,
    /// Of `optim.safetensors`, where there is one.
    pub optim: Values,
}

impl Fixture {
    fn open(dir: &Path) -> Fixture {
        Fixture {
            dir: dir.to_owned(),
            config: read_config(&dir.join("config.json")),
            values: read_values(&dir.join("fixture.safetensors")),
            optim: read_values(&dir.join("optim.safetensors")),
        }
    }

    pub fn name(&self) -> String {
        self.dir.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// The model without multi-token prediction, which is what most of the values are about.
    pub fn main_config(&self) -> ModelConfig {
        ModelConfig { num_nextn_predict_layers: 0, ..self.config.clone() }
    }

    /// The batch that the values of `fixture.safetensors` belong to.
    pub fn sequences(&self) -> Option<Vec<Vec<u32>>> {
        self.values.get("input_ids").map(Truth::sequences)
    }

    /// Values whose name begins with `prefix`, by the rest of their names.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Truth)> {
        self.values.iter().filter_map(move |(key, truth)| Some((key.strip_prefix(prefix)?, truth)))
    }
}

/// Every fixture directory there is.
///
/// # Panics
/// If there is none.
pub fn all() -> Vec<Fixture> {
    let mut places = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parity"))];
    places.extend(std::env::var_os("CONTRAFLOW_PARITY_DIR").map(PathBuf::from));
    let mut dirs = Vec::new();
    for place in places {
        let entries = place.read_dir().unwrap_or_else(|error| panic!("{}: {error}", place.display()));
        let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found.insert(0, place);
        dirs.extend(found.into_iter().filter(|dir| dir.join("config.json").exists()));
    }
    assert!(!dirs.is_empty(), "no fixture directory with a config.json");
    dirs.iter().map(|dir| Fixture::open(dir)).collect()
}

pub fn read_config(path: &Path) -> ModelConfig {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    ModelConfig::from_hf_json(&text).unwrap_or_else(|faults| panic!("{}: {faults}", path.display()))
}

/// The tensors of a file; none if there is no such file.
pub fn read_values(path: &Path) -> Values {
    let Ok(bytes) = std::fs::read(path) else { return Values::new() };
    let tensors =
        SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let read = |(name, view): (String, safetensors::tensor::TensorView)| {
        let values = match view.dtype() {
            Dtype::F32 => numbers(view.data(), |four| f64::from(f32::from_le_bytes(four))),
            Dtype::F64 => numbers(view.data(), f64::from_le_bytes),
            Dtype::I64 => numbers(view.data(), |eight| i64::from_le_bytes(eight) as f64),
            other => panic!("{}: {name}: expected F32, F64 or I64, got {other:?}", path.display()),
        };
        (name, Truth { shape: view.shape().to_vec(), values })
    };
    tensors.tensors().into_iter().map(read).collect()
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    let (chunks, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty());
    chunks.iter().map(|&chunk| number(chunk)).collect()
}
