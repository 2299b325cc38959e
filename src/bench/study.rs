//! Studies: a recipe trained again and again with one thing changed, with several seeds, and what the change does to the loss.
//!
//! Each training run is one file of the results' folder, written when it has ended and read from then on: a study goes on where it
//! was interrupted, and its raw results can be kept. Knows no question; those are in `balance`, `mtp` and `precision`.

mod arm;
mod curve;
mod report;
mod runs;

use std::path::PathBuf;

pub(super) use arm::{Arm, Study, TrainingRun};
pub(super) use curve::{Gap, Statistic};
pub(super) use report::{markdown, shown};
pub(super) use runs::Runs;

/// What every study can be asked for.
#[derive(clap::Args, Debug)]
pub(super) struct StudyArgs {
    /// Steps of each training run: 2000 for precision, else the recipe's 720
    #[arg(long, value_parser = clap::value_parser!(u64).range(20..))]
    pub(super) steps: Option<u64>,
    /// Training runs of each kind: seeds 1, 2, ...
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub(super) seeds: u64,
    /// Folder of the results; what is in it already is not trained again
    #[arg(long, value_name = "DIR", default_value = "docs/evidence")]
    pub(super) results: PathBuf,
    /// Train no more than this many runs, then report what is there
    #[arg(long, value_name = "N")]
    pub(super) at_most: Option<usize>,
}
