//! The cluster's decisions, event by event.

mod attempts;
mod commits;
mod cut_off;
mod flight;
mod foreign;
mod giving_way;
mod goodput;
mod growth;
mod layouts;
mod lost_later;
mod memory;
mod placing;
mod removal;
mod retention;
mod rollback;
mod spec;
mod stalls;
mod times;
mod words;

use std::sync::Arc;

use contraflow_runtime::checkpoint::{Position, ShardFile};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use self::times::{LEFT_MS, RETURN_MS, VERDICT_MS};
use super::facts::{End, Fact, JobSpec};
use super::jobs::{Jobs, Phase};
use super::*;
use crate::recovery::ReplicaShard;

/// The first job, and the second one.
const JOB: JobId = JobId::new(1, 0);
const SECOND: JobId = JobId::new(2, 0);

fn id(number: u64) -> JobId {
    JobId::new(number, 0)
}

/// A formation of the first job.
fn of(generation: u32) -> FormationId {
    FormationId::new(JOB, Generation::new(generation))
}

const RECIPE: &str = "
    model.config = 'tiny'
    parallel.schedule = '1f1b'
    training = { steps = 9, sequence_length = 32, global_batch_size = 72, micro_batch_size = 1 }
    lr.peak = 1e-3
    checkpoint.save_model = false
    watch.max_skips = 2
";

fn spec(ranks: usize, priority: i32) -> Box<JobSpec> {
    spec_with(ranks, priority, &[])
}

/// The same with changes of the recipe.
fn spec_with(ranks: usize, priority: i32, changes: &[&str]) -> Box<JobSpec> {
    let axes = format!("parallel.data={ranks}");
    let changes: Vec<String> = [&[axes.as_str()], changes].concat().into_iter().map(str::to_owned).collect();
    Box::new(JobSpec {
        name: "job".into(),
        priority,
        min_ranks: ranks,
        max_ranks: ranks,
        key: String::new(),
        user: String::new(),
        recipe: Arc::new(Recipe::submitted(RECIPE, "job", &changes, None).unwrap()),
        rank_bytes: 0,
        traceparent: String::new(),
        origin: None,
    })
}

/// A core with what it has kept, and the time.
struct World {
    core: Core,
    facts: Vec<Fact>,
    /// By worker, what it keeps of the state of its job.
    replicas: BTreeMap<u64, Vec<ReplicaShard>>,
    now: u64,
}

/// Of a worker with one slot on a node of its own.
fn registration(worker: u64) -> Registration {
    Registration { worker, slots: 1, node: format!("n{worker}"), ..Registration::default() }
}

impl World {
    fn new() -> Self {
        World::of(Core::new(Jobs::default(), 1, 0, Times::default()), 0)
    }

    fn of(core: Core, now: u64) -> Self {
        World { core, facts: Vec::new(), replicas: BTreeMap::new(), now }
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.core.step(event, self.now);
        let facts = effects.iter().filter_map(|effect| match effect {
            Effect::Persist(fact) => Some(fact.clone()),
            _ => None,
        });
        self.facts.extend(facts);
        effects
    }

    fn attach(&mut self, worker: u64, hosted: Vec<Hosted>) -> Vec<Effect> {
        self.join(Attachment { registration: registration(worker), hosted, ..Attachment::default() })
    }

    /// A worker attaches that has the cluster's storage.
    fn join(&mut self, attachment: Attachment) -> Vec<Effect> {
        self.step(Event::Attached(Box::new(Attachment { storage_id: "mark".into(), ..attachment })))
    }

    fn event(&mut self, event: RankEvent) -> Vec<Effect> {
        let rank = event.rank();
        let formed = self.core.jobs().all[&JOB].formed.clone().unwrap();
        let from = RankAddress { formation: formed.id(JOB), rank };
        self.step(Event::Rank { worker: formed.places[rank.index()], from, event: Box::new(event) })
    }

    /// Time passes in which these workers beat, and say what they keep when they are asked.
    fn pass(&mut self, ms: u64, beating: &[u64]) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..ms / TICK_MS {
            self.now += TICK_MS;
            for &worker in beating {
                effects.extend(self.step(Event::Beat { worker, progress: Vec::new() }));
            }
            let sent = self.step(Event::Tick);
            let answers = self.answers(&sent, beating);
            effects.extend(sent);
            for answer in answers {
                effects.extend(self.step(answer));
            }
        }
        effects
    }

    fn answers(&self, effects: &[Effect], beating: &[u64]) -> Vec<Event> {
        let asked = commands(effects).into_iter().filter(|(worker, _)| beating.contains(worker));
        let answer = |(worker, command): (u64, &WorkerCommand)| match *command {
            WorkerCommand::Release { formation, keep: true, .. } => {
                let replicas = self.replicas.get(&worker).cloned().unwrap_or_default();
                Some(Event::Left { worker, left: Left { formation, replicas } })
            }
            _ => None,
        };
        asked.filter_map(answer).collect()
    }

    fn places(&self) -> Vec<u64> {
        self.core.jobs().all[&JOB].running().map_or_else(Vec::new, |formed| formed.places.clone())
    }
}

/// Ranks of a generation of the first job, of two ranks.
fn hosted(generation: u32, ranks: &[u32]) -> Vec<Hosted> {
    vec![Hosted {
        formation: of(generation),
        ranks: ranks.iter().copied().map(Rank::new).collect(),
        world: 2,
        steps: 9,
        durable: 0,
    }]
}

fn commands(effects: &[Effect]) -> Vec<(u64, &WorkerCommand)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send { worker, command } => Some((*worker, command)),
            _ => None,
        })
        .collect()
}

/// Lines for the job's log.
fn logged(effects: &[Effect]) -> Vec<&str> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Log { line, .. } => Some(line.as_str()),
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
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    let effects = world.event(RankEvent::Ready { rank: Rank::new(1) });
    let begun = commands(&effects).into_iter().filter(|(_, command)| {
        matches!(command, WorkerCommand::Rank { command: RankCommand::BeginStep { step: 1 }, .. })
    });
    assert_eq!(begun.count(), 2);
    world
}

/// Position of a run after a step.
fn position(step: u64) -> Position {
    Position { step, cursor: 72 * step, tokens: 72 * 32 * step }
}

fn save(world: &mut World, step: u64) -> Vec<Effect> {
    let saved = |rank| RankEvent::ShardSaved {
        rank,
        position: position(step),
        watch: Default::default(),
        shard: ShardFile::default(),
    };
    drop(world.event(saved(Rank::new(0))));
    world.event(saved(Rank::new(1)))
}

/// The commit of a checkpoint is reported.
fn committed(world: &mut World, step: u64) {
    let (formation, result) = (FormationId::new(JOB, world.core.jobs().all[&JOB].generation()), Ok(()));
    let (position, worker) = (Some(position(step)), world.places().first().copied().unwrap_or(1));
    drop(world.step(Event::Committed { worker, formation, position, result }));
}

fn checkpoint(world: &mut World, step: u64) {
    drop(save(world, step));
    committed(world, step);
}

#[test]
fn a_job_waits_for_all_its_ranks_and_says_so() {
    let mut world = World::new();
    drop(world.attach(1, Vec::new()));
    drop(world.step(Event::Submit(spec(2, 0))));
    assert!(world.places().is_empty());
    assert_eq!(world.core.waiting_for(JOB), "needs 2 ranks, 1 healthy");
    let effects = world.attach(2, Vec::new());
    assert_eq!(world.places(), [1, 2]);
    let assigned: Vec<u64> = commands(&effects)
        .into_iter()
        .filter(|(_, command)| matches!(command, WorkerCommand::Assign { .. }))
        .map(|(worker, _)| worker)
        .collect();
    assert_eq!(assigned, [1, 2]);
}

#[test]
fn a_silent_worker_is_lost_after_three_beats_and_its_rank_moves_to_the_spare_one() {
    let mut world = training();
    let effects = save(&mut world, 4);
    assert!(matches!(commands(&effects)[..], [(1, WorkerCommand::CommitCheckpoint { .. })]));
    committed(&mut world, 4);
    drop(world.pass(LEASE_MS, &[1, 3]));
    assert_eq!(world.places(), [1, 2]);
    let effects = world.pass(TICK_MS, &[1, 3]);
    assert_eq!(world.places(), [1, 3]);
    let record = &world.core.jobs().all[&JOB];
    let formed = record.formed.as_ref().unwrap();
    assert_eq!((formed.generation.number(), formed.resume_step, record.losses), (2, 4, 1));
    let sent = commands(&effects);
    let released = |worker| {
        sent.iter().any(|(to, command)| {
            *to == worker
                && matches!(command, WorkerCommand::Release { formation, .. } if *formation == of(1))
        })
    };
    assert!(released(1) && released(2));
    let broken = world.facts.iter().find_map(|fact| match fact {
        Fact::Broken { lost, why, .. } => Some((lost.clone(), why.clone())),
        _ => None,
    });
    let (lost, why) = broken.unwrap();
    assert_eq!(lost, [Rank::new(1)]);
    assert!(why.contains("rank 1 lost") && why.contains("node n2 is silent"), "{why}");
}

#[test]
fn a_victim_that_has_lost_a_peer_is_not_blamed() {
    let mut world = training();
    let lost = RankEvent::Failed {
        rank: Rank::new(0),
        action: "F1.0".into(),
        cause: "rank 1 is lost".into(),
        kind: ErrorKind::Lost,
        peer: None,
    };
    drop(world.event(lost));
    drop(world.pass(VERDICT_MS - TICK_MS, &[1, 3]));
    // The lease of worker 2 has run out meanwhile.
    assert_eq!(world.places(), [1, 3]);
}

#[test]
fn ranks_that_lose_each_other_while_all_workers_are_alive_re_form() {
    let mut world = training();
    let lost = RankEvent::Failed {
        rank: Rank::new(0),
        action: "F1.0".into(),
        cause: "connection reset".into(),
        kind: ErrorKind::Lost,
        peer: None,
    };
    drop(world.event(lost));
    drop(world.pass(VERDICT_MS + TICK_MS, &[1, 2, 3]));
    let record = &world.core.jobs().all[&JOB];
    assert_eq!((world.places(), record.generation().number(), record.losses), (vec![1, 2], 2, 0));
}

#[test]
fn messages_of_an_earlier_generation_are_dropped() {
    let mut world = training();
    drop(world.pass(LEASE_MS + TICK_MS, &[1, 3]));
    let stale = RankAddress { formation: of(1), rank: Rank::new(1) };
    let ready = Box::new(RankEvent::Ready { rank: Rank::new(1) });
    drop(world.step(Event::Rank { worker: 2, from: stale, event: ready }));
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    assert!(!world.core.is_training(JOB));
    drop(world.event(RankEvent::Ready { rank: Rank::new(1) }));
    assert!(world.core.is_training(JOB));
}

#[test]
fn a_job_that_validates_is_running() {
    let mut world = World::new();
    (1..=2).for_each(|worker| drop(world.attach(worker, Vec::new())));
    drop(world.step(Event::Submit(spec(2, 0))));
    drop(world.event(RankEvent::Ready { rank: Rank::new(0) }));
    assert!(!world.core.is_running(JOB));
    drop(world.event(RankEvent::Ready { rank: Rank::new(1) }));
    assert!(world.core.is_running(JOB) && world.core.is_training(JOB));
    let steps = world.core.jobs().all[&JOB].spec.steps();
    for rank in 0..2 {
        let report = contraflow_proto::StepReport { rank, step: steps, ..Default::default() };
        drop(world.event(RankEvent::StepDone { report }));
    }
    checkpoint(&mut world, steps);
    assert!(world.core.is_running(JOB) && !world.core.is_training(JOB));
    assert_eq!(world.core.waiting_for(JOB), "validating, waiting for rank 0, 1");
}

#[test]
fn a_restarted_orchestrator_adopts_running_jobs() {
    let world = training();
    let mut jobs = Jobs::default();
    world.facts.iter().for_each(|fact| jobs.apply(fact));
    assert_eq!(&jobs, world.core.jobs());
    let mut again = World::of(Core::new(jobs, 2, 50_000, Times::default()), 50_000);
    drop(again.pass(2_000, &[]));
    let effects = again.attach(1, hosted(1, &[0]));
    assert!(!commands(&effects).iter().any(|(_, command)| matches!(command, WorkerCommand::Assign { .. })));
    drop(again.event(RankEvent::Ready { rank: Rank::new(0) }));
    drop(again.pass(1_000, &[1]));
    // The other worker never got its assignment: it is said again.
    let effects = again.attach(2, Vec::new());
    let expected = WorkerCommand::Assign { formation: of(1), ranks: vec![Rank::new(1)] };
    assert!(commands(&effects).iter().any(|(worker, command)| *worker == 2 && **command == expected));
    drop(again.event(RankEvent::Ready { rank: Rank::new(1) }));
    assert!(again.core.is_training(JOB));
    assert_eq!(again.core.jobs().all[&JOB].generation().number(), 1);
}

#[test]
fn workers_that_do_not_return_to_a_restarted_orchestrator_are_lost() {
    let world = training();
    let core = Core::new(world.core.jobs().clone(), 2, 0, Times::default());
    let mut again = World::of(core, 0);
    drop(again.attach(1, hosted(1, &[0])));
    drop(again.attach(3, Vec::new()));
    drop(again.pass(ADOPTION_MS, &[1, 3]));
    assert_eq!(again.places(), [1, 2]);
    drop(again.pass(TICK_MS, &[1, 3]));
    assert_eq!(again.places(), [1, 3]);
}

#[test]
fn a_restarted_orchestrator_blames_no_worker() {
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
        assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Broken);
        let waits = world.core.waiting_for(JOB);
        assert!(waits.starts_with("needs 2 ranks, 1 healthy") && waits.contains("rank 1 lost"), "{waits}");
        drop(world.pass(SHRINK_MS + TICK_MS, &[1]));
        assert_eq!(world.places(), places);
    }
}

#[test]
fn an_older_orchestrator_and_a_foreign_storage_are_refused_with_a_message() {
    let mut world = training();
    for (incarnation, mark, expected) in
        [(5, "mark", "another one has taken over"), (0, "other", "--storage")]
    {
        let (registration, storage_id) = (registration(9), mark.into());
        let attachment = Attachment { registration, incarnation, storage_id, ..Attachment::default() };
        let effects = world.step(Event::Attached(Box::new(attachment)));
        let [(9, WorkerCommand::Reject { why })] = &commands(&effects)[..] else { panic!("{effects:?}") };
        assert!(why.contains(expected), "{why}");
        assert!(world.core.member(9).is_none());
    }
}

#[test]
fn a_cancelled_job_leaves_its_places_to_the_next() {
    let mut world = training();
    drop(world.step(Event::Submit(spec(3, 0))));
    assert!(world.core.jobs().all[&SECOND].running().is_none());
    let effects = world.step(Event::Cancel { job: JOB, reason: "enough".into() });
    assert!(
        commands(&effects)
            .iter()
            .any(|(worker, command)| *worker == 2 && matches!(command, WorkerCommand::Release { .. }))
    );
    assert_eq!(world.core.jobs().all[&JOB].phase, Phase::Ended(End::Cancelled));
    assert!(world.core.jobs().all[&SECOND].running().is_some());
    assert_eq!(world.step(Event::Cancel { job: JOB, reason: "again".into() }), []);
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
fn a_job_of_higher_priority_preempts_a_lower_one_which_resumes_later() {
    let mut world = training();
    let effects = world.step(Event::Submit(spec(3, 1)));
    let stops = commands(&effects).into_iter().filter(|(_, command)| {
        matches!(command, WorkerCommand::Rank { command: RankCommand::Stop { .. }, .. })
    });
    assert_eq!(stops.count(), 2);
    let waits = world.core.waiting_for(SECOND);
    assert_eq!(waits, "job-1 to yield");
    // The ranks agree on the step after which they stop, and keep it.
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Stopped { rank, step: 5, in_memory: false })));
    checkpoint(&mut world, 5);
    let jobs = &world.core.jobs().all;
    assert_eq!((jobs[&JOB].phase.clone(), jobs[&SECOND].phase.clone()), (Phase::Queued, Phase::Formed));
    drop(world.step(Event::Cancel { job: SECOND, reason: String::new() }));
    let formed = world.core.jobs().all[&JOB].running().unwrap();
    assert_eq!((formed.generation.number(), formed.resume_step), (2, 5));
}
