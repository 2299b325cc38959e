//! The jobs of a cluster as its metrics have them: all of them counted by state, and those that have not ended one by one, as far as
//! there is room.

use std::cmp::Reverse;

use contraflow_proto::v1;
use contraflow_runtime::topology::JobId;

use super::hub::Hub;
use super::jobs_api::{describe, state};
use crate::core::jobs::{JobRecord, Phase};

/// All jobs that are known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Census {
    /// How many are in each state; none of those that no job is in.
    pub by_state: Vec<(v1::JobState, u64)>,
    /// Jobs that have not ended: those that hold slots first, each part in the order of submission.
    pub open: Vec<v1::Job>,
    /// How many jobs that have not ended are not among these.
    pub left_out: u64,
}

/// Counts all jobs, and describes at most so many of the open ones.
pub(super) fn census(hub: &Hub, most: usize) -> Census {
    let core = hub.core();
    let mut by_state: Vec<(v1::JobState, u64)> = Vec::new();
    let mut open: Vec<(Reverse<bool>, JobId)> = Vec::new();
    for (&job, record) in &core.jobs().all {
        let state = state(record, core.is_running(job));
        match by_state.iter_mut().find(|(of, _)| *of == state) {
            Some((_, count)) => *count += 1,
            None => by_state.push((state, 1)),
        }
        if !record.has_ended() {
            open.push((Reverse(has_slots(record)), job));
        }
    }
    by_state.sort_unstable();
    open.sort_unstable();
    let left_out = open.len().saturating_sub(most) as u64;
    let open = open.into_iter().take(most).map(|(_, job)| describe(hub, job)).collect();
    Census { by_state, open, left_out }
}

fn has_slots(record: &JobRecord) -> bool {
    matches!(record.phase, Phase::Formed | Phase::Broken)
}
