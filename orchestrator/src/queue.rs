//! Which job starts, waits or is preempted: a pure function of the jobs and the free slots.
//!
//! Asked by the core whenever a job comes or ends or slots change. The line is by priority, then by the order of
//! submission; a job that was preempted keeps its place in it. A job gets all its slots at once or none. Knows ranks by
//! number only; where they go is [`crate::placement`]'s.
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
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use contraflow_runtime::topology::JobId;

/// A job in line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Unique in the line.
    pub job: JobId,
    /// Higher goes first.
    pub priority: i64,
    /// Its number, which people know: its place among jobs of one priority. Lower goes first, also after a preemption.
    pub submitted: u64,
    /// Slots it needs at once.
    pub ranks: usize,
    /// Whether it may be sent away and continue later.
    pub preemptible: bool,
}

/// A job that holds slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// What it was in line; `ranks` is what it holds now.
    pub job: Waiting,
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
        /// Whether ahead of its turn; to be kept with the running job.
        on_loan: bool,
    },
    /// These jobs stop and go back to their places in line; `for_job` starts when their slots are free.
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
    let mut round =
        Round { running, healthy: free + held(running), free, spare: free, head: None, passed: false };
    line.into_iter().map(|job| round.decide(job)).collect()
}

fn held(running: &[Running]) -> usize {
    running.iter().map(|running| running.job.ranks).sum()
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
        if job.ranks > self.healthy {
            // It blocks no other job: nothing that ends or is preempted would let it start.
            self.passed = true;
            return wait(format!("needs {}, {} healthy", ranks(job.ranks), self.healthy));
        }
        if let Some(head) = self.head {
            if job.ranks > self.spare {
                return wait(format!(
                    "needs {}, {} to spare behind job {}",
                    ranks(job.ranks),
                    self.spare,
                    head.submitted
                ));
            } else if !job.preemptible {
                return wait(format!("cannot be preempted and so does not overtake job {}", head.submitted));
            }
        } else if job.ranks > self.free {
            return self.become_head(job);
        }
        self.free -= job.ranks;
        self.spare -= job.ranks;
        Decision::Start { job: job.job, on_loan: self.passed && job.preemptible }
    }

    fn become_head(&mut self, job: &'a Waiting) -> Decision {
        self.head = Some(job);
        self.passed = true;
        let stopping = held_by(self.running, |running| running.stopping);
        let coming = self.free + stopping;
        let (ranks, free) = (ranks(job.ranks), self.free);
        let wait = |reason| Decision::Wait { job: job.job, reason };
        if coming >= job.ranks {
            self.spare = free.min(coming - job.ranks);
            return wait(format!("needs {ranks}, {free} free, {stopping} being freed"));
        }
        let Some(victims) = victims(job, self.running, job.ranks - coming) else {
            return wait(format!("needs {ranks}, {free} free"));
        };
        let freed: usize = victims.iter().map(|victim| victim.ranks).sum();
        self.spare = free.min(coming + freed - job.ranks);
        Decision::Preempt { victims: victims.iter().map(|victim| victim.job).collect(), for_job: job.job }
    }
}

fn held_by(running: &[Running], which: impl Fn(&Running) -> bool) -> usize {
    running.iter().filter(|running| which(running)).map(|running| running.job.ranks).sum()
}

/// Jobs that `head` may send away and that hold `needed` slots, none too many; `None` where all of them do not.
fn victims<'a>(head: &Waiting, running: &'a [Running], needed: usize) -> Option<Vec<&'a Waiting>> {
    let gives_way = |running: &&Running| {
        let (job, is_lower) = (&running.job, running.job.priority < head.priority);
        job.preemptible && !running.stopping && (is_lower || (running.on_loan && job.place() > head.place()))
    };
    let mut victims: Vec<&Waiting> = running.iter().filter(gives_way).map(|running| &running.job).collect();
    victims.sort_by_key(|job| Reverse(job.place()));
    let mut freed = 0;
    let enough = victims.iter().position(|job| {
        freed += job.ranks;
        freed >= needed
    });
    victims.truncate(enough? + 1);
    // The highest and oldest of those that are not needed are spared first.
    for index in (0..victims.len()).rev() {
        if freed - victims[index].ranks >= needed {
            freed -= victims.remove(index).ranks;
        }
    }
    Some(victims)
}

fn ranks(number: usize) -> String {
    format!("{number} {}", if number == 1 { "rank" } else { "ranks" })
}
