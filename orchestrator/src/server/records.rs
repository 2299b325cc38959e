//! The record of a job's steps, for the worker that keeps it in the job's folder: what is durable, some steps at a time. Knows no
//! file.

use contraflow_proto::{StepRecord, v1};
use contraflow_runtime::control::wire::formation_of;
use contraflow_runtime::topology::{FormationId, JobId, Rank};
use tonic::Status;

use super::Handle;
use super::hub::Hub;
use crate::store::{Store, StoreError};

/// Steps of one answer.
const AT_ONCE: usize = 256;

/// Answers a worker that asks for the steps after one that it has.
///
/// **Errors**: the hub has ended.
pub(super) async fn answer(hub: &Handle, worker: u64, wanted: v1::RecordsWanted) -> Result<(), Status> {
    let Ok(of) = formation_of(wanted.job, wanted.generation) else { return Ok(()) };
    let store = hub.ask(move |hub| keeps(hub, of, worker).then(|| hub.store())).await?;
    let (job, generation) = (wanted.job, wanted.generation);
    let answer = match store {
        None => v1::Records { job, generation, is_over: true, ..v1::Records::default() },
        Some(store) => {
            let read = tokio::task::spawn_blocking(move || {
                read(&store, of.job, (wanted.after_step, wanted.of_generation))
            });
            // It asks again after the next step.
            let Ok(Ok((after_step, records))) = read.await else { return Ok(()) };
            v1::Records { job, generation, after_step, records, is_over: false }
        }
    };
    hub.ask(move |hub| hub.tell(worker, v1::to_worker::Message::Records(answer))).await
}

/// Whether a worker hosts rank 0 of the latest formation of a job, or did when the job ended.
fn keeps(hub: &Hub, of: FormationId, worker: u64) -> bool {
    let record = hub.core().jobs().all.get(&of.job);
    let formed = record.and_then(|record| record.formed.as_ref());
    formed.is_some_and(|formed| {
        formed.generation == of.generation && formed.place_of(Rank::ZERO) == Some(worker)
    })
}

/// The steps after one; all of them if that one is not on record as the generation made it: the job has gone back since.
fn read(
    store: &Store,
    job: JobId,
    (step, generation): (u64, u32),
) -> Result<(u64, Vec<StepRecord>), StoreError> {
    let decode = |bytes: &[u8]| serde_json::from_slice::<StepRecord>(bytes).ok();
    let known = store.steps(job.bits(), step)?.next().transpose()?.and_then(|(_, bytes)| decode(&bytes));
    let is_known = known.is_some_and(|known| (known.step, known.generation) == (step, generation));
    let after = if is_known { step } else { 0 };
    let entries = store.steps(job.bits(), after + 1)?.take(AT_ONCE);
    let records = entries.map(|entry| Ok(decode(&entry?.1))).collect::<Result<Vec<_>, StoreError>>()?;
    Ok((after, records.into_iter().flatten().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Batch;

    #[test]
    fn steps_of_another_history_are_told_again_from_the_first_one_on() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(&dir.path().join("state")).unwrap();
        let job = JobId::new(7, 1);
        let record = |step: u64| {
            let record = StepRecord { step, generation: 1 + u32::from(step > 2), ..StepRecord::default() };
            (step, serde_json::to_vec(&record).unwrap())
        };
        let steps = [(job.bits(), (1..=400).map(record).collect())].into();
        store.keep(&Batch { steps, ..Batch::default() }).unwrap();
        let told = |step: u64, generation: u32| {
            let (after, records) = read(&store, job, (step, generation)).unwrap();
            let steps: Vec<u64> = records.iter().map(|record| record.step).collect();
            assert!(steps.iter().copied().eq(after + 1..=after + steps.len() as u64), "{steps:?}");
            (after, steps.len())
        };
        assert_eq!(told(0, 0), (0, AT_ONCE));
        assert_eq!((told(2, 1), told(399, 2), told(400, 2)), ((2, AT_ONCE), (399, 1), (400, 0)));
        assert_eq!((told(3, 1), told(2, 2), told(401, 2)), ((0, AT_ONCE), (0, AT_ONCE), (0, AT_ONCE)));
        assert_eq!(read(&store, JobId::new(7, 2), (5, 1)).unwrap(), (0, Vec::new()));
    }
}
