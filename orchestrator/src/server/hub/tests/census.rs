//! All jobs of a hub as its metrics have them.

use contraflow_proto::v1::JobState;

use super::*;
use crate::core::{Attachment, Registration};
use crate::server::census::census;

const JOBS: usize = 1_500;

#[tokio::test]
async fn running_jobs_come_before_those_in_the_queue_and_all_are_counted_however_many_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let (mut hub, mut batch) = (open(dir.path()), CommitBatch::default());
    let world = spec("", "").topology().world();
    let mut submit = |hub: &mut Hub, number: usize| {
        let user = format!("user {}", number % 3);
        // The newest are the most important ones.
        let priority = i32::from(number >= JOBS - 3);
        hub.submit(Box::new(JobSpec { min_ranks: world, priority, ..*spec(&user, "") }), &mut batch).unwrap()
    };
    let all: Vec<JobId> = (0..JOBS).map(|number| submit(&mut hub, number)).collect();
    // The oldest have ended, and the newest run.
    let mut batch = CommitBatch::default();
    for &job in &all[..20] {
        hub.step(Event::Cancel { job, reason: String::new() }, &mut batch);
    }
    let registration = Registration { worker: 1, slots: 3 * world, ..Registration::default() };
    let attached = Attachment { registration, storage_id: "mark".into(), ..Attachment::default() };
    hub.step(Event::Attached(Box::new(attached)), &mut batch);
    // One in the middle goes.
    hub.step(Event::Cancel { job: all[700], reason: String::new() }, &mut batch);
    let queued = (JOBS - 24) as u64;
    let counts = vec![(JobState::Queued, queued), (JobState::Forming, 3), (JobState::Cancelled, 21)];
    let whole = census(&hub, JOBS);
    assert_eq!((&whole.by_state, whole.open.len(), whole.left_out), (&counts, JOBS - 21, 0));
    let cut = census(&hub, 50);
    let ids: Vec<String> = cut.open.iter().map(|job| job.job.clone()).collect();
    let expected = all[JOBS - 3..].iter().chain(&all[20..67]);
    let expected: Vec<String> = expected.map(JobId::to_string).collect();
    assert_eq!((&cut.by_state, ids, cut.left_out), (&counts, expected, queued + 3 - 50));
    let forming = cut.open.iter().filter(|job| job.state() == JobState::Forming);
    assert_eq!(forming.count(), 3);
}
