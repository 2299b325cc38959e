//! The expert all-to-all: dispatch, combine, and their backward passes, which are a combine and a dispatch.
//!
//! A token goes once to a rank even if several of its experts live there; each rank sends back one sum per row. Every peer
//! gets exactly one frame per exchange, empty if there is nothing for it. Sums run in the order of the ranks, never of
//! arrival. T tokens, K top-k, N rows received, D hidden.
//!
//! Knows routing and rows, nothing of experts' arithmetic.

use contraflow_kernels::dispatch::{self, Share};
use contraflow_kernels::elementwise::add_into;
use contraflow_kernels::gate::Routing;
use contraflow_kernels::permute;
use contraflow_kernels::tensor::{Format, Tensor};
use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Region, Tag};

use super::packets::{self, Unpack};
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
    /// Experts per token.
    top_k: usize,
    /// Per destination, the token rows that went there, ascending.
    sent_rows: Vec<Tensor>,
    /// Per destination, the flat (token, k) slot of each pair that went there.
    sent_slots: Vec<Tensor>,
    /// Per source, the number of rows that came.
    received_rows: Vec<usize>,
    /// Per source, the number of pairs that came.
    received_pairs: Vec<usize>,
    /// Every token of this rank stays on it, and nothing comes from elsewhere: rows need no copy.
    is_identity: bool,
}

/// One exchange of one chunk's layer: the fabric, the group, and the address all its frames share.
pub struct AllToAll<'a> {
    /// This rank's end of the fabric.
    pub endpoint: &'a Endpoint,
    /// The expert group.
    pub group: &'a ExpertGroup,
    /// Address of the frames, but for kind and source.
    pub tag: Tag,
}

impl AllToAll<'_> {
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
    pub fn dispatch(&self, normed: &Tensor, routing: &Routing) -> Result<(Arrivals, Route), FabricError> {
        let ExpertGroup { ref ranks, own, experts_per_rank } = *self.group;
        let shares = dispatch::by_owner(routing, ranks.len(), experts_per_rank);
        let (num_tokens, top_k) = (routing.expert_ids.rows(), routing.expert_ids.cols());
        let mut route = Route {
            num_tokens,
            top_k,
            received_rows: Vec::new(),
            received_pairs: Vec::new(),
            is_identity: ranks.len() == 1 && shares[0].rows.len() == num_tokens,
            sent_rows: shares.iter().map(|share| share.rows.clone()).collect(),
            sent_slots: shares.iter().map(|share| share.slots.clone()).collect(),
        };
        if route.is_identity {
            let Share { pairs, weights, .. } = shares[0].clone();
            route.received_rows = vec![num_tokens];
            route.received_pairs = vec![pairs.rows()];
            return Ok((Arrivals { rows: normed.clone(), pairs, weights }, route));
        }
        self.send(FrameKind::Dispatch, |index| {
            let Share { rows, pairs, weights, .. } = &shares[index];
            let rows = permute::gather(normed, rows);
            [rows, pairs.clone(), weights.clone()].map(packets::tensor).into()
        })?;
        let mut parts: [Vec<Tensor>; 3] = Default::default();
        let mut num_rows = 0;
        for (index, share) in shares.into_iter().enumerate() {
            let Arrivals { rows, mut pairs, weights } = if index == own {
                let rows = permute::gather(normed, &share.rows);
                Arrivals { rows, pairs: share.pairs, weights: share.weights }
            } else {
                self.receive_rows(index, normed)?
            };
            dispatch::shift_rows(&mut pairs, num_rows);
            route.received_rows.push(rows.rows());
            route.received_pairs.push(pairs.rows());
            num_rows += rows.rows();
            parts.iter_mut().zip([rows, pairs, weights]).for_each(|(list, part)| list.push(part));
        }
        let [rows, pairs, weights] = parts.map(|parts| Tensor::concat_rows(&parts));
        Ok((Arrivals { rows, pairs, weights }, route))
    }

    fn receive_rows(&self, index: usize, like: &Tensor) -> Result<Arrivals, FabricError> {
        let mut frame = self.receive(FrameKind::Dispatch, index)?;
        let rows = frame.rows(like.cols(), like.format())?;
        let pairs = frame.pairs(rows.rows(), self.group.experts_per_rank)?;
        let weights = frame.flat(pairs.rows())?;
        Ok(Arrivals { rows, pairs, weights })
    }

    /// Sends each row's sum back to its token and adds what comes to `home`.
    ///
    /// **Shapes**: `outputs` `[N, D]`, `home` `[T, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn combine(&self, outputs: &Tensor, route: &Route, home: &mut Tensor) -> Result<(), FabricError> {
        self.send_home(FrameKind::Combine, outputs, route, |_| Vec::new())?;
        // Summed up in F32 and rounded once, however many ranks there are.
        let before = std::mem::replace(home, Tensor::zeros(&[0]));
        let (mut sums, format) = (before.to(Format::F32), before.format());
        drop(before);
        for index in 0..self.group.ranks.len() {
            if index == self.group.own {
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

    /// The backward pass of [`AllToAll::combine`]: the gradient of the rows' sums, at the experts.
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
                let num_rows = route.received_rows[index];
                self.receive(FrameKind::CombineGradient, index)?.all_rows(num_rows, dy)?
            });
        }
        Ok(Tensor::concat_rows(&parts))
    }

    /// The backward pass of [`AllToAll::dispatch`]: the gradients of the tokens' rows and of their routing weights, at home.
    ///
    /// **Shapes**: `d_rows` `[N, D]`, `d_pairs` `[P]`, one per arrived pair; output `[T, D]` and `[T, K]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn dispatch_backward(
        &self,
        d_rows: &Tensor,
        d_pairs: &Tensor,
        route: &Route,
    ) -> Result<(Tensor, Tensor), FabricError> {
        let starts = starts_of(&route.received_pairs);
        let pairs_of = |index: usize| Tensor::from(d_pairs.view(starts[index]..starts[index + 1]));
        self.send_home(FrameKind::DispatchGradient, d_rows, route, |index| {
            vec![packets::tensor(pairs_of(index))]
        })?;
        let mut home = Tensor::zeros(&[route.num_tokens, d_rows.cols()]);
        let mut d_weights = Tensor::zeros(&[route.num_tokens * route.top_k]);
        for index in 0..self.group.ranks.len() {
            let slots = &route.sent_slots[index];
            let gradients = if index == self.group.own {
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
        Ok((home, d_weights.reshape(&[route.num_tokens, route.top_k])))
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
            add_into(home, rows);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::comm::address::StepId;
    use contraflow_kernels::host::HostValues;
    use contraflow_runtime::fabric::{LocalNetwork, LocalOptions, Phase};
    use contraflow_runtime::schedule::Chunk;

    const TOKENS: usize = 5;
    const TOP_K: usize = 2;

    fn routing(rank: usize) -> Routing {
        // Experts 0 and 1 live on rank 0, 2 and 3 on rank 1; token 0 has both of its experts on one rank.
        let mut expert_ids = vec![0, 1, 0, 2, 3, 2, 1, 3, 2, 3];
        expert_ids.rotate_left(2 * rank);
        let weights = (0..TOKENS * TOP_K).map(|slot| slot as f32 + 10.0 * rank as f32).collect();
        Routing {
            expert_ids: Tensor::from_vec::<u32>(&[TOKENS, TOP_K], expert_ids),
            weights: Tensor::from_vec(&[TOKENS, TOP_K], weights),
            scores: Tensor::zeros(&[TOKENS, 4]),
        }
    }

    /// Runs one closure per rank on its own thread.
    fn on_both(run: impl Fn(AllToAll, usize) + Send + Sync) {
        let network = LocalNetwork::new(LocalOptions::default());
        let endpoints = [network.join(0), network.join(1)];
        std::thread::scope(|scope| {
            for (own, endpoint) in endpoints.iter().enumerate() {
                let run = &run;
                scope.spawn(move || {
                    let group = ExpertGroup { ranks: vec![0, 1], own, experts_per_rank: 2 };
                    let chunk = Chunk { stage: 0, micro_batch: 0 };
                    let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
                    run(AllToAll { endpoint, group: &group, tag }, own);
                });
            }
        });
    }

    fn tokens(rank: usize) -> Tensor {
        Tensor::from_vec(&[TOKENS, 1], (0..TOKENS).map(|t| (100 * rank + t) as f32).collect())
    }

    #[test]
    fn a_token_travels_once_to_a_rank_and_comes_back_as_one_sum_per_rank() {
        on_both(|all_to_all, rank| {
            let x = tokens(rank);
            let choice = routing(rank);
            let (arrivals, route) = all_to_all.dispatch(&x, &choice).unwrap();
            let copies: usize = route.sent_rows.iter().map(Tensor::len).sum();
            let ids: &[u32] = choice.expert_ids.values();
            let expected: usize =
                ids.chunks(TOP_K).map(|ids| if ids[0] / 2 == ids[1] / 2 { 1 } else { 2 }).sum();
            assert_eq!(copies, expected);
            assert_eq!(arrivals.rows.rows(), route.received_rows.iter().sum::<usize>());
            // Identity experts: every copy comes back, so each token's sum is its value times its number of copies.
            let mut home = Tensor::zeros(&[TOKENS, 1]);
            all_to_all.combine(&arrivals.rows, &route, &mut home).unwrap();
            for (token, ids) in ids.chunks(TOP_K).enumerate() {
                let copies = if ids[0] / 2 == ids[1] / 2 { 1.0 } else { 2.0 };
                assert_eq!(home.values::<f32>()[token], x.values::<f32>()[token] * copies);
            }
        });
    }

    #[test]
    fn gradients_go_back_the_way_the_values_came() {
        on_both(|all_to_all, rank| {
            let x = tokens(rank);
            let choice = routing(rank);
            let (arrivals, route) = all_to_all.dispatch(&x, &choice).unwrap();
            assert_eq!(
                all_to_all.combine_backward(&x, &route).unwrap().values::<f32>(),
                arrivals.rows.values::<f32>()
            );
            // Each pair's routing weight sent back as its own gradient must come home to its slot.
            let (home, d_weights) =
                all_to_all.dispatch_backward(&arrivals.rows, &arrivals.weights, &route).unwrap();
            assert_eq!(d_weights.shape(), [TOKENS, TOP_K]);
            assert_eq!(d_weights.values::<f32>(), choice.weights.values::<f32>());
            let mut combined = Tensor::zeros(&[TOKENS, 1]);
            let tag = Tag { micro_batch: 1, ..all_to_all.tag };
            let again = AllToAll { tag, ..all_to_all };
            again.combine(&arrivals.rows, &route, &mut combined).unwrap();
            assert_eq!(home.values::<f32>(), combined.values::<f32>());
        });
    }

    /// What rank 0 says to a frame of rank 1 that holds `parts`, where one of rank 0's tokens goes to rank 1 and back.
    fn refused(kind: FrameKind, parts: Vec<Tensor>) -> String {
        let timeout = Duration::from_secs(5);
        let network = LocalNetwork::new(LocalOptions { timeout, ..LocalOptions::default() });
        let [endpoint, peer] = [network.join(0), network.join(1)];
        let group = ExpertGroup { ranks: vec![0, 1], own: 0, experts_per_rank: 2 };
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
        let all_to_all = AllToAll { endpoint: &endpoint, group: &group, tag };
        if kind != FrameKind::Dispatch {
            let empty =
                [Tensor::zeros(&[0, 1]), Tensor::from_vec::<u32>(&[0, 2], vec![]), Tensor::zeros(&[0])];
            peer.send(0, all_to_all.tag(FrameKind::Dispatch, 1), empty.map(packets::tensor).into()).unwrap();
        }
        peer.send(0, all_to_all.tag(kind, 1), parts.into_iter().map(packets::tensor).collect()).unwrap();
        let run = || {
            let (arrivals, route) = all_to_all.dispatch(&tokens(0), &routing(0))?;
            match kind {
                FrameKind::Combine => all_to_all.combine(&arrivals.rows, &route, &mut tokens(0)),
                FrameKind::CombineGradient => all_to_all.combine_backward(&tokens(0), &route).map(drop),
                _ => all_to_all.dispatch_backward(&arrivals.rows, &arrivals.weights, &route).map(drop),
            }
        };
        match run() {
            Err(error @ FabricError::Content { .. }) => error.to_string(),
            other => panic!("{kind:?}: {other:?}"),
        }
    }

    #[test]
    fn a_frame_that_does_not_fit_what_was_sent_is_refused() {
        let pairs = |pair: [u32; 2]| Tensor::from_vec(&[1, 2], pair.to_vec());
        for pair in [[2, 0], [0, 2], [u32::MAX, 0]] {
            let parts = vec![Tensor::zeros(&[2, 1]), pairs(pair), Tensor::zeros(&[1])];
            let error = refused(FrameKind::Dispatch, parts);
            assert!(error.ends_with("expected pairs of 2 rows and 2 experts, got others among 1"), "{error}");
        }
        let rows = |num_rows: usize| vec![Tensor::zeros(&[num_rows, 1])];
        let error = refused(FrameKind::Combine, rows(3));
        assert!(error.ends_with("expected 4 rows of width 1, got a tensor F32[3, 1]"), "{error}");
        let error = refused(FrameKind::CombineGradient, rows(1));
        assert!(error.ends_with("expected 0 rows of width 1, got a tensor F32[1, 1]"), "{error}");
        let error = refused(FrameKind::DispatchGradient, rows(5));
        assert!(error.ends_with("expected 4 rows of width 1, got a tensor F32[5, 1]"), "{error}");
    }
}
