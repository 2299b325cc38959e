//! The cluster's decisions, event by event.

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::recipe::ErrorKind;
use contraflow_runtime::schedule::ScheduleKind;
use contraflow_runtime::topology::Topology;
use contraflow_runtime::watch::{Action, Divergence};

use super::facts::{End, Fact, JobSpec};
use super::jobs::{Jobs, Phase};
use super::*;
use crate::recovery::{InMemory, KeptShard};

const RECIPE: &str = "
    model.config = 'tiny'
    parallel.schedule = '1f1b'
    training = { steps = 9, sequence_length = 32, global_batch_size = 8, micro_batch_size = 1 }
    lr.peak = 1e-3
";

fn spec(ranks: usize, priority: i32) -> Box<JobSpec> {
    Box::new(JobSpec {
        name: "job".into(),
        priority,
        min_ranks: ranks,
        key: String::new(),
        recipe: RECIPE.into(),
        model_config: String::new(),
        topology: Topology { pipeline: 1, expert: 1, data: ranks },
        schedule: ScheduleKind::OneFOneB,
        steps: 9,
        save_model: false,
        in_memory: true,
        max_returns: 2,
        traceparent: String::new(),
    })
}

/// A core with what it has kept, and the time.
struct World {
    core: Core,
    facts: Vec<Fact>,
    /// By worker, what it keeps of the state of its job.
    kept: BTreeMap<u64, Vec<KeptShard>>,
    now: u64,
}

impl World {
    fn new() -> Self {
        World::of(Core::new(Jobs::default(), 1, 0), 0)
    }

    fn of(core: Core, now: u64) -> Self {
        World { core, facts: Vec::new(), kept: BTreeMap::new(), now }
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.core.step(event, self.now);
        let facts = effects.iter().filter_map(|effect| match effect {
            Effect::Keep(fact) => Some(fact.clone()),
            _ => None,
        });
        self.facts.extend(facts);
        effects
    }

    fn attach(&mut self, worker: u64, hosted: Vec<(u64, u32, Vec<usize>)>) -> Vec<Effect> {
        let who = Introduction { worker, slots: 1, node: format!("n{worker}"), ..Introduction::default() };
        let (left, storage_mark) = (Vec::new(), "mark".into());
        self.step(Event::Attached { who, hosted, left, incarnation: 0, storage_mark })
    }

    fn event(&mut self, rank: usize, event: RankEvent) -> Vec<Effect> {
        let formed = self.core.jobs().all[&1].formed.clone().unwrap();
        let from = RankAddress { job: 1, generation: formed.generation, rank };
        self.step(Event::Rank { worker: formed.places[rank], from, event: Box::new(event) })
    }

    /// Time passes in which these workers beat, and say what they keep when they are asked.
    fn pass(&mut self, ms: u64, beating: &[u64]) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..ms / TICK_MS {
            self.now += TICK_MS;
            for &worker in beating {
                effects.extend(self.step(Event::Beat { worker, progress: Vec::new() }));
            }
            let told = self.step(Event::Tick);
            let answers = self.answers(&told, beating);
            effects.extend(told);
            for answer in answers {
                effects.extend(self.step(answer));
            }
        }
        effects
    }

    fn answers(&self, effects: &[Effect], beating: &[u64]) -> Vec<Event> {
        let asked = words(effects).into_iter().filter(|(worker, _)| beating.contains(worker));
        let answer = |(worker, word): (u64, &Word)| match *word {
            Word::Release { job, generation, keep: true, .. } => {
                let kept = self.kept.get(&worker).cloned().unwrap_or_default();
                Some(Event::Left { worker, left: Left { job, generation, kept } })
            }
            _ => None,
        };
        asked.filter_map(answer).collect()
    }

    fn places(&self) -> Vec<u64> {
        self.core.jobs().all[&1].running().map_or_else(Vec::new, |formed| formed.places.clone())
    }
}

fn words(effects: &[Effect]) -> Vec<(u64, &Word)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Tell { worker, word } => Some((*worker, word)),
            _ => None,
        })
        .collect()
}

/// Two ranks that train, on workers 1 and 2; worker 3 is spare.
fn training() -> World {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    assert_eq!(world.places(), [1, 2]);
    drop(world.event(0, RankEvent::Ready { rank: 0 }));
    let effects = world.event(1, RankEvent::Ready { rank: 1 });
    let begun = words(&effects).into_iter().filter(|(_, word)| {
        matches!(word, Word::Command { command: RankCommand::BeginStep { step: 1 }, .. })
    });
    assert_eq!(begun.count(), 2);
    world
}

fn save(world: &mut World, step: u64) -> Vec<Effect> {
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: Position { step, ..Position::default() },
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    drop(world.event(0, saved(0)));
    world.event(1, saved(1))
}

#[test]
fn a_job_waits_for_all_its_ranks_and_says_so() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(spec(2, 0))));
    assert!(world.places().is_empty());
    assert_eq!(world.core.waiting_for(1), "needs 2 ranks, 1 healthy");
    let effects = world.attach(2, Vec::new());
    assert_eq!(world.places(), [1, 2]);
    let assigned: Vec<u64> = words(&effects)
        .into_iter()
        .filter(|(_, word)| matches!(word, Word::Assign { .. }))
        .map(|(worker, _)| worker)
        .collect();
    assert_eq!(assigned, [1, 2]);
}

#[test]
fn a_silent_worker_is_lost_after_three_beats_and_its_rank_moves_to_the_spare_one() {
    let mut world = training();
    let effects = save(&mut world, 4);
    assert!(matches!(words(&effects)[..], [(1, Word::CommitCheckpoint { .. })]));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(4), result: Ok(()) };
    drop(world.step(done));
    drop(world.pass(LEASE_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 2]);
    let effects = world.pass(TICK_MS, &[1, 3]);
    assert_eq!(world.places(), [1, 3]);
    let record = &world.core.jobs().all[&1];
    let formed = record.formed.as_ref().unwrap();
    assert_eq!((formed.generation, formed.resume_step, record.losses), (2, 4, 1));
    let told = words(&effects);
    let released = |worker| {
        told.iter().any(|(to, word)| *to == worker && matches!(word, Word::Release { generation: 1, .. }))
    };
    assert!(released(1) && released(2));
    let broken = world.facts.iter().find_map(|fact| match fact {
        Fact::Broken { lost, why, .. } => Some((lost.clone(), why.clone())),
        _ => None,
    });
    let (lost, why) = broken.unwrap();
    assert_eq!(lost, [1]);
    assert!(why.contains("rank 1 lost") && why.contains("node n2 is silent"), "{why}");
}

#[test]
fn a_broken_stream_is_no_loss_if_the_worker_is_back_in_time() {
    let mut world = training();
    drop(world.step(Event::Detached { worker: 2 }));
    drop(world.pass(RETURN_MS - TICK_MS, &[1, 3]));
    let effects = world.attach(2, vec![(1, 1, vec![1])]);
    assert!(!words(&effects).iter().any(|(_, word)| matches!(word, Word::Assign { .. })));
    drop(world.pass(2 * LEASE_MS, &[1, 2, 3]));
    assert_eq!((world.places(), world.core.jobs().all[&1].generation()), (vec![1, 2], 1));
}

#[test]
fn a_victim_that_has_lost_a_peer_is_not_blamed() {
    let mut world = training();
    let lost = RankEvent::Failed {
        rank: 0,
        action: "F1.0".into(),
        cause: "rank 1 is lost".into(),
        kind: ErrorKind::Lost,
    };
    drop(world.event(0, lost));
    drop(world.pass(VERDICT_MS - TICK_MS, &[1, 3]));
    // The lease of worker 2 has run out meanwhile.
    assert_eq!(world.places(), [1, 3]);
}

#[test]
fn ranks_that_lose_each_other_while_all_workers_beat_are_formed_anew() {
    let mut world = training();
    let lost = RankEvent::Failed {
        rank: 0,
        action: "F1.0".into(),
        cause: "connection reset".into(),
        kind: ErrorKind::Lost,
    };
    drop(world.event(0, lost));
    drop(world.pass(VERDICT_MS + TICK_MS, &[1, 2, 3]));
    let record = &world.core.jobs().all[&1];
    assert_eq!((world.places(), record.generation(), record.losses), (vec![1, 2], 2, 0));
}

#[test]
fn what_an_earlier_generation_says_is_dropped() {
    let mut world = training();
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    let stale = RankAddress { job: 1, generation: 1, rank: 1 };
    let ready = Box::new(RankEvent::Ready { rank: 1 });
    drop(world.step(Event::Rank { worker: 2, from: stale, event: ready }));
    drop(world.event(0, RankEvent::Ready { rank: 0 }));
    assert!(!world.core.is_training(1));
    drop(world.event(1, RankEvent::Ready { rank: 1 }));
    assert!(world.core.is_training(1));
}

#[test]
fn an_orchestrator_that_starts_again_adopts_what_runs() {
    let world = training();
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
    let mut again = World::of(Core::new(jobs, 2, 50_000), 50_000);
    drop(again.pass(2_000, &[]));
    let effects = again.attach(1, vec![(1, 1, vec![0])]);
    assert!(!words(&effects).iter().any(|(_, word)| matches!(word, Word::Assign { .. })));
    drop(again.event(0, RankEvent::Ready { rank: 0 }));
    drop(again.pass(1_000, &[1]));
    // The other worker never got its assignment: it is said again.
    let effects = again.attach(2, Vec::new());
    let expected = Word::Assign { job: 1, generation: 1, ranks: vec![1] };
    assert!(words(&effects).iter().any(|(worker, word)| *worker == 2 && **word == expected));
    drop(again.event(1, RankEvent::Ready { rank: 1 }));
    assert!(again.core.is_training(1));
    assert_eq!(again.core.jobs().all[&1].generation(), 1);
}

#[test]
fn workers_that_do_not_come_back_to_a_started_orchestrator_are_lost() {
    let world = training();
    let core = Core::new(world.core.jobs().clone(), 2, 0);
    let mut again = World::of(core, 0);
    drop(again.attach(1, vec![(1, 1, vec![0])]));
    drop(again.attach(3, Vec::new()));
    drop(again.pass(ADOPTION_MS, &[1, 3]));
    assert_eq!(again.places(), [1, 2]);
    drop(again.pass(TICK_MS, &[1, 3]));
    assert_eq!(again.places(), [1, 3]);
}

#[test]
fn an_orchestrator_that_was_away_blames_nobody() {
    let mut world = training();
    world.now += 60_000;
    drop(world.step(Event::Tick));
    assert_eq!(world.places(), [1, 2]);
}

#[test]
fn without_a_spare_a_job_shrinks_if_it_may_and_waits_if_not() {
    for (min_ranks, places) in [(1, vec![1]), (2, vec![])] {
        let mut world = World::new();
        (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
        drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks, ..*spec(2, 0) }))));
        drop(world.pass(LEASE_MS + TICK_MS, &[1]));
        assert_eq!(world.core.jobs().all[&1].phase, Phase::Broken);
        let waits = world.core.waiting_for(1);
        assert!(waits.starts_with("needs 2 ranks, 1 healthy") && waits.contains("rank 1 lost"), "{waits}");
        drop(world.pass(SHRINK_MS + TICK_MS, &[1]));
        assert_eq!(world.places(), places);
    }
}

#[test]
fn an_older_orchestrator_and_a_foreign_storage_are_refused_in_words() {
    let mut world = training();
    let who = Introduction { worker: 9, ..Introduction::default() };
    for (incarnation, mark, expected) in
        [(5, "mark", "another one has taken over"), (0, "other", "--storage")]
    {
        let attached = Event::Attached {
            who: who.clone(),
            hosted: Vec::new(),
            left: Vec::new(),
            incarnation,
            storage_mark: mark.into(),
        };
        let effects = world.step(attached);
        let [(9, Word::Refused { why })] = &words(&effects)[..] else { panic!("{effects:?}") };
        assert!(why.contains(expected), "{why}");
        assert!(world.core.member(9).is_none());
    }
}

#[test]
fn a_cancelled_job_leaves_its_places_to_the_next() {
    let mut world = training();
    drop(world.step(Event::Submit(spec(3, 0))));
    assert!(world.core.jobs().all[&2].running().is_none());
    let effects = world.step(Event::Cancel { job: 1, reason: "enough".into() });
    assert!(
        words(&effects).iter().any(|(worker, word)| *worker == 2 && matches!(word, Word::Release { .. }))
    );
    assert_eq!(world.core.jobs().all[&1].phase, Phase::Ended(End::Cancelled));
    assert!(world.core.jobs().all[&2].running().is_some());
    assert_eq!(world.step(Event::Cancel { job: 1, reason: "again".into() }), []);
}

#[test]
fn the_same_key_is_the_same_job() {
    let mut world = World::new();
    let keyed = || Box::new(JobSpec { key: "once".into(), ..*spec(1, 0) });
    drop(world.step(Event::Submit(keyed())));
    drop(world.step(Event::Submit(keyed())));
    drop(world.step(Event::Submit(spec(1, 0))));
    drop(world.step(Event::Submit(spec(1, 0))));
    assert_eq!(world.core.jobs().all.len(), 3);
}

#[test]
fn where_nobody_gets_on_the_first_to_stop_is_named() {
    let mut world = training();
    let beat = |world: &mut World, ms: u64, operations: [u64; 2]| {
        for _ in 0..ms / BEAT_MS {
            world.now += BEAT_MS;
            for (rank, operations) in operations.into_iter().enumerate() {
                let address = RankAddress { job: 1, generation: 1, rank };
                let progress = vec![Progress { rank: address, step: 3, operations }];
                drop(world.step(Event::Beat { worker: rank as u64 + 1, progress }));
            }
            drop(world.step(Event::Tick));
        }
    };
    beat(&mut world, 1_000, [10, 10]);
    // Rank 1 hangs; rank 0 goes on until it needs it.
    beat(&mut world, 1_000, [14, 10]);
    assert_eq!(world.core.waiting_for(1), "");
    beat(&mut world, STANDSTILL_MS, [14, 10]);
    let waits = world.core.waiting_for(1);
    assert!(
        waits.starts_with("rank 1: the first to stop") && waits.ends_with("step 3 after 10 operations"),
        "{waits}"
    );
}

#[test]
fn a_job_of_higher_priority_takes_the_place_of_a_lower_one_which_goes_on_later() {
    let mut world = training();
    let effects = world.step(Event::Submit(spec(3, 1)));
    let stops = words(&effects)
        .into_iter()
        .filter(|(_, word)| matches!(word, Word::Command { command: RankCommand::Stop, .. }));
    assert_eq!(stops.count(), 2);
    let waits = world.core.waiting_for(2);
    assert_eq!(waits, "job-1 to give way");
    // The ranks agree on the step after which they stop, and keep it.
    (0..2).for_each(|rank| drop(world.event(rank, RankEvent::Stopped { rank, step: 5 })));
    drop(save(&mut world, 5));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(5), result: Ok(()) };
    drop(world.step(done));
    let jobs = &world.core.jobs().all;
    assert_eq!((jobs[&1].phase.clone(), jobs[&2].phase.clone()), (Phase::Queued, Phase::Formed));
    drop(world.step(Event::Cancel { job: 2, reason: String::new() }));
    let formed = world.core.jobs().all[&1].running().unwrap();
    assert_eq!((formed.generation, formed.resume_step), (2, 5));
}

#[test]
fn a_worker_that_wants_to_end_is_left_after_the_running_step_and_gets_no_other_rank() {
    let mut world = training();
    let effects = world.step(Event::Leaving { worker: 2 });
    assert_eq!(words(&effects).len(), 2);
    // It may say so again, after a break of its stream for instance.
    assert_eq!(words(&world.step(Event::Leaving { worker: 2 })), []);
    (0..2).for_each(|rank| drop(world.event(rank, RankEvent::Stopped { rank, step: 5 })));
    drop(save(&mut world, 5));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(5), result: Ok(()) };
    drop(world.step(done));
    let mut places = world.places();
    places.sort_unstable();
    assert_eq!(places, [1, 3]);
    assert_eq!(world.core.jobs().all[&1].losses, 0);
    drop(world.step(Event::Detached { worker: 2 }));
    assert_eq!(world.core.jobs().all[&1].generation(), 2);
}

#[test]
fn a_drained_node_is_left_after_the_running_step() {
    let mut world = training();
    let effects = world.step(Event::Drain { node: "n2".into() });
    assert_eq!(words(&effects).len(), 2);
    (0..2).for_each(|rank| drop(world.event(rank, RankEvent::Stopped { rank, step: 5 })));
    drop(save(&mut world, 5));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(5), result: Ok(()) };
    drop(world.step(done));
    let mut places = world.places();
    places.sort_unstable();
    assert_eq!(places, [1, 3]);
}

/// Rank 0's part on workers 1 and 2, rank 1's on 2 and 1; the step after is not acknowledged yet.
fn keep_everywhere(world: &mut World, generation: u32, step: u64) {
    let shard = |step, rank| KeptShard { generation, step, rank };
    world.kept.insert(1, vec![shard(step, 0), shard(step, 1), shard(step + 1, 0)]);
    world.kept.insert(2, vec![shard(step, 1), shard(step, 0), shard(step + 1, 1)]);
}

fn formed(world: &World) -> facts::Formed {
    world.core.jobs().all[&1].formed.clone().unwrap()
}

#[test]
fn a_lost_rank_costs_no_step_that_its_buddy_has() {
    let mut world = training();
    assert_eq!(formed(&world).buddies, [1, 0]);
    keep_everywhere(&mut world, 1, 6);
    let effects = world.pass(LEASE_MS + TICK_MS, &[1, 3]);
    let again = formed(&world);
    assert_eq!((again.generation, again.places, again.resume_step), (2, vec![1, 3], 6));
    assert_eq!(again.memory, Some(InMemory { generation: 1, step: 6, holders: vec![0, 0] }));
    let said = |effect: &Effect| matches!(effect, Effect::Log { line, .. } if line.contains("from memory after step 6"));
    assert!(effects.iter().any(said), "{effects:?}");
}

#[test]
fn a_formation_that_breaks_before_it_has_made_a_step_goes_back_to_the_same_memory() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    drop(world.attach(4, Vec::new()));
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 4]));
    let again = formed(&world);
    assert_eq!((again.generation, again.places, again.resume_step), (3, vec![1, 4], 6));
    // What generation 1 made beyond that step is of no history any more.
    let shard = |step, rank| KeptShard { generation: 1, step, rank };
    world.kept.insert(1, vec![shard(7, 0), shard(7, 1)]);
    drop(world.attach(5, Vec::new()));
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 5]));
    assert_eq!((formed(&world).generation, formed(&world).resume_step), (4, 0));
}

#[test]
fn owner_and_buddy_lost_is_said_aloud_and_the_checkpoint_taken() {
    let mut world = training();
    drop(save(&mut world, 4));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(4), result: Ok(()) };
    drop(world.step(done));
    keep_everywhere(&mut world, 1, 6);
    world.kept.insert(1, vec![KeptShard { generation: 1, step: 6, rank: 0 }]);
    let effects = world.pass(LEASE_MS + TICK_MS, &[1, 3]);
    let again = formed(&world);
    assert_eq!((again.generation, again.resume_step, again.memory), (2, 4, None));
    let said = effects.iter().find_map(|effect| match effect {
        Effect::Log { line, .. } if line.contains("checkpoint of step 4") => Some(line),
        _ => None,
    });
    assert!(said.is_some_and(|line| line.contains("state of rank 1")), "{effects:?}");
}

#[test]
fn a_checkpoint_that_is_newer_than_what_is_kept_is_taken() {
    let mut world = training();
    drop(save(&mut world, 8));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(8), result: Ok(()) };
    drop(world.step(done));
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).resume_step, formed(&world).memory), (8, None));
}

#[test]
fn who_does_not_say_what_it_keeps_is_not_waited_for_for_ever() {
    let mut world = training();
    // Worker 1 beats, and leaves the question open.
    for _ in 0..=LEASE_MS / TICK_MS {
        world.now += TICK_MS;
        (1..=3).filter(|worker| *worker != 2).for_each(|worker| {
            drop(world.step(Event::Beat { worker, progress: Vec::new() }));
        });
        drop(world.step(Event::Tick));
    }
    assert_eq!(world.core.jobs().all[&1].phase, Phase::Broken);
    drop(world.pass(LEFT_MS, &[1, 3]));
    assert_eq!(formed(&world).generation, 2);
}

#[test]
fn an_orchestrator_that_starts_while_a_job_is_broken_hears_what_is_kept() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    for _ in 0..=LEASE_MS / TICK_MS {
        world.now += TICK_MS;
        drop(world.step(Event::Beat { worker: 1, progress: Vec::new() }));
        drop(world.step(Event::Tick));
    }
    assert_eq!(world.core.jobs().all[&1].phase, Phase::Broken);
    let mut again = World::of(Core::new(world.core.jobs().clone(), 2, 0), 0);
    drop(again.attach(3, Vec::new()));
    assert_eq!(again.core.jobs().all[&1].phase, Phase::Broken);
    let who = Introduction { worker: 1, slots: 1, node: "n1".into(), ..Introduction::default() };
    let left = vec![Left { job: 1, generation: 1, kept: world.kept[&1].clone() }];
    let storage_mark = "mark".into();
    drop(again.step(Event::Attached { who, hosted: Vec::new(), left, incarnation: 0, storage_mark }));
    assert_eq!((formed(&again).generation, formed(&again).resume_step), (2, 6));
}

#[test]
fn after_a_roll_back_what_is_kept_is_let_go() {
    let mut world = training();
    drop(save(&mut world, 4));
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(4), result: Ok(()) };
    drop(world.step(done));
    keep_everywhere(&mut world, 1, 6);
    let diverged = |rank| RankEvent::Diverged {
        rank,
        divergence: Box::new(Divergence {
            step: 7,
            action: Action::RollBack,
            why: "loss is not finite".into(),
            evidence: None,
        }),
        cursor: 56,
    };
    drop(world.event(0, diverged(0)));
    let effects = world.event(1, diverged(1));
    let told = words(&effects);
    let lets_go = |(_, word): &(u64, &Word)| matches!(word, Word::Release { generation: 1, keep: false, .. });
    assert_eq!(told.iter().filter(|told| lets_go(told)).count(), 2);
    assert_eq!((formed(&world).resume_step, formed(&world).cursor, formed(&world).memory), (4, 56, None));
    // Somebody who has missed it is told when it says what it keeps.
    let shard = KeptShard { generation: 1, step: 6, rank: 1 };
    let left = Left { job: 1, generation: 1, kept: vec![shard] };
    let effects = world.step(Event::Left { worker: 3, left });
    assert!(words(&effects).iter().any(lets_go));
}

#[test]
fn a_worker_that_is_late_to_hear_where_the_job_goes_on_keeps_what_it_is_to_bring() {
    let mut world = training();
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    // Its stream breaks before it has heard of the new formation, and it tells once more what it keeps.
    drop(world.step(Event::Detached { worker: 1 }));
    let who = Introduction { worker: 1, slots: 1, node: "n1".into(), ..Introduction::default() };
    let left = vec![Left { job: 1, generation: 1, kept: world.kept[&1].clone() }];
    let storage_mark = "mark".into();
    let effects = world.step(Event::Attached { who, hosted: Vec::new(), left, incarnation: 0, storage_mark });
    let told = words(&effects);
    assert!(
        told.iter().any(|(worker, word)| *worker == 1 && matches!(word, Word::Assign { generation: 2, .. }))
    );
    assert!(!told.iter().any(|(_, word)| matches!(word, Word::Release { .. })), "{told:?}");
}

fn cancel(world: &mut World, job: u64) {
    drop(world.step(Event::Cancel { job, reason: String::new() }));
}

fn forgotten(facts: &[Fact]) -> Vec<u64> {
    facts
        .iter()
        .filter_map(|fact| match fact {
            Fact::Forgotten { job } => Some(*job),
            _ => None,
        })
        .collect()
}

#[test]
fn of_jobs_that_are_over_the_latest_to_end_stay_known() {
    let mut world = training();
    world.core = std::mem::replace(&mut world.core, Core::new(Jobs::default(), 1, 0)).keeping(2);
    for number in 2..=5 {
        let key = format!("key {number}");
        drop(world.step(Event::Submit(Box::new(JobSpec { key, ..*spec(9, 0) }))));
    }
    [4, 2].into_iter().for_each(|job| cancel(&mut world, job));
    assert!(forgotten(&world.facts).is_empty());
    [5, 3].into_iter().for_each(|job| cancel(&mut world, job));
    assert_eq!(forgotten(&world.facts), [4, 2], "as they ended, not as they came");
    let known: Vec<u64> = world.core.jobs().all.keys().copied().collect();
    assert_eq!(known, [1, 3, 5], "the first one runs");
    // The key of a job that is forgotten stands for a new one, with a number of its own; that of a known one does not.
    for (key, newest) in [("key 5", 5), ("key 4", 6)] {
        drop(world.step(Event::Submit(Box::new(JobSpec { key: key.into(), ..*spec(9, 0) }))));
        assert_eq!(world.core.jobs().newest, newest);
    }
    assert_eq!(world.core.jobs().by_key.get("key 4"), Some(&6));
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
}

#[test]
fn a_start_that_keeps_fewer_forgets_the_others() {
    let mut world = World::new();
    (0..4).for_each(|_| drop(world.step(Event::Submit(spec(9, 0)))));
    [3, 1, 2].into_iter().for_each(|job| cancel(&mut world, job));
    let core = Core::new(world.core.jobs().clone(), 2, 0).keeping(1);
    let mut again = World::of(core, 0);
    drop(again.step(Event::Tick));
    assert_eq!(forgotten(&again.facts), [3, 1]);
    assert_eq!(again.core.jobs().all.keys().copied().collect::<Vec<_>>(), [2, 4]);
    assert_eq!(again.core.jobs().newest, 4);
}

#[test]
fn a_job_that_keeps_nothing_in_memory_waits_for_no_word_of_it() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { in_memory: false, ..*spec(2, 0) }))));
    assert!(formed(&world).buddies.is_empty());
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    assert_eq!((formed(&world).generation, formed(&world).memory), (2, None));
}

#[test]
fn for_another_layout_the_state_in_memory_is_written_down_first() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    keep_everywhere(&mut world, 1, 6);
    let effects = world.pass(LEASE_MS + SHRINK_MS + 2 * TICK_MS, &[1]);
    let expected = Word::WriteDown { job: 1, generation: 1, of: (1, 6), ranks: vec![0, 1] };
    let orders: Vec<_> =
        words(&effects).into_iter().filter(|(_, word)| matches!(word, Word::WriteDown { .. })).collect();
    assert_eq!(orders, [(1, &expected)]);
    assert_eq!(world.core.jobs().all[&1].phase, Phase::Broken);
    let say = |world: &mut World, rank: usize, event: RankEvent| {
        let from = RankAddress { job: 1, generation: 1, rank };
        world.step(Event::Rank { worker: 1, from, event: Box::new(event) })
    };
    let report = contraflow_proto::StepReport { rank: 1, step: 6, generation: 1, ..Default::default() };
    let effects = say(&mut world, 1, RankEvent::StepDone { report });
    assert!(matches!(effects[..], [Effect::Record { job: 1, .. }]), "{effects:?}");
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: Position { step: 6, ..Position::default() },
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    assert_eq!(say(&mut world, 0, saved(0)), []);
    let effects = say(&mut world, 1, saved(1));
    assert!(
        matches!(words(&effects)[..], [(1, Word::CommitCheckpoint { generation: 1, .. })]),
        "{effects:?}"
    );
    let done = Event::Committed { worker: 1, job: 1, generation: 1, step: Some(6), result: Ok(()) };
    drop(world.step(done));
    let again = formed(&world);
    assert_eq!((again.places, again.resume_step, again.memory), (vec![1], 6, None));
}

#[test]
fn what_cannot_be_written_down_is_said_and_the_checkpoint_taken() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(Box::new(JobSpec { min_ranks: 1, ..*spec(2, 0) }))));
    keep_everywhere(&mut world, 1, 6);
    drop(world.pass(LEASE_MS + SHRINK_MS + 2 * TICK_MS, &[1]));
    let from = RankAddress { job: 1, generation: 1, rank: 1 };
    let (action, cause) = ("writing".to_owned(), "no space left on device".to_owned());
    let event = Box::new(RankEvent::Failed { rank: 1, action, cause, kind: ErrorKind::Config });
    let effects = world.step(Event::Rank { worker: 1, from, event });
    let said = |effect: &Effect| matches!(effect, Effect::Log { line, .. } if line.contains("no space left"));
    assert!(effects.iter().any(said), "{effects:?}");
    assert_eq!((formed(&world).places, formed(&world).resume_step), (vec![1], 0));
}
