//! Models written in FP8 as DeepSeek publishes them: names, types, codes and scales against torch's and against a search over all
//! codes; into other types and back.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::place::{Place, fixtures};
use crate::tensors;

type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

const SCALES: &str = "_scale_inv";

/// Sizes that no block of 128 divides.
fn ragged() -> Value {
    json!({"hidden_size": 200, "intermediate_size": 168, "moe_intermediate_size": 131, "q_lora_rank": 129, "eos_token_id": 256})
}

/// A number in [0, 1) by name and place: FNV-1a, and its bits spread.
fn unit(name: &str, at: usize) -> f32 {
    let bytes = name.bytes().chain(at.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let hash = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> 40) as f32 / (1 << 24) as f32
}

/// Weights of a few hundredths, with an outlier here and there; no block's largest is a BF16 value.
fn weight(name: &str, at: usize) -> f32 {
    let value = 0.1 * (unit(name, at) - 0.5);
    if unit(name, at + 7) < 1e-3 { 40.0 * value } else { value }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

/// The upper half of a float, rounded to nearest, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

fn of_bf16(bytes: &[u8]) -> Vec<f32> {
    let bits = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    bits.map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()
}

/// What torch makes of matrices, and the number of every code.
fn torch() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/fp8/fp8.safetensors"))
        .unwrap()
}

fn numbers_of_codes() -> Vec<f32> {
    floats(SafeTensors::deserialize(&torch()).unwrap().tensor("codes.value").unwrap().data())
}

/// The numbers of a matrix in FP8.
fn dequantized(all: &Tensors, name: &str) -> Vec<f32> {
    let numbers = numbers_of_codes();
    let (_, shape, codes) = &all[name];
    let scales = floats(&all[&format!("{name}{SCALES}")].2);
    let cols = shape[1];
    let scale = |at: usize| scales[at / cols / 128 * cols.div_ceil(128) + at % cols / 128];
    codes.iter().enumerate().map(|(at, &code)| numbers[usize::from(code)] * scale(at)).collect()
}

fn in_fp8(all: &Tensors) -> impl Iterator<Item = &String> {
    all.iter().filter(|(_, (dtype, ..))| dtype == "F8_E4M3").map(|(name, _)| name)
}

fn export(place: &Place, from: &str, to: &str, dtype: &str) -> Tensors {
    place.done(&["export", from, "--to", to, "--dtype", dtype]);
    tensors(&place.path(to))
}

#[test]
fn an_fp8_export_has_the_published_tensors() {
    let place = Place::new();
    place.model("from", ragged(), weight);
    let all = export(&place, "from", "fp8", "fp8");
    let before = tensors(&place.path("from"));
    let config = place.json("fp8/config.json");
    let published = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    });
    assert_eq!((&config["quantization_config"], &config["torch_dtype"]), (&published, &json!("bfloat16")));
    // The endings of the published table, of the main model and of multi-token prediction.
    let in_blocks = [
        "self_attn.q_a_proj.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    ];
    for (name, (dtype, shape, bytes)) in &before {
        let is = |ending: &&str| name.ends_with(*ending);
        let (got, got_shape, got_bytes) = &all[name];
        assert_eq!((dtype.as_str(), got_shape), ("F32", shape), "{name}");
        if in_blocks.iter().any(is) {
            assert_eq!(got, "F8_E4M3", "{name}");
            let scales = &all[&format!("{name}{SCALES}")];
            let blocks: Vec<usize> = shape.iter().map(|&size| size.div_ceil(128)).collect();
            assert_eq!((scales.0.as_str(), &scales.1), ("F32", &blocks), "{name}");
        } else if name.ends_with("e_score_correction_bias") {
            assert!(got == "F32" && got_bytes == bytes, "{name}");
        } else {
            let rounded: Vec<u8> =
                floats(bytes).into_iter().flat_map(|value| bf16(value).to_le_bytes()).collect();
            assert!(got == "BF16" && *got_bytes == rounded, "{name}");
        }
    }
    assert_eq!(all.len(), before.len() + in_fp8(&all).count());
    for (copy, original) in [
        ("model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.2.shared_head.head.weight", "lm_head.weight"),
    ] {
        assert!(all[copy] == all[original], "{copy}");
    }
    for name in ["enorm", "hnorm", "eh_proj", "shared_head.norm", "self_attn.o_proj", "mlp.experts.3.up_proj"]
    {
        assert!(all.contains_key(&format!("model.layers.2.{name}.weight")), "{name}");
    }
    // Cut anywhere it is the same, and the index knows the scales.
    place.done(&["export", "from", "--to", "cut", "--dtype", "fp8", "--shard-size", "60KB"]);
    assert!(tensors(&place.path("cut")) == all);
    let index = place.json("cut/model.safetensors.index.json");
    assert!(index["weight_map"].as_object().unwrap().keys().eq(all.keys()));
    let bytes: usize = all.values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
}

#[test]
fn codes_and_scales_are_those_of_torch() {
    let place = Place::new();
    let file = torch();
    let torch = SafeTensors::deserialize(&file).unwrap();
    let tensor = |name: &str| torch.tensor(&format!("ragged.w{name}")).unwrap().data().to_vec();
    let matrix = floats(&tensor(""));
    let name = "model.layers.0.mlp.gate_proj.weight";
    place.model("from", ragged(), |of, at| if of == name { matrix[at] } else { weight(of, at) });
    let all = export(&place, "from", "fp8", "fp8");
    assert_eq!(all[name].1, [168, 200]);
    assert!(all[name].2 == tensor(".q"));
    assert!(all[&format!("{name}{SCALES}")].2 == tensor(".scale"));
    place.done(&["import", "fp8"]);
    assert!(tensors(&place.path("runs/fp8/model"))[name].2 == tensor(".dequant"));
}

/// Of all codes the one whose number is nearest, of two that are equally near the even one.
fn nearest(numbers: &[f32], value: f32) -> u8 {
    let distance = |code: u8| (f64::from(numbers[usize::from(code)]) - f64::from(value.abs())).abs();
    let nearest = (0..127_u8).min_by(|&left, &right| {
        distance(left).total_cmp(&distance(right)).then((left & 1).cmp(&(right & 1)))
    });
    nearest.unwrap() | if value.is_sign_negative() { 128 } else { 0 }
}

#[test]
fn every_code_is_the_nearest_and_every_scale_the_largest_magnitude_over_448() {
    let place = Place::new();
    // A block of zeros, one of denormals whose scale would be zero, and zeros among others.
    let value = |name: &str, at: usize| match (name.contains("up_proj"), at % 200) {
        (true, col) if col >= 128 && at / 200 < 128 => 0.0,
        (true, col) if col >= 128 => 1e-44,
        (_, 3) => -0.0,
        _ => weight(name, at),
    };
    place.model("from", ragged(), value);
    let numbers = numbers_of_codes();
    let before = tensors(&place.path("from"));
    let all = export(&place, "from", "fp8", "fp8");
    for name in in_fp8(&all) {
        let values = floats(&before[name].2);
        let (_, shape, codes) = &all[name];
        let cols = shape[1];
        let blocks = cols.div_ceil(128);
        let block = |at: usize| at / cols / 128 * blocks + at % cols / 128;
        let scales = floats(&all[&format!("{name}{SCALES}")].2);
        let mut largest = vec![0_f32; scales.len()];
        values.iter().enumerate().for_each(|(at, value)| {
            largest[block(at)] = largest[block(at)].max(value.abs());
        });
        for (largest, &scale) in largest.iter().zip(&scales) {
            let exact = largest / 448.0;
            assert_eq!(scale, if exact == 0.0 { 1.0 } else { exact }, "{name}");
        }
        for (at, (&value, &code)) in values.iter().zip(codes).enumerate() {
            assert_eq!(code, nearest(&numbers, value / scales[block(at)]), "{name} at {at}: {value}");
        }
    }
    let scales = floats(&all["model.layers.0.mlp.up_proj.weight_scale_inv"].2);
    assert_eq!((scales[1], scales[3]), (1.0, 1.0));
    place.done(&["import", "fp8"]);
}

#[test]
fn what_is_imported_is_what_the_blocks_stand_for_and_bf16_is_its_rounding() {
    let place = Place::new();
    place.model("from", ragged(), weight);
    let blocks = export(&place, "from", "fp8", "fp8");
    place.done(&["import", "fp8"]);
    let imported = tensors(&place.path("runs/fp8/model"));
    assert!(in_fp8(&blocks).count() > 20);
    for name in in_fp8(&blocks) {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(imported[name].0, "F32");
        assert!(bits(floats(&imported[name].2)) == bits(dequantized(&blocks, name)), "{name}");
    }
    let (wide, half) = (export(&place, "fp8", "wide", "f32"), export(&place, "fp8", "half", "bf16"));
    assert!(place.json("wide/config.json").get("quantization_config").is_none());
    assert!(wide.keys().eq(half.keys()) && wide.keys().all(|name| !name.ends_with(SCALES)));
    for (name, (dtype, shape, bytes)) in &half {
        let exact = floats(&wide[name].2);
        assert_eq!(shape, &wide[name].1);
        if dtype == "F32" {
            assert!(bytes == &wide[name].2, "{name}");
        } else {
            let rounded: Vec<f32> =
                exact.into_iter().map(|value| f32::from_bits(u32::from(bf16(value)) << 16)).collect();
            assert!(of_bf16(bytes) == rounded, "{name}");
        }
    }
}

#[test]
fn a_model_that_comes_in_fp8_keeps_its_codes_and_scales() {
    let place = Place::new();
    place.model("from", ragged(), weight);
    let all = export(&place, "from", "fp8", "fp8");
    assert!(export(&place, "fp8", "again", "fp8") == all);
    let output = place.run(&["import", "fp8", "--dtype", "fp8"]);
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(tensors(&place.path("runs/fp8/model")) == all);
    let config = |path: &str| place.json(path)["quantization_config"].clone();
    assert_eq!(config("runs/fp8/model/config.json"), config("fp8/config.json"));
    // Powers of two are no scales of our rule, and stay.
    let published = fp8_fixture(&place);
    let kept = export(&place, "published", "kept", "fp8");
    for name in in_fp8(&published).filter(|name| !name.contains("head")) {
        assert!(kept[name] == published[name], "{name}");
    }
}

fn fp8_fixture(place: &Place) -> Tensors {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8");
    std::fs::create_dir(place.path("published")).unwrap();
    for entry in from.read_dir().unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, place.path("published").join(path.file_name().unwrap())).unwrap();
    }
    tensors(&from)
}

/// In a block that was quantised by the rule the largest code is 448 (0x7e). Its number, 448 x scale, is within 2^-24 of the largest
/// magnitude `a` that the scale was made of, and rounding it to BF16 gives `a` again where that is a BF16 value: then the scale comes
/// out the same. Where it is not, `a` changes by at most a half unit of BF16, 2^-8 of it, and so does the scale; from then on it is a
/// BF16 value. Codes stay in both cases: they would change from half a step on, which is at least 2^-5 of a number.
#[test]
fn through_bf16_and_back_codes_stay_and_so_do_scales_whose_block_begins_in_bf16() {
    let place = Place::new();
    place.model("wide", ragged(), weight);
    export(&place, "wide", "half", "bf16");
    for (name, begins_in_bf16) in [("half", true), ("wide", false)] {
        let to = |ending: &str| format!("{name}-{ending}");
        let first = export(&place, name, &to("first"), "fp8");
        export(&place, &to("first"), &to("through"), "bf16");
        let second = export(&place, &to("through"), &to("second"), "fp8");
        export(&place, &to("second"), &to("on"), "bf16");
        let third = export(&place, &to("on"), &to("third"), "fp8");
        assert_eq!(first == second, begins_in_bf16, "{name}");
        assert!(second == third, "{name}");
        for matrix in in_fp8(&first) {
            assert!(first[matrix] == second[matrix], "{matrix}");
            let scales = format!("{matrix}{SCALES}");
            for (before, after) in floats(&first[&scales].2).iter().zip(floats(&second[&scales].2)) {
                assert!((after - before).abs() <= before / 256.0, "{scales}: {before} {after}");
            }
        }
    }
}

/// 448 x scale is rounded to F32, and dividing that by 448 may miss the scale by a unit of its last place: 7 has three bits, so the
/// product is cut by up to four units of the scale, a seventh of which is more than a half. The second time it comes out the same.
#[test]
fn through_f32_and_back_codes_stay_and_scales_are_within_one_unit() {
    let place = Place::new();
    place.model("from", ragged(), weight);
    let first = export(&place, "from", "first", "fp8");
    export(&place, "first", "through", "f32");
    let second = export(&place, "through", "second", "fp8");
    export(&place, "second", "on", "f32");
    let third = export(&place, "on", "third", "fp8");
    assert!(second == third);
    let mut num_changed = 0;
    for matrix in in_fp8(&first) {
        assert!(first[matrix] == second[matrix], "{matrix}");
        let scales = format!("{matrix}{SCALES}");
        for (before, after) in floats(&first[&scales].2).iter().zip(floats(&second[&scales].2)) {
            assert!(before.to_bits().abs_diff(after.to_bits()) <= 1, "{scales}: {before} {after}");
            num_changed += usize::from(*before != after);
        }
    }
    println!(
        "{num_changed} scales of {} changed",
        first.keys().filter(|name| name.ends_with(SCALES)).count()
    );
}

#[test]
fn every_fixture_is_written_in_fp8_and_measured_like_what_it_stands_for() {
    let place = Place::new();
    let loss = |model: &str| {
        let args = ["eval", model, "--data", "validation.txt", "--sequence-length", "32", "--format", "json"];
        let measured: Value = serde_json::from_str(&place.done(&args)).unwrap();
        measured["loss"].as_f64().unwrap().to_bits()
    };
    place.model("bytes", json!({"eos_token_id": 256, "vocab_size": 257}), weight);
    for (number, fixture) in fixtures().into_iter().chain([place.path("bytes")]).enumerate() {
        let (fp8, name) = (format!("{number}-fp8"), format!("{number}-f32"));
        let all = export(&place, fixture.to_str().unwrap(), &fp8, "fp8");
        assert!(in_fp8(&all).count() > 8, "{}", fixture.display());
        place.done(&["import", &fp8, "--name", &name]);
        assert_eq!(tensors(&fixture).len(), tensors(&place.path("runs").join(&name).join("model")).len());
    }
    assert_eq!(loss("8-fp8"), loss("runs/8-f32"));
    place.done(&["generate", "8-fp8", "--prompt", "the", "--tokens", "3"]);
    let train = ["train", "--init", "8-fp8", "--name", "on", "--set", "training.steps=1"];
    place.done(&[&train[..], &crate::place::TRAINING].concat());
    assert!(place.json("runs/on/model/config.json").get("quantization_config").is_none());
}
