//! Jobs that take the slots that nobody else has a use for, and those that somebody wants to be larger or smaller. They stop after
//! the running step, whose state stays in memory, and go on at once in another layout, whose ranks take it over from each other.

use contraflow_runtime::faults::count;
use contraflow_runtime::topology::JobId;

use super::facts::Fact;
use super::formation::Formation;
use super::layouts::Layouts;
use super::{Core, GROW_MS, MAX_RANKS, Severity};
use crate::queue::{Running, Size, grows};

/// Free slots that jobs may grow into.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    slots: usize,
    /// Since when there are so many. **Units**: ms.
    since_ms: u64,
}

impl Core {
    /// Lets the first job in line grow that can, once the free slots have been the same for a while. One at a time.
    pub(super) fn grow(&mut self, running: &[Running], free: usize, now: u64) {
        let candidates = grows(running, free);
        if candidates.is_empty() || running.iter().any(|running| running.stopping) {
            self.room = None;
            return;
        }
        let known = self.room.filter(|room| room.slots == free);
        let room = *self.room.insert(known.unwrap_or(Room { slots: free, since_ms: now }));
        if now < room.since_ms + GROW_MS {
            return;
        }
        let is_ready = |core: &Core, job| {
            core.formations.get(&job).is_some_and(|formation: &Formation| formation.is_ready_to_move(now))
        };
        let (ready, others): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|(job, _)| is_ready(self, *job));
        for (job, ranks) in ready {
            let held = self.jobs.all[&job].running().map_or(0, |formed| formed.places.len());
            let placed = self.place_on(job, &[job], ranks);
            if let Some(placed) = placed.ok().filter(|placed| placed.topology.world() > held) {
                self.room = None;
                let why = format!("grows from {} to {}", count(held, "rank"), placed.topology.world());
                return self.rearrange(job, placed.topology.world(), why, now);
            }
        }
        if others.is_empty() {
            // Nobody can use them, until something changes.
            self.room = None;
        }
    }

    /// How many ranks a job may have; none if it is not known.
    pub fn size(&self, job: JobId) -> Size {
        let size = |record| self.layouts.known_size(job, record);
        self.jobs.all.get(&job).map_or(Size::exactly(0), size)
    }

    /// Whether a job can be told to have at most so many ranks.
    ///
    /// **Errors**: in words; it has ended, or cannot be run on so few.
    pub fn check_scale(&self, job: JobId, ranks: usize) -> Result<(), String> {
        let record = self.jobs.all.get(&job).filter(|record| !record.has_ended());
        let record = record.ok_or_else(|| format!("job: expected one that has not ended, got {job}"))?;
        if ranks > MAX_RANKS {
            return Err(format!("ranks: expected at most {MAX_RANKS}, got {ranks}"));
        }
        let named = record.spec.named_ranks();
        if ranks > 0 && !named.is_empty() && !named.contains(&ranks) {
            let named: Vec<String> = named.iter().map(usize::to_string).collect();
            let named = named.join(" or ");
            return Err(format!(
                "ranks: expected {named}, those of the layouts that the recipe names, got {ranks}"
            ));
        }
        let is_possible = ranks == 0 || Layouts::default().best(job, &record.spec, ranks, 1).is_some();
        is_possible.then_some(()).ok_or_else(|| {
            format!("ranks: expected as many as a layout of the recipe has, got {ranks}: none has so few")
        })
    }

    /// A job is to have at most so many ranks, until that is said again; 0: as it was submitted.
    pub(super) fn scale(&mut self, job: JobId, ranks: usize, now: u64) {
        let Some(record) = self.jobs.all.get(&job).filter(|record| !record.has_ended()) else { return };
        if record.target == ranks {
            return;
        }
        let words = match ranks {
            0 => "scaled: it grows and shrinks with the cluster again".to_owned(),
            ranks => format!("scaled to {}", count(ranks, "rank")),
        };
        self.log_as(Severity::Info, job, words.clone());
        self.persist(Fact::Scaled { job, ranks });
        let record = &self.jobs.all[&job];
        let most = self.layouts.size(job, record).most;
        let held = record.running().map_or(0, |formed| formed.places.len());
        let is_moving = self.formations.get(&job).is_some_and(Formation::is_moving);
        if held > most && !is_moving {
            self.rearrange(job, most, words, now);
        }
    }

    /// Has a job go on with so many ranks after the running step, from memory. One that keeps nothing in memory, or has no formation,
    /// goes back in line.
    pub(super) fn rearrange(&mut self, job: JobId, ranks: usize, why: String, now: u64) {
        let in_memory = self.jobs.all[&job].spec.recipe.checkpoint.in_memory;
        match self.formations.get_mut(&job).filter(|_| in_memory) {
            Some(formation) => {
                let effects = formation.rearrange(why, ranks);
                self.apply_effects(job, effects, now);
            }
            None => self.requeue(job, why, now),
        }
    }

    /// The ranks of a job have stopped, and their state is in memory: its workers are asked what they have of it.
    pub(super) fn rearranged(&mut self, job: JobId, why: String, ranks: usize, now: u64) {
        let stop = self.stop(job);
        self.release(job, &why, true);
        self.log(job, format!("{why}; its state after step {} is in memory", stop.step));
        self.persist(Fact::Rearranged { job, ranks, why, at_ms: now, stop });
        self.query_survivors(job, now);
    }
}
