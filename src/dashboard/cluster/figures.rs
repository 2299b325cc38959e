//! The metrics of a cluster, by family: of the jobs and members that its services list. Pure; docs/metrics.md has the same names.

use std::collections::BTreeMap;

use contraflow_proto::v1;

use super::phase_of;
use crate::client::{goodput, state_of};
use crate::dashboard::shown::Phase;
use crate::otlp::families::{Family, Labels, Metrics, counter, gauge, label};

/// Open jobs with samples of their own in one answer of `/metrics`: labels stay few.
const MAX_JOBS: usize = 100;

/// Families of a cluster.
pub static OF_CLUSTERS: [Family; 14] = [
    gauge("contraflow_jobs", "Jobs that are known, by state."),
    gauge("contraflow_workers", "Members of the cluster, by whether they take ranks."),
    gauge("contraflow_slots", "Ranks that members can host."),
    gauge("contraflow_used_slots", "Ranks that members host."),
    counter(
        "contraflow_slot_seconds_total",
        "Slot time of all members by what it was used for, since the orchestrator started.",
    ),
    gauge("contraflow_worker_silence_seconds", "Time since a member's last heartbeat."),
    gauge("contraflow_job_step", "Latest step of an open job of which all ranks have reported."),
    gauge("contraflow_job_steps", "Steps of an open job's recipe."),
    gauge("contraflow_job_loss_nats", "Mean cross-entropy a token of an open job's latest step."),
    counter("contraflow_job_losses_total", "Times an open job has lost a rank."),
    counter("contraflow_job_slot_seconds_total", "Slot time of an open job by what it was used for."),
    counter("contraflow_job_queued_seconds_total", "Time that an open job has waited in the queue."),
    gauge("contraflow_job_slow_ranks", "Ranks of an open job that hold the others up."),
    counter("contraflow_orchestrator_starts_total", "Starts of the orchestrator on its state."),
];

/// Slot time by its use, as far as that is decided: what only grows.
fn by_use(goodput: &v1::Goodput) -> impl Iterator<Item = (Labels, f64)> + use<> {
    let decided = goodput::parts(goodput).into_iter().filter(|(of, _)| *of != "undecided");
    decided.map(|(of, seconds)| (label("use", of), seconds))
}

/// Adds the families of a cluster.
pub fn of_cluster(out: &mut Metrics, listed: &v1::ListResponse, members: &v1::NodesResponse) {
    let mut by_state: BTreeMap<String, f64> = BTreeMap::new();
    listed.jobs.iter().for_each(|job| *by_state.entry(state_of(job)).or_default() += 1.0);
    let is_open =
        |job: &&v1::Job| !matches!(phase_of(job.state()), Phase::Done | Phase::Failed | Phase::Stopped);
    let open: Vec<&v1::Job> = listed.jobs.iter().filter(is_open).take(MAX_JOBS).collect();
    let of_jobs = |value: fn(&v1::Job) -> f64| {
        open.iter().map(|job| (label("job", &job.job), value(job))).collect::<Vec<_>>()
    };
    let all = |value: f64| vec![(Labels::new(), value)];
    let workers = &members.workers;
    for family in &OF_CLUSTERS {
        let samples = match family.name {
            "contraflow_jobs" => {
                by_state.iter().map(|(state, count)| (label("state", state), *count)).collect()
            }
            "contraflow_workers" => {
                let draining = workers.iter().filter(|worker| worker.draining).count();
                vec![
                    (label("state", "draining"), draining as f64),
                    (label("state", "taking"), (workers.len() - draining) as f64),
                ]
            }
            "contraflow_slots" => all(workers.iter().map(|worker| worker.slots).sum::<u64>() as f64),
            "contraflow_used_slots" => all(workers.iter().map(|worker| worker.used).sum::<u64>() as f64),
            "contraflow_worker_silence_seconds" => {
                let of =
                    |worker: &v1::Worker| (label("worker", &worker.worker), worker.silent_ms as f64 / 1e3);
                workers.iter().map(of).collect()
            }
            "contraflow_slot_seconds_total" => members.goodput.iter().flat_map(by_use).collect(),
            "contraflow_job_slot_seconds_total" => {
                let of_job = |job: &&v1::Job| {
                    let of_use = job.goodput.iter().flat_map(by_use).filter(|(of, _)| of[0].1 != "idle");
                    let job = label("job", &job.job);
                    of_use.map(|(of, seconds)| ([job.clone(), of].concat(), seconds)).collect::<Vec<_>>()
                };
                open.iter().flat_map(of_job).collect()
            }
            "contraflow_job_queued_seconds_total" => of_jobs(|job| job.queued_seconds),
            "contraflow_job_step" => of_jobs(|job| job.step as f64),
            "contraflow_job_steps" => of_jobs(|job| job.steps as f64),
            "contraflow_job_loss_nats" => of_jobs(|job| job.loss.unwrap_or(f64::NAN)),
            "contraflow_job_losses_total" => of_jobs(|job| f64::from(job.losses)),
            "contraflow_job_slow_ranks" => {
                of_jobs(|job| job.ranks.iter().filter(|rank| rank.slow).count() as f64)
            }
            _ => all(members.incarnation as f64),
        };
        out.family(family, samples);
    }
}
