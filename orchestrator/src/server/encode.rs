//! Commands of the core as messages of the worker link.

use contraflow_proto::v1;
use contraflow_runtime::control::wire::{RankAddress, encode_command, formation_numbers, rank_numbers};
use contraflow_runtime::topology::{FormationId, JobId};
use contraflow_runtime::trace::{self, SPAN, TraceContext};
use tracing::{Span, info_span};
use v1::commit::What;
use v1::to_worker::Message;

use crate::core::facts::Formed;
use crate::core::jobs::JobRecord;
use crate::core::{Core, WorkerCommand, axes_overrides};

/// A command as it goes over the wire; `None` if its subject has ended by now.
pub(super) fn encode(
    core: &Core,
    (key, quota): (&[u8; 32], Option<u64>),
    command: WorkerCommand,
) -> Option<Message> {
    Some(match command {
        WorkerCommand::Welcome => Message::Welcome(v1::Welcome {
            incarnation: core.incarnation(),
            beat_ms: core.times().beat_ms(),
            state: core.state(),
        }),
        WorkerCommand::Reject { why } => Message::Refused(why),
        WorkerCommand::Disconnect => return None,
        WorkerCommand::Assign { formation, ranks } => {
            let record = core.jobs().all.get(&formation.job)?;
            let formed = record.running().filter(|formed| formed.generation == formation.generation)?;
            let mut workers = formed.places.clone();
            workers.sort_unstable();
            workers.dedup();
            let fabric = workers.iter().map(|&worker| {
                // The address of a worker that has not attached to this orchestrator is unknown: the command is repeated later.
                let member = core.member(worker).filter(|member| member.is_known())?;
                member.registration.fabric.clone().map(Into::into)
            });
            let place = |worker| workers.partition_point(|other| other < worker) as u64;
            let (job, generation) = formation_numbers(formation);
            Message::Assign(v1::Assign {
                job,
                generation,
                recipe: record.spec.recipe.resolved_toml(),
                model_config: record.spec.recipe.model_config.to_hf_json(),
                ranks: rank_numbers(&ranks),
                fabric: fabric.collect::<Option<Vec<v1::FabricAddress>>>()?,
                workers: formed.places.iter().map(place).collect(),
                secret: secret(key, formation).to_vec(),
                resume_step: formed.resume_step,
                last_checkpoint: record.last_checkpoint,
                earlier_checkpoint: record.pinned().earlier,
                cursor: formed.cursor,
                overrides: overrides(record, formed),
                buddies: rank_numbers(&formed.buddies),
                memory: formed.memory.as_ref().map(|memory| v1::InMemory {
                    generation: memory.generation.number(),
                    step: memory.step,
                    holders: rank_numbers(&memory.holders),
                }),
                traceparent: trace::current().to_string(),
                state: core.state(),
                quota_bytes: quota.unwrap_or_default(),
                origin: record.spec.origin.as_ref().map(|origin| v1::Origin {
                    job: origin.job.map_or(0, JobId::bits),
                    folder: origin.folder.clone(),
                    step: origin.checkpoint.step,
                    cursor: origin.checkpoint.cursor,
                }),
            })
        }
        WorkerCommand::Rank { to, command } => {
            let traceparent = trace::current().to_string();
            Message::Command(v1::RankCommand { traceparent, ..encode_command(to, &command) })
        }
        WorkerCommand::Release { formation, reason, keep } => {
            let (job, generation) = formation_numbers(formation);
            Message::Release(v1::Release { job, generation, reason, keep })
        }
        WorkerCommand::CommitCheckpoint { formation, position, watch, shards, pinned } => {
            let (job, generation) = formation_numbers(formation);
            let checkpoint = v1::Checkpoint {
                position: Some(position.into()),
                watch: Some(watch.into()),
                shards: shards.into_iter().map(Into::into).collect(),
                last_checkpoint: pinned.newest,
                earlier_checkpoint: pinned.earlier,
            };
            Message::Commit(v1::Commit { job, generation, what: Some(What::Checkpoint(checkpoint)) })
        }
        WorkerCommand::WriteShards { formation, of: (of_generation, step), ranks } => {
            let (job, generation) = formation_numbers(formation);
            let of_generation = of_generation.number();
            let ranks = rank_numbers(&ranks);
            Message::WriteShards(v1::WriteShards { job, generation, of_generation, step, ranks })
        }
        WorkerCommand::ReadFlight { formation, lost } => {
            let (job, generation) = formation_numbers(formation);
            let (state, lost) = (core.state(), rank_numbers(&lost));
            Message::ReadFlight(v1::ReadFlight { job, generation, state, lost })
        }
        WorkerCommand::Discard { job, last, everything } => Message::Discard(v1::Discard {
            job: job.bits(),
            state: core.state(),
            generation: last.number(),
            everything,
        }),
        WorkerCommand::PublishWeights { formation, files } => {
            let (job, generation) = formation_numbers(formation);
            let weights = v1::Weights { files: files.into_iter().map(Into::into).collect() };
            Message::Commit(v1::Commit { job, generation, what: Some(What::Weights(weights)) })
        }
    })
}

/// The span of a command that starts work, below the submission of its job.
pub(super) fn span_of(core: &Core, command: &WorkerCommand) -> Span {
    let (job, span) = match command {
        WorkerCommand::Assign { formation: FormationId { job, generation }, .. } => {
            let generation = generation.number();
            (*job, info_span!(target: SPAN, parent: None, "assign", %job, generation))
        }
        WorkerCommand::Rank { to, command } => {
            let RankAddress { formation: FormationId { job, generation }, rank } = *to;
            let (generation, rank) = (generation.number(), rank.number());
            (job, info_span!(target: SPAN, parent: None, "command", %job, generation, rank, ?command))
        }
        _ => return Span::none(),
    };
    let submitted = core.jobs().all.get(&job).map(|record| TraceContext::parse(&record.spec.traceparent));
    trace::below(submitted.unwrap_or_default(), span)
}

/// Changes of the recipe for a formation with other axes than the job asked for.
fn overrides(record: &JobRecord, formed: &Formed) -> Vec<String> {
    if record.spec.topology() == formed.topology {
        return Vec::new();
    }
    axes_overrides(&formed.topology)
}

/// The shared secret of one formation.
fn secret(key: &[u8; 32], formation: FormationId) -> [u8; 32] {
    let (job, generation) = formation_numbers(formation);
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&job.to_le_bytes());
    hasher.update(&generation.to_le_bytes());
    hasher.finalize().into()
}
