//! Collectives over replica groups: all-reduce of a few totals, and the two halves of ZeRO-1, reduce-scatter and all-gather.
//!
//! Sums run in an order that the group fixes, never in that of arrival, so that a run gives the same bits whatever the timing.
//! Knows ranks and flat slices; no layers.

use std::ops::Range;

use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region};
use contraflow_runtime::schedule::Chunk;
use contraflow_runtime::topology::collective::{children, parent};

use super::address::StepId;
use super::packets::{self, Payload, Unpack};

const NOWHERE: Chunk = Chunk { stage: 0, micro_batch: 0 };

/// Collectives of one step; `bucket` distinguishes those of one kind.
pub struct Collectives<'a> {
    /// This rank's end of the fabric.
    pub endpoint: &'a Endpoint,
    /// The step it belongs to.
    pub id: StepId,
}

impl Collectives<'_> {
    fn send(&self, to: usize, kind: FrameKind, bucket: usize, part: Region) -> Result<(), FabricError> {
        self.send_parts(to, kind, bucket, vec![part])
    }

    fn send_parts(
        &self,
        to: usize,
        kind: FrameKind,
        bucket: usize,
        parts: Vec<Region>,
    ) -> Result<(), FabricError> {
        self.endpoint.send(to, self.id.tag(kind, NOWHERE, bucket, self.endpoint.rank()), parts)
    }

    fn receive(&self, from: usize, kind: FrameKind, bucket: usize) -> Result<Unpack, FabricError> {
        let tag = self.id.tag(kind, NOWHERE, bucket, from);
        Ok(Unpack::new(tag, self.endpoint.receive(tag)?))
    }

    /// Sums `totals` over the group, up a tree and down again: no member talks to more than a few others, however large the
    /// group. Each adds the sums of its children to its own in the order of the group.
    ///
    /// **Errors**: those of the fabric.
    pub fn all_reduce(
        &self,
        group: &[usize],
        bucket: usize,
        mut totals: Vec<f64>,
    ) -> Result<Vec<f64>, FabricError> {
        let (kind, len) = (FrameKind::AllReduce, totals.len());
        let at = group.iter().position(|&member| member == self.endpoint.rank()).unwrap_or_default();
        let children = children(at, group.len());
        for &child in &children {
            let other = self.receive(group[child], kind, bucket)?.totals(len)?;
            totals.iter_mut().zip(other).for_each(|(sum, value)| *sum += value);
        }
        if at > 0 {
            let parent = group[parent(at)];
            self.send(parent, kind, bucket, Region::new(Payload::Totals(totals)))?;
            totals = self.receive(parent, kind, bucket)?.totals(len)?;
        }
        let sum = Region::new(Payload::Totals(totals.clone()));
        children.iter().try_for_each(|&child| self.send(group[child], kind, bucket, sum.clone()))?;
        Ok(totals)
    }

    /// Sums a flat bucket over the group and returns this rank's shard of the sum. `parts` are this rank's values: by member,
    /// what falls into the member's shard.
    ///
    /// **Errors**: those of the fabric.
    pub fn reduce_scatter(
        &self,
        group: &[usize],
        bucket: usize,
        parts: Vec<Tensor>,
    ) -> Result<Tensor, FabricError> {
        let own_rank = self.endpoint.rank();
        let mut own = None;
        for (&member, part) in group.iter().zip(parts) {
            if member == own_rank {
                own = Some(part);
            } else {
                self.send(member, FrameKind::ReduceScatter, bucket, packets::tensor(part))?;
            }
        }
        let len = own.as_ref().map_or(0, Tensor::len);
        let mut sum: Option<Tensor> = None;
        for &member in group {
            let part = if member == own_rank {
                own.take()
            } else {
                Some(self.receive(member, FrameKind::ReduceScatter, bucket)?.flat(len)?)
            };
            match (&mut sum, part) {
                (Some(sum), Some(part)) => add_into(sum, &part),
                (_, part) => sum = part,
            }
        }
        Ok(sum.unwrap_or_else(|| Tensor::zeros(&[0])))
    }

    /// Gives this rank's shard of a flat bucket to every member, in the runs that `runs_of` says for an index in the group;
    /// returns theirs with their ranges, and of the own ones those that are not in F32, since their masters are elsewhere.
    ///
    /// **Errors**: those of the fabric.
    pub fn all_gather(
        &self,
        (group, bucket): (&[usize], usize),
        own: Vec<Tensor>,
        runs_of: impl Fn(usize) -> Vec<(Range<usize>, Format)>,
    ) -> Result<Vec<(Range<usize>, Tensor)>, FabricError> {
        let own_rank = self.endpoint.rank();
        for &member in group.iter().filter(|&&member| member != own_rank) {
            let parts = own.iter().cloned().map(packets::tensor).collect();
            self.send_parts(member, FrameKind::AllGather, bucket, parts)?;
        }
        let mut gathered = Vec::new();
        for (index, &member) in group.iter().enumerate() {
            let runs = runs_of(index);
            if member == own_rank {
                let ranges = runs.into_iter().map(|(range, _)| range);
                gathered.extend(ranges.zip(own.clone()).filter(|(_, part)| part.format() != Format::F32));
                continue;
            }
            let mut frame = self.receive(member, FrameKind::AllGather, bucket)?;
            for (range, format) in runs {
                let part = frame.flat_in(range.len(), format)?;
                gathered.push((range, part));
            }
        }
        Ok(gathered)
    }
}

impl Collectives<'_> {
    /// Brings runs of some F32 tensors, one of each tensor from every member, together at the first member of the group, which
    /// gets the tensors that they make up in the order of the group; `lens` says how long those are.
    ///
    /// **Shapes**: runs and results `[N, 1]`.
    ///
    /// **Errors**: those of the fabric; the runs of a tensor are not as long as it is.
    pub fn gather_at_first(
        &self,
        (group, bucket): (&[usize], usize),
        own: Vec<Tensor>,
        lens: &[usize],
    ) -> Result<Option<Vec<Tensor>>, FabricError> {
        let kind = FrameKind::State;
        if group[0] != self.endpoint.rank() {
            self.send_parts(group[0], kind, bucket, own.into_iter().map(packets::tensor).collect())?;
            return Ok(None);
        }
        let mut runs: Vec<Vec<Tensor>> = own.into_iter().map(|run| vec![run]).collect();
        for &member in &group[1..] {
            let mut frame = self.receive(member, kind, bucket)?;
            for runs in &mut runs {
                runs.push(frame.rows(1, Format::F32)?);
            }
        }
        let whole = |(runs, &len): (Vec<Tensor>, &usize)| {
            let whole = Tensor::concat_rows(&runs);
            let (tag, got) = (self.id.tag(kind, NOWHERE, bucket, group[0]), whole.len());
            let wrong = || FabricError::Content {
                tag,
                expected: format!("{len} elements"),
                got: format!("{got} elements"),
            };
            (got == len).then_some(whole).ok_or_else(wrong)
        };
        runs.into_iter().zip(lens).map(whole).collect::<Result<_, _>>().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contraflow_runtime::fabric::{DelayInjection, LocalNetwork, LocalOptions, Phase};

    use super::*;

    /// Numbers whose sum depends on the order.
    fn totals(rank: usize) -> Vec<f64> {
        [3.0, 7.0, 11.0].map(|part| (1.0 + rank as f64) / part * 10_f64.powi(rank as i32 % 5)).to_vec()
    }

    /// What each member got and the bytes that it sent, in the order of the group; frames come late and out of order.
    fn reduce(group: &[usize], seed: u64) -> Vec<(Vec<f64>, u64)> {
        let delay_injection = Some(DelayInjection { seed, max_delay: Duration::from_millis(3) });
        let network = LocalNetwork::new(LocalOptions { delay_injection, ..LocalOptions::default() });
        let ends: Vec<Endpoint> = group.iter().map(|&rank| network.join(rank)).collect();
        let id = StepId::first(Phase::Update);
        let one = |endpoint: &Endpoint| {
            let sum = Collectives { endpoint, id }.all_reduce(group, 0, totals(endpoint.rank())).unwrap();
            (sum, endpoint.sent_bytes())
        };
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = ends.iter().map(|endpoint| scope.spawn(move || one(endpoint))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(network.num_waiting(), 0);
        results
    }

    /// The sum over a run of positions, of which there are `span` at most: that of its first eighth, then the others.
    fn sum_of_run(group: &[usize], start: usize, span: usize) -> Vec<f64> {
        if span == 1 {
            return totals(group[start]);
        }
        let starts = (start..group.len().min(start + span)).step_by(span / 8);
        let sums = starts.map(|start| sum_of_run(group, start, span / 8));
        sums.reduce(|sum, other| sum.iter().zip(other).map(|(sum, value)| sum + value).collect()).unwrap()
    }

    fn bits(sum: &[f64]) -> Vec<u64> {
        sum.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_member_gets_the_sum_in_the_order_of_the_group() {
        for members in [1, 2, 7, 8, 9, 20, 64, 70] {
            // Not the order of the ranks.
            let group: Vec<usize> = (0..members).map(|at| at * 37 % 101).collect();
            let expected = match members {
                0..=8 => group.iter().map(|&rank| totals(rank)).fold(vec![0.0; 3], |sum, other| {
                    sum.iter().zip(other).map(|(sum, value)| sum + value).collect()
                }),
                _ => sum_of_run(&group, 0, 512),
            };
            for seed in [1, 2] {
                let results = reduce(&group, seed);
                assert!(results.iter().all(|(sum, _)| bits(sum) == bits(&expected)), "{members} members");
                let sent: u64 = results.iter().map(|(_, bytes)| bytes).sum();
                assert_eq!(sent, 2 * (members as u64 - 1) * 24, "{members} members");
            }
        }
    }
}
