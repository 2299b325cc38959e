//! A cluster as data: how fast its devices compute, how fast its links carry, what is left to chance, and what was published of
//! runs on it.
//!
//! A profile is a TOML file; `recipes/clusters/` holds those that are built in, and docs/simulator.md says what each key means.
//! Knows no model, no layout and no schedule.

use std::cell::RefCell;
use std::path::Path;

use toml::{Table, Value};

use super::link::{Link, link};
use super::measured::MeasuredCosts;
use super::section::{Range, Section};
use crate::faults::Faults;
use crate::files;
use crate::recipe::NumberFormat;
use crate::schedule::UnitCosts;

/// Names and texts of the built-in profiles.
const PROFILES: [(&str, &str); 4] = [
    ("h800-2048", include_str!("../../../recipes/clusters/h800-2048.toml")),
    ("h800-2048-table4", include_str!("../../../recipes/clusters/h800-2048-table4.toml")),
    ("h800-2048-calibrated", include_str!("../../../recipes/clusters/h800-2048-calibrated.toml")),
    ("h800-2048-libraries", include_str!("../../../recipes/clusters/h800-2048-libraries.toml")),
];

/// Names of the built-in profiles.
pub fn cluster_names() -> Vec<&'static str> {
    PROFILES.iter().map(|(name, _)| *name).collect()
}

/// A cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Its name or file.
    pub name: String,
    /// Devices.
    pub ranks: usize,
    /// Devices of a node, whose ranks are neighbours in number.
    pub ranks_per_node: usize,
    /// **Units**: bytes of a device.
    pub memory_bytes: u64,
    /// What the utilization of the devices is counted against. **Units**: FLOP/s of a device.
    pub peak_flops: f64,
    /// What work costs.
    pub costs: Costs,
    /// What was published of a run.
    pub published: Vec<Published>,
}

/// What work costs on a cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Costs {
    /// One duration for each kind of action, and of the update; transfers are free.
    Actions {
        /// **Units**: seconds.
        unit: UnitCosts,
        /// **Units**: seconds.
        optimizer_s: f64,
    },
    /// By kernels and links.
    Kernels(Box<Rates>),
    /// As operations of models were measured.
    Measured(Box<MeasuredCosts>),
}

/// How fast kernels run and links carry.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// Share of a device that communication takes from products and attention.
    pub communication_share: f64,
    /// Before each kernel. **Units**: seconds.
    pub launch_s: f64,
    /// Of matrix products.
    pub products: Vec<ProductRate>,
    /// Of attention's core forward. **Units**: FLOP/s.
    pub attention: f64,
    /// And backward, where scores are computed again. **Units**: FLOP/s.
    pub attention_backward: f64,
    /// Of kernels that memory holds up.
    pub bandwidth: Bandwidth,
    /// Between two ranks of a node.
    pub inside: Link,
    /// Between two nodes.
    pub across: Link,
    /// All-to-alls of the expert group.
    pub exchange: Exchange,
    /// What is left to chance.
    pub chance: Chance,
    /// What was fitted to a measurement.
    pub calibrated: Calibrated,
}

/// A role of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// One matrix of weights.
    Dense,
    /// As many as the rank has experts, each with its own rows.
    Grouped,
    /// The gradient of weights.
    Weight,
}

impl Role {
    const NAMES: [(Role, &str); 3] =
        [(Role::Dense, "dense"), (Role::Grouped, "grouped"), (Role::Weight, "weight")];

    /// As profiles write it.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }
}

/// How fast a matrix product runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductRate {
    /// Its role.
    pub role: Role,
    /// Of its factors.
    pub format: NumberFormat,
    /// Columns of the result and length of the sums; nothing where the rate is that of all shapes.
    pub shape: Option<(usize, usize)>,
    /// **Units**: FLOP/s.
    pub flops: f64,
}

/// Bytes that kernels read and write, in a second.
///
/// **Units**: bytes/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Norms.
    pub norm: f64,
    /// SwiGLU.
    pub swiglu: f64,
    /// Casts to a narrow format, and turning what is in one.
    pub cast: f64,
    /// What comes before and behind attention's core in its backward pass.
    pub attention_ends: f64,
    /// Rows put in order, sums of two tensors, rotations, the loss.
    pub copy: f64,
    /// The optimizer.
    pub update: f64,
}

/// How all-to-alls travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// 2: a row crosses once to each node and is passed on there; 1: once to each rank.
    pub hops: u64,
    /// Rows of two hops between nodes, counted once for each node of a token's experts, the own one among them: dispatch, combine.
    ///
    /// **Units**: bytes/s.
    pub across: [f64; 2],
    /// Rows inside a node, counted once for each rank of a token's experts: dispatch, combine. **Units**: bytes/s.
    pub inside: [f64; 2],
    /// Before rows move: ranks agree on counts. **Units**: seconds.
    pub barrier_s: f64,
}

/// What is left to chance, drawn from a seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance {
    /// Coefficient of variation of how often experts are chosen, over the experts of a layer in a micro-batch.
    pub expert_cv: f64,
    /// Coefficient of variation of a computation's duration, over ranks and times.
    pub jitter_cv: f64,
    /// Of the draws.
    pub seed: u64,
}

/// What was fitted to a measurement, each 0 where nothing was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Calibrated {
    /// How much slower than the mean the stages at the ends compute; those in the middle are as much faster.
    pub stage_imbalance: f64,
    /// On top of each transfer between pipeline ranks. **Units**: seconds.
    pub hop_latency_s: f64,
}

/// A published figure of the run, and why the simulation differs from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// `step` or one of the components.
    pub name: &'static str,
    /// **Units**: seconds of a step.
    pub seconds: f64,
    /// In words.
    pub cause: String,
}

/// The names of what can be published: the whole step and the six components of a breakdown.
pub const PUBLISHED: [&str; 7] = ["step", "1F", "bubble", "1B", "1W", "1F1B", "optimizer"];

impl Cluster {
    /// A built-in profile by name, or else a file.
    ///
    /// # Errors
    /// Every fault at once, with the paths of the keys.
    pub fn load(name: &str) -> Result<Self, Faults> {
        match PROFILES.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::from_toml(name, text),
            None => {
                let text = files::read_to_string(Path::new(name)).map_err(|error| {
                    let mut faults = Faults::default();
                    let expected = format!("a file, or one of {}", cluster_names().join(", "));
                    faults.expected(name, expected, error);
                    faults
                })?;
                Self::from_toml(name, &text)
            }
        }
    }

    /// The profile of a text.
    ///
    /// # Errors
    /// As [`Cluster::load`].
    pub fn from_toml(name: &str, text: &str) -> Result<Self, Faults> {
        let faults = RefCell::new(Faults::default());
        let table = read_table(name, text)?;
        let mut root = Section::root(&table, &faults);
        let costs = if root.has("actions") {
            actions(&mut root)
        } else if root.has("measured") {
            Costs::Measured(Box::new(MeasuredCosts::read(&mut root)))
        } else {
            Costs::Kernels(Box::new(rates(&mut root)))
        };
        let cluster = Cluster {
            name: name.to_owned(),
            ranks: root.whole("ranks") as usize,
            ranks_per_node: root.whole("ranks_per_node") as usize,
            memory_bytes: root.whole("memory_bytes"),
            peak_flops: root.number("peak_flops", Range::Positive),
            costs,
            published: root.rows("published").into_iter().map(published).collect(),
        };
        root.close();
        let mut found = Faults::default();
        let faults = faults.into_inner();
        found.more = faults.more;
        for fault in faults.list {
            found.push(format!("{name}: {}", fault.path), fault.message);
        }
        found.into_result(cluster)
    }

    /// The constants that were fitted, by key, and the same cluster without each.
    pub fn calibrated(&self) -> Vec<(&'static str, f64, Cluster)> {
        let Costs::Kernels(rates) = &self.costs else { return Vec::new() };
        let Calibrated { stage_imbalance, hop_latency_s } = rates.calibrated;
        let without = |calibrated: Calibrated| Cluster {
            costs: Costs::Kernels(Box::new(Rates { calibrated, ..rates.as_ref().clone() })),
            ..self.clone()
        };
        let all = [
            (
                "stage_imbalance",
                stage_imbalance,
                without(Calibrated { stage_imbalance: 0.0, ..rates.calibrated }),
            ),
            ("hop_latency_s", hop_latency_s, without(Calibrated { hop_latency_s: 0.0, ..rates.calibrated })),
        ];
        all.into_iter().filter(|(_, value, _)| *value != 0.0).collect()
    }

    /// The rates, where work is counted by kernels.
    pub fn rates(&self) -> Option<&Rates> {
        match &self.costs {
            Costs::Kernels(rates) => Some(rates),
            Costs::Actions { .. } | Costs::Measured(_) => None,
        }
    }
}

/// The table of a text, laid over the one that it is based on.
fn read_table(name: &str, text: &str) -> Result<Table, Faults> {
    let fault = |path: &str, expected: String, got: String| {
        let mut faults = Faults::default();
        faults.expected(path, expected, got);
        faults
    };
    let mut table = text.parse::<Table>().map_err(|error| {
        fault(
            name,
            "valid TOML".to_owned(),
            format!("an error: {}", error.to_string().trim_end().replace('\n', ", ")),
        )
    })?;
    let Some(base) = table.remove("based_on") else { return Ok(table) };
    let known = base.as_str().and_then(|base| PROFILES.iter().find(|(known, _)| *known == base));
    let Some((_, text)) = known else {
        let expected = format!("one of {}", cluster_names().join(", "));
        return Err(fault(&format!("{name}: based_on"), expected, base.to_string()));
    };
    let mut whole = read_table(name, text)?;
    lay_over(&mut whole, table);
    Ok(whole)
}

/// Sections are laid over each other key by key; every other value replaces what was there.
fn lay_over(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

fn actions(root: &mut Section) -> Costs {
    let mut section = root.section("actions");
    let mut seconds = |key| section.number(key, Range::Positive);
    let [f, i, w, fb] = ["f_s", "i_s", "w_s", "fb_s"].map(&mut seconds);
    let optimizer_s = section.number_or("optimizer_s", Range::NotNegative, 0.0);
    section.close();
    Costs::Actions { unit: UnitCosts { f, b: i + w, i, w, fb }, optimizer_s }
}

fn rates(root: &mut Section) -> Rates {
    let mut compute = root.section("compute");
    let mut network = root.section("network");
    let mut bandwidth = compute.section("bandwidth");
    let mut attention = compute.section("attention");
    let (inside, across) = (link(network.section("inside")), link(network.section("across")));
    let exchange = exchange(network.section("exchange"));
    let rates = Rates {
        communication_share: compute.number_or("communication_share", Range::Share, 0.0),
        launch_s: compute.number_or("launch_s", Range::NotNegative, 0.0),
        products: compute.rows("products").into_iter().map(product).collect(),
        attention: attention.number("forward", Range::Positive),
        attention_backward: attention.number("backward", Range::Positive),
        bandwidth: Bandwidth {
            norm: bandwidth.number("norm", Range::Positive),
            swiglu: bandwidth.number("swiglu", Range::Positive),
            cast: bandwidth.number("cast", Range::Positive),
            attention_ends: bandwidth.number("attention_ends", Range::Positive),
            copy: bandwidth.number("copy", Range::Positive),
            update: bandwidth.number("update", Range::Positive),
        },
        inside,
        across,
        exchange,
        chance: root
            .section_or_empty("chance")
            .map_or(Chance { expert_cv: 0.0, jitter_cv: 0.0, seed: 1 }, chance),
        calibrated: root.section_or_empty("calibrated").map_or(Calibrated::default(), calibrated),
    };
    for section in [bandwidth, attention, compute, network] {
        section.close();
    }
    rates
}

fn product(mut row: Section) -> ProductRate {
    let role = row.word("role", &Role::NAMES.map(|(_, name)| name));
    let format = row.word("format", &["fp8", "bf16", "f32"]);
    let has_shape = row.has("n") || row.has("k");
    let rate = ProductRate {
        role: Role::NAMES.iter().find(|(_, name)| *name == role).map_or(Role::Dense, |(role, _)| *role),
        format: match format {
            "fp8" => NumberFormat::Fp8,
            "bf16" => NumberFormat::Bf16,
            _ => NumberFormat::F32,
        },
        shape: has_shape.then(|| (row.whole("n") as usize, row.whole("k") as usize)),
        flops: row.number("flops", Range::Positive),
    };
    row.close();
    rate
}

fn exchange(mut section: Section) -> Exchange {
    let mut speed = |key| section.number(key, Range::Positive);
    let across = ["dispatch_across", "combine_across"].map(&mut speed);
    let inside = ["dispatch_inside", "combine_inside"].map(&mut speed);
    let hops = match section.word("hops", &["one", "two"]) {
        "two" => 2,
        _ => 1,
    };
    let barrier_s = section.number_or("barrier_s", Range::NotNegative, 0.0);
    section.close();
    Exchange { hops, across, inside, barrier_s }
}

fn chance(mut section: Section) -> Chance {
    let chance = Chance {
        expert_cv: section.number_or("expert_cv", Range::NotNegative, 0.0),
        jitter_cv: section.number_or("jitter_cv", Range::NotNegative, 0.0),
        seed: section.number_or("seed", Range::NotNegative, 1.0) as u64,
    };
    section.close();
    chance
}

fn calibrated(mut section: Section) -> Calibrated {
    let calibrated = Calibrated {
        stage_imbalance: section.number_or("stage_imbalance", Range::Share, 0.0),
        hop_latency_s: section.number_or("hop_latency_s", Range::NotNegative, 0.0),
    };
    section.close();
    calibrated
}

fn published(mut row: Section) -> Published {
    let name = row.word("name", &PUBLISHED);
    let published =
        Published { name, seconds: row.number("seconds", Range::Positive), cause: row.text("cause") };
    row.close();
    published
}
