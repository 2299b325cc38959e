//! E4M3 against recorded cases: codes, scales and products of other implementations, to the bit where those are exact.
#![allow(clippy::unwrap_used, missing_docs)]

use contraflow_kernels::{
    grouped,
    host::HostValues,
    linear,
    tensor::{Format, ScaleRule, Study, Tensor, Tile},
};
use serde_json::Value;

const PLAIN: ScaleRule = ScaleRule { floor: false, power_of_two: false, study: Study::NONE };
const POWERS: ScaleRule = ScaleRule { power_of_two: true, ..PLAIN };
const FLOORED: ScaleRule = ScaleRule { floor: true, ..PLAIN };
const FLOORED_POWERS: ScaleRule = ScaleRule { floor: true, ..POWERS };

fn fixture(path: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// The tensors of a safetensors file.
struct Recorded(Value, Vec<u8>);

impl Recorded {
    fn open(path: &str) -> Recorded {
        let bytes = fixture(path);
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Recorded(serde_json::from_slice(header).unwrap(), data.to_vec())
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let [start, end] = [0, 1].map(|index| self.0[name]["data_offsets"][index].as_u64().unwrap() as usize);
        &self.1[start..end]
    }

    fn tensor(&self, name: &str) -> Tensor {
        let shape = self.0[name]["shape"].as_array().unwrap();
        let shape: Vec<usize> = shape.iter().map(|dim| dim.as_u64().unwrap() as usize).collect();
        Tensor::from_vec(&shape, floats(self.bytes(name)))
    }
}

/// Codes and scales.
fn parts(tensor: &Tensor) -> (Vec<u8>, Vec<f32>) {
    let [codes, scales] = tensor.parts().collect::<Vec<_>>().try_into().unwrap();
    (codes.to_vec(), floats(scales))
}

#[test]
fn every_cast_to_e4m3_is_the_recorded_one() {
    let recorded = Recorded::open("parity/fp8/fp8.safetensors");
    // One value of 448 beside it makes a scale of 1.
    for (value, &bits) in floats(recorded.bytes("cast.in")).into_iter().zip(recorded.bytes("cast.bits")) {
        if value.is_finite() {
            let tile = Tensor::from_vec(&[1, 2], vec![value.clamp(-448.0, 448.0), 448.0]);
            let (codes, scales) = parts(&tile.to(Format::E4M3(Tile::Row, PLAIN)));
            assert_eq!((codes[0], scales[0]), (bits, 1.0), "{value:e}");
        }
    }
}

#[test]
fn tiles_and_blocks_are_the_recorded_ones_to_the_bit() {
    let recorded = Recorded::open("parity/fp8/fp8.safetensors");
    for name in ["aligned", "ragged"] {
        let x = recorded.tensor(&format!("{name}.x"));
        let (codes, scales) = parts(&x.to(Format::E4M3(Tile::Row, PLAIN)));
        assert_eq!(codes, recorded.bytes(&format!("{name}.x.q")));
        assert_eq!(scales, floats(recorded.bytes(&format!("{name}.x.scale"))));
        let (_, scales) = parts(&x.to(Format::E4M3(Tile::Row, POWERS)));
        assert_eq!(scales, floats(recorded.bytes(&format!("{name}.x.scale_pow2"))));
    }
    let w = recorded.tensor("ragged.w").to(Format::E4M3(Tile::Block, PLAIN));
    assert_eq!(parts(&w), (recorded.bytes("ragged.w.q").to_vec(), floats(recorded.bytes("ragged.w.scale"))));
    let back = |name: &str, format| recorded.tensor(name).to(format).to(Format::F32);
    for (name, format, expected) in [
        ("ragged.x", Format::E4M3(Tile::Row, PLAIN), "ragged.x.dequant"),
        ("ragged.x", Format::E4M3(Tile::Row, POWERS), "ragged.x.dequant_pow2"),
        ("ragged.w", Format::E4M3(Tile::Block, PLAIN), "ragged.w.dequant"),
    ] {
        assert_eq!(back(name, format).values::<f32>(), recorded.tensor(expected).values::<f32>());
    }
}

#[test]
fn products_are_the_recorded_ones_but_for_the_order_of_sums() {
    let recorded = Recorded::open("parity/fp8/fp8.safetensors");
    let x = recorded.tensor("ragged.x").to(Format::E4M3(Tile::Row, PLAIN));
    let w = recorded.tensor("ragged.w").to(Format::E4M3(Tile::Block, PLAIN));
    let y = linear::forward(&x, &w).to(Format::F32);
    let exact = recorded.tensor("ragged.y.gemm_f64");
    for (found, exact) in y.values::<f32>().iter().zip(exact.values::<f32>()) {
        // Outputs are BF16: half of the last of 8 bits, and what the sums of 200 values are off by.
        assert!((found - exact).abs() <= exact.abs() / 256.0 + 1e-4, "{found} for {exact}");
    }
}

#[test]
fn the_rule_with_a_floor_gives_the_codes_of_the_published_inference_code() {
    let cases: Value = serde_json::from_slice(&fixture("golden/fp8/cases.json")).unwrap();
    let hex = |text: &Value| -> Vec<u8> {
        let digits = text.as_str().unwrap().as_bytes().as_chunks::<2>().0;
        digits
            .iter()
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    };
    let matrix = |rows: &Value| {
        let rows: Vec<Vec<u8>> = rows.as_array().unwrap().iter().map(hex).collect();
        let words = rows.concat();
        let values: Vec<f32> =
            words.as_chunks::<4>().0.iter().map(|&bytes| f32::from_be_bytes(bytes)).collect();
        Tensor::from_vec(&[rows.len(), values.len() / rows.len()], values)
    };
    let bytes = |rows: &Value| rows.as_array().unwrap().iter().flat_map(hex).collect::<Vec<_>>();
    let scales = |rows: &Value| -> Vec<f32> {
        let rows = rows.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
        rows.map(|scale| scale.as_f64().unwrap() as f32).collect()
    };
    let activation = &cases["activation"];
    for (rule, codes, scale) in
        [(FLOORED, "codes_hex", "scales"), (FLOORED_POWERS, "pow2_codes_hex", "pow2_scales")]
    {
        let found = parts(&matrix(&activation["x_f32_hex"]).to(Format::E4M3(Tile::Row, rule)));
        assert_eq!(found, (bytes(&activation[codes]), scales(&activation[scale])));
    }
    let weight = &cases["weight"];
    let found = parts(&matrix(&weight["w_f32_hex"]).to(Format::E4M3(Tile::Block, PLAIN)));
    assert_eq!(found, (bytes(&weight["codes_hex"]), scales(&weight["scale_inv"])));
}

/// `[rows, cols]` of numbers from -1 to 1.
fn noise(rows: usize, cols: usize, seed: u32) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    Tensor::from_vec(&[rows, cols], (0..rows * cols).map(|_| next()).collect())
}

fn weight(shape: &[usize], gradient_blocks: bool) -> Tensor {
    let study = Study { gradient_blocks, ..Study::NONE };
    let [rows, cols] = [shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1]];
    noise(rows, cols, 1).reshape(shape).to(Format::E4M3(Tile::Block, ScaleRule { study, ..PLAIN }))
}

/// Gradients of 130 tokens, one of which is a million times the others.
fn gradients_with_an_outlier() -> Tensor {
    let mut values = noise(130, 200, 2).values::<f32>().to_vec();
    values[5 * 200..6 * 200].iter_mut().for_each(|value| *value *= 1e6);
    Tensor::from_vec(&[130, 200], values)
}

#[test]
fn gradients_in_blocks_lose_what_stands_beside_an_outlier_in_both_of_their_products() {
    let (dy, x) = (gradients_with_an_outlier(), noise(130, 140, 3));
    let products = |gradient_blocks: bool| {
        let w = weight(&[200, 140], gradient_blocks);
        let mut dw = Tensor::zeros(&[200, 140]);
        // The outlier's own input is zero: its weights' gradient is that of the others.
        let mut values = x.values::<f32>().to_vec();
        values[5 * 140..6 * 140].fill(0.0);
        let x = Tensor::from_vec(&[130, 140], values);
        linear::backward_weight(&dy, &linear::input(&x, &w), &mut dw);
        let dx = linear::backward_input(&dy, &w).to(Format::F32);
        (dx.values::<f32>().to_vec(), dw.values::<f32>().to_vec())
    };
    let ((dx, _), (dx_blocks, dw_blocks)) = (products(false), products(true));
    // In its block all is below half of the smallest code but the outlier; beyond its 128 tokens nothing is.
    for row in (0..130).filter(|&row| row != 5) {
        let is_lost = dx_blocks[row * 140..(row + 1) * 140].iter().all(|&value| value == 0.0);
        assert_eq!(is_lost, row < 128, "token {row}");
        assert!(dx[row * 140..(row + 1) * 140].iter().all(|&value| value != 0.0), "token {row}");
    }
    assert!(dw_blocks.iter().any(|&value| value != 0.0));
    let beyond = weight(&[200, 140], true);
    let mut expected = Tensor::zeros(&[200, 140]);
    // What is left are the two tokens beyond the block, whose tiles of inputs hold the others too.
    let mut rest = dy.values::<f32>().to_vec();
    rest[..128 * 200].fill(0.0);
    let rest = Tensor::from_vec(&[130, 200], rest);
    linear::backward_weight(&rest, &linear::input(&x, &beyond), &mut expected);
    assert_eq!(dw_blocks, expected.values::<f32>());
}

#[test]
fn blocks_of_gradients_begin_with_the_rows_of_an_expert() {
    let (dy, offsets) = (gradients_with_an_outlier(), [0_usize, 70, 130]);
    let w = weight(&[2, 200, 140], true);
    let ids = Tensor::from_vec(&[3], offsets.map(|offset| offset as u32).to_vec());
    // As they are computed, and as they come from another rank.
    for format in [Format::F32, Format::E4M3(Tile::Row, POWERS)] {
        let dy = dy.to(format);
        let found = grouped::backward_input(&dy, &ids, &w).to(Format::F32);
        let dy = dy.to(Format::F32);
        for (expert, rows) in offsets.windows(2).enumerate() {
            let own = w.to(Format::F32).reshape(&[400, 140]).slice_rows(expert * 200..(expert + 1) * 200);
            let alone = linear::backward_input(&dy.slice_rows(rows[0]..rows[1]), &own.to(w.format()));
            let found = &found.values::<f32>()[rows[0] * 140..rows[1] * 140];
            assert_eq!(found, alone.to(Format::F32).values::<f32>(), "{format:?}");
        }
    }
}
