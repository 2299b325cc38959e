//! Jobs that the watch stops: they go back to a checkpoint and say past how much, or end and say why.

use contraflow_runtime::stability::evidence::{Evidence, NamedTensor, RankEvidence};
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_runtime::topology::Rank;

use super::*;

/// Every rank says that the watch has stopped a step.
fn diverge(world: &mut World, divergence: &Divergence, cursor: u64) -> Vec<Effect> {
    let diverged = |rank| RankEvent::Diverged { rank, divergence: Box::new(divergence.clone()), cursor };
    drop(world.event(diverged(Rank::new(0))));
    world.event(diverged(Rank::new(1)))
}

fn spike(step: u64) -> Divergence {
    Divergence { step, action: StepAction::RollBack, why: "a spike".into(), evidence: None }
}

/// The ranks of the running formation have their models.
fn ready(world: &mut World) {
    Rank::all(2).for_each(|rank| drop(world.event(RankEvent::Ready { rank })));
    assert!(world.core.is_training(JOB));
}

#[test]
fn a_rollback_logs_its_step_and_the_number_of_skipped_sequences() {
    let mut world = training();
    checkpoint(&mut world, 4);
    let effects = diverge(&mut world, &spike(6), 6 * 72);
    let sent = logged(&effects);
    assert_eq!(sent[0], "a spike; rolling back to step 4, skipping 144 sequences");
    assert!(sent[1].starts_with("generation 2: "), "{sent:?}");
    // The second time the same checkpoint is further away, for the place where the run continued counts too.
    ready(&mut world);
    let effects = diverge(&mut world, &spike(5), 6 * 72 + 72);
    assert_eq!(logged(&effects)[0], "a spike; rolling back to step 4, skipping 216 sequences");
    ready(&mut world);
    drop(diverge(&mut world, &spike(5), 6 * 72 + 144));
    let record = &world.core.jobs().all[&JOB];
    assert_eq!(record.phase, Phase::Ended(End::Failed));
    assert_eq!(record.why, "a spike; the run rolled back to step 4 2 times (watch.max_skips)");
}

#[test]
fn from_before_a_damaged_checkpoint_the_run_goes_past_what_it_went_past_then_and_no_further() {
    let mut world = training();
    checkpoint(&mut world, 4);
    drop(diverge(&mut world, &spike(6), 6 * 72));
    ready(&mut world);
    checkpoint(&mut world, 8);
    drop(diverge(&mut world, &spike(11), 11 * 72));
    let (action, cause, kind) = ("reading".into(), "shard-1 is damaged".into(), ErrorKind::Damaged);
    drop(world.event(RankEvent::Failed { rank: Rank::new(0), action, cause, kind, peer: None }));
    drop(world.pass(LEFT_MS + TICK_MS, &[1, 2, 3]));
    let formed = world.core.jobs().all[&JOB].formed.as_ref().unwrap();
    assert_eq!((formed.generation.number(), formed.resume_step, formed.cursor), (4, 4, 6 * 72));
}

#[test]
fn a_restarted_orchestrator_continues_the_count() {
    let mut world = training();
    checkpoint(&mut world, 4);
    drop(diverge(&mut world, &spike(6), 6 * 72));
    let facts: Vec<String> = world.facts.iter().map(|fact| serde_json::to_string(fact).unwrap()).collect();
    let mut jobs = Jobs::default();
    facts.iter().for_each(|fact| jobs.apply(&serde_json::from_str(fact).unwrap()));
    assert_eq!(&jobs, world.core.jobs());
    let mut again = World::of(Core::new(jobs, 2, world.now, Times::default()), world.now);
    for worker in again.places() {
        let rank = again.places().iter().position(|place| *place == worker).unwrap();
        drop(again.attach(worker, hosted(2, &[rank as u32])));
    }
    ready(&mut again);
    let effects = diverge(&mut again, &spike(5), 7 * 72);
    assert_eq!(logged(&effects)[0], "a spike; rolling back to step 4, skipping 216 sequences");
}

#[test]
fn a_job_that_is_stopped_names_the_evidence_where_there_is_some() {
    let name = "model.norm.weight".to_owned();
    let weight = Some(NamedTensor { name, layer: None, num_values: 1 });
    let found = RankEvidence {
        rank: 0,
        weight,
        micro_batch: None,
        first_gradient: None,
        last_gradient: None,
        num_gradients: 0,
    };
    let evidence = Evidence {
        step: 3,
        loss: "NaN".into(),
        grad_norm: "NaN".into(),
        ranks: vec![found],
        sequences: vec![],
    };
    for (evidence, outcome) in
        [(Some(evidence), "not finite; see evidence.json in the job's folder"), (None, "not finite")]
    {
        let mut world = training();
        checkpoint(&mut world, 2);
        let divergence = Divergence { step: 3, action: StepAction::Stop, why: "not finite".into(), evidence };
        drop(diverge(&mut world, &divergence, 3 * 72));
        let record = &world.core.jobs().all[&JOB];
        assert_eq!((&record.phase, record.why.as_str()), (&Phase::Ended(End::Failed), outcome));
    }
}

#[test]
fn without_a_checkpoint_there_is_nothing_to_roll_back_to() {
    let mut world = training();
    drop(diverge(&mut world, &spike(3), 3 * 72));
    let record = &world.core.jobs().all[&JOB];
    assert_eq!(record.why, "a spike; there is no checkpoint to roll back to");
}
