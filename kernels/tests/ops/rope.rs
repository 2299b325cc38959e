//! Rotary frequencies against the golden file, rotations against complex numbers.

use std::{fs, path::Path};

use contraflow_kernels::{
    host::HostValues,
    par::Threads,
    rope::{Rope, RopeSpec, Yarn, rotate, softmax_scale},
    tensor::Tensor,
};
use serde_json::Value;

use crate::twin::{Random, assert_close, dot, gradient, wide};

fn yarn(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> Yarn {
    let (beta_fast, beta_slow, original_max_position_embeddings) = (32.0, 1.0, 4096);
    Yarn { factor, beta_fast, beta_slow, mscale, mscale_all_dim, original_max_position_embeddings }
}

fn frequencies(rope: &Rope) -> &[f32] {
    rope.inv_freq.values()
}

fn assert_near(found: f32, expected: f64) {
    assert!(
        (f64::from(found) - expected).abs() <= 1e-6 * expected.abs(),
        "found {found}, expected {expected}"
    );
}

#[test]
fn frequencies_equal_the_golden_ones() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/yarn/freqs.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let number = |key: &str| case[key].as_f64().unwrap();
        let stretched = number("max_seq_len") > number("original_seq_len");
        let yarn = stretched.then(|| Yarn {
            factor: number("factor"),
            beta_fast: number("beta_fast"),
            beta_slow: number("beta_slow"),
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            original_max_position_embeddings: number("original_seq_len") as usize,
        });
        let rope = Rope::new(&RopeSpec { dim: number("rope_dim") as usize, theta: number("theta"), yarn });
        let expected = case["freqs"].as_array().unwrap();
        assert_eq!(rope.inv_freq.len(), expected.len());
        frequencies(&rope)
            .iter()
            .zip(expected)
            .for_each(|(&found, f)| assert_near(found, f.as_f64().unwrap()));
    }
}

#[test]
fn corrections_follow_the_two_weights() {
    let log = |weight: f64| 0.1 * weight * 40.0_f64.ln() + 1.0;
    let scale = |mscale, all_dim| {
        Rope::new(&RopeSpec { dim: 64, theta: 1e4, yarn: Some(yarn(40.0, mscale, all_dim)) }).cos_sin_scale
    };
    assert_eq!(scale(Some(1.0), Some(1.0)), 1.0);
    assert_near(scale(Some(0.7), Some(1.0)), log(0.7) / log(1.0));
    assert_near(scale(Some(0.7), None), log(1.0));
    assert_near(scale(None, None), log(1.0));

    assert_near(softmax_scale(192, None), 192.0_f64.powf(-0.5));
    assert_near(
        softmax_scale(192, Some(&yarn(40.0, Some(1.0), Some(1.0)))),
        192.0_f64.powf(-0.5) * log(1.0).powi(2),
    );
    assert_near(softmax_scale(192, Some(&yarn(40.0, Some(1.0), None))), 192.0_f64.powf(-0.5));
    assert_near(softmax_scale(192, Some(&yarn(1.0, Some(1.0), Some(1.0)))), 192.0_f64.powf(-0.5));
}

#[test]
fn a_ramp_of_no_length_is_a_step() {
    // A context below one turn of the first pair: both ends of the ramp fall on pair 0.
    let yarn = Yarn { original_max_position_embeddings: 4, ..yarn(4.0, None, None) };
    let plain = Rope::new(&RopeSpec { dim: 8, theta: 1e4, yarn: None });

    let stretched = Rope::new(&RopeSpec { dim: 8, theta: 1e4, yarn: Some(yarn) });

    let (plain, stretched) = (frequencies(&plain), frequencies(&stretched));

    assert_near(stretched[0], f64::from(plain[0]));
    plain
        .iter()
        .zip(stretched)
        .skip(1)
        .for_each(|(&plain, &found)| assert_near(found, f64::from(plain) / 4.0));
}

/// Each head's pairs as complex numbers times a unit one.
fn twin(x: &[f64], rope: &Rope, positions: &[u32], [heads, stride, offset]: [usize; 3]) -> Vec<f64> {
    let mut y = x.to_vec();
    for (row, &position) in positions.iter().enumerate() {
        for (head, (pair, &frequency)) in
            (0..heads).flat_map(|head| frequencies(rope).iter().enumerate().map(move |p| (head, p)))
        {
            let at = (row * heads + head) * stride + offset + 2 * pair;
            let (sin, cos) = (f64::from(frequency) * f64::from(position)).sin_cos();
            let scale = f64::from(rope.cos_sin_scale);
            y[at] = scale * (x[at] * cos - x[at + 1] * sin);
            y[at + 1] = scale * (x[at] * sin + x[at + 1] * cos);
        }
    }
    y
}

#[test]
fn rotation_agrees_with_its_twin_and_its_inverse_with_differences() {
    let rope = Rope::new(&RopeSpec { dim: 6, theta: 1e4, yarn: Some(yarn(40.0, Some(0.7), Some(1.0))) });
    let positions = [0, 1, 2, 4095, 163_839];
    let table = rope.table(&Tensor::from_vec(&[5], positions.to_vec()));
    for place in [[1, 6, 0], [3, 10, 4], [2, 9, 1]] {
        let [heads, stride, offset] = place;
        let mut random = Random::new(heads as u64);
        let shape = [positions.len(), heads * stride];
        let (x, dy) = (random.tensor(&shape), random.tensor(&shape));
        let wide_dy = wide(dy.values::<f32>());

        let mut y = x.clone();
        rotate(&table, &mut y, heads, offset, false);
        assert_close(y.values::<f32>(), &twin(&wide(x.values::<f32>()), &rope, &positions, place), "y");

        let mut dx = dy.clone();
        rotate(&table, &mut dx, heads, offset, true);
        let expected = gradient(|x| dot(&twin(x, &rope, &positions, place), &wide_dy), x.values::<f32>());
        assert_close(dx.values::<f32>(), &expected, "dx");
    }
}

#[test]
fn threads_change_no_bit() {
    let rope = Rope::new(&RopeSpec { dim: 16, theta: 1e4, yarn: None });
    let table = rope.table(&Tensor::from_vec(&[700], (0..700_u32).collect()));
    let x = Random::new(2).tensor(&[700, 96]);
    let run = || {
        let mut y = x.clone();
        rotate(&table, &mut y, 4, 8, false);
        y
    };
    assert!(run().parts().eq(Threads::new(3).run(run).parts()));
}
