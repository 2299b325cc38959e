//! AdamW against the textbook update in f64, term by term.

use contraflow_kernels::{
    adamw::{self, AdamW, Rounding, State},
    host::HostValues,
    par::Threads,
    tensor::{Format, Tensor},
};

use crate::twin::{Random, assert_close, wide};

fn spec(step: u64) -> AdamW {
    let rounding = Rounding::Nearest;
    AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        grad_scale: 0.5,
        rounding,
    }
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

fn vector(values: Vec<f32>) -> Tensor {
    Tensor::from_vec(&[values.len()], values)
}

/// One step on the whole of some tensors.
fn update([weight, exp_avg, exp_avg_sq]: &mut [Tensor; 3], gradient: &Tensor, spec: &AdamW) {
    let all = 0..gradient.len();
    let state = State {
        weight: weight.view_mut(all.clone()),
        exp_avg: exp_avg.view_mut(all.clone()),
        exp_avg_sq: exp_avg_sq.view_mut(all.clone()),
    };
    adamw::update(state, gradient.view(all), spec);
}

#[test]
fn steps_agree_with_the_twin() {
    const LEN: usize = 77;
    let mut random = Random::new(3);
    let p = random.values(LEN);
    let (mut wide_p, mut wide_m, mut wide_v) = (wide(&p), vec![0.0; LEN], vec![0.0; LEN]);
    let mut state = [vector(p), Tensor::zeros(&[LEN]), Tensor::zeros(&[LEN])];
    for step in 1..=20 {
        let mut g = random.values(LEN);
        g[0] = 0.0;
        g[1] *= 1e-12;
        update(&mut state, &vector(g.clone()), &spec(step));
        twin([&mut wide_p, &mut wide_m, &mut wide_v], &g, &spec(step));
        for (found, (expected, what)) in state.iter().zip([(&wide_p, "p"), (&wide_m, "m"), (&wide_v, "v")]) {
            assert_close(found.values(), expected, what);
        }
    }
}

#[test]
fn the_first_step_is_lr_against_the_gradients_sign() {
    let mut state = [vector(vec![1.0, 1.0]), Tensor::zeros(&[2]), Tensor::zeros(&[2])];
    update(&mut state, &vector(vec![3.0, -0.2]), &AdamW { weight_decay: 0.0, ..spec(1) });
    let p: &[f32] = state[0].values();
    assert!((p[0] - 0.99).abs() < 1e-6 && (p[1] - 1.01).abs() < 1e-6, "{p:?}");
}

#[test]
fn a_step_changes_its_own_run_alone() {
    let mut random = Random::new(5);
    let (p, gradient) = (random.values(10), vector(random.values(4)));
    let mut weight = vector(p.clone());
    let (mut exp_avg, mut exp_avg_sq) = (Tensor::zeros(&[4]), Tensor::zeros(&[4]));
    let state = State {
        weight: weight.view_mut(3..7),
        exp_avg: exp_avg.view_mut(0..4),
        exp_avg_sq: exp_avg_sq.view_mut(0..4),
    };
    adamw::update(state, gradient.view(0..4), &spec(1));

    let mut alone = [vector(p[3..7].to_vec()), Tensor::zeros(&[4]), Tensor::zeros(&[4])];
    update(&mut alone, &gradient, &spec(1));
    let expected = [&p[..3], alone[0].values(), &p[7..]].concat();
    assert_eq!(weight.values::<f32>(), expected);
    assert_eq!(exp_avg.values::<f32>(), alone[1].values::<f32>());
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::new(4);
    let (p, g, m) = (random.values(50_001), random.values(50_001), random.values(50_001));
    let v: Vec<f32> = random.values(50_001).iter().map(|value| value.abs()).collect();
    let (state, gradient) = ([p, m, v].map(vector), vector(g));
    let run = || {
        let mut state = state.clone();
        update(&mut state, &gradient, &spec(7));
        state.map(|tensor| tensor.values::<f32>().to_vec())
    };
    assert_eq!(run(), Threads::new(3).run(run));
}

fn moments(value: f32, len: usize) -> Tensor {
    vector(vec![value; len]).to(Format::BF16)
}

#[test]
fn moments_in_bf16_are_those_in_f32_rounded_once_a_step() {
    const LEN: usize = 77;
    let mut random = Random::new(4);
    let p = random.values(LEN);
    let mut narrow = [vector(p.clone()), moments(0.0, LEN), moments(0.0, LEN)];
    for step in 1..=20 {
        let g = vector(random.values(LEN));
        // A step in F32 from the same moments: its weights are the ones, its moments round to the others.
        let [weight, exp_avg, exp_avg_sq] = &narrow;
        let mut wide = [weight.clone(), exp_avg.to(Format::F32), exp_avg_sq.to(Format::F32)];
        update(&mut wide, &g, &spec(step));
        update(&mut narrow, &g, &spec(step));
        assert_eq!(narrow[0].values::<f32>(), wide[0].values::<f32>());
        for (narrow, wide) in narrow[1..].iter().zip(&wide[1..]) {
            assert_eq!(narrow.values::<u16>(), wide.to(Format::BF16).values::<u16>(), "step {step}");
        }
    }
}

/// A thousandth of 1 is less than half the step of BF16 below 1: rounded to nearest it is lost, for ever.
#[test]
fn what_nearest_loses_stochastic_rounding_keeps_on_average() {
    const LEN: usize = 4096;
    const STEPS: i32 = 200;
    let decay = |rounding: &dyn Fn(u64) -> Rounding| {
        let mut state = [vector(vec![0.0; LEN]), moments(0.0, LEN), moments(1.0, LEN)];
        for step in 1..=STEPS as u64 {
            let rule = AdamW { beta2: 0.999, rounding: rounding(step), ..spec(step) };
            update(&mut state, &vector(vec![0.0; LEN]), &rule);
        }
        let values = state[2].to(Format::F32);
        values.values::<f32>().iter().map(|&value| f64::from(value)).sum::<f64>() / LEN as f64
    };
    assert_eq!(decay(&|_| Rounding::Nearest), 1.0);
    let mean =
        decay(&|step| Rounding::Stochastic { key: step.wrapping_mul(0x9e37_79b9_7f4a_7c15), first: 0 });
    let exact = 0.999_f64.powi(STEPS);
    // Each step rounds to one of two values at most 2^-8 apart, so its variance is at most 2^-18; five standard errors of the mean.
    let bound = 5.0 * (f64::from(STEPS) * 2.0_f64.powi(-18) / LEN as f64).sqrt();
    assert!((mean - exact).abs() < bound, "{mean} for {exact} within {bound}");
}

#[test]
fn chance_belongs_to_the_element_and_not_to_the_run_it_is_in() {
    let mut random = Random::new(6);
    let (p, g) = (random.values(100), vector(random.values(100)));
    let rule = |first| AdamW { rounding: Rounding::Stochastic { key: 7, first }, ..spec(1) };
    let mut whole = [vector(p.clone()), moments(0.0, 100), moments(0.0, 100)];
    update(&mut whole, &g, &rule(0));
    let mut parts = [vector(p), moments(0.0, 100), moments(0.0, 100)];
    for range in [0..33, 33..100] {
        let [weight, exp_avg, exp_avg_sq] = &mut parts;
        let state = State {
            weight: weight.view_mut(range.clone()),
            exp_avg: exp_avg.view_mut(range.clone()),
            exp_avg_sq: exp_avg_sq.view_mut(range.clone()),
        };
        adamw::update(state, g.view(range.clone()), &rule(range.start));
    }
    for (whole, parts) in whole[1..].iter().zip(&parts[1..]) {
        assert_eq!(whole.values::<u16>(), parts.values::<u16>());
    }
    let nearest = AdamW { rounding: Rounding::Nearest, ..spec(1) };
    let mut other = [vector(vec![0.0; 100]), moments(0.0, 100), moments(0.0, 100)];
    update(&mut other, &g, &nearest);
    assert_ne!(other[1].values::<u16>(), whole[1].values::<u16>(), "some are rounded the other way");
}
