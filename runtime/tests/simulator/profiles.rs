//! Profiles as data: a machine of one's own, and what is said of a faulty one.

use contraflow_runtime::simulator::{Cluster, predict};

use crate::recipe;

/// A machine that a user describes.
const OWN: &str = r#"
ranks = 8
ranks_per_node = 4
memory_bytes = 16_000_000_000
peak_flops = 1e12

[compute]
launch_s = 1e-6
[[compute.products]]
role = "dense"
format = "f32"
flops = 5e11
[[compute.products]]
role = "grouped"
format = "f32"
flops = 4e11
[[compute.products]]
role = "weight"
format = "f32"
flops = 4e11
[compute.attention]
forward = 1e11
backward = 1e11
[compute.bandwidth]
norm = 1e10
swiglu = 1e10
cast = 1e10
attention_ends = 1e10
copy = 1e10
update = 1e10

[network.inside]
bytes_per_s = 1e10
latency_s = 1e-6
[network.across]
bytes_per_s = 1e9
latency_s = 1e-5
[network.exchange]
hops = "one"
dispatch_across = 1e9
combine_across = 1e9
dispatch_inside = 1e10
combine_inside = 1e10
"#;

fn faults(text: &str) -> Vec<String> {
    let faults = Cluster::from_toml("own.toml", text).unwrap_err();
    faults.list.iter().map(ToString::to_string).collect()
}

#[test]
fn a_machine_of_ones_own_is_described_without_code() {
    let cluster = Cluster::from_toml("own.toml", OWN).unwrap();
    let (run, prediction) = predict(&recipe("tiny", &[]), &cluster).unwrap();
    assert!(run.step_s > 0.0 && prediction.published.is_empty() && prediction.calibrated.is_empty());
    // One that is based on another one says what differs.
    let slower =
        Cluster::from_toml("slow", "based_on = \"h800-2048\"\n[network.across]\nbytes_per_s = 25e9\n")
            .unwrap();
    let known = Cluster::load("h800-2048").unwrap();
    let [of_slower, of_known] = [&slower, &known].map(|cluster| cluster.rates().unwrap());
    assert_eq!(of_slower.across.bytes_per_s, 25e9);
    assert_eq!(
        (of_slower.across.latency_s, &of_slower.products),
        (of_known.across.latency_s, &of_known.products)
    );
}

#[test]
fn every_fault_of_a_profile_is_reported_at_once_with_its_path() {
    let wrong = OWN
        .replace("ranks_per_node = 4", "ranks_per_node = 0")
        .replace("peak_flops = 1e12", "peak_flop = 1e12")
        .replace("role = \"weight\"", "role = \"heavy\"")
        .replace("norm = 1e10", "norm = -1")
        .replace("hops = \"one\"", "hops = \"three\"")
        .replace("[compute.attention]\nforward = 1e11\nbackward = 1e11\n", "")
        .replace("[network.inside]\nbytes_per_s = 1e10", "[network.inside]\nbytes_per_s = nan");
    let mut found = faults(&wrong);
    found.sort();
    let expected = [
        "own.toml: compute.attention: expected a section, [compute.attention], got nothing",
        "own.toml: compute.bandwidth.norm: expected a number greater than 0, got -1",
        "own.toml: compute.products[2].role: expected one of dense, grouped, weight, got \"heavy\"",
        "own.toml: network.exchange.hops: expected one of one, two, got \"three\"",
        "own.toml: network.inside.bytes_per_s: expected a number greater than 0, got nan",
        "own.toml: peak_flop: unknown key; known here: compute, calibrated",
        "own.toml: peak_flops: expected a number greater than 0, got nothing",
        "own.toml: ranks_per_node: expected a whole number of 1 or more, got 0",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected.split(';').next().unwrap()), "{found}");
    }
    assert!(faults("ranks = \n")[0].starts_with("own.toml: expected valid TOML"));
    assert!(faults("based_on = \"h900\"")[0].starts_with("own.toml: based_on: expected one of h800-2048"));
    assert!(Cluster::load("no-such-file.toml").is_err());
}

#[test]
fn what_cannot_be_simulated_is_said() {
    let cluster = Cluster::from_toml("own.toml", OWN).unwrap();
    let refused = |changes: &[&str]| predict(&recipe("tiny", changes), &cluster).unwrap_err();
    let narrow = refused(&["precision.recipe=bf16"]);
    assert!(narrow.iter().any(|fault| fault.contains("dense products in bf16")), "{narrow:?}");
    assert_eq!(narrow.len(), 3, "{narrow:?}");
    let large = refused(&["parallel.data=4", "training.global_batch_size=64"]);
    assert!(large[0].contains("at most the 8 ranks"), "{large:?}");
}
