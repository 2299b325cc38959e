//! Recovery from memory. In the same layout every rank's shard is sent to it. In another one each rank asks those that have what it
//! lacks, so that nothing moves that is there. Then the ranks gather the parameters they hold copies of.

use std::collections::BTreeSet;
use std::sync::Arc;

use contraflow_proto::{StepReport, v1};
use contraflow_runtime::checkpoint::Position;
use contraflow_runtime::control::MovedBytes;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::stability::StabilityWatch;
use contraflow_runtime::topology::{FormationId, Generation, Topology};
use prost::Message;

use super::moves::{Moves, Ranges, moves};
use super::replicator::step_id;
use super::{ReplicaStore, ShardReplica, transfer};
use crate::checkpoint::{Record, Records, part_of};
use crate::error::RankError;

const NOWHERE: Chunk = Chunk { stage: 0, micro_batch: 0 };

/// Where the parts of a state are.
#[derive(Clone)]
pub struct Recovered {
    /// Of the formation that made the step.
    pub generation: Generation,
    /// The step.
    pub step: u64,
    /// By rank of the state, the rank of this formation whose worker has its part; numbers after those of the ranks are of workers
    /// that host none.
    pub holders: Vec<usize>,
    /// The axes of the state, if they are not those of this formation.
    pub axes: Option<Topology>,
    /// Ranks of this formation.
    pub world: usize,
    /// What this worker has.
    pub store: Arc<ReplicaStore>,
}

/// What a rank needs of a state in another layout.
pub struct Wanted {
    /// The records that it answers for in its own layout.
    pub needs: Vec<Record>,
    /// By rank of the state, the records of its part.
    pub parts: Vec<Vec<Record>>,
}

/// What a rank has of a state that was in another layout.
pub struct Rearranged {
    /// Position of the run.
    pub position: Position,
    /// State of the stability watch.
    pub watch: StabilityWatch,
    /// Everything that it needs, each element once.
    pub records: Records,
    /// What came from elsewhere, and what had to.
    pub moved: MovedBytes,
}

impl Recovered {
    fn part(&self, rank: usize) -> Result<Arc<ShardReplica>, FabricError> {
        let (generation, step) = (self.generation, self.step);
        self.store.get((generation, step, rank)).ok_or_else(|| FabricError::Lost {
            rank,
            reason: format!("its state after step {step} of generation {generation} is not in memory here"),
        })
    }

    fn of(&self) -> String {
        format!("the state after step {} in memory", self.step)
    }

    /// Sends the parts of this worker to the ranks that resume from them.
    fn push(&self, endpoint: &Endpoint, formation: FormationId) -> Result<(), RankError> {
        let (own, id) = (endpoint.rank(), step_id(formation, self.step));
        for rank in (0..self.holders.len()).filter(|&rank| self.holders[rank] == own && rank != own) {
            let (replica, reports) = (self.part(rank)?, self.store.reports(rank, self.step));
            transfer::send((endpoint, rank), (id, FrameKind::State, rank), &replica, reports)?;
        }
        Ok(())
    }

    /// Hears from every other rank what it wants of the parts that this worker brings, and sends it that.
    fn answer(&self, endpoint: &Endpoint, formation: FormationId) -> Result<(), RankError> {
        let (own, id) = (endpoint.rank(), step_id(formation, self.step));
        for rank in (0..self.world).filter(|&rank| rank != own) {
            let tag = id.tag(FrameKind::StateWanted, NOWHERE, 0, rank);
            let wrong = |got: String| FabricError::Content { tag, expected: "what a rank wants".into(), got };
            let frame = endpoint.receive(tag)?;
            let wanted = frame.first().map(|part| v1::StateWanted::decode(part.bytes()));
            let wanted = wanted.and_then(Result::ok).ok_or_else(|| wrong("another message".into()))?;
            for v1::PartWanted { rank: part, records } in wanted.parts {
                let part = usize::try_from(part).unwrap_or(usize::MAX);
                let replica = self.part(part)?;
                let records = serde_json::from_slice(&records).map_err(|error| wrong(error.to_string()))?;
                let bytes = Arc::new(self.take(&replica, records)?);
                let ShardReplica { position, ref watch, .. } = *replica;
                let taken = ShardReplica { position, watch: watch.clone(), bytes };
                transfer::send((endpoint, rank), (id, FrameKind::State, part), &taken, Vec::new())?;
            }
        }
        Ok(())
    }

    fn take(&self, replica: &ShardReplica, wanted: Vec<Record>) -> Result<Vec<u8>, RankError> {
        part_of(&Records::in_memory(self.of(), [replica.bytes.clone()])?, wanted)
    }
}

/// Brings parts of this worker, which hosts no rank of the formation, to those that need them.
///
/// **Errors**: those of the fabric; a part is not here.
pub fn bring(recovered: &Recovered, endpoint: &Endpoint, formation: FormationId) -> Result<(), RankError> {
    match recovered.axes {
        None => recovered.push(endpoint, formation),
        Some(_) => recovered.answer(endpoint, formation),
    }
}

/// Brings parts of this worker to the ranks that resume from them, and gets this rank's own: the part, and what the rank had
/// reported that may not be durable with the orchestrator. In the same layout.
///
/// **Errors**: those of the fabric; a part is not here.
pub fn recover(
    recovered: &Recovered,
    endpoint: &Endpoint,
    formation: FormationId,
) -> Result<(Arc<ShardReplica>, Vec<StepReport>), RankError> {
    let Recovered { generation, step, holders, store, .. } = recovered;
    let own = endpoint.rank();
    recovered.push(endpoint, formation)?;
    if holders.get(own) == Some(&own) {
        return Ok((recovered.part(own)?, store.reports(own, *step)));
    }
    let holder = holders.get(own).copied().unwrap_or(own);
    let id = (step_id(formation, *step), FrameKind::State, own);
    let (replica, reports) = transfer::receive((endpoint, holder), id, store.buffer())?;
    let replica = Arc::new(replica);
    store.put(formation.generation, (*generation, *step, own), replica.clone(), reports.clone());
    Ok((replica, reports))
}

/// Gets what this rank needs of a state in another layout, and gives the others what this worker brings. The state stays where it is
/// until the ranks have made steps of their own.
///
/// **Errors**: those of the fabric; the parts of the state do not make up what is needed.
pub fn rearrange(
    recovered: &Recovered,
    endpoint: &Endpoint,
    formation: FormationId,
    Wanted { needs, parts }: &Wanted,
) -> Result<Rearranged, RankError> {
    let (own, id) = (endpoint.rank(), step_id(formation, recovered.step));
    let wrong = |message| RankError::Content { path: recovered.of(), message };
    let local: Vec<bool> = (0..parts.len()).map(|part| recovered.part(part).is_ok()).collect();
    let found = moves(needs, parts, &recovered.holders, |part| local[part]).map_err(wrong)?;
    let Moves { here, mut from, moved: least, needed } = found;
    if from.is_empty() && !local.contains(&true) {
        // Where the run stands is said with a part, even if nothing of it is needed.
        let first = recovered.holders.first().copied().ok_or_else(|| wrong("has no parts".into()))?;
        from.entry(first).or_default().insert(0, Vec::new());
    }
    let bringers: BTreeSet<usize> = recovered.holders.iter().copied().collect();
    for &bringer in bringers.iter().filter(|&&bringer| bringer != own) {
        let tag = id.tag(FrameKind::StateWanted, NOWHERE, 0, own);
        let wanted = wanted(from.get(&bringer)).map_err(|error| wrong(error.to_string()))?;
        endpoint.send(bringer, tag, vec![Region::new(wanted.encode_to_vec())])?;
    }
    if bringers.contains(&own) {
        recovered.answer(endpoint, formation)?;
    }
    let (mut shards, mut moved, mut stood) = (Vec::new(), 0, None);
    for (part, records) in here {
        let replica = recovered.part(part)?;
        shards.push(Arc::new(recovered.take(&replica, records)?));
    }
    for (bringer, ranges) in from {
        for part in ranges.into_keys() {
            let id = (id, FrameKind::State, part);
            let (taken, _) = transfer::receive((endpoint, bringer), id, Vec::new())?;
            moved += Records::in_memory(recovered.of(), [taken.bytes.clone()])?.num_bytes();
            stood = Some((taken.position, taken.watch));
            shards.push(taken.bytes);
        }
    }
    if let Some(part) = local.iter().position(|is_here| *is_here) {
        let replica = recovered.part(part)?;
        stood = Some((replica.position, replica.watch.clone()));
    }
    let (position, watch) = stood.ok_or_else(|| wrong("has no part that says where the run stood".into()))?;
    let records = Records::in_memory(recovered.of(), shards)?;
    Ok(Rearranged { position, watch, records, moved: MovedBytes { moved, least, needed } })
}

fn wanted(ranges: Option<&Ranges>) -> serde_json::Result<v1::StateWanted> {
    let part = |(&part, records): (&usize, &Vec<Record>)| {
        Ok(v1::PartWanted { rank: part as u64, records: serde_json::to_vec(records)? })
    };
    Ok(v1::StateWanted { parts: ranges.into_iter().flatten().map(part).collect::<serde_json::Result<_>>()? })
}
