//! Collectives over replica groups: all-reduce of a few totals, and the two halves of ZeRO-1, reduce-scatter and all-gather.
//!
//! Sums run in the order of the group, never of arrival, so that a run gives the same bits whatever the timing.
//! Knows ranks and flat slices; no layers.

use contraflow_kernels::math::add_into;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region};
use contraflow_runtime::schedule::Chunk;

use crate::packets::{self, Payload, Unpack};
use crate::step::StepId;

const NOWHERE: Chunk = Chunk { stage: 0, micro_batch: 0 };

/// Collectives of one step; `bucket` tells those of one kind apart.
pub struct Collectives<'a> {
    /// This rank's end of the fabric.
    pub endpoint: &'a Endpoint,
    /// Which step.
    pub id: StepId,
}

/// The share of `len` elements that member `index` of `members` owns.
pub fn shard(len: usize, members: usize, index: usize) -> std::ops::Range<usize> {
    len * index / members..len * (index + 1) / members
}

impl Collectives<'_> {
    fn send(&self, to: usize, kind: FrameKind, bucket: usize, part: Region) -> Result<(), FabricError> {
        self.endpoint.send(to, self.id.tag(kind, NOWHERE, bucket, self.endpoint.rank()), vec![part])
    }

    fn receive(&self, from: usize, kind: FrameKind, bucket: usize) -> Result<Unpack, FabricError> {
        let tag = self.id.tag(kind, NOWHERE, bucket, from);
        Ok(Unpack::new(tag, self.endpoint.receive(tag)?))
    }

    /// Sums `totals` over the group. The first member adds them up in order and tells the others.
    ///
    /// **Errors**: those of the fabric.
    pub fn all_reduce(
        &self,
        group: &[usize],
        bucket: usize,
        mut totals: Vec<f64>,
    ) -> Result<Vec<f64>, FabricError> {
        let (kind, len) = (FrameKind::AllReduce, totals.len());
        let root = group[0];
        if self.endpoint.rank() != root {
            self.send(root, kind, bucket, Region::new(Payload::Totals(totals)))?;
            return self.receive(root, kind, bucket)?.totals(len);
        }
        for &member in &group[1..] {
            let other = self.receive(member, kind, bucket)?.totals(len)?;
            totals.iter_mut().zip(other).for_each(|(sum, value)| *sum += value);
        }
        for &member in &group[1..] {
            self.send(member, kind, bucket, Region::new(Payload::Totals(totals.clone())))?;
        }
        Ok(totals)
    }

    /// Sums a flat bucket over the group and returns this rank's shard of the sum. `slice` copies a range of the bucket.
    ///
    /// **Errors**: those of the fabric.
    pub fn reduce_scatter(
        &self,
        group: &[usize],
        bucket: usize,
        len: usize,
        slice: impl Fn(std::ops::Range<usize>) -> Tensor,
    ) -> Result<Tensor, FabricError> {
        let own_rank = self.endpoint.rank();
        for (index, &member) in group.iter().enumerate() {
            if member != own_rank {
                let part = slice(shard(len, group.len(), index));
                self.send(member, FrameKind::ReduceScatter, bucket, packets::tensor(part))?;
            }
        }
        let own = group.iter().position(|&member| member == own_rank).unwrap_or_default();
        let range = shard(len, group.len(), own);
        let mut sum: Option<Tensor> = None;
        for &member in group {
            let part = if member == own_rank {
                slice(range.clone())
            } else {
                self.receive(member, FrameKind::ReduceScatter, bucket)?.flat(range.len())?
            };
            match &mut sum {
                Some(sum) => add_into(sum.f32_mut(), part.f32()),
                None => sum = Some(part),
            }
        }
        Ok(sum.unwrap_or_else(|| slice(range)))
    }

    /// Gives this rank's shard to every member and hands each other member's shard to `store`.
    ///
    /// **Errors**: those of the fabric.
    pub fn all_gather(
        &self,
        group: &[usize],
        bucket: usize,
        len: usize,
        slice: impl Fn(std::ops::Range<usize>) -> Tensor,
        mut store: impl FnMut(std::ops::Range<usize>, &Tensor),
    ) -> Result<(), FabricError> {
        let own_rank = self.endpoint.rank();
        let own = group.iter().position(|&member| member == own_rank).unwrap_or_default();
        for &member in group.iter().filter(|&&member| member != own_rank) {
            let part = slice(shard(len, group.len(), own));
            self.send(member, FrameKind::AllGather, bucket, packets::tensor(part))?;
        }
        for (index, &member) in group.iter().enumerate().filter(|&(_, &member)| member != own_rank) {
            let range = shard(len, group.len(), index);
            let part = self.receive(member, FrameKind::AllGather, bucket)?.flat(range.len())?;
            store(range, &part);
        }
        Ok(())
    }
}
