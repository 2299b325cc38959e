//! `contraflow dashboard`: runs that are over, or that another process trains, from their folders.

use std::path::{Path, PathBuf};

use super::folder::of_folder;
use super::server::{Door, DoorArgs, Listen};
use super::subject::Subject;
use crate::failure::Failure;
use crate::interrupt::{self, Signals};
use crate::output::{count, say};
use crate::run_dir::{self, RUNS};

/// Most runs of one dashboard: each is read and kept whole.
const MAX_RUNS: usize = 50;

/// Arguments of `contraflow dashboard`.
#[derive(clap::Args, Debug)]
pub struct DashboardArgs {
    /// Runs, by folder or name [default: the latest 50 of runs/]
    #[arg(value_name = "RUN")]
    pub runs: Vec<String>,
    /// Where it is served [default: 127.0.0.1:7080, or any port if that is taken]
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<Listen>,
    /// What viewers have to know; needed where others than this machine can reach it
    #[arg(long, value_name = "TOKEN", env = "CONTRAFLOW_DASHBOARD_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
}

/// Runs the command, until it is interrupted.
///
/// **Errors**: code 2 with every run that is not there; where it cannot be served.
pub fn run(args: &DashboardArgs) -> Result<(), Failure> {
    if args.listen == Some(Listen::Off) {
        return Err(Failure::input("--listen off: expected HOST:PORT, there is nothing else to do"));
    }
    let folders = if args.runs.is_empty() { latest()? } else { named(&args.runs)? };
    let door = Door::open(&DoorArgs { listen: args.listen, token: args.token.clone() })?;
    let failed = |error: std::io::Error| Failure::run(format!("dashboard: {error}"));
    let runs = folders.iter().map(|run| of_folder(run)).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let shown = count(runs.len(), "run");
    let dashboard = door.map(|door| door.serve(Subject::of_runs(runs))).transpose()?;
    dashboard.iter().for_each(|dashboard| say(format_args!("dashboard of {shown}: {}", dashboard.url())));
    interrupt::runtime()?.block_on(async {
        Signals::listen()?.next().await;
        Ok(())
    })
}

fn named(names: &[String]) -> Result<Vec<PathBuf>, Failure> {
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    for name in names {
        match run_dir::find_run(name) {
            Ok(run) => found.push(run_dir::without_link(&run)),
            Err(fault) => faults.push(fault),
        }
    }
    if found.len() > MAX_RUNS {
        faults.push(format!("expected at most {MAX_RUNS} runs, got {}", found.len()));
    }
    let mut ids: Vec<String> = found.iter().map(|run| run_dir::name_of(run)).collect();
    ids.sort();
    ids.windows(2).filter(|pair| pair[0] == pair[1]).for_each(|pair| {
        faults.push(format!("{}: expected runs of different names, got two of this one", pair[0]));
    });
    if faults.is_empty() { Ok(found) } else { Err(Failure::faults("dashboard", &faults)) }
}

/// The runs that changed last, the latest first.
fn latest() -> Result<Vec<PathBuf>, Failure> {
    let runs = run_dir::list(Path::new(RUNS)).map_err(|error| Failure::input(format!("{RUNS}: {error}")))?;
    let mut runs: Vec<_> = runs.into_iter().filter(|run| run_dir::is_run(run)).collect();
    if runs.is_empty() {
        return Err(Failure::input(
            "dashboard: expected a run, got none in runs/; contraflow train makes one",
        ));
    }
    runs.sort_by_key(|run| std::cmp::Reverse(run_dir::last_change(run)));
    runs.truncate(MAX_RUNS);
    Ok(runs)
}
