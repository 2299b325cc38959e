//! The expert all-to-all: dispatch, combine, and their backward passes, which are a combine and a dispatch.
//!
//! A token goes once to a rank even if several of its experts live there; each rank sends back one sum per row. Every peer
//! gets exactly one frame per exchange, empty if there is nothing for it. Sums run in the order of the ranks, never of
//! arrival. T tokens, K top-k, N rows received, D hidden.
//!
//! Knows routing and rows, nothing of experts' arithmetic.

use contraflow_kernels::gate::Routing;
use contraflow_kernels::math::add_into;
use contraflow_kernels::permute;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region, Tag};

use super::packets::{self, Payload, Unpack};
use crate::model::experts::Arrivals;

/// The ranks that share the routed experts, and this rank's place among them.
#[derive(Clone)]
pub struct ExpertGroup {
    /// Ranks in order; rank i of the group owns the i-th share of the experts.
    pub ranks: Vec<usize>,
    /// Index of this rank.
    pub own: usize,
    /// Routed experts per rank.
    pub experts_per_rank: usize,
}

/// Which rows went where in a dispatch: what combine and both backward passes go back along.
#[must_use = "a dispatch without its combine loses the tokens' way home"]
pub struct Route {
    /// Tokens of this rank.
    num_tokens: usize,
    /// Per destination, the token rows that went there, ascending.
    sent_rows: Vec<Vec<u32>>,
    /// Per destination, the flat (token, k) slot of each pair that went there.
    sent_slots: Vec<Vec<u32>>,
    /// Per source, the number of rows that came.
    received_rows: Vec<usize>,
    /// Per source, the number of pairs that came.
    received_pairs: Vec<usize>,
    /// Every token of this rank stays on it, and nothing comes from elsewhere: rows need no copy.
    is_identity: bool,
}

/// One exchange of one chunk's layer: the fabric, the group, and the address all its frames share.
pub struct Exchange<'a> {
    /// This rank's end of the fabric.
    pub endpoint: &'a Endpoint,
    /// The expert group.
    pub group: &'a ExpertGroup,
    /// Address of the frames, but for kind and source.
    pub tag: Tag,
}

/// Pairs bound for one destination: row within the packet and expert within the destination.
#[derive(Default)]
struct Outgoing {
    pairs: Vec<(u32, u32)>,
    weights: Vec<f32>,
}

/// Sorts the gate's choice by destination.
fn plan(routing: &Routing, top_k: usize, group: &ExpertGroup) -> (Route, Vec<Outgoing>) {
    let num_ranks = group.ranks.len();
    let num_tokens = routing.expert_ids.len() / top_k;
    let mut sent_rows = vec![Vec::new(); num_ranks];
    let mut sent_slots = vec![Vec::new(); num_ranks];
    let mut outgoing: Vec<Outgoing> = (0..num_ranks).map(|_| Outgoing::default()).collect();
    for token in 0..num_tokens {
        for slot in token * top_k..(token + 1) * top_k {
            let expert = routing.expert_ids[slot] as usize;
            let destination = expert / group.experts_per_rank;
            let rows: &mut Vec<u32> = &mut sent_rows[destination];
            if rows.last() != Some(&(token as u32)) {
                rows.push(token as u32);
            }
            let row = rows.len() as u32 - 1;
            outgoing[destination].pairs.push((row, (expert % group.experts_per_rank) as u32));
            outgoing[destination].weights.push(routing.weights[slot]);
            sent_slots[destination].push(slot as u32);
        }
    }
    let route = Route {
        num_tokens,
        received_rows: Vec::new(),
        received_pairs: Vec::new(),
        is_identity: num_ranks == 1 && sent_rows[0].len() == num_tokens,
        sent_rows,
        sent_slots,
    };
    (route, outgoing)
}

impl Exchange<'_> {
    fn tag(&self, kind: FrameKind, source: usize) -> Tag {
        Tag { kind, source: source as u32, ..self.tag }
    }

    /// Sends one frame to every other member; `make` is asked for each index but the own one.
    fn send(&self, kind: FrameKind, mut make: impl FnMut(usize) -> Vec<Region>) -> Result<(), FabricError> {
        for (index, &rank) in self.group.ranks.iter().enumerate() {
            if index != self.group.own {
                self.endpoint.send(rank, self.tag(kind, self.endpoint.rank()), make(index))?;
            }
        }
        Ok(())
    }

    /// The frame of the member with this index.
    fn receive(&self, kind: FrameKind, index: usize) -> Result<Unpack, FabricError> {
        let tag = self.tag(kind, self.group.ranks[index]);
        Ok(Unpack::new(tag, self.endpoint.receive(tag)?))
    }

    /// Sends each token's row to the ranks that own its experts, and collects what comes.
    ///
    /// **Shapes**: `normed` `[T, D]`; arrivals `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn dispatch(
        &self,
        normed: &Tensor,
        routing: &Routing,
        top_k: usize,
    ) -> Result<(Arrivals, Route), FabricError> {
        let (mut route, mut outgoing) = plan(routing, top_k, self.group);
        let own = std::mem::take(&mut outgoing[self.group.own]);
        if route.is_identity {
            route.received_rows = vec![route.num_tokens];
            route.received_pairs = vec![own.pairs.len()];
            return Ok((Arrivals { rows: normed.clone(), pairs: own.pairs, weights: own.weights }, route));
        }
        self.send(FrameKind::Dispatch, |index| {
            let Outgoing { pairs, weights } = std::mem::take(&mut outgoing[index]);
            let ids = pairs.into_iter().flat_map(|(row, expert)| [row, expert]).collect();
            let rows = permute::gather(normed, &route.sent_rows[index]);
            vec![
                packets::tensor(rows),
                Region::new(Payload::Ids(ids)),
                Region::new(Payload::Weights(weights)),
            ]
        })?;
        let mut own = Some((permute::gather(normed, &route.sent_rows[self.group.own]), own));
        let mut parts = Vec::new();
        let (mut pairs, mut weights, mut num_rows) = (Vec::new(), Vec::new(), 0);
        for index in 0..self.group.ranks.len() {
            let (rows, from) = match own.take_if(|_| index == self.group.own) {
                Some(own) => own,
                None => self.receive_rows(index, normed.cols())?,
            };
            pairs.extend(from.pairs.iter().map(|&(row, expert)| (row + num_rows as u32, expert)));
            weights.extend(from.weights);
            route.received_rows.push(rows.rows());
            route.received_pairs.push(from.pairs.len());
            num_rows += rows.rows();
            parts.push(rows);
        }
        Ok((Arrivals { rows: concatenate(&parts, normed.cols()), pairs, weights }, route))
    }

    fn receive_rows(&self, index: usize, width: usize) -> Result<(Tensor, Outgoing), FabricError> {
        let mut frame = self.receive(FrameKind::Dispatch, index)?;
        let rows = frame.rows(width)?;
        let ids = frame.ids()?;
        let pairs: Vec<(u32, u32)> = ids.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let weights = frame.weights(pairs.len())?;
        Ok((rows, Outgoing { pairs, weights }))
    }

    /// Sends each row's sum back to its token and adds what comes to `home`.
    ///
    /// **Shapes**: `outputs` `[N, D]`, `home` `[T, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn combine(&self, outputs: &Tensor, route: &Route, home: &mut Tensor) -> Result<(), FabricError> {
        self.send_home(FrameKind::Combine, outputs, route, |_| Vec::new())?;
        for index in 0..self.group.ranks.len() {
            if index == self.group.own {
                self.add_own(outputs, route, home);
            } else {
                let rows = self.receive(FrameKind::Combine, index)?.rows(home.cols())?;
                permute::scatter_add(&rows, &route.sent_rows[index], home);
            }
        }
        Ok(())
    }

    /// The backward pass of [`Exchange::combine`]: the gradient of the rows' sums, at the experts.
    ///
    /// **Shapes**: `dy` `[T, D]`, output `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn combine_backward(&self, dy: &Tensor, route: &Route) -> Result<Tensor, FabricError> {
        if route.is_identity {
            return Ok(dy.clone());
        }
        let gathered = |index: usize| permute::gather(dy, &route.sent_rows[index]);
        self.send(FrameKind::CombineGradient, |index| vec![packets::tensor(gathered(index))])?;
        let mut parts = Vec::new();
        for index in 0..self.group.ranks.len() {
            parts.push(if index == self.group.own {
                gathered(index)
            } else {
                self.receive(FrameKind::CombineGradient, index)?.rows(dy.cols())?
            });
        }
        Ok(concatenate(&parts, dy.cols()))
    }

    /// The backward pass of [`Exchange::dispatch`]: the gradients of the tokens' rows and of their routing weights, at home.
    ///
    /// **Shapes**: `d_rows` `[N, D]`, `d_pairs` one per arrived pair; output `[T, D]` and `[T * K]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn dispatch_backward(
        &self,
        d_rows: &Tensor,
        d_pairs: &[f32],
        route: &Route,
    ) -> Result<(Tensor, Vec<f32>), FabricError> {
        let starts = starts_of(&route.received_pairs);
        let pairs_of = |index: usize| &d_pairs[starts[index]..starts[index + 1]];
        self.send_home(FrameKind::DispatchGradient, d_rows, route, |index| {
            vec![Region::new(Payload::Weights(pairs_of(index).to_vec()))]
        })?;
        let mut home = Tensor::zeros(&[route.num_tokens, d_rows.cols()]);
        let mut d_weights = vec![0.0; route.sent_slots.iter().map(Vec::len).sum()];
        for index in 0..self.group.ranks.len() {
            let slots = &route.sent_slots[index];
            let gradients = if index == self.group.own {
                self.add_own(d_rows, route, &mut home);
                pairs_of(index).to_vec()
            } else {
                let mut frame = self.receive(FrameKind::DispatchGradient, index)?;
                permute::scatter_add(&frame.rows(d_rows.cols())?, &route.sent_rows[index], &mut home);
                frame.weights(slots.len())?
            };
            for (&slot, gradient) in slots.iter().zip(gradients) {
                d_weights[slot as usize] = gradient;
            }
        }
        Ok((home, d_weights))
    }

    /// Splits rows by where they came from and sends each share back, followed by `more`.
    fn send_home(
        &self,
        kind: FrameKind,
        rows: &Tensor,
        route: &Route,
        more: impl Fn(usize) -> Vec<Region>,
    ) -> Result<(), FabricError> {
        let starts = starts_of(&route.received_rows);
        self.send(kind, |index| {
            let mut parts = vec![packets::tensor(rows.slice_rows(starts[index]..starts[index + 1]))];
            parts.extend(more(index));
            parts
        })
    }

    fn add_own(&self, rows: &Tensor, route: &Route, home: &mut Tensor) {
        if route.is_identity {
            add_into(home.f32_mut(), rows.f32());
            return;
        }
        let starts = starts_of(&route.received_rows);
        let own = self.group.own;
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

fn concatenate(parts: &[Tensor], width: usize) -> Tensor {
    let mut joined = Tensor::for_overwrite(&[parts.iter().map(Tensor::rows).sum(), width]);
    let mut rest = joined.f32_mut();
    for part in parts {
        let (head, tail) = rest.split_at_mut(part.len());
        head.copy_from_slice(part.f32());
        rest = tail;
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::address::StepId;
    use contraflow_runtime::fabric::{LocalNetwork, LocalOptions, Phase};
    use contraflow_runtime::schedule::Chunk;

    const TOKENS: usize = 5;
    const TOP_K: usize = 2;

    fn routing(rank: usize) -> Routing {
        // Experts 0 and 1 live on rank 0, 2 and 3 on rank 1; token 0 has both of its experts on one rank.
        let mut expert_ids = vec![0, 1, 0, 2, 3, 2, 1, 3, 2, 3];
        expert_ids.rotate_left(2 * rank);
        let weights = (0..TOKENS * TOP_K).map(|slot| slot as f32 + 10.0 * rank as f32).collect();
        Routing { expert_ids, weights, scores: Tensor::zeros(&[TOKENS, 4]) }
    }

    /// Runs one closure per rank on its own thread.
    fn on_both(run: impl Fn(Exchange, usize) + Send + Sync) {
        let network = LocalNetwork::new(LocalOptions::default());
        let endpoints = [network.join(0), network.join(1)];
        std::thread::scope(|scope| {
            for (own, endpoint) in endpoints.iter().enumerate() {
                let run = &run;
                scope.spawn(move || {
                    let group = ExpertGroup { ranks: vec![0, 1], own, experts_per_rank: 2 };
                    let chunk = Chunk { stage: 0, micro_batch: 0 };
                    let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
                    run(Exchange { endpoint, group: &group, tag }, own);
                });
            }
        });
    }

    fn tokens(rank: usize) -> Tensor {
        Tensor::from_vec(&[TOKENS, 1], (0..TOKENS).map(|t| (100 * rank + t) as f32).collect())
    }

    #[test]
    fn a_token_travels_once_to_a_rank_and_comes_back_as_one_sum_per_rank() {
        on_both(|exchange, rank| {
            let x = tokens(rank);
            let choice = routing(rank);
            let (arrivals, route) = exchange.dispatch(&x, &choice, TOP_K).unwrap();
            let copies: usize = route.sent_rows.iter().map(Vec::len).sum();
            let expected: usize =
                choice.expert_ids.chunks(TOP_K).map(|ids| if ids[0] / 2 == ids[1] / 2 { 1 } else { 2 }).sum();
            assert_eq!(copies, expected);
            assert_eq!(arrivals.rows.rows(), route.received_rows.iter().sum::<usize>());
            // Identity experts: every copy comes back, so each token's sum is its value times its number of copies.
            let mut home = Tensor::zeros(&[TOKENS, 1]);
            exchange.combine(&arrivals.rows, &route, &mut home).unwrap();
            for (token, ids) in choice.expert_ids.chunks(TOP_K).enumerate() {
                let copies = if ids[0] / 2 == ids[1] / 2 { 1.0 } else { 2.0 };
                assert_eq!(home.f32()[token], x.f32()[token] * copies);
            }
        });
    }

    #[test]
    fn gradients_go_back_the_way_the_values_came() {
        on_both(|exchange, rank| {
            let x = tokens(rank);
            let choice = routing(rank);
            let (arrivals, route) = exchange.dispatch(&x, &choice, TOP_K).unwrap();
            assert_eq!(exchange.combine_backward(&x, &route).unwrap().f32(), arrivals.rows.f32());
            // Each pair's routing weight sent back as its own gradient must come home to its slot.
            let (home, d_weights) =
                exchange.dispatch_backward(&arrivals.rows, &arrivals.weights, &route).unwrap();
            assert_eq!(d_weights, choice.weights);
            let mut combined = Tensor::zeros(&[TOKENS, 1]);
            let tag = Tag { micro_batch: 1, ..exchange.tag };
            let again = Exchange { tag, ..exchange };
            again.combine(&arrivals.rows, &route, &mut combined).unwrap();
            assert_eq!(home.f32(), combined.f32());
        });
    }
}
