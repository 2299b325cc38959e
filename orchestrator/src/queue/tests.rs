//! The queue: decisions one by one, and whole lives of random jobs against worlds without loans.

use proptest::prelude::*;

use super::*;

fn id(number: u64) -> JobId {
    JobId::new(number, 0)
}

fn waiting(job: u64, priority: i64, ranks: usize) -> Waiting {
    Waiting { job: id(job), priority, submitted: job, size: Size::exactly(ranks), preemptible: true }
}

fn elastic(job: u64, priority: i64, (least, asked, most): (usize, usize, usize)) -> Waiting {
    Waiting { size: Size { least, asked, most }, ..waiting(job, priority, asked) }
}

fn running(job: u64, priority: i64, ranks: usize) -> Running {
    holding(waiting(job, priority, ranks), ranks)
}

fn holding(job: Waiting, ranks: usize) -> Running {
    Running { job, ranks, on_loan: false, stopping: false }
}

fn start(job: u64, ranks: usize, on_loan: bool) -> Decision {
    Decision::Start { job: id(job), ranks, on_loan }
}

fn preempt(victims: &[u64], for_job: u64) -> Decision {
    Decision::Preempt { victims: victims.iter().copied().map(id).collect(), for_job: id(for_job) }
}

fn wait(job: u64, reason: &str) -> Decision {
    Decision::Wait { job: id(job), reason: reason.to_owned() }
}

#[test]
fn the_line_is_by_priority_then_by_submission() {
    let jobs = [waiting(1, 0, 1), waiting(2, 5, 1), waiting(3, 0, 1), waiting(4, 5, 2)];
    let decided = decide(&jobs, &[], 4);
    assert_eq!(decided[..3], [start(2, 1, false), start(4, 2, false), start(1, 1, false)]);
    assert_eq!(decided[3], wait(3, "needs 1 rank, 0 free"));
}

#[test]
fn idle_slots_are_lent_and_given_back() {
    let mut holder = running(1, 0, 5);
    let line = [
        waiting(2, 0, 8),
        waiting(3, 0, 2),
        Waiting { preemptible: false, ..waiting(4, 0, 1) },
        waiting(5, 0, 2),
    ];
    let decided = decide(&line, std::slice::from_ref(&holder), 3);
    assert_eq!(
        decided,
        [
            wait(2, "needs 8 ranks, 3 free"),
            start(3, 2, true),
            wait(4, "cannot be preempted and so does not overtake job 2"),
            wait(5, "needs 2 ranks, 1 to spare behind job 2"),
        ]
    );
    let loan = Running { on_loan: true, ..running(3, 0, 2) };
    // The holder ended: the head has its slots back, and meanwhile no job takes the free ones.
    let decided = decide(&line[..1], std::slice::from_ref(&loan), 6);
    assert_eq!(decided, [preempt(&[3], 2)]);
    let leaving = Running { stopping: true, ..loan.clone() };
    let decided = decide(&[line[0].clone(), line[3].clone()], &[leaving], 6);
    assert_eq!(
        decided,
        [wait(2, "needs 8 ranks, 6 free, 2 being freed"), wait(5, "needs 2 ranks, 0 to spare behind job 2")]
    );
    // A loan that would not suffice is left alone, and so is one before the head of the queue.
    holder.ranks = 6;
    assert_eq!(decide(&line[..1], &[holder, loan.clone()], 0), [wait(2, "needs 8 ranks, 0 free")]);
    assert_eq!(decide(&[waiting(9, 0, 2)], &[loan], 0), [wait(9, "needs 2 ranks, 0 free")]);
}

#[test]
fn only_strictly_lower_jobs_give_way_the_newest_lowest_first_and_none_too_many() {
    let jobs = [running(1, 1, 4), running(2, 0, 4), running(3, 0, 1), running(4, 2, 4)];
    let preempt = |victims: &[u64]| [preempt(victims, 9)];
    assert_eq!(decide(&[waiting(9, 2, 1)], &jobs, 0), preempt(&[3]));
    assert_eq!(decide(&[waiting(9, 2, 4)], &jobs, 0), preempt(&[2]));
    assert_eq!(decide(&[waiting(9, 2, 8)], &jobs, 0), preempt(&[2, 1]));
    assert_eq!(decide(&[waiting(9, 2, 9)], &jobs, 0), preempt(&[3, 2, 1]));
    assert_eq!(decide(&[waiting(9, 2, 10)], &jobs, 0), [wait(9, "needs 10 ranks, 0 free")]);
    assert_eq!(decide(&[waiting(9, 0, 1)], &jobs, 0), [wait(9, "needs 1 rank, 0 free")]);
    let firm = holding(Waiting { preemptible: false, ..waiting(1, 0, 4) }, 4);
    assert_eq!(decide(&[waiting(9, 2, 1)], &[firm], 0), [wait(9, "needs 1 rank, 0 free")]);
}

#[test]
fn a_job_larger_than_the_cluster_blocks_no_other() {
    let firm = Waiting { preemptible: false, ..waiting(2, 0, 3) };
    let decided = decide(&[waiting(1, 5, 9), firm, waiting(3, 0, 1)], &[running(7, 9, 4)], 4);
    assert_eq!(decided, [wait(1, "needs 9 ranks, 8 healthy"), start(2, 3, false), start(3, 1, true)]);
}

#[test]
fn an_elastic_job_starts_with_what_there_is_and_with_more_where_nobody_waits() {
    let job = elastic(1, 0, (2, 4, 8));
    assert_eq!(decide(std::slice::from_ref(&job), &[], 3), [start(1, 3, false)]);
    assert_eq!(decide(std::slice::from_ref(&job), &[], 6), [start(1, 6, false)]);
    assert_eq!(decide(std::slice::from_ref(&job), &[], 9), [start(1, 8, false)]);
    assert_eq!(
        decide(std::slice::from_ref(&job), &[running(7, 0, 5)], 1),
        [wait(1, "needs 4 ranks or at least 2, 1 free")]
    );
    let too_few = [wait(1, "needs 4 ranks or at least 2, 1 healthy")];
    assert_eq!(decide(std::slice::from_ref(&job), &[], 1), too_few);
    // Each has what it asks for before anybody has more.
    let both = [job.clone(), waiting(2, 0, 3)];
    assert_eq!(decide(&both, &[], 8), [start(1, 5, false), start(2, 3, false)]);
    // It has no more than it asks for where somebody waits, though that one may not use what is left.
    let decided = decide(&[job, waiting(2, 0, 3)], &[], 6);
    assert_eq!(decided, [start(1, 4, false), wait(2, "needs 3 ranks, 2 free")]);
}

#[test]
fn elastic_jobs_give_up_ranks_before_anybody_is_sent_away() {
    // Beyond what it asked for to anybody, the rest to those of a higher priority.
    let grown = holding(elastic(1, 0, (2, 4, 8)), 8);
    let lower = running(2, -1, 4);
    assert_eq!(decide(&[waiting(9, 0, 4)], &[grown.clone(), lower.clone()], 0), [preempt(&[1], 9)]);
    assert_eq!(decide(&[waiting(9, 0, 5)], &[grown.clone(), lower.clone()], 0), [preempt(&[2, 1], 9)]);
    assert_eq!(
        decide(&[waiting(9, 0, 5)], std::slice::from_ref(&grown), 0),
        [wait(9, "needs 5 ranks, 0 free")]
    );
    assert_eq!(decide(&[waiting(9, 1, 6)], &[grown.clone(), lower.clone()], 0), [preempt(&[1], 9)]);
    // With all of them at their fewest it has too little: then they go as a whole.
    assert_eq!(decide(&[waiting(9, 1, 7)], &[grown, lower], 0), [preempt(&[1], 9)]);
    // One that waits takes the fewest that it may have where it cannot get more, but no more from others for that.
    let small = elastic(9, 0, (1, 6, 6));
    let grown = holding(elastic(1, 0, (2, 4, 8)), 6);
    assert_eq!(decide(std::slice::from_ref(&small), std::slice::from_ref(&grown), 0), [preempt(&[1], 9)]);
    assert_eq!(decide(std::slice::from_ref(&small), &[running(1, 0, 4)], 2), [start(9, 2, false)]);
}

#[test]
fn what_nobody_waits_for_goes_to_those_that_may_grow() {
    let jobs = [
        holding(elastic(1, 0, (1, 2, 4)), 2),
        holding(elastic(2, 1, (1, 2, 9)), 1),
        running(3, 5, 2),
        Running { stopping: true, ..holding(elastic(4, 9, (1, 2, 9)), 2) },
        holding(elastic(5, 7, (1, 2, 4)), 4),
    ];
    assert_eq!(grows(&jobs, 3), [(id(2), 4), (id(1), 4)]);
    assert_eq!(grows(&jobs, 0), []);
}

/// A job's whole life: when it comes, and how many ticks of work it is.
#[derive(Clone, Debug)]
struct Life {
    arrives: u64,
    work: u64,
    job: Waiting,
}

/// A cluster in which time passes; a job that is sent away is out at once and keeps the work it has done.
#[derive(Clone)]
struct World {
    slots: usize,
    now: u64,
    line: Vec<Waiting>,
    running: Vec<Running>,
    work_left: Vec<u64>,
    lends: bool,
    /// First start of each job.
    started: Vec<Option<u64>>,
    ended: usize,
}

impl World {
    fn new(slots: usize, lives: &[Life]) -> World {
        let work_left = lives.iter().map(|life| life.work).collect();
        let (line, running) = (Vec::new(), Vec::new());
        World {
            slots,
            now: 0,
            line,
            running,
            work_left,
            lends: true,
            started: vec![None; lives.len()],
            ended: 0,
        }
    }

    fn free(&self) -> usize {
        self.slots.checked_sub(held_by(&self.running, |_| true)).expect("more slots are held than there are")
    }

    /// The same world without loans: jobs on loan go back into the queue.
    fn without_loans(&self) -> World {
        let mut other = World { lends: false, ..self.clone() };
        let (loans, running) = other.running.drain(..).partition(|running: &Running| running.on_loan);
        other.running = running;
        other.line.extend(loans.into_iter().map(|loan: Running| loan.job));
        other
    }

    /// Jobs end and come.
    fn advance(&mut self, lives: &[Life]) {
        self.now += 1;
        for running in &self.running {
            self.work_left[running.job.job.number() as usize] -= 1;
        }
        let before = self.running.len();
        self.running.retain(|running| self.work_left[running.job.job.number() as usize] > 0);
        self.ended += before - self.running.len();
        self.line.extend(lives.iter().filter(|life| life.arrives == self.now).map(|life| life.job.clone()));
    }

    /// Does what is decided until nothing changes; each state is checked.
    fn settle(&mut self) {
        for _ in 0..100 {
            let decided = decide(&self.line, &self.running, self.free());
            assert_eq!(decided.len(), self.line.len());
            let mut reversed = (self.line.clone(), self.running.clone());
            reversed.0.reverse();
            reversed.1.reverse();
            assert_eq!(
                decide(&reversed.0, &reversed.1, self.free()),
                decided,
                "depends on the order of its input"
            );
            let mut changed = false;
            for decision in decided {
                match decision {
                    Decision::Start { on_loan: true, .. } if !self.lends => {}
                    Decision::Start { job, ranks, on_loan } => {
                        (self.start(job, ranks, on_loan), changed = true).1
                    }
                    Decision::Preempt { victims, for_job } => {
                        (self.send_away(&victims, for_job), changed = true).1
                    }
                    Decision::Wait { .. } => {}
                }
            }
            if !changed {
                return;
            }
        }
        panic!("the decisions do not come to rest");
    }

    fn start(&mut self, job: JobId, ranks: usize, on_loan: bool) {
        let index = self.line.iter().position(|waiting| waiting.job == job).unwrap();
        let job = self.line.remove(index);
        assert!((job.size.least..=job.size.most).contains(&ranks), "{ranks} of {:?}", job.size);
        assert!(ranks <= self.free(), "overcommitted");
        let overtaken = self.line.iter().filter(|other| other.place() < job.place());
        assert!(on_loan || !job.preemptible || overtaken.count() == 0, "out of turn, but not on loan");
        self.started[job.job.number() as usize].get_or_insert(self.now);
        self.running.push(Running { on_loan, ..holding(job, ranks) });
    }

    fn send_away(&mut self, victims: &[JobId], for_job: JobId) {
        let head = self.line.iter().find(|waiting| waiting.job == for_job).unwrap().clone();
        let mut freed = Vec::new();
        for victim in victims {
            let index = self.running.iter().position(|running| running.job.job == *victim).unwrap();
            let victim = self.running.remove(index);
            assert!(victim.job.preemptible);
            assert!(
                victim.job.priority < head.priority
                    || victim.on_loan && victim.job.place() > head.place()
                    || victim.ranks > victim.job.size.asked,
                "{victim:?} gives way to {head:?}"
            );
            freed.push(victim.ranks);
            self.line.push(victim.job);
        }
        let Size { least, asked, most } = head.size;
        assert!(self.free() >= least, "sent away without use");
        assert!(
            least < most || freed.iter().all(|ranks| self.free() - ranks < asked),
            "more sent away than needed"
        );
    }

    fn head(&self) -> Option<Waiting> {
        self.line.iter().filter(|job| job.size.least <= self.slots).min_by_key(|job| job.place()).cloned()
    }
}

/// `elastic_jobs`: they may have fewer ranks than they ask for, and more.
fn lives(elastic_jobs: bool) -> impl Strategy<Value = (usize, Vec<Life>)> {
    let ranks = (1_usize..8, 0_usize..8, 0_usize..8);
    let life = (1_u64..25, 1_u64..9, -1_i64..2, ranks, prop::bool::weighted(0.8));
    (2_usize..10, prop::collection::vec(life, 1..14)).prop_map(move |(slots, lives)| {
        let life = |(job, (arrives, work, priority, (ranks, fewer, more), preemptible))| {
            let job: usize = job;
            // Nothing larger than the cluster, so that everything ends.
            let asked = usize::min(ranks, slots);
            let elastic =
                Size { least: usize::max(1, asked.saturating_sub(fewer)), asked, most: asked + more };
            let size = if elastic_jobs { elastic } else { Size::exactly(asked) };
            let job = Waiting { job: id(job as u64), priority, submitted: arrives, size, preemptible };
            Life { arrives, work, job }
        };
        (slots, lives.into_iter().enumerate().map(life).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_job_has_its_turn_and_no_head_waits_for_a_loan((slots, lives) in lives(false)) {
        let mut world = World::new(slots, &lives);
        // For the job that is head: the world in which nothing was lent since it became that.
        let mut twin: Option<(JobId, World)> = None;
        for _ in 0..400 {
            world.advance(&lives);
            if let Some((_, twin)) = &mut twin { twin.advance(&lives) }
            if let Some(head) = world.head()
                && twin.as_ref().is_none_or(|(job, _)| *job != head.job)
            {
                twin = Some((head.job, world.without_loans()));
            }
            world.settle();
            if let Some((head, other)) = &mut twin {
                other.settle();
                let (ours, theirs) = (world.started[head.number() as usize], other.started[head.number() as usize]);
                prop_assert!(theirs.is_none() || ours.is_some(), "{head} is delayed by a loan at {}", world.now);
                if ours.is_some() { twin = None }
            }
        }
        prop_assert_eq!(world.ended, lives.len(), "a job starved");
    }

    /// Nobody has more than it asked for while that would let another one start, and everything ends.
    #[test]
    fn elastic_jobs_leave_room_for_others_and_all_have_their_turn((slots, lives) in lives(true)) {
        let mut world = World::new(slots, &lives);
        for _ in 0..400 {
            world.advance(&lives);
            world.settle();
            let beyond = |running: &Running| running.ranks.saturating_sub(running.job.size.asked);
            let preemptible = world.running.iter().filter(|running| running.job.preemptible);
            let extra: usize = preemptible.map(beyond).sum();
            if let Some(head) = world.head().filter(|_| extra > 0) {
                prop_assert!(world.free() + extra < head.size.least, "{head:?} waits: {:?}", world.running);
            }
            for (job, ranks) in grows(&world.running, world.free()) {
                let held = world.running.iter().find(|running| running.job.job == job).unwrap().ranks;
                prop_assert!(held < ranks && ranks <= held + world.free());
            }
        }
        prop_assert_eq!(world.ended, lives.len(), "a job starved");
    }

    /// Among jobs of one priority that cannot be sent away, first come is first served.
    #[test]
    fn firm_jobs_of_one_priority_start_in_the_order_of_their_coming((slots, mut lives) in lives(false)) {
        for life in &mut lives {
            (life.job.priority, life.job.preemptible) = (0, false);
        }
        let mut world = World::new(slots, &lives);
        for _ in 0..400 {
            world.advance(&lives);
            world.settle();
        }
        let mut order: Vec<_> = lives.iter().map(|life| (life.job.place(), world.started[life.job.job.number() as usize].unwrap())).collect();
        order.sort();
        prop_assert!(order.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{order:?}");
    }
}
