//! Linear and grouped layers: values, gradients, ragged experts.

use contraflow_kernels::{grouped, host::HostValues, linear, par::Threads, tensor::Tensor};

use crate::twin::{Random, assert_close, dot, gradient, wide};

/// `x w^T` for `x` `[rows, input]`.
fn twin(x: &[f64], w: &[f64], input: usize) -> Vec<f64> {
    x.chunks(input).flat_map(|x| w.chunks(input).map(|w| dot(x, w))).collect()
}

/// Each expert's part of [`twin`], for `w` `[experts, out, input]`.
fn grouped_twin(x: &[f64], w: &[f64], offsets: &[usize], input: usize) -> Vec<f64> {
    let weights = w.chunks(w.len() / (offsets.len() - 1));
    let rows = offsets.windows(2).map(|bounds| &x[bounds[0] * input..bounds[1] * input]);
    rows.zip(weights).flat_map(|(x, w)| twin(x, w, input)).collect()
}

#[test]
fn linear_agrees_with_its_twin_and_differences() {
    for (rows, input, output) in [(1, 5, 3), (7, 3, 6), (6, 9, 1)] {
        let mut random = Random::new(rows as u64);
        let (x, w) = (random.tensor(&[rows, input]), random.tensor(&[output, input]));
        let (dy, residual) = (random.tensor(&[rows, output]), random.tensor(&[rows, output]));
        let (wide_x, wide_w, wide_dy) =
            (wide(x.values::<f32>()), wide(w.values::<f32>()), wide(dy.values::<f32>()));
        let expected = twin(&wide_x, &wide_w, input);
        let shifted: Vec<f64> =
            expected.iter().zip(residual.values::<f32>()).map(|(y, &r)| y + f64::from(r)).collect();

        assert_close(linear::forward(&x, &w).values::<f32>(), &expected, "y");
        assert_close(linear::forward_add(&x, &w, &residual).values::<f32>(), &shifted, "residual + y");
        let expected = gradient(|x| dot(&twin(x, &wide_w, input), &wide_dy), x.values::<f32>());
        assert_close(linear::backward_input(&dy, &w).values::<f32>(), &expected, "dx");

        let expected = gradient(|w| dot(&twin(&wide_x, w, input), &wide_dy), w.values::<f32>());
        let mut dw = Tensor::zeros(w.shape());
        linear::backward_weight(&dy, &x, &mut dw);
        assert_close(dw.values::<f32>(), &expected, "dw");
        linear::backward_weight(&dy, &x, &mut dw);
        assert_close(
            dw.values::<f32>(),
            &expected.iter().map(|g| 2.0 * g).collect::<Vec<_>>(),
            "dw of two micro-batches",
        );
    }
}

/// Loads with empty experts at both ends and in the middle, single rows, and one that outgrows a block.
const LOADS: [&[usize]; 5] = [&[3], &[0, 4, 0, 1, 2, 0], &[1, 1, 1], &[0, 0], &[0, 300, 5]];

fn offsets(loads: &[usize]) -> Vec<usize> {
    (0..=loads.len()).map(|experts| loads[..experts].iter().sum()).collect()
}

fn ids(offsets: &[usize]) -> Tensor {
    Tensor::from_vec(&[offsets.len()], offsets.iter().map(|&offset| offset as u32).collect())
}

#[test]
fn grouped_agrees_with_its_twin_and_differences() {
    let (input, output) = (5, 3);
    for loads in LOADS.into_iter().filter(|loads| loads.iter().sum::<usize>() < 10) {
        let offsets = offsets(loads);
        let rows = offsets[loads.len()];
        let mut random = Random::new(rows as u64);
        let (x, w) = (random.tensor(&[rows, input]), random.tensor(&[loads.len(), output, input]));
        let dy = random.tensor(&[rows, output]);
        let (wide_x, wide_w, wide_dy) =
            (wide(x.values::<f32>()), wide(w.values::<f32>()), wide(dy.values::<f32>()));

        let y = grouped::forward(&x, &ids(&offsets), &w);
        assert_eq!(y.shape(), [rows, output]);
        assert_close(y.values::<f32>(), &grouped_twin(&wide_x, &wide_w, &offsets, input), "y");
        let expected =
            gradient(|x| dot(&grouped_twin(x, &wide_w, &offsets, input), &wide_dy), x.values::<f32>());
        assert_close(grouped::backward_input(&dy, &ids(&offsets), &w).values::<f32>(), &expected, "dx");
        let expected =
            gradient(|w| dot(&grouped_twin(&wide_x, w, &offsets, input), &wide_dy), w.values::<f32>());
        let mut dw = Tensor::zeros(w.shape());
        grouped::backward_weight(&dy, &x, &ids(&offsets), &mut dw);
        assert_close(dw.values::<f32>(), &expected, "dw");
        grouped::backward_weight(&dy, &x, &ids(&offsets), &mut dw);
        assert_close(
            dw.values::<f32>(),
            &expected.iter().map(|g| 2.0 * g).collect::<Vec<_>>(),
            "dw of two micro-batches",
        );
    }
}

#[test]
fn grouped_on_any_threads_is_linear_expert_by_expert() {
    let (input, output) = (24, 150);
    for loads in LOADS {
        let offsets = offsets(loads);
        let rows = offsets[loads.len()];
        let mut random = Random::new(rows as u64);
        let (x, w) = (random.tensor(&[rows, input]), random.tensor(&[loads.len(), output, input]));
        let dy = random.tensor(&[rows, output]);
        for threads in [1, 2, 3].map(Threads::new) {
            let run = || {
                let mut dw = Tensor::zeros(w.shape());
                grouped::backward_weight(&dy, &x, &ids(&offsets), &mut dw);
                [
                    grouped::forward(&x, &ids(&offsets), &w),
                    grouped::backward_input(&dy, &ids(&offsets), &w),
                    dw,
                ]
            };
            let [y, dx, dw] = threads.run(run);
            let again = threads.run(run);
            assert!(
                [&y, &dx, &dw].into_iter().zip(&again).all(|(a, b)| a.parts().eq(b.parts())),
                "{loads:?}"
            );

            for (expert_id, bounds) in offsets.windows(2).enumerate() {
                let part = |tensor: &Tensor| tensor.slice_rows(bounds[0]..bounds[1]);
                let weight = w.slice_rows(expert_id * output..(expert_id + 1) * output);
                assert_close(
                    part(&y).values::<f32>(),
                    &wide(linear::forward(&part(&x), &weight).values::<f32>()),
                    "y",
                );
                assert_close(
                    part(&dx).values::<f32>(),
                    &wide(linear::backward_input(&part(&dy), &weight).values::<f32>()),
                    "dx",
                );
                let mut expected = Tensor::zeros(weight.shape());
                linear::backward_weight(&part(&dy), &part(&x), &mut expected);
                let found = dw.slice_rows(expert_id * output..(expert_id + 1) * output);
                assert_close(found.values::<f32>(), &wide(expected.values::<f32>()), "dw");
            }
        }
    }
}

#[test]
#[should_panic(expected = "expected ascending offsets from 0 to 4, got [0, 3, 2, 4]")]
fn offsets_that_step_back_are_refused() {
    grouped::forward(&Tensor::zeros(&[4, 2]), &ids(&[0, 3, 2, 4]), &Tensor::zeros(&[3, 2, 2]));
}
