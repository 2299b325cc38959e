//! Which job starts, waits, gives way or grows: a pure function of the jobs and the free slots.
//!
//! Asked by the core whenever a job comes or ends or slots change. The line is by priority, then by the order of
//! submission; a job that was preempted keeps its place in it. A job gets all its slots at once or none; one that may have
//! fewer than it asks for starts with what there is. Knows ranks by number only; where they go is [`crate::placement`]'s.
//!
//! **The head** is the first job in line that the cluster as a whole could hold. While it cannot start, jobs behind it may
//! use the slots it leaves idle, but only on loan: they must be preemptible, and the head has them back at once when it can
//! start with them. So such a job never delays the head. What the head can reach is the free slots and those of the jobs it
//! may send away; a loan moves slots from the first heap to the second and leaves the sum as it was. What remains is the
//! time in which a job that was sent away stops. No estimate of a job's length is needed, and none is believed.
//!
//! **Preemption**: a job sends away those of strictly lower priority, and those on loan behind it in line. Among jobs of one
//! priority none that started in its turn is ever sent away. One that has lost ranks holds the slots of the others, and gives
//! them up like any other job.
//!
//! **Elastic jobs**: nobody is sent away where it is enough that some give up ranks. Those that may be sent away go down to the
//! fewest that they may have; anybody else gives up only what it has beyond what it asked for. What no job in line has a use for
//! goes to those that may grow, in the order of the line ([`grows`]).
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use contraflow_runtime::topology::JobId;

/// How many ranks a job may have. Each is one that it can be run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// With fewer it does not start.
    pub least: usize,
    /// As many as it asks for.
    pub asked: usize,
    /// As many as it takes where nobody else has a use for them.
    pub most: usize,
}

impl Size {
    /// That of a job which has so many ranks or none.
    pub fn exactly(ranks: usize) -> Size {
        Size { least: ranks, asked: ranks, most: ranks }
    }

    /// Whether the job may have so many.
    pub fn allows(self, ranks: usize) -> bool {
        (self.least..=self.most).contains(&ranks)
    }
}

/// A job in line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Unique in the line.
    pub job: JobId,
    /// Higher goes first.
    pub priority: i64,
    /// Its number, which people know: its place among jobs of one priority. Lower goes first, also after a preemption.
    pub submitted: u64,
    /// Slots it takes.
    pub size: Size,
    /// Whether it may be sent away and continue later.
    pub preemptible: bool,
}

/// A job that holds slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// What it was in line.
    pub job: Waiting,
    /// What it holds now.
    pub ranks: usize,
    /// Whether it started ahead of its turn: what [`Decision::Start`] said.
    pub on_loan: bool,
    /// Whether it is on its way out: its slots come free without anything being done.
    pub stopping: bool,
}

/// The decision about a queued job. There is one for each, in queue order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The job takes free slots now.
    Start {
        /// Fits into what is free.
        job: JobId,
        /// As many as it may take.
        ranks: usize,
        /// Whether ahead of its turn; to be kept with the running job.
        on_loan: bool,
    },
    /// These jobs stop and go back to their places in line, from where they may start again at once with fewer ranks; `for_job`
    /// starts when their slots are free.
    Preempt {
        /// Lowest priority first, the latest submitted first; none of them could be spared.
        victims: Vec<JobId>,
        /// Further ahead in line.
        for_job: JobId,
    },
    /// The job stays in line.
    Wait {
        /// Keeps its place.
        job: JobId,
        /// For the user.
        reason: String,
    },
}

impl Waiting {
    /// Sorts into the order of the line.
    fn place(&self) -> (Reverse<i64>, u64, JobId) {
        (Reverse(self.priority), self.submitted, self.job)
    }
}

/// Decides about every queued job, with `free` healthy slots. Neither list has to be sorted.
pub fn decide(waiting: &[Waiting], running: &[Running], free: usize) -> Vec<Decision> {
    let mut line: Vec<&Waiting> = waiting.iter().collect();
    line.sort_by_key(|job| job.place());
    let held = held_by(running, |_| true);
    let mut round = Round { running, healthy: free + held, free, spare: free, head: None, passed: false };
    let mut decisions: Vec<Decision> = line.iter().map(|job| round.decide(job)).collect();
    if !round.passed {
        // Nobody waits: those that start may have more than they ask for.
        for (job, decision) in line.iter().zip(&mut decisions) {
            if let Decision::Start { ranks, .. } = decision {
                let more = (job.size.most - *ranks).min(round.free);
                (*ranks, round.free) = (*ranks + more, round.free - more);
            }
        }
    }
    decisions
}

/// The jobs that may have more ranks than they hold, in the order of the line, each with as many as it may have if it alone grows.
/// To be asked where no job in line has a use for the free slots.
pub fn grows(running: &[Running], free: usize) -> Vec<(JobId, usize)> {
    let mut all: Vec<&Running> = running.iter().filter(|running| !running.stopping).collect();
    all.sort_by_key(|running| running.job.place());
    let most = |running: &Running| running.job.size.most.min(running.ranks.saturating_add(free));
    let grows = all.into_iter().filter(|running| most(running) > running.ranks);
    grows.map(|running| (running.job.job, most(running))).collect()
}

/// Position of the walk along the queue.
struct Round<'a> {
    running: &'a [Running],
    healthy: usize,
    free: usize,
    /// Of the free slots, those that the head does not wait for. All of them until there is one.
    spare: usize,
    /// The head, once a job was found that should start and cannot.
    head: Option<&'a Waiting>,
    /// Whether a job stays in line before those that come now.
    passed: bool,
}

impl<'a> Round<'a> {
    fn decide(&mut self, job: &'a Waiting) -> Decision {
        let wait = |reason| Decision::Wait { job: job.job, reason };
        if job.size.least > self.healthy {
            // It blocks no other job: nothing that ends or is preempted would let it start.
            self.passed = true;
            return wait(format!("needs {}, {} healthy", needs(job.size), self.healthy));
        }
        if let Some(head) = self.head {
            if job.size.least > self.spare {
                return wait(format!(
                    "needs {}, {} to spare behind job {}",
                    needs(job.size),
                    self.spare,
                    head.submitted
                ));
            } else if !job.preemptible {
                return wait(format!("cannot be preempted and so does not overtake job {}", head.submitted));
            }
        } else if job.size.asked > self.free
            && let Some(decision) = self.become_head(job)
        {
            return decision;
        }
        let available = if self.head.is_some() { self.spare } else { self.free };
        let ranks = job.size.asked.min(available);
        self.free -= ranks;
        self.spare -= ranks;
        Decision::Start { job: job.job, ranks, on_loan: self.passed && job.preemptible }
    }

    /// The job waits for what it asks for if others give it up; else for the fewest that it may have, unless those are free.
    fn become_head(&mut self, job: &'a Waiting) -> Option<Decision> {
        let Size { least, asked, .. } = job.size;
        let stopping = held_by(self.running, |running| running.stopping);
        let coming = self.free + stopping;
        let reach = |ranks: usize| victims(job, self.running, ranks.saturating_sub(coming));
        let (goal, victims) = match (reach(asked), least <= self.free) {
            (Some(victims), _) => (asked, Some(victims)),
            (None, true) => return None,
            (None, false) => (least, reach(least)),
        };
        self.head = Some(job);
        self.passed = true;
        let wait = |reason| Some(Decision::Wait { job: job.job, reason });
        let Some(victims) = victims else {
            return wait(format!("needs {}, {} free", needs(job.size), self.free));
        };
        let freed: usize = victims.iter().map(|(_, ranks)| ranks).sum();
        let free = self.free;
        self.spare = free.min(coming + freed - goal);
        if victims.is_empty() {
            return wait(format!("needs {}, {free} free, {stopping} being freed", needs(job.size)));
        }
        Some(Decision::Preempt { victims: victims.iter().map(|(job, _)| *job).collect(), for_job: job.job })
    }
}

fn held_by(running: &[Running], which: impl Fn(&Running) -> bool) -> usize {
    running.iter().filter(|running| which(running)).map(|running| running.ranks).sum()
}

/// Jobs that `head` may take `needed` slots from, none too many, and what each gives up; `None` where all of them do not have
/// enough. Where it suffices that each keeps the fewest ranks that it may have, none is sent away.
fn victims(head: &Waiting, running: &[Running], needed: usize) -> Option<Vec<(JobId, usize)>> {
    let gives_way = |running: &Running| {
        let (job, is_lower) = (&running.job, running.job.priority < head.priority);
        is_lower || (running.on_loan && job.place() > head.place())
    };
    let with = |floor: &dyn Fn(&Running) -> usize| {
        let mut victims: Vec<(&Running, usize)> = Vec::new();
        for running in running.iter().filter(|running| running.job.preemptible && !running.stopping) {
            let floor = if gives_way(running) { floor(running) } else { running.job.size.asked };
            let gives = running.ranks.saturating_sub(floor);
            victims.extend((gives > 0).then_some((running, gives)));
        }
        victims.sort_by_key(|(running, _)| Reverse(running.job.place()));
        fewest(victims, needed)
    };
    let victims = with(&|running| running.job.size.least).or_else(|| with(&|_| 0))?;
    Some(victims.into_iter().map(|(running, gives)| (running.job.job, gives)).collect())
}

/// The first of these that give `needed` slots, without those that are not needed; the last ones are spared first.
fn fewest(mut victims: Vec<(&Running, usize)>, needed: usize) -> Option<Vec<(&Running, usize)>> {
    let mut freed = 0;
    let enough = victims.iter().position(|(_, gives)| {
        freed += gives;
        freed >= needed
    });
    match enough {
        _ if needed == 0 => victims.clear(),
        enough => victims.truncate(enough? + 1),
    }
    for index in (0..victims.len()).rev() {
        if freed - victims[index].1 >= needed {
            freed -= victims.remove(index).1;
        }
    }
    Some(victims)
}

/// `2 ranks`, `4 ranks or at least 2`.
fn needs(Size { least, asked, .. }: Size) -> String {
    let ranks = |number: usize| format!("{number} {}", if number == 1 { "rank" } else { "ranks" });
    if least == asked { ranks(asked) } else { format!("{} or at least {least}", ranks(asked)) }
}
