//! `contraflow bench simulation`: a job of many simulated ranks under faults, decided by the real core, in one thread.

use std::time::Instant;

use contraflow_orchestrator::simulation::{Report, run_large};

use super::checkpoint::peak_memory;
use super::cpu_seconds;
use crate::failure::Failure;
use crate::output::print;

/// Runs the command; figures go to stdout.
///
/// **Errors**: code 2 for fewer ranks than a worker has; code 1 if a promise is broken.
pub fn run(ranks: usize, steps: u64, seed: u64) -> Result<(), Failure> {
    if ranks < 8 || steps == 0 {
        return Err(Failure::input(format!(
            "expected at least 8 ranks (a worker's) and 1 step, got {ranks} and {steps}"
        )));
    }
    let (began, before) = (Instant::now(), cpu_seconds());
    let report = run_large(ranks, steps, seed);
    let (wall, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - before);
    print(&format_summary((ranks, steps), &report, (wall, cpu)))?;
    match report.violation {
        None if report.steps < steps => {
            Err(Failure::run(format!("expected {steps} steps, got {}: the job ended early", report.steps)))
        }
        None => Ok(()),
        Some(violation) => Err(Failure::run(format!("after {} ms: {violation}", report.ended_ms))),
    }
}

fn format_summary((ranks, steps): (usize, u64), report: &Report, (wall, cpu): (f64, f64)) -> String {
    let faults: Vec<String> =
        report.faults.iter().map(|(fault, times)| format!("{times} {fault:?}").to_lowercase()).collect();
    format!(
        "{ranks} ranks, {steps} steps in {:.0} s of simulated time: {} made, {} formations\n\
         faults: {} ({})\n\
         {} events, {:.0}/s\n\
         {wall:.1} s, {cpu:.1} CPU seconds, peak memory {} MiB\n\
         trace {:016x}\n",
        report.ended_ms as f64 / 1e3,
        report.steps,
        report.formations,
        report.faults.values().sum::<u64>(),
        faults.join(", "),
        report.events,
        report.events as f64 / wall.max(1e-9),
        peak_memory() >> 20,
        report.trace,
    )
}
