//! What overlap is worth for DeepSeek-V3, and that no order of the table exposes less than the default one.

use contraflow_runtime::schedule::{Overlap, PairOrder};
use contraflow_runtime::simulator::{Cluster, Costs, pair_with, simulate_with};

use crate::recipe;

/// The profile with all-to-alls that take `ratio` of a pair's computations.
pub fn cluster(ratio: f64) -> Cluster {
    let mut cluster = Cluster::load("h800-2048").unwrap();
    let balanced = pair_with(&recipe("deepseek-v3", &[]), &cluster, 4, Overlap::DEFAULT).unwrap();
    let Costs::Kernels(rates) = &mut cluster.costs else { panic!("expected rates") };
    let slower = ratio * balanced.compute_s / balanced.exchange_s;
    let exchange = &mut rates.exchange;
    exchange.across.iter_mut().chain(&mut exchange.inside).for_each(|speed| *speed /= slower);
    cluster
}

/// Share of a pair in which the compute lane waits.
fn exposed(cluster: &Cluster, order: PairOrder) -> f64 {
    let pair = pair_with(&recipe("deepseek-v3", &[]), cluster, 4, Overlap::Pairs(order)).unwrap();
    1.0 - pair.compute_s / pair.span_s
}

#[test]
fn no_order_of_a_pair_exposes_less_than_the_default() {
    for ratio in [0.62, 0.8, 1.0] {
        let cluster = cluster(ratio);
        let default = exposed(&cluster, PairOrder::DEFAULT);
        for order in PairOrder::all() {
            let other = exposed(&cluster, order);
            println!("{ratio}: {:.2} % {order:?}", 100.0 * other);
            assert!(default <= other + 1e-9, "{ratio}: {default} exposed, {other} with {order:?}");
        }
        // The exchanges alone take as much.
        let floor = f64::max(1.0 - 1.0 / ratio, 0.0);
        assert!(default <= floor + 0.05, "{ratio}: {default} exposed");
    }
}

#[test]
fn without_overlap_a_step_takes_half_as_long_again() {
    let cluster = Cluster::load("h800-2048").unwrap();
    let recipe = recipe("deepseek-v3", &[]);
    let [with, without] = [Overlap::DEFAULT, Overlap::Off]
        .map(|overlap| simulate_with(&recipe, &cluster, overlap).unwrap().step_s);
    println!("{with:.3} s with overlap, {without:.3} s without");
    let documented = format!("a step of {without:.2} s without any, of {with:.2} s with pairs");
    assert!(
        include_str!("../../../docs/simulator.md").contains(&documented),
        "docs/simulator.md lacks: {documented}"
    );
    assert!(without > 1.4 * with, "{with} {without}");
}
