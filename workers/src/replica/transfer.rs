//! Transfer of a shard to another rank's worker: a header, then pieces small enough that training's frames pass between
//! them. Knows ranks and bytes.

use std::sync::Arc;

use contraflow_proto::{StepReport, v1};
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Memory, Region};
use contraflow_runtime::schedule::Chunk;
use prost::Message;

use super::ShardReplica;
use crate::comm::address::StepId;

/// **Units**: bytes of a piece.
const PIECE: usize = 4 << 20;

/// Borrowed bytes of a shard.
struct TransferPiece {
    bytes: Arc<Vec<u8>>,
    range: std::ops::Range<usize>,
}

impl Memory for TransferPiece {
    fn part(&self, index: usize) -> Option<&[u8]> {
        (index == 0).then(|| &self.bytes[self.range.clone()])
    }

    fn num_bytes(&self) -> usize {
        self.range.len()
    }
}

fn chunk(piece: usize) -> Chunk {
    Chunk { stage: 0, micro_batch: piece }
}

/// Sends the part of a rank, or some of it, with reports of that rank, to rank `to`. Does not wait.
///
/// **Errors**: those of the fabric.
pub fn send(
    (endpoint, to): (&Endpoint, usize),
    (id, kind, part): (StepId, FrameKind, usize),
    replica: &ShardReplica,
    reports: Vec<StepReport>,
) -> Result<(), FabricError> {
    let header = v1::StateHeader {
        position: Some(replica.position.into()),
        watch: Some(replica.watch.clone().into()),
        bytes: replica.bytes.len() as u64,
        reports,
    };
    let tag = |piece| id.tag(kind, chunk(piece), part, endpoint.rank());
    endpoint.send(to, tag(0), vec![Region::new(header.encode_to_vec())])?;
    let len = replica.bytes.len();
    for (index, start) in (0..len).step_by(PIECE).enumerate() {
        let piece = TransferPiece { bytes: replica.bytes.clone(), range: start..(start + PIECE).min(len) };
        endpoint.send(to, tag(index + 1), vec![Region::new(piece)])?;
    }
    Ok(())
}

/// Takes in what rank `from` sends of the part of a rank, into an empty `buffer`.
///
/// **Errors**: those of the fabric; [`FabricError::Content`].
pub fn receive(
    (endpoint, from): (&Endpoint, usize),
    (id, kind, part): (StepId, FrameKind, usize),
    mut buffer: Vec<u8>,
) -> Result<(ShardReplica, Vec<StepReport>), FabricError> {
    let tag = |piece| id.tag(kind, chunk(piece), part, from);
    let wrong = |piece, expected: &str, got: String| {
        let expected = expected.to_owned();
        FabricError::Content { tag: tag(piece), expected, got }
    };
    let parts = endpoint.receive(tag(0))?;
    let header = parts.first().map(|part| v1::StateHeader::decode(part.bytes()));
    let Some(Ok(header)) = header else {
        return Err(wrong(0, "a header", format!("{} parts, or no message", parts.len())));
    };
    let v1::StateHeader { position: Some(position), watch: Some(watch), bytes, reports } = header else {
        return Err(wrong(0, "a position and a stability state", "less".into()));
    };
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    let num_pieces = len.div_ceil(PIECE);
    for piece in 1..=num_pieces {
        let parts = endpoint.receive(tag(piece))?;
        let expected = if piece == num_pieces { len - (piece - 1) * PIECE } else { PIECE };
        match &parts[..] {
            // Memory grows with what has arrived, not with what was announced.
            [part] if part.len() == expected => buffer.extend_from_slice(part.bytes()),
            _ => {
                let got = parts.iter().map(Region::len).sum::<usize>();
                return Err(wrong(piece, &format!("{expected} bytes"), format!("{got} bytes")));
            }
        }
    }
    let replica = ShardReplica { position: position.into(), watch: watch.into(), bytes: Arc::new(buffer) };
    Ok((replica, reports))
}
