//! SwiGLU with and without routing weights, and its gradients.

use contraflow_kernels::{par::Threads, swiglu};

use crate::twin::{Random, assert_close, dot, gradient, wide};

fn twin(gate_up: &[f64], weights: &[f64]) -> Vec<f64> {
    let width = gate_up.len() / weights.len();
    let row = |(row, &weight): (&[f64], &f64)| {
        let (gate, up) = row.split_at(width / 2);
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u * weight).collect::<Vec<_>>()
    };
    gate_up.chunks(width).zip(weights).flat_map(row).collect()
}

#[test]
fn swiglu_agrees_with_its_twin_and_differences() {
    for (rows, hidden) in [(1, 1), (3, 5), (2, 32), (2, 41)] {
        let mut random = Random::new(hidden as u64);
        // Three times as wide as other inputs, to leave the straight part of the sigmoid.
        let mut gate_up = random.tensor(&[rows, 2 * hidden]);
        gate_up.f32_mut().iter_mut().for_each(|value| *value *= 3.0);
        let (weights, d_act) = (random.values(rows), random.tensor(&[rows, hidden]));
        let (wide_input, wide_d_act) = (wide(gate_up.f32()), wide(d_act.f32()));

        for weights in [Some(&weights[..]), None] {
            let wide_weights = weights.map_or(vec![1.0; rows], wide);
            assert_close(swiglu::forward(&gate_up, weights).f32(), &twin(&wide_input, &wide_weights), "act");
            let (d_gate_up, d_weights) = swiglu::backward(&d_act, &gate_up, weights);
            let expected = gradient(|input| dot(&twin(input, &wide_weights), &wide_d_act), gate_up.f32());
            assert_close(d_gate_up.f32(), &expected, "d_gate_up");
            let expected = weights.map_or(Vec::new(), |weights| {
                gradient(|weights| dot(&twin(&wide_input, weights), &wide_d_act), weights)
            });
            assert_close(&d_weights, &expected, "d_weights");
        }
    }
}

#[test]
fn a_row_of_weight_zero_still_has_a_weight_gradient() {
    let mut random = Random::new(9);
    let (gate_up, d_act) = (random.tensor(&[1, 10]), random.tensor(&[1, 5]));

    let (d_gate_up, d_weights) = swiglu::backward(&d_act, &gate_up, Some(&[0.0]));

    assert!(d_gate_up.f32().iter().all(|&value| value == 0.0));
    assert_eq!(d_weights, swiglu::backward(&d_act, &gate_up, Some(&[1.0])).1);
    assert_ne!(d_weights, [0.0]);
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::new(8);
    let (gate_up, d_act) = (random.tensor(&[400, 200]), random.tensor(&[400, 100]));
    let weights = random.values(400);
    let run =
        || (swiglu::forward(&gate_up, Some(&weights)), swiglu::backward(&d_act, &gate_up, Some(&weights)));

    let (act, (d_gate_up, d_weights)) = run();
    let shared = Threads::new(3).run(run);

    assert_eq!(shared.0.bytes(), act.bytes());
    assert_eq!(shared.1.0.bytes(), d_gate_up.bytes());
    assert_eq!(shared.1.1, d_weights);
}
