//! Commands and events as messages of the worker link, and back.
//!
//! What comes from a wire may be anything: a message that lacks a part is an error with a message, never a panic.

use std::path::Path;

use contraflow_proto::v1;
use v1::rank_command::Command;
use v1::rank_event::Event;

use super::{ExportedFile, MovedBytes, RankCommand, RankEvent};
use crate::checkpoint::{Position, ShardFile};
use crate::fabric::Address;
use crate::faults::ErrorKind;
use crate::topology::{FormationId, Generation, JobId, Rank};

/// Which rank of which formation a message is for or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RankAddress {
    /// Running, or over by now.
    pub formation: FormationId,
    /// One of its ranks.
    pub rank: Rank,
}

/// A command on its way to a worker, without the span that it belongs to. Where weights are exported to is the worker's to know.
pub fn encode_command(to: RankAddress, command: &RankCommand) -> v1::RankCommand {
    let command = match command {
        RankCommand::BeginStep { step } => Command::BeginStep(*step),
        RankCommand::Stop { in_memory: false } => Command::Stop(v1::Empty {}),
        RankCommand::Stop { in_memory: true } => Command::StopInMemory(v1::Empty {}),
        RankCommand::Validate => Command::Validate(v1::Empty {}),
        RankCommand::Export { .. } => Command::Export(v1::Empty {}),
        RankCommand::Abort { reason } => Command::Abort(reason.clone()),
        RankCommand::Shutdown => Command::Shutdown(v1::Empty {}),
    };
    let (job, generation) = formation_numbers(to.formation);
    let traceparent = String::new();
    v1::RankCommand { job, generation, rank: to.rank.number().into(), command: Some(command), traceparent }
}

/// A command as it came; weights are exported to `export_dir`.
///
/// **Errors**: if there is no command in it.
pub fn decode_command(
    message: v1::RankCommand,
    export_dir: &Path,
) -> Result<(RankAddress, RankCommand), String> {
    let v1::RankCommand { job, generation, rank, command, .. } = message;
    let command = match command.ok_or("a command without content")? {
        Command::BeginStep(step) => RankCommand::BeginStep { step },
        Command::Stop(_) => RankCommand::Stop { in_memory: false },
        Command::StopInMemory(_) => RankCommand::Stop { in_memory: true },
        Command::Validate(_) => RankCommand::Validate,
        Command::Export(_) => RankCommand::Export { dir: export_dir.to_owned() },
        Command::Abort(reason) => RankCommand::Abort { reason },
        Command::Shutdown(_) => RankCommand::Shutdown,
    };
    Ok((RankAddress { formation: formation_of(job, generation)?, rank: rank_of(rank)? }, command))
}

/// An event on its way to the orchestrator.
pub fn encode_event(formation: FormationId, event: &RankEvent) -> v1::RankEvent {
    let (job, generation) = formation_numbers(formation);
    let rank = event.rank().number().into();
    let event = match event {
        RankEvent::Ready { .. } => Event::Ready(v1::Empty {}),
        RankEvent::StateMoved { moved: MovedBytes { moved, least, needed }, .. } => {
            Event::StateMoved(v1::StateMoved { moved: *moved, least: *least, needed: *needed })
        }
        RankEvent::StepDone { report } => Event::StepDone(report.clone()),
        RankEvent::Stopped { step, in_memory: false, .. } => Event::Stopped(*step),
        RankEvent::Stopped { step, in_memory: true, .. } => Event::StoppedInMemory(*step),
        RankEvent::ShardSaved { position, watch, shard, .. } => Event::ShardSaved(v1::ShardSaved {
            position: Some((*position).into()),
            watch: Some(watch.clone().into()),
            shard: Some(shard.clone().into()),
        }),
        RankEvent::Validated { loss, tokens, .. } => {
            Event::Validated(v1::Validated { loss: *loss, tokens: *tokens })
        }
        RankEvent::Exported { file, .. } => Event::Exported(file.clone().into()),
        RankEvent::Aborted { .. } => Event::Aborted(v1::Empty {}),
        RankEvent::Diverged { divergence, cursor, .. } => {
            let divergence = Some((**divergence).clone().into());
            Event::Diverged(v1::Diverged { divergence, cursor: *cursor })
        }
        RankEvent::SaveFailed { step, cause, .. } => {
            Event::SaveFailed(v1::SaveFailed { step: *step, cause: cause.clone() })
        }
        RankEvent::Failed { action, cause, kind, peer, .. } => Event::Failed(v1::Failed {
            action: action.clone(),
            cause: cause.clone(),
            kind: kind.name().to_owned(),
            peer: peer.map(|peer| peer.number().into()),
        }),
    };
    v1::RankEvent { job, generation, rank, event: Some(event) }
}

/// An event as it came.
///
/// **Errors**: if a part is missing or is malformed.
pub fn decode_event(message: v1::RankEvent) -> Result<(RankAddress, RankEvent), String> {
    let v1::RankEvent { job, generation, rank, event } = message;
    let rank = rank_of(rank)?;
    let address = RankAddress { formation: formation_of(job, generation)?, rank };
    let event = match event.ok_or("an event without content")? {
        Event::Ready(_) => RankEvent::Ready { rank },
        Event::StateMoved(v1::StateMoved { moved, least, needed }) => {
            RankEvent::StateMoved { rank, moved: MovedBytes { moved, least, needed } }
        }
        Event::StepDone(report) if Rank::new(report.rank) != rank => {
            return Err(format!("a report of rank {} from rank {rank}", report.rank));
        }
        Event::StepDone(report) => RankEvent::StepDone { report },
        Event::Stopped(step) => RankEvent::Stopped { rank, step, in_memory: false },
        Event::StoppedInMemory(step) => RankEvent::Stopped { rank, step, in_memory: true },
        Event::ShardSaved(saved) => RankEvent::ShardSaved {
            rank,
            position: saved.position.ok_or("a shard without a position")?.into(),
            watch: saved.watch.ok_or("a shard without a stability state")?.into(),
            shard: saved.shard.ok_or("a saved shard without a file")?.into(),
        },
        Event::Validated(v1::Validated { loss, tokens }) => RankEvent::Validated { rank, loss, tokens },
        Event::Exported(file) => RankEvent::Exported { rank, file: file.into() },
        Event::Aborted(_) => RankEvent::Aborted { rank },
        Event::Diverged(v1::Diverged { divergence, cursor }) => {
            let divergence = divergence.ok_or("a stopped step without a reason")?;
            RankEvent::Diverged { rank, divergence: Box::new(divergence.try_into()?), cursor }
        }
        Event::SaveFailed(v1::SaveFailed { step, cause }) => RankEvent::SaveFailed { rank, step, cause },
        Event::Failed(v1::Failed { action, cause, kind, peer }) => {
            let kind = ErrorKind::of_name(&kind).ok_or_else(|| format!("a failure of the kind {kind:?}"))?;
            let peer = peer.map(rank_of).transpose()?;
            RankEvent::Failed { rank, action, cause, kind, peer }
        }
    };
    Ok((address, event))
}

/// A job as it came: submitted jobs are counted from 1.
///
/// **Errors**: no job has such an id.
pub fn job_of(bits: u64) -> Result<JobId, String> {
    let job = JobId::of(bits);
    let is_one = job.number() > 0;
    is_one.then_some(job).ok_or_else(|| format!("job: expected the id of a job, got {bits}"))
}

/// A generation as it came.
///
/// **Errors**: no formation has such a count.
pub fn generation_of(number: u32) -> Result<Generation, String> {
    let is_one = number > 0;
    is_one
        .then_some(Generation::new(number))
        .ok_or_else(|| "generation: expected a count from 1, got 0".to_owned())
}

/// A formation as it came.
///
/// **Errors**: those of [`job_of`] and [`generation_of`].
pub fn formation_of(job: u64, generation: u32) -> Result<FormationId, String> {
    Ok(FormationId::new(job_of(job)?, generation_of(generation)?))
}

/// A formation as it is sent: the job's id and the generation.
pub fn formation_numbers(FormationId { job, generation }: FormationId) -> (u64, u32) {
    (job.bits(), generation.number())
}

/// A rank as it came.
///
/// **Errors**: no rank has such a number.
pub fn rank_of(number: u64) -> Result<Rank, String> {
    let rank = u32::try_from(number).map(Rank::new);
    rank.map_err(|_| format!("rank: expected at most {}, got {number}", u32::MAX))
}

/// Ranks as they came.
///
/// **Errors**: as [`rank_of`].
pub fn ranks_of(numbers: &[u64]) -> Result<Vec<Rank>, String> {
    numbers.iter().copied().map(rank_of).collect()
}

/// Ranks as they are sent.
pub fn rank_numbers(ranks: &[Rank]) -> Vec<u64> {
    ranks.iter().map(|rank| rank.number().into()).collect()
}

impl From<Position> for v1::Position {
    fn from(position: Position) -> Self {
        let Position { step, cursor, tokens } = position;
        v1::Position { step, cursor, tokens }
    }
}

impl From<v1::Position> for Position {
    fn from(position: v1::Position) -> Self {
        let v1::Position { step, cursor, tokens } = position;
        Position { step, cursor, tokens }
    }
}

impl From<Address> for v1::FabricAddress {
    fn from(address: Address) -> Self {
        let Address { host, tcp, unix } = address;
        v1::FabricAddress { host, tcp: tcp.to_string(), unix }
    }
}

impl TryFrom<v1::FabricAddress> for Address {
    type Error = String;

    fn try_from(address: v1::FabricAddress) -> Result<Self, String> {
        let v1::FabricAddress { host, tcp, unix } = address;
        let tcp = tcp.parse().map_err(|_| format!("tcp: expected IP:PORT, got {tcp:?}"))?;
        Ok(Address { host, tcp, unix })
    }
}

impl From<ShardFile> for v1::ShardFile {
    fn from(shard: ShardFile) -> Self {
        let ShardFile { file, bytes, blake3 } = shard;
        v1::ShardFile { file, bytes, blake3 }
    }
}

impl From<v1::ShardFile> for ShardFile {
    fn from(shard: v1::ShardFile) -> Self {
        let v1::ShardFile { file, bytes, blake3 } = shard;
        ShardFile { file, bytes, blake3 }
    }
}

impl From<ExportedFile> for v1::ExportedFile {
    fn from(exported: ExportedFile) -> Self {
        let ExportedFile { file, tensors, bytes } = exported;
        v1::ExportedFile { file, tensors, bytes }
    }
}

impl From<v1::ExportedFile> for ExportedFile {
    fn from(exported: v1::ExportedFile) -> Self {
        let v1::ExportedFile { file, tensors, bytes } = exported;
        ExportedFile { file, tensors, bytes }
    }
}

#[cfg(test)]
mod tests {
    use contraflow_proto::StepReport;

    use super::*;
    use crate::stability::{Divergence, StabilityWatch, StepAction};

    const FORMATION: FormationId = FormationId::new(JobId::new(5, 7), Generation::new(2));

    #[test]
    fn every_event_comes_back_as_it_went() {
        let rank = Rank::new(3);
        let shard = ShardFile { file: "rank-00003.safetensors".into(), bytes: 7, blake3: "ab".into() };
        let divergence =
            Divergence { step: 4, action: StepAction::RollBack, why: "a spike".into(), evidence: None };
        let events = [
            RankEvent::Ready { rank },
            RankEvent::StateMoved { rank, moved: MovedBytes { moved: 7, least: 6, needed: 9 } },
            RankEvent::StepDone { report: StepReport { rank: 3, step: 9, loss: 0.1, ..Default::default() } },
            RankEvent::Stopped { rank, step: 9, in_memory: false },
            RankEvent::Stopped { rank, step: 9, in_memory: true },
            RankEvent::ShardSaved {
                rank,
                position: Position { step: 1, cursor: 2, tokens: 3 },
                watch: StabilityWatch::default(),
                shard,
            },
            RankEvent::Validated { rank, loss: 1.5, tokens: 12 },
            RankEvent::Exported {
                rank,
                file: ExportedFile { file: "m".into(), tensors: vec!["t".into()], bytes: 4 },
            },
            RankEvent::Aborted { rank },
            RankEvent::Diverged { rank, divergence: Box::new(divergence), cursor: 64 },
            RankEvent::SaveFailed { rank, step: 9, cause: "c".into() },
            RankEvent::Failed {
                rank,
                action: "a".into(),
                cause: "c".into(),
                kind: ErrorKind::Lost,
                peer: Some(Rank::new(3)),
            },
        ];
        for event in events {
            let (address, back) = decode_event(encode_event(FORMATION, &event)).unwrap();
            assert_eq!(address, RankAddress { formation: FORMATION, rank });
            assert_eq!(back, event);
        }
    }

    #[test]
    fn every_command_comes_back_as_it_went() {
        let dir = Path::new("/jobs/1/model.part");
        let commands = [
            RankCommand::BeginStep { step: 4 },
            RankCommand::Stop { in_memory: false },
            RankCommand::Stop { in_memory: true },
            RankCommand::Validate,
            RankCommand::Export { dir: dir.to_owned() },
            RankCommand::Abort { reason: "why".into() },
            RankCommand::Shutdown,
        ];
        let to = RankAddress { formation: FORMATION, rank: Rank::new(3) };
        for command in commands {
            assert_eq!(decode_command(encode_command(to, &command), dir), Ok((to, command)));
        }
    }

    #[test]
    fn an_address_comes_back_as_it_went_and_another_text_is_refused() {
        for tcp in ["10.0.0.7:4096", "[::1]:1"] {
            let address = Address { host: "boot net".into(), tcp: tcp.parse().unwrap(), unix: "name".into() };
            assert_eq!(Address::try_from(v1::FabricAddress::from(address.clone())), Ok(address));
        }
        let wrong = v1::FabricAddress { tcp: "node0:7070".into(), ..Default::default() };
        assert_eq!(Address::try_from(wrong), Err("tcp: expected IP:PORT, got \"node0:7070\"".into()));
    }

    #[test]
    fn a_message_without_its_parts_is_an_error_with_a_message() {
        assert!(decode_event(v1::RankEvent::default()).is_err());
        assert!(decode_command(v1::RankCommand::default(), Path::new("")).is_err());
        let (job, generation) = formation_numbers(FORMATION);
        let event = |event| v1::RankEvent { job, generation, rank: 1, event: Some(event) };
        assert!(decode_event(event(Event::ShardSaved(v1::ShardSaved::default()))).is_err());
        assert!(decode_event(event(Event::StepDone(StepReport::default()))).is_err());
        assert!(decode_event(event(Event::Diverged(v1::Diverged::default()))).is_err());
        let failed = v1::Failed { kind: "tired".into(), ..Default::default() };
        assert!(decode_event(event(Event::Failed(failed))).unwrap_err().contains("tired"));
    }
    #[test]
    fn a_number_that_is_no_id_is_refused_with_its_field() {
        let (job, generation) = formation_numbers(FORMATION);
        let event = v1::RankEvent { job, generation, rank: 3, event: Some(Event::Aborted(v1::Empty {})) };
        assert!(decode_event(event.clone()).is_ok());
        let refusals = [
            (v1::RankEvent { job: 0, ..event.clone() }, "job: expected the id of a job, got 0"),
            // A nonce without a number.
            (v1::RankEvent { job: 7, ..event.clone() }, "job: expected the id of a job, got 7"),
            (v1::RankEvent { generation: 0, ..event.clone() }, "generation: expected a count from 1, got 0"),
            (
                v1::RankEvent { rank: 1 << 32, ..event.clone() },
                "rank: expected at most 4294967295, got 4294967296",
            ),
        ];
        for (message, words) in refusals {
            assert_eq!(decode_event(message), Err(words.to_owned()));
        }
        let last = v1::RankEvent { rank: u32::MAX.into(), generation: u32::MAX, job: u64::MAX, ..event };
        assert_eq!(decode_event(last).unwrap().0.rank, Rank::new(u32::MAX));
        assert!(ranks_of(&[0, 1, 1 << 40]).is_err());
    }
}
