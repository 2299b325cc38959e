//! The simulator: what a training step takes on a cluster, from the very programs that the ranks execute.
//!
//! `cluster` is a machine as data, `kernels` what an operation runs, `duration` how long that takes, `measured` what it took on a machine,
//! `measured_durations` what follows from that, and `observed` how it is found in recorded steps, `chance` what is uneven about it;
//! `run` lets the programs of a recipe walk on the virtual clock under these durations, `breakdown` says where the time goes and
//! `prediction` what a user wants to know of it; `search` compares layouts; `rows` is what pictures show of a simulated or a recorded
//! step, `svg`, `trace` and `gantt` draw it in the colours of `palette`. The model and its
//! limits are in docs/simulator.md. Knows no actor and no wall clock.

mod breakdown;
mod chance;
mod cluster;
mod duration;
mod gantt;
mod kernels;
mod link;
mod measured;
mod measured_durations;
mod observed;
mod pair;
mod palette;
mod prediction;
mod rows;
mod run;
mod search;
mod section;
mod svg;
mod times;
mod trace;

pub use breakdown::{Breakdown, Components};
pub use cluster::{Calibrated, Chance, Cluster, Costs, Published, Rates, cluster_names};
pub use duration::Durations;
pub use gantt::gantt;
pub use kernels::{Kernel, KernelShapes, Traffic};
pub use measured::{LayerShape, MeasuredCosts, MeasuredModel, MeasuredOperation, UpdateSpeed};
pub use observed::{Observed, measured_links, measured_model};
pub use pair::{Pair, pair, pair_with};
pub use palette::{Shade, shade_of, shade_of_action};
pub use prediction::{Compared, Constant, Prediction, predict};
pub use rows::{Bar, Row, RowTimeline, StepTimeline, lane_name, recorded_rows, rows};
pub use run::{Run, operation_times, simulate_recipe, simulate_shapes, simulate_with};
pub use search::{Candidate, Choice, Search, Verdict, search};
pub use svg::svg;
pub use times::OperationTimes;
pub use trace::write_trace;
