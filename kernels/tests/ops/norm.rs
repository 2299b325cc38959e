//! RMSNorm, whole rows and column ranges, and its gradients.

use contraflow_kernels::{host::HostValues, norm, par::Threads, tensor::Tensor};

use crate::twin::{Random, assert_close, dot, gradient, wide};

fn twin(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(move |(x, w)| x / rms * w).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

#[test]
fn norm_agrees_with_its_twin_and_differences() {
    for (rows, width, eps) in [(1, 1, 1e-3), (3, 7, 1e-6), (2, 32, 1e-6), (2, 77, 1e-3)] {
        let mut random = Random::new(width as u64);
        let (x, w, dy) =
            (random.tensor(&[rows, width]), random.tensor(&[width]), random.tensor(&[rows, width]));
        let (wide_x, wide_w, wide_dy) =
            (wide(x.values::<f32>()), wide(w.values::<f32>()), wide(dy.values::<f32>()));
        let wide_eps = f64::from(eps);
        let seed = random.tensor(&[width]);
        let mut dw = seed.clone();

        assert_close(norm::forward(&x, &w, eps).values::<f32>(), &twin(&wide_x, &wide_w, wide_eps), "y");
        let dx = norm::backward(&dy, &x, &w, eps, &mut dw);
        let expected = gradient(|x| dot(&twin(x, &wide_w, wide_eps), &wide_dy), x.values::<f32>());
        // One column has the gradient eps w / rms^3, a difference of two terms of order 1.
        if width > 1 {
            assert_close(dx.values::<f32>(), &expected, "dx");
        }
        let expected = gradient(|w| dot(&twin(&wide_x, w, wide_eps), &wide_dy), w.values::<f32>());
        let expected: Vec<f64> =
            expected.iter().zip(seed.values::<f32>()).map(|(g, &seed)| g + f64::from(seed)).collect();
        assert_close(dw.values::<f32>(), &expected, "dw on top of what was there");
    }
}

#[test]
fn a_range_of_columns_is_the_norm_of_those_columns() {
    let mut random = Random::new(5);
    let (x, w, dy) = (random.tensor(&[4, 11]), random.tensor(&[6]), random.tensor(&[4, 6]));
    let part = x.slice_cols(2..8);
    let (mut dw, mut expected_dw) = (Tensor::zeros(&[6]), Tensor::zeros(&[6]));
    let before = random.tensor(&[4, 11]);
    let mut dx = before.clone();

    assert_eq!(
        norm::forward_cols(&x, 2..8, &w, 1e-6).values::<f32>(),
        norm::forward(&part, &w, 1e-6).values::<f32>()
    );
    norm::backward_cols(&dy, &x, 2..8, &w, 1e-6, &mut dw, &mut dx);

    let expected = norm::backward(&dy, &part, &w, 1e-6, &mut expected_dw);
    assert_eq!(dw.values::<f32>(), expected_dw.values::<f32>());
    let mut written = before.clone();
    written.set_cols(2, &expected);
    assert_eq!(dx.values::<f32>(), written.values::<f32>());
}

#[test]
fn threads_change_only_the_rounding_of_the_weights_gradient() {
    let mut random = Random::new(6);
    let (x, w, dy) = (random.tensor(&[701, 100]), random.tensor(&[100]), random.tensor(&[701, 100]));
    let run = || {
        let mut dw = Tensor::zeros(&[100]);
        let dx = norm::backward(&dy, &x, &w, 1e-6, &mut dw);
        (norm::forward(&x, &w, 1e-6), dx, dw)
    };
    let (y, dx, dw) = run();
    let threads = Threads::new(3);

    let shared = threads.run(run);

    assert!(shared.0.parts().eq(y.parts()));
    assert!(shared.1.parts().eq(dx.parts()));
    assert_close(shared.2.values::<f32>(), &wide(dw.values::<f32>()), "dw");
    assert!(threads.run(run).2.parts().eq(shared.2.parts()));
}
