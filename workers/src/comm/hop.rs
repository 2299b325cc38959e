//! One exchange of rows between some ranks, each of which stands for a run of neighbouring experts: there, and back as sums.
//!
//! A row goes once to a rank even if several of its experts live there; each rank sends back one sum per row. Every peer
//! gets exactly one frame per exchange, empty if there is nothing for it. Sums run in the order of the ranks, never of
//! arrival. R rows and C choices at the sender, N rows and P pairs received, D hidden.
//!
//! Does not know whether the ranks own the experts or pass rows on, nor where rows come from.

use contraflow_kernels::dispatch::{self, Choice, Share};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::permute;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region, Tag};

use super::packets::{self, Unpack};
use crate::model::experts::Arrivals;

/// Who exchanges rows.
#[derive(Clone)]
pub(super) struct Hop {
    /// Ranks in order; the i-th stands for the i-th run of experts.
    pub ranks: Vec<usize>,
    /// Index of this rank.
    pub own: usize,
    /// Experts of a run.
    pub experts_per_rank: usize,
}

/// Which rows went where: what the other passes go back along.
pub(super) struct HopRoute {
    /// Rows of this rank.
    pub num_rows: usize,
    /// Choices of this rank.
    num_choices: usize,
    /// Per destination, the rows that went there, ascending.
    pub sent_rows: Vec<Tensor>,
    /// Per destination, the position among the choices of each pair that went there.
    sent_slots: Vec<Tensor>,
    /// Per source, the number of rows that came.
    pub received_rows: Vec<usize>,
    /// Per source, the number of pairs that came.
    received_pairs: Vec<usize>,
    /// Every row of this rank stays on it, and nothing comes from elsewhere: rows need no copy.
    is_identity: bool,
}

/// One exchange: the fabric, who takes part, and the address all its frames share.
pub(super) struct Exchange<'a> {
    pub endpoint: &'a Endpoint,
    pub hop: &'a Hop,
    /// Address of the frames, but for kind and source.
    pub tag: Tag,
}

impl Exchange<'_> {
    pub(super) fn tag(&self, kind: FrameKind, source: usize) -> Tag {
        Tag { kind, source: source as u32, ..self.tag }
    }

    /// Sends one frame to every other member; `make` is asked for each index but the own one.
    fn send(&self, kind: FrameKind, mut make: impl FnMut(usize) -> Vec<Region>) -> Result<(), FabricError> {
        for (index, &rank) in self.hop.ranks.iter().enumerate() {
            if index != self.hop.own {
                self.endpoint.send(rank, self.tag(kind, self.endpoint.rank()), make(index))?;
            }
        }
        Ok(())
    }

    /// The frame of the member with this index.
    fn receive(&self, kind: FrameKind, index: usize) -> Result<Unpack, FabricError> {
        let tag = self.tag(kind, self.hop.ranks[index]);
        Ok(Unpack::new(tag, self.endpoint.receive(tag)?))
    }

    /// Sends each row to the ranks that stand for what it chooses, and collects what comes.
    ///
    /// **Shapes**: `rows` `[R, D]`; arrivals `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub(super) fn dispatch(
        &self,
        rows: &Tensor,
        choices: impl Iterator<Item = Choice>,
    ) -> Result<(Arrivals, HopRoute), FabricError> {
        let Hop { ref ranks, own, experts_per_rank } = *self.hop;
        let shares = dispatch::by_owner(choices, ranks.len(), experts_per_rank);
        let num_rows = rows.rows();
        let mut route = HopRoute {
            num_rows,
            num_choices: shares.iter().map(|share| share.slots.len()).sum(),
            received_rows: Vec::new(),
            received_pairs: Vec::new(),
            is_identity: ranks.len() == 1 && shares[0].rows.len() == num_rows,
            sent_rows: shares.iter().map(|share| share.rows.clone()).collect(),
            sent_slots: shares.iter().map(|share| share.slots.clone()).collect(),
        };
        if route.is_identity {
            let Share { pairs, weights, .. } = shares[0].clone();
            route.received_rows = vec![num_rows];
            route.received_pairs = vec![pairs.rows()];
            return Ok((Arrivals { rows: rows.clone(), pairs, weights }, route));
        }
        self.send(FrameKind::Dispatch, |index| {
            let share = &shares[index];
            let rows = permute::gather(rows, &share.rows);
            [rows, share.pairs.clone(), share.weights.clone()].map(packets::tensor).into()
        })?;
        let mut parts: [Vec<Tensor>; 3] = Default::default();
        let mut num_arrived = 0;
        for (index, share) in shares.into_iter().enumerate() {
            let Arrivals { rows, mut pairs, weights } = if index == own {
                let rows = permute::gather(rows, &share.rows);
                Arrivals { rows, pairs: share.pairs, weights: share.weights }
            } else {
                self.receive_rows(index, rows)?
            };
            dispatch::shift_rows(&mut pairs, num_arrived);
            route.received_rows.push(rows.rows());
            route.received_pairs.push(pairs.rows());
            num_arrived += rows.rows();
            parts.iter_mut().zip([rows, pairs, weights]).for_each(|(list, part)| list.push(part));
        }
        let [rows, pairs, weights] = parts.map(|parts| Tensor::concat_rows(&parts));
        Ok((Arrivals { rows, pairs, weights }, route))
    }

    fn receive_rows(&self, index: usize, like: &Tensor) -> Result<Arrivals, FabricError> {
        let mut frame = self.receive(FrameKind::Dispatch, index)?;
        let rows = frame.rows(like.cols(), like.format())?;
        let pairs = frame.pairs(rows.rows(), self.hop.experts_per_rank)?;
        let weights = frame.flat(pairs.rows())?;
        Ok(Arrivals { rows, pairs, weights })
    }

    /// Sends each row's sum back and adds what comes to `home`.
    ///
    /// **Shapes**: `outputs` `[N, D]`, `home` `[R, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub(super) fn combine(
        &self,
        outputs: &Tensor,
        route: &HopRoute,
        home: &mut Tensor,
    ) -> Result<(), FabricError> {
        self.send_home(FrameKind::Combine, outputs, route, |_| Vec::new())?;
        // Summed up in F32 and rounded once, however many ranks there are.
        let before = std::mem::replace(home, Tensor::zeros(&[0]));
        let (mut sums, format) = (before.to(Format::F32), before.format());
        drop(before);
        for index in 0..self.hop.ranks.len() {
            if index == self.hop.own {
                self.add_own(outputs, route, &mut sums);
            } else {
                let sent = &route.sent_rows[index];
                let rows = self.receive(FrameKind::Combine, index)?.all_rows(sent.len(), outputs)?;
                permute::scatter_add(&rows, sent, &mut sums);
            }
        }
        *home = sums.to(format);
        Ok(())
    }

    /// The backward pass of [`Exchange::combine`]: the gradient of the rows' sums, where they were made.
    ///
    /// **Shapes**: `dy` `[R, D]`, output `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub(super) fn combine_backward(&self, dy: &Tensor, route: &HopRoute) -> Result<Tensor, FabricError> {
        if route.is_identity {
            return Ok(dy.clone());
        }
        let gathered = |index: usize| permute::gather(dy, &route.sent_rows[index]);
        self.send(FrameKind::CombineGradient, |index| vec![packets::tensor(gathered(index))])?;
        let mut parts = Vec::new();
        for index in 0..self.hop.ranks.len() {
            parts.push(if index == self.hop.own {
                gathered(index)
            } else {
                let num_rows = route.received_rows[index];
                self.receive(FrameKind::CombineGradient, index)?.all_rows(num_rows, dy)?
            });
        }
        Ok(Tensor::concat_rows(&parts))
    }

    /// The backward pass of [`Exchange::dispatch`]: the gradients of the rows and of the choices' weights, at home.
    ///
    /// **Shapes**: `d_rows` `[N, D]`, `d_pairs` `[P]`, one per arrived pair; output `[R, D]` and `[C]`.
    ///
    /// **Errors**: those of the fabric.
    pub(super) fn dispatch_backward(
        &self,
        d_rows: &Tensor,
        d_pairs: &Tensor,
        route: &HopRoute,
    ) -> Result<(Tensor, Tensor), FabricError> {
        let starts = starts_of(&route.received_pairs);
        let pairs_of = |index: usize| Tensor::from(d_pairs.view(starts[index]..starts[index + 1]));
        self.send_home(FrameKind::DispatchGradient, d_rows, route, |index| {
            vec![packets::tensor(pairs_of(index))]
        })?;
        let mut home = Tensor::zeros(&[route.num_rows, d_rows.cols()]);
        let mut d_weights = Tensor::zeros(&[route.num_choices]);
        for index in 0..self.hop.ranks.len() {
            let slots = &route.sent_slots[index];
            let gradients = if index == self.hop.own {
                self.add_own(d_rows, route, &mut home);
                pairs_of(index)
            } else {
                let mut frame = self.receive(FrameKind::DispatchGradient, index)?;
                let sent = &route.sent_rows[index];
                permute::scatter_add(&frame.all_rows(sent.len(), d_rows)?, sent, &mut home);
                frame.flat(slots.len())?
            };
            permute::scatter(&gradients, slots, &mut d_weights);
        }
        Ok((home, d_weights))
    }

    /// Splits rows by where they came from and sends each share back, followed by `more`.
    fn send_home(
        &self,
        kind: FrameKind,
        rows: &Tensor,
        route: &HopRoute,
        more: impl Fn(usize) -> Vec<Region>,
    ) -> Result<(), FabricError> {
        let starts = starts_of(&route.received_rows);
        self.send(kind, |index| {
            let mut parts = vec![packets::tensor(rows.slice_rows(starts[index]..starts[index + 1]))];
            parts.extend(more(index));
            parts
        })
    }

    fn add_own(&self, rows: &Tensor, route: &HopRoute, home: &mut Tensor) {
        if route.is_identity {
            add_into(home, rows);
            return;
        }
        let starts = starts_of(&route.received_rows);
        let own = self.hop.own;
        permute::scatter_add(&rows.slice_rows(starts[own]..starts[own + 1]), &route.sent_rows[own], home);
    }
}

/// Running sums, beginning with 0.
fn starts_of(counts: &[usize]) -> Vec<usize> {
    let mut starts = vec![0];
    for count in counts {
        starts.push(starts[starts.len() - 1] + count);
    }
    starts
}
