//! How a job gives up its slots for another one: a job that trains saves its state first, a job that has lost ranks goes once
//! waiting has brought it nothing. To whom jobs give way is decided in [`crate::queue`], but for two that have both lost ranks.

use contraflow_runtime::topology::JobId;

use super::facts::Fact;
use super::jobs::Phase;
use super::schedule::{free_slots, refill_lost};
use super::{Core, Severity};

impl Core {
    /// Puts a job into the queue again. One that trains stops after the running step, and keeps it. One that has lost ranks goes
    /// back to its newest checkpoint, but not before its workers had time to come back with its state; to be asked again until then.
    pub(super) fn requeue(&mut self, job: JobId, why: String, now: u64) {
        if let Some(formation) = self.formations.get_mut(&job) {
            let effects = formation.requeue(why);
            self.apply_effects(job, effects, now);
        } else if self.has_waited(job, now) {
            let step = self.jobs.all[&job].last_checkpoint;
            let stop = self.stop(job);
            self.release(job, &why, false);
            self.log_as(Severity::Warn, job, format!("{why}; back in the queue, to go on after step {step}"));
            self.persist(Fact::Requeued { job, why, stop });
        }
    }

    /// Whether a job has lost ranks for so long that nobody is expected to bring its state back.
    fn has_waited(&self, job: JobId, now: u64) -> bool {
        let record = &self.jobs.all[&job];
        let is_expecting = self.awaits_survivors(job, now);
        record.phase == Phase::Broken && record.broken_ms + self.times.adoption_ms() <= now && !is_expecting
    }

    /// Jobs that have lost ranks and wait for slots that others of them hold would wait for ever: the least important give way.
    /// So does one that all workers together have no room for, if somebody else has a use for its slots. `short` are those without
    /// places, the most important first. Returns whether some have given way.
    pub(super) fn break_deadlock(&mut self, short: &[JobId], now: u64) -> bool {
        let waiting = short.iter().copied().filter(|&job| self.has_waited(job, now));
        let (mut waiting, too_large): (Vec<JobId>, Vec<JobId>) =
            waiting.partition(|&job| self.fits_into_cluster(job));
        let in_the_way = too_large.iter().copied().find(|&job| self.is_in_the_way(job));
        if let Some(job) = in_the_way {
            let why = "needs more slots than all workers together have, and others wait".to_owned();
            self.requeue(job, why, now);
            return true;
        }
        waiting.extend(too_large);
        let found = waiting.iter().enumerate().find_map(|(index, &job)| {
            let holders = self.holders_of_places(job, &waiting[index + 1..])?;
            Some((job, holders))
        });
        let Some((job, holders)) = found else { return false };
        for holder in holders {
            self.requeue(holder, format!("gives way to {job}, which has lost ranks too"), now);
        }
        true
    }

    /// Whether a job could have its ranks, or as few as it may have, if no other one held a slot.
    fn fits_into_cluster(&self, job: JobId) -> bool {
        let record = &self.jobs.all[&job];
        let Some(before) = record.formed.as_ref() else { return true };
        self.room_for(before.rank_bytes).0 >= self.layouts.known_size(job, record).least
    }

    /// Whether a job in the queue could start with the free slots and those that this one holds.
    fn is_in_the_way(&mut self, job: JobId) -> bool {
        let queued = self.jobs.all.iter().filter(|(_, record)| record.phase == Phase::Queued);
        let sized =
            queued.map(|(&queued, record)| (self.layouts.size(queued, record).least, record.spec.rank_bytes));
        let mut queued: Vec<(usize, u64)> = sized.collect();
        queued.dedup();
        queued.into_iter().any(|(ranks, bytes)| free_slots(&self.supply(&[job], bytes)) >= ranks)
    }

    /// Of these jobs, the most important first, those whose slots a job needs for its lost ranks, or for as many as it was scaled to;
    /// `None` if it has no place with all of them, or waits for something else.
    fn holders_of_places(&self, job: JobId, others: &[JobId]) -> Option<Vec<JobId>> {
        let record = &self.jobs.all[&job];
        let before = record.formed.as_ref()?;
        let size = self.layouts.known_size(job, record);
        let fits = |holders: &[JobId]| {
            let supply = self.supply(&[&[job], holders].concat(), before.rank_bytes);
            match size.allows(before.places.len()) {
                true => refill_lost(&supply, record, before).is_some(),
                false => free_slots(&supply) >= size.least,
            }
        };
        let mut holders = others.to_vec();
        if !fits(&holders) {
            return None;
        }
        for spared in others {
            let fewer: Vec<JobId> = holders.iter().copied().filter(|holder| holder != spared).collect();
            if fits(&fewer) {
                holders = fewer;
            }
        }
        Some(holders).filter(|holders| !holders.is_empty())
    }
}
