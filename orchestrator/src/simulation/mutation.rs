//! Rules that a run breaks on purpose, one at a time: a check that lets one of them pass is no check.
//!
//! Each is planted where the simulation stands for what is around the core: the hub, its store, the workers. What the core
//! itself might do wrong is planted in its inputs, so that it acts as if it had not checked.

use contraflow_proto::StepReport;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::Rank;

use super::World;
use crate::core::facts::Formed;
use crate::core::{Core, Event};

/// A broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Commands are sent before the facts they follow from are durable.
    SpeaksFirst,
    /// What the disk does not take is done all the same.
    GoesOnUnkept,
    /// The orchestrator's end takes a fact along that was acknowledged.
    LosesAFact,
    /// A start does not raise the incarnation.
    KeepsIncarnation,
    /// An orchestrator keeps writing after another one has taken over.
    WritesOn,
    /// Workers and orchestrators do not compare incarnations.
    IgnoresIncarnations,
    /// A restarted orchestrator does not know which steps have been reported.
    ForgetsSteps,
    /// Repeated steps are reported again.
    TellsStepsAgain,
    /// What a rank of an earlier formation says counts.
    HearsStaleRanks,
    /// Any worker is believed that says it has committed.
    BelievesAnybody,
    /// A checkpoint is to be committed as soon as one rank has written its shard.
    CommitsEarly,
    /// A worker reports a commit that it has not made.
    CommitsInWords,
    /// A rank is assigned to a second worker, too.
    AssignsTwice,
    /// A worker that is told to leave a formation stays.
    StaysOn,
    /// A worker does not repeat what its orchestrator may have missed.
    SaysOnce,
    /// A formation continues at the checkpoint's place in the order of the sequences, not past what led astray.
    ForgetsCursor,
    /// A second submission of a job is another job.
    IgnoresKeys,
    /// Finished jobs are retained for ever.
    ForgetsNothing,
    /// Of a job that is forgotten the steps stay.
    ForgetsHalf,
    /// A rank's worker takes shards of an earlier checkpoint.
    ResumesEarlier,
    /// A step does not wait until the buddies have the one before.
    OutrunsBuddies,
    /// A worker drops the step before the latest although not every rank has the latest.
    LetsGoEarly,
    /// Ranks that resume from memory do not repeat earlier reports.
    RecoversInSilence,
    /// A rank of another layout takes a part of the step before from whoever still has that.
    MovesStale,
    /// A worker without a rank of a formation drops what it is to bring to it.
    DropsWhatItBrings,
    /// A checkpoint that the orchestrator knows of goes, once there are newer ones.
    PinsNothing,
    /// A stalled rank is not distinguished from those that wait for it.
    BlamesNobody,
    /// A job takes the folder of its number for its own, even another job's.
    TakesAnyFolder,
    /// A rank that cannot write its part of a checkpoint ends the job.
    EndsOnFailedSave,
    /// What a rank reads of a checkpoint is not compared with what was written.
    ReadsDamage,
    /// A damaged checkpoint is taken for a fault of the recipe.
    EndsOnDamage,
    /// Ranks do not say which peer they could not reach.
    HidesPeers,
    /// Failed formations are counted as ones that complete steps.
    CountsNothing,
    /// A job takes as many ranks as there are.
    KnowsNoMost,
    /// A job does not grow.
    StaysSmall,
}

fn failed(rank: Rank, cause: &str, kind: ErrorKind) -> RankEvent {
    RankEvent::Failed { rank, action: "saving".into(), cause: cause.to_owned(), kind, peer: None }
}

impl World {
    pub(super) fn breaks(&self, rule: Mutation) -> bool {
        self.mutation == Some(rule)
    }

    /// What the core gets instead of an event.
    pub(super) fn distort(&self, core: &Core, mut event: Event) -> Vec<Event> {
        match (self.mutation, &mut event) {
            (Some(Mutation::HearsStaleRanks), Event::Rank { worker, from, .. }) => {
                if let Some(formed) =
                    core.jobs().all.get(&from.formation.job).and_then(|record| record.running())
                {
                    from.formation.generation = formed.generation;
                    *worker = formed.place_of(from.rank).unwrap_or(*worker);
                }
            }
            (Some(Mutation::BelievesAnybody), Event::Committed { worker, formation, .. }) => {
                let formed = core.jobs().all.get(&formation.job).and_then(|record| record.running());
                let committer = formed.and_then(|formed| formed.place_of(Rank::ZERO));
                *worker = committer.unwrap_or(*worker);
            }
            (Some(Mutation::IgnoresIncarnations), Event::Attached(attachment)) => {
                attachment.incarnation = 0;
            }
            (Some(Mutation::IgnoresKeys), Event::Submit(spec)) => spec.key.clear(),
            (Some(Mutation::KnowsNoMost), Event::Submit(spec)) => spec.max_ranks = 64,
            (Some(Mutation::StaysSmall), Event::Submit(spec)) => spec.max_ranks = 0,
            (Some(Mutation::BlamesNobody), Event::Beat { progress, .. }) => {
                progress.iter_mut().for_each(|progress| progress.is_at_work = false);
            }
            (Some(Mutation::EndsOnFailedSave), Event::Rank { event, .. }) => {
                if let RankEvent::SaveFailed { rank, cause, .. } = &**event {
                    **event = failed(*rank, cause, ErrorKind::Config);
                }
            }
            (Some(Mutation::EndsOnDamage), Event::Rank { event, .. }) => {
                if let RankEvent::Failed { kind, .. } = &mut **event
                    && *kind == ErrorKind::Damaged
                {
                    *kind = ErrorKind::Config;
                }
            }
            (Some(Mutation::HidesPeers), Event::Rank { event, .. }) => {
                if let RankEvent::Failed { peer, .. } = &mut **event {
                    *peer = None;
                }
            }
            (Some(Mutation::CountsNothing), Event::Tick) => return self.with_steps(core),
            (Some(Mutation::CommitsEarly), Event::Rank { from, event: original, .. }) => {
                let formed = core.jobs().all.get(&from.formation.job).and_then(|record| record.running());
                let ranks = formed.into_iter().flat_map(Formed::ranks);
                if let RankEvent::ShardSaved { position, watch, shard, .. } = &**original {
                    let as_of = |(rank, worker): (Rank, u64)| {
                        let (watch, shard) = (watch.clone(), shard.clone());
                        let event = RankEvent::ShardSaved { rank, position: *position, watch, shard };
                        Event::Rank { worker, from: RankAddress { rank, ..*from }, event: Box::new(event) }
                    };
                    return ranks.map(as_of).collect();
                }
            }
            _ => {}
        }
        vec![event]
    }

    /// Time passes, and jobs whose ranks end their workers are said to have made a step.
    fn with_steps(&self, core: &Core) -> Vec<Event> {
        let running = core.jobs().all.iter().filter_map(|(&job, record)| Some((job, record.running()?)));
        let crashing = running.filter(|(job, _)| self.job_plan(*job).is_some_and(|planned| planned.crashes));
        let stepped = crashing.map(|(job, formed)| {
            let (generation, step) = (formed.generation.number(), formed.resume_step + 1);
            let report = StepReport { generation, step, ..StepReport::default() };
            let event = Box::new(RankEvent::StepDone { report });
            let from = RankAddress { formation: formed.id(job), rank: Rank::ZERO };
            Event::Rank { worker: formed.places[0], from, event }
        });
        [Event::Tick].into_iter().chain(stepped).collect()
    }
}
