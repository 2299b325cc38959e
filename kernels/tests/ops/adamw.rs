//! AdamW against the textbook update in f64, term by term.

use contraflow_kernels::{
    adamw::{AdamW, update},
    par::Threads,
};

use crate::twin::{Random, assert_close, wide};

fn spec(step: u64) -> AdamW {
    AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
}

/// The textbook's order: decay, moments, corrected moments, step.
fn twin([p, m, v]: [&mut [f64]; 3], g: &[f32], spec: &AdamW) {
    let (beta1, beta2) = (f64::from(spec.beta1), f64::from(spec.beta2));
    let power = i32::try_from(spec.step).unwrap();
    for i in 0..p.len() {
        let g = f64::from(g[i]) * f64::from(spec.grad_scale);
        p[i] *= 1.0 - f64::from(spec.lr) * f64::from(spec.weight_decay);
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let (mean, square) = (m[i] / (1.0 - beta1.powi(power)), v[i] / (1.0 - beta2.powi(power)));
        p[i] -= f64::from(spec.lr) * mean / (square.sqrt() + f64::from(spec.epsilon));
    }
}

#[test]
fn steps_agree_with_the_twin() {
    const LEN: usize = 77;
    let mut random = Random::new(3);
    let mut p = random.values(LEN);
    let (mut m, mut v) = (vec![0.0; LEN], vec![0.0; LEN]);
    let (mut wide_p, mut wide_m, mut wide_v) = (wide(&p), vec![0.0; LEN], vec![0.0; LEN]);
    for step in 1..=20 {
        let mut g = random.values(LEN);
        g[0] = 0.0;
        g[1] *= 1e-12;
        update(&mut p, &g, &mut m, &mut v, &spec(step));
        twin([&mut wide_p, &mut wide_m, &mut wide_v], &g, &spec(step));
        assert_close(&p, &wide_p, "p");
        assert_close(&m, &wide_m, "m");
        assert_close(&v, &wide_v, "v");
    }
}

#[test]
fn the_first_step_is_lr_against_the_gradients_sign() {
    let (mut p, mut m, mut v) = ([1.0_f32, 1.0], [0.0; 2], [0.0; 2]);
    update(&mut p, &[3.0, -0.2], &mut m, &mut v, &AdamW { weight_decay: 0.0, ..spec(1) });
    assert!((p[0] - 0.99).abs() < 1e-6 && (p[1] - 1.01).abs() < 1e-6, "{p:?}");
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::new(4);
    let (p, g, m) = (random.values(50_001), random.values(50_001), random.values(50_001));
    let v: Vec<f32> = random.values(50_001).iter().map(|value| value.abs()).collect();
    let run = || {
        let (mut p, mut m, mut v) = (p.clone(), m.clone(), v.clone());
        update(&mut p, &g, &mut m, &mut v, &spec(7));
        (p, m, v)
    };
    assert_eq!(run(), Threads::new(3).run(run));
}
