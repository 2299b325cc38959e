//! SwiGLU with and without routing weights, and its gradients.

use contraflow_kernels::{
    host::{HostValues, HostValuesMut},
    par::Threads,
    swiglu,
    tensor::Tensor,
};

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
        gate_up.values_mut::<f32>().iter_mut().for_each(|value| *value *= 3.0);
        let (weights, d_act) = (random.tensor(&[rows]), random.tensor(&[rows, hidden]));
        let (wide_input, wide_d_act) = (wide(gate_up.values::<f32>()), wide(d_act.values::<f32>()));

        for weights in [Some(&weights), None] {
            let values = weights.map(|weights| weights.values::<f32>());
            let wide_weights = values.map_or(vec![1.0; rows], wide);
            assert_close(
                swiglu::forward(&gate_up, weights).values::<f32>(),
                &twin(&wide_input, &wide_weights),
                "act",
            );
            let (d_gate_up, d_weights) = swiglu::backward(&d_act, &gate_up, weights);
            let expected =
                gradient(|input| dot(&twin(input, &wide_weights), &wide_d_act), gate_up.values::<f32>());
            assert_close(d_gate_up.values::<f32>(), &expected, "d_gate_up");
            let expected = values
                .map(|weights| gradient(|weights| dot(&twin(&wide_input, weights), &wide_d_act), weights));
            assert_eq!(d_weights.is_some(), expected.is_some());
            if let (Some(found), Some(expected)) = (d_weights, expected) {
                assert_close(found.values(), &expected, "d_weights");
            }
        }
    }
}

#[test]
fn a_row_of_weight_zero_still_has_a_weight_gradient() {
    let mut random = Random::new(9);
    let (gate_up, d_act) = (random.tensor(&[1, 10]), random.tensor(&[1, 5]));

    let backward = |weight: f32| {
        let (d_gate_up, d_weights) =
            swiglu::backward(&d_act, &gate_up, Some(&Tensor::from_vec(&[1], vec![weight])));
        (d_gate_up, d_weights.unwrap().values::<f32>()[0])
    };
    let (d_gate_up, d_weight) = backward(0.0);

    assert!(d_gate_up.values::<f32>().iter().all(|&value| value == 0.0));
    assert_eq!(d_weight, backward(1.0).1);
    assert_ne!(d_weight, 0.0);
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::new(8);
    let (gate_up, d_act) = (random.tensor(&[400, 200]), random.tensor(&[400, 100]));
    let weights = random.tensor(&[400]);
    let run =
        || (swiglu::forward(&gate_up, Some(&weights)), swiglu::backward(&d_act, &gate_up, Some(&weights)));

    let (act, (d_gate_up, d_weights)) = run();
    let shared = Threads::new(3).run(run);

    assert!(shared.0.parts().eq(act.parts()));
    assert!(shared.1.0.parts().eq(d_gate_up.parts()));
    assert!(shared.1.1.unwrap().parts().eq(d_weights.unwrap().parts()));
}
