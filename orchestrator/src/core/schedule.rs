//! Which job gets ranks now, and where: jobs that have lost some first, then the queue. The decisions are in
//! [`crate::queue`] and [`crate::placement`]; here they get their numbers, and their answers become facts and commands.

use std::collections::{BTreeMap, BTreeSet};

use contraflow_runtime::faults::count;
use contraflow_runtime::topology::{JobId, Rank, Topology};

use super::avoided::Avoided;
use super::facts::{Fact, Formed};
use super::formation::Formation;
use super::jobs::{JobRecord, Phase};
use super::peak::peak_flops;
use super::{Core, SHRINK_MS, WorkerCommand};
use crate::placement::{Limit, Reason, Slots, Supply, TooSmall, buddies, place, refill};
use crate::queue::{self, Decision, Running, Waiting, grows};

/// Where a job is to have its ranks.
pub(super) struct Placed {
    /// The axes.
    pub topology: Topology,
    /// By rank, the worker.
    pub places: Vec<u64>,
    /// The axes, and why it has these, in a sentence.
    pub why: String,
}

impl Core {
    /// Forms every job that can be formed, and makes room for those that may ask for it; `only` these, which have lost ranks, where
    /// nothing has changed for others.
    pub(super) fn schedule(&mut self, only: Option<BTreeSet<JobId>>, now: u64) {
        let unchanged = self.effects.len();
        if self.recover(only.as_ref(), now) {
            // What has come free is for them first.
            return;
        }
        if only.is_some() && self.effects.len() == unchanged {
            // Most words are those of the workers of a formation that has broken, and there are thousands of them.
            return;
        }
        let (waiting, running, missing) = self.line();
        self.reasons.clear();
        let waiting = self.without_unfit(waiting);
        if waiting.is_empty() && grows(&running, usize::MAX).is_empty() {
            self.room = None;
            return;
        }
        // Slots that a job which has lost ranks waits for are not for others.
        let free = free_slots(&self.supply(&[], 0)).saturating_sub(missing);
        let healthy = free + running.iter().map(|running| running.ranks).sum::<usize>();
        if waiting.iter().all(|waiting| waiting.size.least > healthy) {
            self.grow(&running, free, now);
        }
        for decision in queue::decide(&waiting, &running, free) {
            match decision {
                Decision::Start { job, ranks, on_loan } => self.start(job, ranks, on_loan),
                Decision::Preempt { victims, for_job } => {
                    for victim in &victims {
                        self.requeue(*victim, format!("gives way to {}", for_job), now);
                    }
                    let victims: Vec<String> = victims.iter().map(JobId::to_string).collect();
                    self.reasons.insert(for_job, format!("{} to yield", victims.join(", ")));
                }
                Decision::Wait { job, reason } => drop(self.reasons.insert(job, reason)),
            }
        }
    }

    /// Forms jobs that have lost ranks again. Returns whether some of them have given way to others of them.
    fn recover(&mut self, only: Option<&BTreeSet<JobId>>, now: u64) -> bool {
        let mut short = Vec::new();
        for job in self.recovering() {
            let is_meant = only.is_none_or(|only| only.contains(&job));
            if !is_meant || self.awaits_survivors(job, now) || self.pauses(job, now).is_some() {
                continue;
            }
            match self.place_again(job, now) {
                None => short.push(job),
                Some(placed) => {
                    if !self.awaits_keepers(job, &placed.topology, &placed.places, now) {
                        self.form(job, placed, false);
                    }
                }
            }
        }
        self.break_deadlock(&short, now)
    }

    fn start(&mut self, job: JobId, ranks: usize, on_loan: bool) {
        match self.place_on(job, &[], ranks) {
            Ok(placed) => {
                // There is no layout of just so many: what is left is for the next in line.
                self.is_open |= placed.topology.world() < ranks;
                self.form(job, placed, on_loan);
            }
            Err(refusal) => drop(self.reasons.insert(job, refusal)),
        }
    }

    /// Places for a job on at most so many ranks, and the layout that it has there: on fewer ones where it may and there is no room.
    /// Slots of `own` are taken for free.
    ///
    /// **Errors**: why there is no room for the fewest that it may have.
    pub(super) fn place_on(&mut self, job: JobId, own: &[JobId], ranks: usize) -> Result<Placed, String> {
        let record = &self.jobs.all[&job];
        let least = self.layouts.size(job, record).least;
        let mut refusal = format!("needs {}, {ranks} free", count(least, "rank"));
        // More slots than there are can be left out at once; whether there is the memory is another matter for each layout.
        let free = free_slots(&self.supply(own, 0));
        let (mut available, mut refused) = (ranks.min(free), None);
        loop {
            let record = &self.jobs.all[&job];
            let Some(topology) = self.layouts.best(job, &record.spec, available, least) else {
                return Err(refusal);
            };
            let rank_bytes = self.layouts.rank_bytes(job, &record.spec, &topology);
            let schedule = record.spec.recipe.parallel.schedule;
            let supply = self.supply(own, rank_bytes);
            match self.reachable(&supply, |supply| place(supply, &topology, schedule)) {
                Ok(placement) => {
                    let limit = match refused {
                        Some((of, why)) => Limit::Place(of, why),
                        None if !own.is_empty() => Limit::Own(ranks.min(free)),
                        None if ranks < free => Limit::Share(ranks),
                        None => Limit::Free(free),
                    };
                    let why = self.why_layout(job, topology, limit);
                    return Ok(Placed { topology, places: placement.of_rank, why });
                }
                Err(why) => {
                    available = topology.world() - 1;
                    refusal = why.to_string();
                    refused.get_or_insert((topology, why.to_string()));
                }
            }
        }
    }

    /// Why a job has these axes; `limit`: what would be in the way of more, if it may have more.
    fn why_layout(&mut self, job: JobId, axes: Topology, limit: Limit) -> String {
        let record = &self.jobs.all[&job];
        let (size, world) = (self.layouts.size(job, record), axes.world());
        let limit = match limit {
            _ if record.target > 0 && world == size.most => Limit::Scaled,
            _ if size.least == size.most => Limit::Fixed,
            _ if world == size.most => Limit::Most,
            Limit::Share(ranks) if world == size.asked && ranks == size.asked => Limit::Asked,
            limit => limit,
        };
        let larger = self.layouts.larger(job, record, &axes);
        let (base, named) = (record.spec.topology(), record.spec.recipe.elastic.layouts.len());
        Reason { axes, base, named, limit, larger }.words()
    }

    fn form(&mut self, job: JobId, Placed { topology, places, why }: Placed, on_loan: bool) {
        let (memory, why_not) = match self.in_memory(job, &topology, &places) {
            Ok(memory) => (Some(memory), None),
            Err(why_not) => (None, why_not),
        };
        let record = &self.jobs.all[&job];
        let resume_step = memory.as_ref().map_or(record.last_checkpoint, |memory| memory.step);
        let from = match (&memory, resume_step) {
            (Some(_), step) => format!(" and resume from memory after step {step}"),
            (None, 0) => String::new(),
            (None, step) => {
                let origin = record.spec.origin.as_ref().filter(|origin| origin.checkpoint.step == step);
                let whose = origin.map_or_else(String::new, |origin| match origin.job {
                    Some(job) => format!(" of {job}"),
                    None => format!(" in {}", origin.folder),
                });
                format!(" and resume from the checkpoint of step {step}{whose}")
            }
        };
        let keeps_in_memory = record.spec.recipe.checkpoint.in_memory;
        let formed = Formed {
            generation: record.generation().next(),
            topology,
            buddies: if keeps_in_memory { self.buddies(job, &places) } else { Vec::new() },
            peak_flops: self.peak_flops(&places, record.spec.recipe.parallel.threads_per_rank),
            places,
            resume_step,
            memory,
            cursor: record.cursor,
            rank_bytes: self.layouts.rank_bytes(job, &record.spec, &topology),
            on_loan,
            layout: why.clone(),
        };
        let is_told = record.formed.as_ref().is_some_and(|before| before.layout == why);
        let is_same_layout = record.formed.as_ref().is_some_and(|before| before.topology == topology);
        let recipe = record.spec.recipe_on(&topology);
        // How much text there is to validate on, the workers know alone.
        let notes = || recipe.fallbacks().into_iter().chain(recipe.no_validation(usize::MAX)).collect();
        let notes: Vec<String> = if is_same_layout { Vec::new() } else { notes() };
        let (formation, places) = (formed.id(job), formed.places.clone());
        let why_not = why_not.map(|why_not| format!("; {why_not}")).unwrap_or_default();
        self.log(
            job,
            format!(
                "generation {}: {} formed{from}{why_not}",
                formed.generation,
                count(places.len(), "rank")
            ),
        );
        if !is_told {
            self.log(job, format!("layout: {why}"));
        }
        notes.into_iter().for_each(|note| self.log(job, format!("note: {note}")));
        let bringers: Vec<(Rank, u64)> = formed.bringers().collect();
        self.released(job, &formed.workers());
        self.persist(Fact::Formed { job, formed, at_ms: self.clock.wall_ms() });
        self.reasons.remove(&job);
        self.paused_until.remove(&job);
        self.formations.insert(job, Formation::of(&self.jobs.all[&job]));
        let mut ranks_of: BTreeMap<u64, Vec<Rank>> = BTreeMap::new();
        for (rank, worker) in places.into_iter().enumerate() {
            ranks_of.entry(worker).or_default().push(Rank::at(rank));
        }
        for (worker, ranks) in ranks_of {
            self.send(worker, WorkerCommand::Assign { formation, ranks });
        }
        for (place, worker) in bringers {
            self.send(worker, WorkerCommand::Bring { formation, place });
        }
    }

    /// Measured peak of the cores that ranks at these places compute on. **Units**: FLOP/s.
    fn peak_flops(&self, places: &[u64], threads_per_rank: usize) -> u64 {
        let members =
            places.iter().map(|&worker| self.members.get(worker).map(|member| &member.registration));
        members.collect::<Option<Vec<_>>>().map_or(0, |members| peak_flops(&members, threads_per_rank))
    }

    /// By rank, whose worker holds its replica; none if all ranks are on one worker.
    fn buddies(&self, job: JobId, places: &[u64]) -> Vec<Rank> {
        let buddies = buddies(&self.supply(&[job], 0), places).unwrap_or_default();
        buddies.into_iter().map(Rank::at).collect()
    }

    /// Workers of the formation before that have no part in the next one need not keep anything of its state.
    fn released(&mut self, job: JobId, stay: &BTreeSet<u64>) {
        let Some(before) = self.jobs.all[&job].formed.as_ref() else { return };
        let (formation, workers) = (before.id(job), before.workers());
        for worker in workers.difference(stay).copied() {
            let reason = "the job continues without this worker".to_owned();
            self.send(worker, WorkerCommand::Release { formation, reason, keep: false });
        }
        self.survivors.remove(&job);
    }

    /// Jobs that have lost ranks, the most important first.
    fn recovering(&self) -> Vec<JobId> {
        let broken = self.jobs.all.iter().filter(|(_, record)| record.phase == Phase::Broken);
        let mut broken: Vec<(i32, JobId)> =
            broken.map(|(&job, record)| (-record.spec.priority, job)).collect();
        broken.sort_unstable();
        broken.into_iter().map(|(_, job)| job).collect()
    }

    /// How much longer a job that has lost its ranks waits until it is formed again: what ended its formations may pass.
    pub(super) fn pauses(&self, job: JobId, now: u64) -> Option<u64> {
        self.paused_until.get(&job)?.checked_sub(now).filter(|left| *left > 0)
    }

    /// Places for a job that has lost ranks: the others stay where they are, and nothing goes where it came to nothing before,
    /// while there is room elsewhere. With fewer ranks if nothing has come free for long enough and it may.
    fn place_again(&mut self, job: JobId, now: u64) -> Option<Placed> {
        let record = &self.jobs.all[&job];
        let before = record.formed.as_ref()?;
        let size = self.layouts.size(job, record);
        if !size.allows(before.places.len()) {
            // It was scaled meanwhile.
            return self.place_on(job, &[job], size.most).ok();
        }
        // It may have been scaled since it stopped.
        let goal = record.goal.min(size.most);
        if goal > 0
            && goal != before.places.len()
            && let Ok(placed) = self.place_on(job, &[job], goal)
        {
            return Some(placed);
        }
        let record = &self.jobs.all[&job];
        let before = record.formed.as_ref()?;
        let supply = self.supply(&[job], before.rank_bytes);
        let refilled = |supply: &Supply| refill_lost(supply, record, before).ok_or(());
        let elsewhere = self.avoided.get(&job).map(|avoided| without(supply.clone(), avoided));
        let places = elsewhere.and_then(|supply| self.reachable(&supply, refilled).ok());
        if let Some(places) = places.or_else(|| self.reachable(&supply, refilled).ok()) {
            // It has the same axes for the same reason.
            return Some(Placed { topology: before.topology, places, why: before.layout.clone() });
        }
        if now < record.broken_ms + SHRINK_MS {
            return None;
        }
        let most = before.places.len();
        self.place_on(job, &[job], most).ok()
    }

    /// What comes of a supply without workers whose data port does not answer; if nothing does, with them.
    fn reachable<T, E>(&self, supply: &Supply, take: impl Fn(&Supply) -> Result<T, E>) -> Result<T, E> {
        let is_away =
            |worker| self.members.get(worker).is_some_and(|member| member.registration.is_unreachable);
        if !supply.slots.iter().any(|slots| is_away(slots.worker)) {
            return take(supply);
        }
        let mut answering = supply.clone();
        answering.slots.iter_mut().filter(|slots| is_away(slots.worker)).for_each(|slots| slots.free = 0);
        take(&answering).or_else(|_| take(supply))
    }

    /// The slots that a job may take for ranks that need this much memory: the free ones, and its own where it has lost
    /// its formation.
    pub(super) fn supply(&self, own: &[JobId], rank_bytes: u64) -> Supply {
        let held = self.held(own);
        let mut supply = Supply::default();
        for (&worker, member) in self.members.iter().filter(|(_, member)| member.is_attached) {
            let (used, used_bytes) = held.get(&worker).copied().unwrap_or_default();
            if self.is_draining(member) {
                supply.draining += member.registration.slots;
                continue;
            }
            supply.taken += used;
            let free = member.registration.slots.saturating_sub(used);
            let room = free.min(member.room_for(rank_bytes, used_bytes));
            if room < free {
                supply.too_small.note(free - room, rank_bytes, member.registration.memory_bytes, || {
                    member.registration.memory()
                });
            }
            let (node, block) = (member.registration.node.clone(), member.registration.block.clone());
            supply.slots.push(Slots { worker, node, block, free: room });
        }
        supply
    }

    /// Slots by worker that formations hold, and those that survivors of a broken one keep, and what memory their ranks need;
    /// but for those of `own`.
    pub(super) fn held(&self, own: &[JobId]) -> BTreeMap<u64, (usize, u64)> {
        let mut held: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
        let mut hold = |worker: u64, bytes: u64| {
            let (slots, held) = held.entry(worker).or_default();
            (*slots, *held) = (*slots + 1, held.saturating_add(bytes));
        };
        for (&job, record) in &self.jobs.all {
            if !own.contains(&job) {
                let bytes = record.formed.as_ref().map_or(0, |formed| formed.rank_bytes);
                survivors(record).for_each(|worker| hold(worker, bytes));
            }
        }
        self.held_by_foreign().for_each(|worker| hold(worker, 0));
        held
    }

    /// Takes those out of the line that would not fit into the memory of all workers together if they did nothing else, though
    /// they have enough slots: they block no other job.
    fn without_unfit(&mut self, waiting: Vec<Waiting>) -> Vec<Waiting> {
        let mut rooms: BTreeMap<u64, (usize, TooSmall)> = BTreeMap::new();
        let mut fit = Vec::with_capacity(waiting.len());
        for job in waiting {
            let bytes = self.jobs.all[&job.job].spec.rank_bytes;
            let (room, too_small) = rooms.entry(bytes).or_insert_with(|| self.room_for(bytes));
            let ranks = job.size.least;
            if *room < ranks && ranks <= *room + too_small.slots {
                let words = format!("needs {}, room for {room}{too_small}", count(ranks, "rank"));
                self.reasons.insert(job.job, words);
            } else {
                fit.push(job);
            }
        }
        fit
    }

    /// How many ranks that need so much memory all workers together have room for if they do nothing else, and the slots into
    /// which none fits. A worker whose stream has just ended counts as long as its lease lasts: it may be back at once.
    pub(super) fn room_for(&self, rank_bytes: u64) -> (usize, TooSmall) {
        let (mut room, mut too_small) = (0, TooSmall::default());
        let members = self.members.iter().map(|(_, member)| member);
        for member in members.filter(|member| !self.is_draining(member)) {
            let slots = member.registration.slots;
            let fit = slots.min(member.room_for(rank_bytes, 0));
            room += fit;
            if fit < slots {
                too_small.note(slots - fit, rank_bytes, member.registration.memory_bytes, || {
                    member.registration.memory()
                });
            }
        }
        (room, too_small)
    }

    /// What the queue is asked: who waits, who runs, and how many slots jobs that run have lost.
    fn line(&mut self) -> (Vec<Waiting>, Vec<Running>, usize) {
        let (mut waiting, mut running, mut missing) = (Vec::new(), Vec::new(), 0);
        for (&job, record) in self.jobs.all.iter().filter(|(_, record)| !record.has_ended()) {
            let in_line = Waiting {
                job,
                priority: record.spec.priority.into(),
                submitted: job.number(),
                size: self.layouts.size(job, record),
                preemptible: true,
            };
            match (&record.phase, &record.formed) {
                (Phase::Queued, _) => waiting.push(in_line),
                (Phase::Formed | Phase::Broken, Some(formed)) => {
                    let held = survivors(record).count();
                    missing += formed.places.len() - held;
                    let formation = self.formations.get(&job);
                    let stopping = formation.is_some_and(Formation::is_moving);
                    running.push(Running { job: in_line, ranks: held, on_loan: formed.on_loan, stopping });
                }
                _ => {}
            }
        }
        (waiting, running, missing)
    }

    /// Why a job has no ranks.
    pub(super) fn why_without_place(&self, job: JobId) -> String {
        let record = &self.jobs.all[&job];
        if let Some(reason) = self.reasons.get(&job).filter(|_| record.phase == Phase::Queued) {
            return reason.clone();
        }
        if let Some(left) = self.pauses(job, self.clock.now()) {
            let (idle, seconds) = (record.attempts.idle, left.div_ceil(1000));
            return format!(
                "formed {idle} times in a row without completing a step, again in {seconds} s; {}",
                record.why
            );
        }
        let (topology, bytes) = match &record.formed {
            Some(formed) => (formed.topology, formed.rank_bytes),
            None => (record.spec.topology(), record.spec.rank_bytes),
        };
        let supply = self.supply(&[job], bytes);
        let (world, free, draining) = (topology.world(), free_slots(&supply), supply.draining);
        format!(
            "needs {}, {free} healthy, {draining} draining{}; {}",
            count(world, "rank"),
            supply.too_small,
            record.why
        )
    }
}

pub(super) fn free_slots(supply: &Supply) -> usize {
    supply.slots.iter().map(|slots| slots.free).sum()
}

/// What is left of a supply where nothing is to go to these places.
fn without(mut supply: Supply, Avoided { nodes, workers, .. }: &Avoided) -> Supply {
    let is_avoided = |slots: &&mut Slots| nodes.contains(&slots.node) || workers.contains(&slots.worker);
    supply.slots.iter_mut().filter(is_avoided).for_each(|slots| slots.free = 0);
    supply
}

/// Places for a formation's lost ranks; the others stay where they are.
pub(super) fn refill_lost(supply: &Supply, record: &JobRecord, before: &Formed) -> Option<Vec<u64>> {
    let index: BTreeMap<u64, usize> =
        supply.slots.iter().enumerate().map(|(index, slots)| (slots.worker, index)).collect();
    let (mut gone, mut kept) = (BTreeSet::new(), supply.clone());
    for (rank, worker) in before.ranks() {
        let index = index.get(&worker).filter(|_| !record.lost.contains(&rank));
        // Whoever is back has kept its state, but not its slot.
        let is_free = |index: &&usize| record.holds(rank) || kept.slots[**index].free > 0;
        match index.filter(is_free) {
            Some(&index) => kept.slots[index].free = kept.slots[index].free.saturating_sub(1),
            None => drop(gone.insert(rank.index())),
        }
    }
    let schedule = record.spec.recipe.parallel.schedule;
    let placement = refill(&kept, &before.topology, schedule, &before.places, &gone).ok()?;
    Some(placement.of_rank)
}

/// The workers on which a job holds slots.
pub(super) fn survivors(record: &JobRecord) -> impl Iterator<Item = u64> + '_ {
    let holds = matches!(record.phase, Phase::Formed | Phase::Broken);
    let places = record.formed.iter().filter(move |_| holds).flat_map(Formed::ranks);
    places.filter(|(rank, _)| record.holds(*rank)).map(|(_, worker)| worker)
}
