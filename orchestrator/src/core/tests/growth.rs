//! Jobs that start with what there is, grow into what nobody else has a use for, and give it up again.

use contraflow_proto::StepReport;
use contraflow_runtime::control::MovedBytes;

use super::*;
use crate::queue::Size;

/// A job of two ranks that may have one to four.
fn elastic(priority: i32) -> Box<JobSpec> {
    Box::new(JobSpec { min_ranks: 1, max_ranks: 4, ..*spec(2, priority) })
}

/// Its ranks are ready and have made a step.
fn trains(world: &mut World, step: u64) {
    let ranks = world.places().len();
    Rank::all(ranks).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
    for rank in 0..ranks as u32 {
        let report = StepReport { rank, step, generation: world.generation(), ..StepReport::default() };
        drop(world.event(RankEvent::StepDone { report }));
    }
}

/// The job has as many ranks as there are workers, for nobody else waits, and has made a step.
fn training_on(workers: usize) -> World {
    let mut world = World::new();
    (1..=workers as u64).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(elastic(0))));
    assert_eq!(world.places().len(), workers);
    trains(&mut world, 1);
    world
}

/// Its ranks stop after a step, which stays in memory; nobody is told to save anything.
fn stops(world: &mut World, step: u64) {
    let before = world.generation();
    let effects = world.stops_in_memory(step);
    let memory = world.core.jobs().all[&JOB].formed.clone().unwrap().memory.unwrap();
    assert_eq!((memory.generation.number(), memory.step, world.generation()), (before, step, before + 1));
    let commits =
        |(_, command): &(u64, &WorkerCommand)| matches!(command, WorkerCommand::CommitCheckpoint { .. });
    assert!(!commands(&effects).iter().any(commits), "{effects:?}");
}

/// Its ranks stop after a step, which is saved, and it goes back in line.
fn gives_way(world: &mut World, step: u64) {
    let ranks = world.places().len();
    Rank::all(ranks).for_each(|rank| drop(world.event(RankEvent::Stopped { rank, step, in_memory: false })));
    for rank in Rank::all(ranks) {
        let (position, watch, shard) = (position(step), Default::default(), ShardFile::default());
        drop(world.event(RankEvent::ShardSaved { rank, position, watch, shard }));
    }
    committed(world, step);
}

impl World {
    /// The ranks of the first job stop after a step, whose state every worker of it has in memory, and all say so.
    pub(super) fn stops_in_memory(&mut self, step: u64) -> Vec<Effect> {
        let formed = self.core.jobs().all[&JOB].formed.clone().unwrap();
        let ranks: Vec<Rank> = Rank::all(formed.places.len()).collect();
        let shard = |rank| ReplicaShard { generation: formed.generation, step, rank };
        let workers: Vec<u64> = formed.places.clone();
        for &worker in &workers {
            self.replicas.insert(worker, ranks.iter().copied().map(shard).collect());
        }
        let mut effects: Vec<Effect> = Vec::new();
        for rank in ranks {
            effects.extend(self.event(RankEvent::Stopped { rank, step, in_memory: true }));
        }
        for answer in self.answers(&effects, &workers) {
            effects.extend(self.step(answer));
        }
        effects
    }

    fn generation(&self) -> u32 {
        self.core.jobs().all[&JOB].generation().number()
    }
}

fn stop_commands(effects: &[Effect]) -> usize {
    let is_stop = |(_, command): &(u64, &WorkerCommand)| {
        matches!(command, WorkerCommand::Rank { command: RankCommand::Stop { .. }, .. })
    };
    commands(effects).iter().filter(|sent| is_stop(sent)).count()
}

#[test]
fn a_job_starts_with_what_there_is_and_grows_once_the_room_has_lasted() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(elastic(0))));
    assert_eq!(world.places(), [1]);
    assert_eq!(world.core.size(JOB), Size { least: 1, asked: 2, most: 4 });
    trains(&mut world, 1);
    drop(world.attach(2, Vec::new()));
    assert_eq!(stop_commands(&world.pass(GROW_MS - TICK_MS, &[1, 2])), 0);
    // Another one comes: the room is another one from now on.
    drop(world.attach(3, Vec::new()));
    assert_eq!(stop_commands(&world.pass(GROW_MS - TICK_MS, &[1, 2, 3])), 0);
    assert_eq!(stop_commands(&world.pass(2 * TICK_MS, &[1, 2, 3])), 1);
    stops(&mut world, 1);
    assert_eq!(world.places(), [1, 2, 3]);
    let formed = world.core.jobs().all[&JOB].formed.clone().unwrap();
    assert_eq!((formed.topology.data, formed.resume_step, formed.generation.number()), (3, 1, 2));
    // No more than it may have, and no layout has five.
    (4..=6).for_each(|worker| drop(world.attach(worker, Vec::new())));
    trains(&mut world, 2);
    drop(world.pass(GROW_MS + 2 * TICK_MS, &[1, 2, 3, 4, 5, 6]));
    stops(&mut world, 2);
    assert_eq!(world.places().len(), 4);
    trains(&mut world, 3);
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2, 3, 4, 5, 6])), 0);
}

#[test]
fn a_formation_that_has_made_no_step_does_not_grow() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(elastic(0))));
    drop(world.attach(2, Vec::new()));
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2])), 0);
    trains(&mut world, 1);
    assert_eq!(stop_commands(&world.pass(TICK_MS, &[1, 2])), 1);
}

#[test]
fn what_another_job_waits_for_nobody_grows_into_and_a_job_gives_it_up() {
    let mut world = training_on(4);
    // Of the same priority: it keeps what it asked for.
    let effects = world.step(Event::Submit(spec(2, 0)));
    assert_eq!(stop_commands(&effects), 4);
    assert_eq!(world.core.waiting_for(SECOND), "job-1 to yield");
    gives_way(&mut world, 1);
    let ranks =
        |world: &World, job| world.core.jobs().all[&job].running().map_or(0, |formed| formed.places.len());
    assert_eq!([JOB, SECOND].map(|job| ranks(&world, job)), [2, 2]);
    trains(&mut world, 2);
    // One of a higher priority: it goes down to the fewest.
    let effects = world.step(Event::Submit(spec(1, 1)));
    assert_eq!(stop_commands(&effects), 2);
    gives_way(&mut world, 2);
    assert_eq!([JOB, SECOND, id(3)].map(|job| ranks(&world, job)), [1, 2, 1]);
    // It has the room back when the other one has ended.
    trains(&mut world, 3);
    drop(world.step(Event::Cancel { job: id(3), reason: String::new() }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2, 3, 4])), 1);
    stops(&mut world, 3);
    assert_eq!([JOB, SECOND].map(|job| ranks(&world, job)), [2, 2]);
}

#[test]
fn a_job_is_scaled_down_at_once_and_up_when_there_is_room_until_it_is_left_to_itself_again() {
    let mut world = training_on(4);
    let effects = world.step(Event::Scale { job: JOB, ranks: 3 });
    assert_eq!((stop_commands(&effects), logged(&effects)), (4, vec!["scaled to 3 ranks"]));
    stops(&mut world, 1);
    assert_eq!(world.places().len(), 3);
    trains(&mut world, 2);
    assert_eq!(stop_commands(&world.pass(10 * GROW_MS, &[1, 2, 3, 4])), 0, "the fourth slot stays free");
    // Again the same is nothing new.
    assert!(world.step(Event::Scale { job: JOB, ranks: 3 }).is_empty());
    drop(world.step(Event::Scale { job: JOB, ranks: 0 }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2, 3, 4])), 3);
    stops(&mut world, 2);
    assert_eq!(world.places().len(), 4);
    // It is kept.
    drop(world.step(Event::Scale { job: JOB, ranks: 1 }));
    let kept = Fact::Scaled { job: JOB, ranks: 1 };
    assert!(world.facts.contains(&kept));
    assert_eq!(world.core.size(JOB), Size { least: 1, asked: 1, most: 1 });
    assert_eq!(world.core.check_scale(JOB, 5), Ok(()));
    // A number that nobody can mean costs nobody any time.
    let most = world.core.check_scale(JOB, usize::MAX).unwrap_err();
    assert!(most.starts_with("ranks: expected at most 65536, got "), "{most}");
    let unknown = world.core.check_scale(SECOND, 5).unwrap_err();
    assert_eq!(unknown, "job: expected one that has not ended, got job-2");
}

#[test]
fn a_job_that_was_scaled_up_may_still_have_as_few_ranks_as_its_recipe_names() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.step(Event::Scale { job: JOB, ranks: 3 }));
    assert_eq!(world.core.size(JOB), Size { least: 2, asked: 3, most: 3 });
}

#[test]
fn a_job_that_has_lost_ranks_and_was_scaled_meanwhile_holds_nobody_up() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(3, 0))));
    drop(world.step(Event::Scale { job: JOB, ranks: 1 }));
    assert_eq!(world.places(), [1]);
    trains(&mut world, 1);
    // It may go on with one rank until it loses that.
    drop(world.step(Event::Scale { job: JOB, ranks: 0 }));
    drop(world.pass(LEASE_MS + ADOPTION_MS + 2 * TICK_MS, &[2]));
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
    drop(world.attach(3, Vec::new()));
    drop(world.step(Event::Submit(spec(1, 0))));
    assert_eq!(world.core.jobs().all[&SECOND].phase, Phase::Formed);
}

#[test]
fn a_job_that_is_drained_goes_on_with_fewer_ranks_and_grows_back() {
    let mut world = training_on(2);
    drop(world.step(Event::Drain { node: "n2".into() }));
    gives_way(&mut world, 1);
    assert_eq!(world.places(), [1]);
    trains(&mut world, 2);
    drop(world.step(Event::Undrain { node: "n2".into() }));
    assert_eq!(stop_commands(&world.pass(GROW_MS + TICK_MS, &[1, 2])), 1);
    stops(&mut world, 2);
    assert_eq!(world.places(), [1, 2]);
}

#[test]
fn a_job_that_shrinks_has_what_it_needs_brought_by_those_that_leave_until_it_needs_them_no_more() {
    let mut world = training_on(4);
    drop(world.step(Event::Scale { job: JOB, ranks: 2 }));
    // Only the owners are known to have their parts: nobody else may be asked.
    let generation = Generation::FIRST;
    for worker in 1..=4 {
        let rank = Rank::new(worker as u32 - 1);
        world.replicas.insert(worker, vec![ReplicaShard { generation, step: 1, rank }]);
    }
    let mut effects = Vec::new();
    for rank in Rank::all(4) {
        effects.extend(world.event(RankEvent::Stopped { rank, step: 1, in_memory: true }));
    }
    for answer in world.answers(&effects, &[1, 2, 3, 4]) {
        effects.extend(world.step(answer));
    }
    let formed = world.core.jobs().all[&JOB].formed.clone().unwrap();
    let memory = formed.memory.clone().unwrap();
    assert_eq!((formed.places.clone(), formed.resume_step), (vec![1, 2], 1));
    assert_eq!((memory.axes.map(|axes| axes.data), memory.bringers.clone()), (Some(4), vec![3, 4]));
    assert_eq!(memory.holders, Rank::all(4).collect::<Vec<_>>());
    let told = |effects: &[Effect], worker: u64| -> Vec<WorkerCommand> {
        let sent = commands(effects).into_iter().filter(|(to, _)| *to == worker);
        sent.map(|(_, command)| command.clone()).collect()
    };
    for (worker, place) in [(3, 2), (4, 3)] {
        let bring = WorkerCommand::Bring { formation: of(2), place: Rank::new(place) };
        assert_eq!(told(&effects, worker).last(), Some(&bring));
    }
    // One that comes back is told again.
    drop(world.step(Event::Detached { worker: 3 }));
    let left = vec![Left { formation: of(2), replicas: world.replicas[&3].clone() }];
    let effects = world.join(Attachment { registration: registration(3), left, ..Attachment::default() });
    let bring = WorkerCommand::Bring { formation: of(2), place: Rank::new(2) };
    assert_eq!(told(&effects, 3).last(), Some(&bring));
    // Each says how much it took over; of all of them there is one line.
    let moved = |rank| RankEvent::StateMoved { rank, moved: MovedBytes { moved: 3, least: 2, needed: 4 } };
    assert_eq!(logged(&world.event(moved(Rank::new(0)))), Vec::<&str>::new());
    let words = "of 8.0 B of state in memory 6.0 B moved between workers, 4.0 B had to";
    assert_eq!(logged(&world.event(moved(Rank::new(1)))), [words]);
    trains(&mut world, 2);
    let released = |effects: &[Effect]| {
        let is_release = |command: &WorkerCommand| matches!(command, WorkerCommand::Release { keep: false, formation, .. } if *formation == of(2));
        (3..=4).filter(|&worker| told(effects, worker).iter().any(is_release)).count()
    };
    let made = |world: &mut World, step| {
        let report = StepReport { rank: 0, step, generation: world.generation(), ..StepReport::default() };
        world.event(RankEvent::StepDone { report })
    };
    // Of step 2 not every buddy has the state by then.
    assert_eq!(released(&made(&mut world, 2)), 0);
    assert_eq!(released(&made(&mut world, 3)), 2);
    assert_eq!(released(&made(&mut world, 4)), 0, "once");
}

#[test]
fn a_worker_that_is_lost_before_it_has_brought_its_part_ends_the_formation_and_a_copy_is_taken() {
    let mut world = training_on(4);
    drop(world.step(Event::Scale { job: JOB, ranks: 2 }));
    let generation = Generation::FIRST;
    let part = |rank: u32| ReplicaShard { generation, step: 1, rank: Rank::new(rank) };
    for (worker, parts) in [(1, vec![0]), (2, vec![1]), (3, vec![2, 3]), (4, vec![2, 3])] {
        world.replicas.insert(worker, parts.into_iter().map(part).collect());
    }
    let mut effects = Vec::new();
    for rank in Rank::all(4) {
        effects.extend(world.event(RankEvent::Stopped { rank, step: 1, in_memory: true }));
    }
    for answer in world.answers(&effects, &[1, 2, 3, 4]) {
        drop(world.step(answer));
    }
    let memory = |world: &World| world.core.jobs().all[&JOB].formed.clone().unwrap().memory.unwrap();
    assert_eq!(memory(&world).bringers, [3, 4]);
    drop(world.pass(LEASE_MS + 2 * TICK_MS, &[1, 2, 4]));
    assert_eq!((world.generation(), memory(&world).bringers), (3, vec![4]));
    assert_eq!((memory(&world).step, world.places()), (1, vec![1, 2]));
}

#[test]
fn a_job_that_keeps_nothing_in_memory_is_saved_for_another_layout() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    let kept = spec_with(2, 0, &["checkpoint.in_memory=false"]);
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*kept }))));
    trains(&mut world, 1);
    let effects = world.step(Event::Scale { job: JOB, ranks: 1 });
    let saves = |(_, command): &(u64, &WorkerCommand)| {
        matches!(command, WorkerCommand::Rank { command: RankCommand::Stop { in_memory: false }, .. })
    };
    assert_eq!(commands(&effects).iter().filter(|sent| saves(sent)).count(), 2);
    gives_way(&mut world, 1);
    let formed = world.core.jobs().all[&JOB].formed.clone().unwrap();
    assert_eq!((formed.places.len(), formed.resume_step, formed.memory), (1, 1, None));
}

#[test]
fn an_orchestrator_that_starts_while_a_job_changes_its_layout_goes_on_with_that() {
    let mut world = training_on(2);
    drop(world.step(Event::Scale { job: JOB, ranks: 1 }));
    // It ends before its workers have said what they keep.
    for rank in Rank::all(2) {
        drop(world.event(RankEvent::Stopped { rank, step: 1, in_memory: true }));
    }
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 0, Times::default()), 0);
    let part = |rank| ReplicaShard { generation: Generation::FIRST, step: 1, rank };
    for worker in 1..=2 {
        let replicas: Vec<ReplicaShard> = Rank::all(2).map(part).collect();
        again.replicas.insert(worker, replicas.clone());
        let left = vec![Left { formation: of(1), replicas }];
        let registration = registration(worker);
        let effects = again.join(Attachment { registration, left, ..Attachment::default() });
        // It repeats what its ranks have reported before it is believed what it has.
        assert!(again.places().is_empty());
        for answer in again.answers(&effects, &[worker]) {
            drop(again.step(answer));
        }
    }
    let formed = again.core.jobs().all[&JOB].formed.clone().unwrap();
    assert_eq!((formed.places.len(), formed.resume_step, formed.memory.is_some()), (1, 1, true));
}

#[test]
fn a_job_whose_state_is_in_memory_alone_makes_a_step_before_it_gives_its_slots_up() {
    let mut world = training_on(4);
    drop(world.step(Event::Scale { job: JOB, ranks: 2 }));
    stops(&mut world, 1);
    // Nothing of it is in the storage, and none of its ranks is ready.
    let effects = world.step(Event::Submit(spec(3, 1)));
    assert_eq!(stop_commands(&effects), 0);
    assert!(world.core.waiting_for(SECOND).contains("job-1 to yield"));
    drop(world.event(RankEvent::Ready { rank: Rank::ZERO }));
    let effects = world.event(RankEvent::Ready { rank: Rank::new(1) });
    assert_eq!(stop_commands(&effects), 2, "{effects:?}");
    gives_way(&mut world, 2);
    assert_eq!(world.core.jobs().all[&JOB].last_checkpoint, 2);
    assert_eq!(world.core.jobs().all[&SECOND].phase, Phase::Formed);
}
