//! Gigabytes from BF16 to FP8 and back, with kills on the way: memory, and the same numbers. `CONTRAFLOW_GIGABYTES`
//! sets the size, without it nothing is done; `TMPDIR` is the place. `just long` runs it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use contraflow_runtime::model_config::{ModelConfig, WeightShape};
use contraflow_workers::hf::header::header_text;
use contraflow_workers::hf::weights::HfWeights;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::place::{MODEL, Place};

/// Largest resident memory that a conversion may take.
///
/// **Units**: bytes.
const MEMORY: u64 = 1 << 30;

/// The model's configuration, so wide that tables and dense matrices alone have hundreds of megabytes.
fn config(gigabytes: usize) -> ModelConfig {
    let mut config: Value = serde_json::from_str(MODEL).unwrap();
    let keys = json!({
        "vocab_size": 129_280, "hidden_size": 2048, "intermediate_size": 18_432, "moe_intermediate_size": 1408,
        "num_hidden_layers": 3, "q_lora_rank": 768, "kv_lora_rank": 512, "n_group": 1, "n_routed_experts": 8,
    });
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let sized = |config: &Value| {
        let config = ModelConfig::from_hf_json(&config.to_string()).unwrap();
        let elements: u64 = config.weights().iter().map(WeightShape::num_elements).sum();
        (2 * elements, config)
    };
    loop {
        let (bytes, config_of_size) = sized(&config);
        if bytes >= (gigabytes as u64) * 1_000_000_000 {
            return config_of_size;
        }
        config["n_routed_experts"] = (config["n_routed_experts"].as_u64().unwrap() + 2).into();
    }
}

/// Writes a model in BF16, one file a gigabyte. Every value is one that E4M3 holds with a scale of 2^-13, and every block has the
/// largest of them: so FP8 holds them all exactly, but for the tensors that stay in BF16 anyhow.
fn write(dir: &Path, config: &ModelConfig) -> usize {
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_hf_json()).unwrap();
    let mut shards: Vec<Vec<WeightShape>> = vec![Vec::new()];
    let mut filled = 0;
    for weight in config.weights() {
        if filled > 1_000_000_000 {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += 2 * weight.num_elements();
        shards.last_mut().unwrap().push(weight);
    }
    // 448 and 127 smaller ones, in turn: every 128 columns that begin with a multiple of 128 hold the largest.
    let numbers: Vec<u8> = (0..128_u32)
        .flat_map(|at| {
            let magnitude = if at == 0 { 448.0 } else { (8 + at % 8) as f32 * 2_f32.powi(at as i32 % 5) };
            let value = if at % 3 == 1 { -magnitude } else { magnitude } / 8192.0;
            ((value.to_bits() >> 16) as u16).to_le_bytes()
        })
        .collect();
    let cycle = numbers.repeat(1 << 13);
    let mut map = serde_json::Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        let dtype = |weight: &WeightShape| if weight.is_gate_bias() { Dtype::F32 } else { Dtype::BF16 };
        let listed = shard.iter().map(|weight| (weight.name.as_str(), dtype(weight), &weight.shape[..]));
        let (header, _) = header_text(listed);
        let mut file = BufWriter::new(File::create(dir.join(&name)).unwrap());
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        for weight in shard {
            let mut left = weight.num_elements() as usize * dtype(weight).bitsize() / 8;
            while left > 0 {
                let len = left.min(cycle.len());
                file.write_all(&cycle[..len]).unwrap();
                left -= len;
            }
            map.insert(weight.name.clone(), name.clone().into());
        }
        file.into_inner().unwrap().sync_all().unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    shards.len()
}

/// Largest resident memory of a process so far; `None` once it has ended.
fn peak_bytes(child: &Child) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}

/// Converts, killed a second after the first and the third weight file has its name; returns the largest memory of all tries.
fn convert(place: &Place, from: &str, to: &str, dtype: &str) -> u64 {
    let begins = Instant::now();
    let (mut peak, mut kills) = (0, vec![3, 1]);
    loop {
        let args = ["export", from, "--to", to, "--dtype", dtype, "--shard-size", "1GB"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
        let mut child =
            command.args(args).current_dir(place.path("")).stderr(Stdio::inherit()).spawn().unwrap();
        let mut kill_at = None;
        let status = loop {
            peak = peak.max(peak_bytes(&child).unwrap_or(0));
            let part = place.path(&format!("{to}.part"));
            let is_made = |number: usize| {
                let entries = part.read_dir().into_iter().flatten().map(|entry| entry.unwrap().file_name());
                entries.filter(|name| name.to_string_lossy().starts_with("model-")).count() >= number
            };
            if kill_at.is_none() && kills.last().is_some_and(|&number| is_made(number)) {
                kill_at = Some(Instant::now() + Duration::from_secs(1));
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) && !kills.is_empty() {
                child.kill().unwrap();
            }
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if status.signal().is_none() {
            assert!(status.success() && kills.is_empty(), "{status} {kills:?}");
            println!("{from} to {to}: {} MB, {:.0} s", peak / 1_000_000, begins.elapsed().as_secs_f64());
            return peak;
        }
        kills.pop();
        println!("{from} to {to}: killed");
    }
}

#[test]
fn gigabytes_go_to_fp8_and_back_in_a_part_of_the_memory_and_through_kills() {
    let Ok(gigabytes) = std::env::var("CONTRAFLOW_GIGABYTES") else {
        eprintln!("SKIPPED: no gigabytes are converted, as CONTRAFLOW_GIGABYTES is not set");
        return;
    };
    let gigabytes = gigabytes.parse().unwrap();
    let place = Place::new();
    let config = config(gigabytes);
    let num_files = write(&place.path("bf16"), &config);
    println!("{num_files} files, {} GB", gigabytes);
    let peaks = [convert(&place, "bf16", "fp8", "fp8"), convert(&place, "fp8", "back", "bf16")];
    assert!(peaks.iter().all(|&peak| peak > 0 && peak < MEMORY), "{peaks:?}");
    let open = |dir: &str| HfWeights::open(&place.path(dir)).unwrap();
    let (before, after) = (open("bf16"), open("back"));
    for weight in config.weights() {
        let rows = weight.shape.iter().rev().skip(1).product::<usize>();
        for first in (0..rows).step_by(1024) {
            let part = |weights: &HfWeights| {
                weights.read_rows(&weight.name, &weight.shape, first..rows.min(first + 1024)).unwrap()
            };
            assert!(part(&before) == part(&after), "{} from row {first}", weight.name);
        }
    }
}
