//! Which job gets ranks now, and where: first those that have lost some, then the queue.

use super::facts::{Fact, Formed};
use super::formation::Formation;
use super::jobs::Phase;
use super::{Core, SHRINK_MS, Word};
use contraflow_runtime::topology::Topology;

/// A worker with room.
struct Room {
    worker: u64,
    free: usize,
}

impl Core {
    /// Forms every job that can be formed.
    pub(super) fn schedule(&mut self, now: u64) {
        for job in self.line() {
            let Some(formed) = self.place(job, now) else {
                // Nobody overtakes a job that waits: it would take the places that the job waits for.
                return;
            };
            let (generation, places) = (formed.generation, formed.places.clone());
            self.keep(Fact::Formed { job, formed });
            self.formations.insert(job, Formation::of(&self.jobs.all[&job]));
            self.log(job, format!("generation {generation}: {} ranks formed", places.len()));
            let mut workers = places.clone();
            workers.sort_unstable();
            workers.dedup();
            for worker in workers {
                let ranks = (0..places.len()).filter(|&rank| places[rank] == worker).collect();
                self.tell(worker, Word::Assign { job, ranks });
            }
        }
    }

    /// Jobs without ranks: those that have lost some first, then by priority, then by age.
    fn line(&self) -> Vec<u64> {
        let waits = |phase: &Phase| matches!(phase, Phase::Queued | Phase::Broken);
        let mut line: Vec<_> = self
            .jobs
            .all
            .iter()
            .filter(|(_, record)| waits(&record.phase))
            .map(|(&job, record)| (record.phase != Phase::Broken, -record.spec.priority, job))
            .collect();
        line.sort_unstable();
        line.into_iter().map(|(.., job)| job).collect()
    }

    fn rooms(&self) -> Vec<Room> {
        let open = self
            .members
            .iter()
            .filter(|(_, member)| member.is_attached && !self.jobs.drained.contains(&member.who.node));
        open.map(|(&worker, member)| Room {
            worker,
            free: member.who.slots.saturating_sub(self.used(worker)),
        })
        .collect()
    }

    fn place(&self, job: u64, now: u64) -> Option<Formed> {
        let record = &self.jobs.all[&job];
        let mut rooms = self.rooms();
        let topology = self.affordable(job, &rooms, now)?;
        let mut places = vec![None; topology.world()];
        // Whoever had a rank keeps it.
        if let Some(before) = record.formed.as_ref().filter(|before| before.topology == topology) {
            for (rank, &worker) in before.places.iter().enumerate() {
                let room = rooms.iter_mut().find(|room| room.worker == worker && room.free > 0);
                if let Some(room) = room.filter(|_| !record.lost.contains(&rank)) {
                    room.free -= 1;
                    places[rank] = Some(worker);
                }
            }
        }
        for place in places.iter_mut().filter(|place| place.is_none()) {
            let room = rooms.iter_mut().find(|room| room.free > 0)?;
            room.free -= 1;
            *place = Some(room.worker);
        }
        Some(Formed {
            generation: record.generation() + 1,
            topology,
            places: places.into_iter().flatten().collect(),
            resume_step: record.kept,
            cursor: record.cursor,
        })
    }

    /// The axes a job can have now: its own if there is room; fewer data replicas if it has waited long enough and may.
    fn affordable(&self, job: u64, rooms: &[Room], now: u64) -> Option<Topology> {
        let record = &self.jobs.all[&job];
        let free: usize = rooms.iter().map(|room| room.free).sum();
        let wanted = record.spec.topology;
        if wanted.world() <= free {
            return Some(wanted);
        }
        let may_shrink = record.phase == Phase::Broken && record.broken_ms + SHRINK_MS <= now;
        let smaller = (1..wanted.data).rev().filter(|data| wanted.data.is_multiple_of(*data));
        let mut smaller = smaller.map(|data| Topology { data, ..wanted });
        smaller.find(|topology| {
            may_shrink && topology.world() <= free && topology.world() >= record.spec.min_ranks
        })
    }

    /// Why a job has no ranks, in words.
    pub(super) fn why_without_place(&self, job: u64) -> String {
        let record = &self.jobs.all[&job];
        let free: usize = self.rooms().iter().map(|room| room.free).sum();
        let draining = self.members.iter().filter(|(_, member)| self.jobs.drained.contains(&member.who.node));
        let draining: usize = draining.map(|(_, member)| member.who.slots).sum();
        let needs = format!("needs {} ranks, {free} free, {draining} draining", record.spec.topology.world());
        if record.why.is_empty() { needs } else { format!("{needs}; {}", record.why) }
    }
}
