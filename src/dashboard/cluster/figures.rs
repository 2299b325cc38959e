//! The metrics of a cluster, by family: of all its jobs and members. Pure; docs/metrics.md has the same names.

use contraflow_orchestrator::server::Census;
use contraflow_proto::v1;

use crate::client::{goodput, name_of};
use crate::otlp::families::{Family, Labels, Metrics, counter, gauge, label};

/// Open jobs with samples of their own in one answer of `/metrics`: labels are bounded.
pub const MAX_JOBS: usize = 1_000;

/// Families of a cluster.
pub static OF_CLUSTERS: [Family; 15] = [
    gauge("contraflow_jobs", "Jobs that are known, by state."),
    gauge("contraflow_jobs_left_out", "Open jobs beyond those that have samples of their own."),
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
pub fn of_cluster(out: &mut Metrics, jobs: &Census, members: &v1::NodesResponse) {
    let open = &jobs.open;
    let of_jobs = |value: fn(&v1::Job) -> f64| {
        open.iter().map(|job| (label("job", &job.job), value(job))).collect::<Vec<_>>()
    };
    let all = |value: f64| vec![(Labels::new(), value)];
    let workers = &members.workers;
    for family in &OF_CLUSTERS {
        let samples = match family.name {
            "contraflow_jobs" => {
                let of =
                    |(state, count): &(v1::JobState, u64)| (label("state", &name_of(*state)), *count as f64);
                jobs.by_state.iter().map(of).collect()
            }
            "contraflow_jobs_left_out" => all(jobs.left_out as f64),
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
                let of_job = |job: &v1::Job| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_open_job_has_its_samples_and_ended_ones_are_counted() {
        let job = |number: usize| v1::Job {
            job: format!("job-{number}"),
            step: number as u64,
            losses: 1,
            goodput: Some(v1::Goodput { committed: 2.0, ..v1::Goodput::default() }),
            ..v1::Job::default()
        };
        let by_state = vec![(v1::JobState::Running, 700), (v1::JobState::Done, 9_000)];
        let census = Census { by_state, open: (0..700).map(job).collect(), left_out: 3 };
        let mut metrics = Metrics::default();
        of_cluster(&mut metrics, &census, &v1::NodesResponse::default());
        let samples = |name: &str| {
            let found = metrics.families.iter().find(|(family, _)| family.name == name);
            found.map_or(&[][..], |(_, samples)| samples)
        };
        let states = [(label("state", "running"), 700.0), (label("state", "done"), 9_000.0)];
        assert_eq!(samples("contraflow_jobs"), states);
        assert_eq!(samples("contraflow_jobs_left_out"), [(Labels::new(), 3.0)]);
        let steps = samples("contraflow_job_step");
        assert_eq!((steps.len(), &steps[699]), (700, &(label("job", "job-699"), 699.0)));
        assert_eq!(samples("contraflow_job_slot_seconds_total").len(), 4 * 700);
        assert_eq!(samples("contraflow_job_loss_nats"), []);
    }
}
