//! `contraflow bench simulation`: a job of many simulated ranks under faults, decided by the real core, in one thread.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use contraflow_orchestrator::simulation::run_large;
use serde::Serialize;

use super::checkpoint::peak_memory;
use super::cpu_seconds;
use crate::failure::Failure;

/// What the simulation did, and what it took.
#[derive(Debug, Serialize)]
pub(super) struct SimulationFigures {
    ranks: usize,
    steps: u64,
    simulated_s: f64,
    made_steps: u64,
    formations: u64,
    faults: BTreeMap<String, u64>,
    events: u64,
    events_per_second: f64,
    wall_s: f64,
    cpu_s: f64,
    peak_memory_bytes: u64,
    /// A digest of everything that happened, in hex: the same for the same seed.
    trace: String,
    violation: Option<String>,
    /// How the job has ended.
    outcome: String,
}

/// Runs it.
///
/// **Errors**: code 2 for fewer ranks than a worker has.
pub(super) fn run(ranks: usize, steps: u64, seed: u64) -> Result<SimulationFigures, Failure> {
    if !(8..=1 << 20).contains(&ranks) || steps == 0 {
        return Err(Failure::input(format!(
            "expected 8 (a worker's) to 1048576 ranks and at least 1 step, got {ranks} and {steps}"
        )));
    }
    let (began, before) = (Instant::now(), cpu_seconds());
    let report = run_large(ranks, steps, seed);
    let (wall_s, cpu_s) = (began.elapsed().as_secs_f64(), cpu_seconds() - before);
    let faults = report.faults.iter().map(|(fault, times)| (format!("{fault:?}").to_lowercase(), *times));
    Ok(SimulationFigures {
        ranks,
        steps,
        simulated_s: report.ended_ms as f64 / 1e3,
        made_steps: report.steps,
        formations: report.formations,
        faults: faults.collect(),
        events: report.events,
        events_per_second: report.events as f64 / wall_s.max(1e-9),
        wall_s,
        cpu_s,
        peak_memory_bytes: peak_memory(),
        trace: format!("{:016x}", report.trace),
        violation: report.violation,
        outcome: report.outcomes.join("; "),
    })
}

impl SimulationFigures {
    /// **Errors**: code 1 if an invariant was violated, or the job ended early.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        let SimulationFigures { steps, made_steps, .. } = self;
        match &self.violation {
            None if made_steps < steps => {
                Err(Failure::run(format!("expected {steps} steps, got {made_steps}: {}", self.outcome)))
            }
            None => Ok(()),
            Some(violation) => Err(Failure::run(format!("after {:.3} s: {violation}", self.simulated_s))),
        }
    }
}

impl fmt::Display for SimulationFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> =
            self.faults.iter().map(|(fault, times)| format!("{times} {fault}")).collect();
        let SimulationFigures { ranks, steps, simulated_s, made_steps, formations, .. } = self;
        writeln!(
            f,
            "{ranks} ranks, {steps} steps in {simulated_s:.0} s of simulated time: {made_steps} made, {formations} formations"
        )?;
        writeln!(f, "faults: {} ({})", self.faults.values().sum::<u64>(), faults.join(", "))?;
        writeln!(f, "{} events, {:.0}/s", self.events, self.events_per_second)?;
        let peak = self.peak_memory_bytes >> 20;
        writeln!(f, "{:.1} s, {:.1} CPU seconds, peak memory {peak} MiB", self.wall_s, self.cpu_s)?;
        writeln!(f, "trace {}", self.trace)
    }
}
