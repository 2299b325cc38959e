//! How many workers a group is to have: more as soon as the queue lacks slots, fewer once the last ones have been idle for a while. Pure.

use std::time::Duration;

use contraflow_proto::v1;
use k8s_openapi::jiff::Timestamp;
use v1::JobState;

use crate::cluster::WorkerGroup;

/// How long workers are idle before they go.
pub const COOL_DOWN: Duration = Duration::from_secs(300);

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSize {
    /// Its name.
    pub name: String,
    /// Workers that it is to have.
    pub workers: i32,
    /// Since when its last workers have been idle; none: they are not.
    pub idle_since: Option<Timestamp>,
}

/// The least that a group has, and the most.
fn bounds(group: &WorkerGroup) -> (i32, i32) {
    let least = group.min_workers.max(0);
    (least, group.max_workers.unwrap_or(least).max(least))
}

/// A group as it is: what its StatefulSet was told last, within its bounds.
pub fn present(group: &WorkerGroup, replicas: Option<i32>, idle_since: Option<Timestamp>) -> GroupSize {
    let (least, most) = bounds(group);
    GroupSize { name: group.name.clone(), workers: replicas.unwrap_or(least).clamp(least, most), idle_since }
}

/// Slots that there are with every group at its most.
fn most_slots(groups: &[WorkerGroup]) -> i64 {
    groups.iter().map(|group| i64::from(bounds(group).1) * i64::from(group.slots)).sum()
}

fn waits(job: &v1::Job) -> bool {
    matches!(job.state(), JobState::Queued | JobState::Recovering)
}

/// Jobs in the queue that need more slots than the groups have at their most, in words: no worker is started for them.
pub fn too_large(groups: &[WorkerGroup], jobs: &[v1::Job]) -> Vec<String> {
    let most = most_slots(groups);
    let large = jobs.iter().filter(|job| waits(job) && i64::from(job.min_ranks) > most);
    let words = |job: &v1::Job| {
        format!("{} needs {} ranks, and all groups at their most have {most} slots", job.job, job.min_ranks)
    };
    large.map(words).collect()
}

/// Slots that jobs in the queue need and nobody has. Workers that are being started count as there.
pub fn lacking(
    groups: &[WorkerGroup],
    present: &[GroupSize],
    jobs: &[v1::Job],
    workers: &[v1::Worker],
) -> i64 {
    let slots = |size: &GroupSize| {
        groups.iter().find(|group| group.name == size.name).map_or(0, |group| i64::from(group.slots))
    };
    let there: i64 = present.iter().map(|size| i64::from(size.workers) * slots(size)).sum();
    let used: i64 = workers.iter().map(|worker| i64::try_from(worker.used).unwrap_or(0)).sum();
    let drained = workers.iter().filter(|worker| worker.draining);
    let drained: i64 =
        drained.map(|worker| i64::try_from(worker.slots.saturating_sub(worker.used)).unwrap_or(0)).sum();
    let most = most_slots(groups);
    let fit = jobs.iter().filter(|job| waits(job) && i64::from(job.min_ranks) <= most);
    // Ranks that a job has already are among those that are used.
    let is_there = |rank: &&v1::RankPlace| workers.iter().any(|worker| worker.worker == rank.worker);
    let has = |job: &v1::Job| i64::try_from(job.ranks.iter().filter(is_there).count()).unwrap_or(0);
    let needed: i64 = fit.map(|job| (i64::from(job.min_ranks) - has(job)).max(0)).sum();
    needed - (there - used - drained).max(0)
}

/// What each group is to have next. `cluster` is the name of the object, which pods are called after.
pub fn sizes(
    cluster: &str,
    groups: &[WorkerGroup],
    present: &[GroupSize],
    (jobs, workers): (&[v1::Job], &[v1::Worker]),
    now: Timestamp,
) -> Vec<GroupSize> {
    let mut lack = lacking(groups, present, jobs, workers);
    let size = |(group, present): (&WorkerGroup, &GroupSize)| {
        let (least, most) = bounds(group);
        if lack > 0 {
            let slots = i64::from(group.slots.max(1));
            let more =
                i32::try_from((lack + slots - 1) / slots).unwrap_or(i32::MAX).min(most - present.workers);
            lack -= i64::from(more) * slots;
            return GroupSize { workers: present.workers + more, idle_since: None, ..present.clone() };
        }
        let idle =
            idle(&format!("{cluster}-{}", group.name), present.workers, workers).min(present.workers - least);
        let since = present.idle_since.unwrap_or(now);
        let lasted = now.as_second().saturating_sub(since.as_second());
        match idle {
            ..=0 => GroupSize { idle_since: None, ..present.clone() },
            // A job in the queue may be about to take them.
            _ if lack > -i64::from(group.slots) => GroupSize { idle_since: None, ..present.clone() },
            idle if lasted >= i64::try_from(COOL_DOWN.as_secs()).unwrap_or(i64::MAX) => {
                // Only what the queue does not need.
                let spare = i32::try_from(-lack / i64::from(group.slots.max(1))).unwrap_or(i32::MAX);
                let fewer = idle.min(spare);
                lack += i64::from(fewer) * i64::from(group.slots);
                GroupSize { workers: present.workers - fewer, idle_since: None, ..present.clone() }
            }
            _ => GroupSize { idle_since: Some(since), ..present.clone() },
        }
    };
    groups.iter().zip(present).map(size).collect()
}

/// Pods at the end of a StatefulSet that host no rank: those that go first.
fn idle(set: &str, pods: i32, workers: &[v1::Worker]) -> i32 {
    let is_busy = |pod: &str| {
        let of_pod = |worker: &&v1::Worker| {
            worker.worker == pod || worker.worker.rsplit_once('-').is_some_and(|(host, _)| host == pod)
        };
        workers.iter().filter(of_pod).any(|worker| worker.used > 0)
    };
    let idle = (0..pods).rev().take_while(|ordinal| !is_busy(&format!("{set}-{ordinal}"))).count();
    i32::try_from(idle).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, min_workers: i32, max_workers: Option<i32>) -> WorkerGroup {
        WorkerGroup { name: name.into(), min_workers, max_workers, slots: 4, ..WorkerGroup::default() }
    }

    fn job(state: JobState, min_ranks: u32) -> v1::Job {
        v1::Job { state: state.into(), min_ranks, ..v1::Job::default() }
    }

    fn worker(pod: &str, used: u64) -> v1::Worker {
        v1::Worker { worker: format!("{pod}-1"), slots: 4, used, ..v1::Worker::default() }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap_or_default()
    }

    fn next(
        groups: &[WorkerGroup],
        present: &[GroupSize],
        jobs: &[v1::Job],
        workers: &[v1::Worker],
        now: i64,
    ) -> Vec<GroupSize> {
        sizes("c", groups, present, (jobs, workers), at(now))
    }

    #[test]
    fn a_group_grows_by_what_the_queue_lacks_and_no_further_while_its_pods_start() {
        let groups = [group("a", 1, Some(5))];
        let one = [present(&groups[0], None, None)];
        let queue = [job(JobState::Queued, 8), job(JobState::Running, 4), job(JobState::Done, 100)];
        let busy = [worker("c-a-0", 4)];
        let grown = next(&groups, &one, &queue, &busy, 0);
        assert_eq!(grown[0].workers, 3);
        // Its two new pods have not joined yet.
        assert_eq!(next(&groups, &grown, &queue, &busy, 1), grown);
        let more = [job(JobState::Queued, 12), job(JobState::Queued, 12)];
        assert_eq!(next(&groups, &grown, &more, &busy, 1)[0].workers, 5);
    }

    #[test]
    fn a_job_that_no_number_of_workers_has_room_for_starts_none() {
        let groups = [group("a", 1, Some(5))];
        let one = [present(&groups[0], None, None)];
        let large = v1::Job { job: "job-3".into(), ..job(JobState::Queued, 21) };
        let queue = [large, job(JobState::Queued, 8), job(JobState::Running, 100)];
        assert_eq!(next(&groups, &one, &queue, &[], 0)[0].workers, 2);
        assert_eq!(
            too_large(&groups, &queue),
            ["job-3 needs 21 ranks, and all groups at their most have 20 slots"]
        );
        assert_eq!(too_large(&groups, &[job(JobState::Queued, 20)]), [] as [&str; 0]);
    }

    #[test]
    fn ranks_that_a_recovering_job_has_are_not_asked_for_again() {
        let groups = [group("a", 2, Some(5))];
        let two = [present(&groups[0], None, None)];
        let place = |pod: &str| v1::RankPlace { worker: format!("{pod}-1"), ..v1::RankPlace::default() };
        // Four of its eight ranks were on a pod that is gone; another one is being started.
        let ranks = [vec![place("c-a-0"); 4], vec![place("gone"); 4]].concat();
        let recovering = v1::Job { ranks, ..job(JobState::Recovering, 8) };
        let queue = [recovering];
        assert_eq!(lacking(&groups, &two, &queue, &[worker("c-a-0", 4)]), 0);
        assert_eq!(next(&groups, &two, &queue, &[worker("c-a-0", 4)], 0)[0].workers, 2);
    }

    #[test]
    fn what_one_group_cannot_have_the_next_one_gets() {
        let groups = [group("a", 1, Some(2)), group("b", 0, Some(9)), group("fixed", 1, None)];
        let now: Vec<GroupSize> = groups.iter().map(|group| present(group, None, None)).collect();
        let grown = next(&groups, &now, &[job(JobState::Queued, 24)], &[], 0);
        assert_eq!(grown.iter().map(|size| size.workers).collect::<Vec<_>>(), [2, 3, 1]);
    }

    #[test]
    fn the_last_workers_go_after_they_have_been_idle_for_a_while() {
        let groups = [group("a", 1, Some(5))];
        let four = [present(&groups[0], Some(4), None)];
        let workers = [worker("c-a-0", 0), worker("c-a-1", 2), worker("c-a-2", 0), worker("c-a-3", 0)];
        let noticed = next(&groups, &four, &[], &workers, 1000);
        assert_eq!((noticed[0].workers, noticed[0].idle_since), (4, Some(at(1000))));
        let waiting = next(&groups, &noticed, &[], &workers, 1299);
        assert_eq!(waiting, noticed);
        // The first one is idle too, but one that is not stands behind it.
        assert_eq!(next(&groups, &noticed, &[], &workers, 1300)[0].workers, 2);
        // A rank on the last one begins the wait anew.
        let taken = [worker("c-a-3", 1)];
        assert_eq!(next(&groups, &noticed, &[], &taken, 1299)[0].idle_since, None);
        // Jobs are about to take what is idle.
        let queue = [job(JobState::Queued, 13)];
        assert_eq!(next(&groups, &noticed, &queue, &workers, 1300)[0].workers, 4);
    }

    #[test]
    fn a_group_never_leaves_its_bounds() {
        let bounded = group("a", 2, Some(3));
        assert_eq!(present(&bounded, Some(9), None).workers, 3);
        assert_eq!(present(&bounded, Some(0), None).workers, 2);
        let idle = [present(&bounded, Some(3), Some(at(0)))];
        assert_eq!(next(&[bounded], &idle, &[], &[], 1000)[0].workers, 2);
    }
}
