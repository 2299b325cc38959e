//! docs/simulator.md says what the program says: its tables and its picture are made here again.

use contraflow_runtime::schedule::{Mode, ScheduleKind, UnitCosts, clock};
use contraflow_runtime::simulator::{
    Cluster, Costs, Prediction, Rates, pair, predict, rows, simulate_recipe, svg,
};

use crate::recipe;

const DOCUMENT: &str = include_str!("../../../docs/simulator.md");

fn prediction(name: &str) -> Prediction {
    predict(&recipe("deepseek-v3", &[]), &Cluster::load(name).unwrap()).unwrap().1
}

fn assert_documented(rows: &[String]) {
    let missing: Vec<&String> = rows.iter().filter(|row| !DOCUMENT.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "docs/simulator.md lacks these of its rows:\n{}", rows.join("\n"));
}

/// Seconds of a step as published, the step itself last.
const MEASURED: [(&str, f64); 7] = [
    ("1F", 1.13),
    ("bubble", 2.06),
    ("1B", 1.99),
    ("1W", 0.48),
    ("1F1B", 13.95),
    ("optimizer", 0.29),
    ("step", 19.926),
];

fn error(predicted: f64, measured: f64) -> String {
    format!("{predicted:.2} | {:+.1} %", 100.0 * (predicted / measured - 1.0))
}

#[test]
fn predictions_are_those_of_the_profiles() {
    let names = ["h800-2048-table4", "h800-2048", "h800-2048-libraries", "h800-2048-calibrated"];
    let predictions = names.map(prediction);
    let part = |prediction: &Prediction, name: &str| {
        let named = prediction.components.named();
        named.iter().find(|(of, _)| *of == name).map_or(prediction.step_s, |(_, seconds)| *seconds)
    };
    let row = |&(name, measured): &(&str, f64)| {
        let cells = predictions.each_ref().map(|prediction| error(part(prediction, name), measured));
        format!("| {name} | {measured} | {} |", cells.join(" | "))
    };
    let whole = |what: &str, measured: &str, of: &dyn Fn(&Prediction) -> String| {
        let cells = predictions.each_ref().map(of);
        format!("| {what} | {measured} | {} | |", cells.join(" | | "))
    };
    let mut rows: Vec<String> = MEASURED.iter().map(row).collect();
    rows.push(whole("tokens/s a GPU", "1542", &|p| format!("{:.0}", p.tokens_per_gpu_s)));
    rows.push(whole("thousand GPU hours a trillion tokens", "180", &|p| {
        format!("{:.0}", p.gpu_hours_per_trillion_tokens / 1e3)
    }));
    rows.push(whole("MFU causal, %", "38.94", &|p| format!("{:.2}", 100.0 * p.mfu_causal)));
    rows.push(whole("MFU not causal, %", "43.73", &|p| format!("{:.2}", 100.0 * p.mfu_noncausal)));
    assert_documented(&rows);
}

#[test]
fn the_pair_is_that_of_the_profiles() {
    let recipe = recipe("deepseek-v3", &[]);
    let row = |name: &&str| {
        let pair = pair(&recipe, &Cluster::load(name).unwrap(), 4).unwrap();
        let [span, compute, exchange] = [pair.span_s, pair.compute_s, pair.exchange_s].map(|s| 1e3 * s);
        let error = 100.0 * (span / 129.0 - 1.0);
        format!(
            "| `{name}` | {span:.1} | {error:+.1} % | {compute:.1} | {exchange:.1} | {:.1} |",
            span - compute
        )
    };
    assert_documented(&["h800-2048", "h800-2048-libraries"].iter().map(row).collect::<Vec<_>>());
}

type Change = fn(&mut Rates);

/// One input of `h800-2048` changed at a time.
const CHANGES: [(&str, Change); 9] = [
    ("nothing", |_| {}),
    ("all-to-alls as fast as DeepEP's table: 51 and 50 GB/s", |rates| rates.exchange.across = [51e9, 50e9]),
    ("notification of 33.0 / 16 ms before each all-to-all", |rates| {
        rates.exchange.barrier_s = 33.0e-3 / 16.0
    }),
    ("experts chosen with a variation of 10 %", |rates| rates.chance.expert_cv = 0.1),
    ("experts chosen with a variation of 30 %", |rates| rates.chance.expert_cv = 0.3),
    ("computations that scatter by 2 %", |rates| rates.chance.jitter_cv = 0.02),
    ("transfers between pipeline ranks 1 ms later", |rates| rates.calibrated.hop_latency_s = 1e-3),
    ("stages at the ends 5 % slower than the mean", |rates| rates.calibrated.stage_imbalance = 0.05),
    ("head at 90 % of the peak instead of 80 %", |rates| {
        let bf16 = contraflow_runtime::recipe::NumberFormat::Bf16;
        rates.products.iter_mut().filter(|rate| rate.format == bf16).for_each(|rate| rate.flops = 890e12);
    }),
];

#[test]
fn sensitivities_are_those_of_the_profile() {
    let recipe = recipe("deepseek-v3", &[]);
    let row = |(what, change): &(&str, Change)| {
        let mut cluster = Cluster::load("h800-2048").unwrap();
        if let Costs::Kernels(rates) = &mut cluster.costs {
            change(rates);
        }
        let run = simulate_recipe(&recipe, &cluster).unwrap();
        let parts = run.breakdown.mean.named().map(|(_, seconds)| format!("{seconds:.2}"));
        format!("| {what} | {} | {:.2} |", parts.join(" | "), run.step_s)
    };
    assert_documented(&CHANGES.iter().map(row).collect::<Vec<_>>());
}

#[test]
fn the_picture_is_what_the_program_draws() {
    let (plan, _) = ScheduleKind::Dualpipe.plan(8, 20, Mode::Train).unwrap();
    let (programs, timeline) = clock(&plan, UnitCosts::SUM).unwrap();
    let drawn = svg(&plan, &rows("rank", &programs, &timeline), "F");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/dualpipe.svg");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == drawn, "docs/dualpipe.svg is not what `contraflow plan --svg` draws");
}
