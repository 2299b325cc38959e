//! Commands of the core as messages of the worker link.

use contraflow_proto::v1;
use contraflow_runtime::control::wire::{RankAddress, encode_command, formation_numbers, rank_numbers};
use contraflow_runtime::topology::{FormationId, JobId, Rank, Topology};
use contraflow_runtime::trace::{self, SPAN, TraceContext};
use tracing::{Span, info_span};
use v1::commit::What;
use v1::to_worker::Message;

use crate::core::facts::Formed;
use crate::core::jobs::JobRecord;
use crate::core::{Core, WorkerCommand, axes_overrides};
use crate::recovery::InMemory;

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
            let Network { fabric, workers, bringers } = network(core, formed)?;
            let (job, generation) = formation_numbers(formation);
            Message::Assign(v1::Assign {
                job,
                generation,
                recipe: record.spec.recipe.resolved_toml(),
                model_config: record.spec.recipe.model_config.to_hf_json(),
                ranks: rank_numbers(&ranks),
                fabric,
                workers,
                bringers,
                secret: secret(key, formation).to_vec(),
                resume_step: formed.resume_step,
                last_checkpoint: record.last_checkpoint,
                earlier_checkpoint: record.pinned().earlier,
                cursor: formed.cursor,
                overrides: overrides(record, formed),
                buddies: rank_numbers(&formed.buddies),
                memory: formed.memory.as_ref().map(in_memory),
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
        WorkerCommand::Bring { formation, place } => Message::Bring(bring(core, key, (formation, place))?),
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

/// Where the processes of a formation accept data connections.
struct Network {
    fabric: Vec<v1::FabricAddress>,
    /// By rank, then of those that bring a state, the place in `fabric`.
    workers: Vec<u64>,
    bringers: u64,
}

/// `None` as long as an address is unknown, of a worker that has not attached to this orchestrator: the command is repeated later.
fn network(core: &Core, formed: &Formed) -> Option<Network> {
    let all: Vec<u64> = formed.workers().into_iter().collect();
    let fabric = all.iter().map(|&worker| {
        let member = core.member(worker).filter(|member| member.is_known())?;
        member.registration.fabric.clone().map(Into::into)
    });
    let place = |(_, worker): (Rank, u64)| all.partition_point(|other| *other < worker) as u64;
    let workers = formed.ranks().chain(formed.bringers()).map(place).collect();
    let bringers = formed.bringers().count() as u64;
    Some(Network { fabric: fabric.collect::<Option<_>>()?, workers, bringers })
}

fn in_memory(memory: &InMemory) -> v1::InMemory {
    v1::InMemory {
        generation: memory.generation.number(),
        step: memory.step,
        holders: rank_numbers(&memory.holders),
        axes: memory.axes.map(|Topology { pipeline, expert, data }| v1::Axes {
            pipeline: pipeline as u64,
            expert: expert as u64,
            data: data as u64,
        }),
    }
}

/// What a worker brings to a formation that has no rank there; `None` if it has nothing to bring by now.
fn bring(core: &Core, key: &[u8; 32], (formation, place): (FormationId, Rank)) -> Option<v1::Bring> {
    let formed = core.jobs().all.get(&formation.job)?.running()?;
    let formed = Some(formed).filter(|formed| formed.generation == formation.generation)?;
    let memory = Some(in_memory(formed.memory.as_ref()?));
    let Network { fabric, workers, bringers } = network(core, formed)?;
    let (job, generation) = formation_numbers(formation);
    let (place, secret) = (place.number().into(), secret(key, formation).to_vec());
    Some(v1::Bring { job, generation, fabric, workers, bringers, place, secret, memory })
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
