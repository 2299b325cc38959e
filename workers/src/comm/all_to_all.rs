//! The expert all-to-all: dispatch, combine, and their backward passes, which are a combine and a dispatch.
//!
//! One exchange between all ranks of the group; or two, where the group is spread over nodes (section 3.2.2 of the report): a
//! token crosses once to each node that it needs, to the rank of its own place there, which passes it on; on the way back the sums
//! of a node's ranks cross as one. T tokens, K top-k, N rows received, D hidden, P pairs of a row and an expert.
//!
//! Knows routing and rows, nothing of experts' arithmetic.

use contraflow_kernels::dispatch;
use contraflow_kernels::gate::Routing;
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::fabric::{Endpoint, FabricError, Tag};

use super::hop::{Exchange, Hop, HopRoute};
use crate::model::experts::Arrivals;

/// The ranks that share the routed experts, and this rank's place among them.
#[derive(Clone)]
pub struct ExpertGroup {
    /// Among all ranks; or, with a second hop, between the ranks of one place in every node.
    first: Hop,
    /// Inside the node.
    second: Option<Hop>,
}

impl ExpertGroup {
    /// The group of `ranks`, of which the i-th owns the i-th share of the experts; neighbours share one of `nodes` nodes.
    ///
    /// **Errors**: panics unless the nodes divide the ranks.
    pub fn new(ranks: &[usize], own: usize, experts_per_rank: usize, nodes: usize) -> ExpertGroup {
        let per_node = ranks.len() / nodes;
        assert_eq!(per_node * nodes, ranks.len(), "as many ranks on each node");
        if nodes == 1 || per_node == 1 {
            return ExpertGroup { first: Hop { ranks: ranks.to_vec(), own, experts_per_rank }, second: None };
        }
        let (node, place) = (own / per_node, own % per_node);
        let across = ranks.iter().skip(place).step_by(per_node).copied().collect();
        let inside = ranks[node * per_node..][..per_node].to_vec();
        ExpertGroup {
            first: Hop { ranks: across, own: node, experts_per_rank: experts_per_rank * per_node },
            second: Some(Hop { ranks: inside, own: place, experts_per_rank }),
        }
    }
}

/// Which rows went where in a dispatch: what combine and both backward passes go back along.
#[must_use = "a dispatch without its combine loses the tokens' way home"]
pub struct Route {
    first: HopRoute,
    second: Option<HopRoute>,
    /// Experts per token.
    top_k: usize,
}

/// One exchange of one chunk's layer: the fabric, the group, and the address all its frames share.
pub struct AllToAll<'a> {
    /// This rank's end of the fabric.
    pub endpoint: &'a Endpoint,
    /// The expert group.
    pub group: &'a ExpertGroup,
    /// Address of the frames, but for kind, source and hop.
    pub tag: Tag,
}

impl<'a> AllToAll<'a> {
    fn first(&self) -> Exchange<'a> {
        Exchange { endpoint: self.endpoint, hop: &self.group.first, tag: self.tag }
    }

    /// The second hop, if there is one.
    fn second(&self) -> Option<Exchange<'a>> {
        let hop = self.group.second.as_ref()?;
        Some(Exchange { endpoint: self.endpoint, hop, tag: Tag { hop: 1, ..self.tag } })
    }

    /// The second hop and what its dispatch sent where.
    fn passed_on<'r>(&self, route: &'r Route) -> Option<(Exchange<'a>, &'r HopRoute)> {
        self.second().zip(route.second.as_ref())
    }

    /// Sends each token's row to the ranks that own its experts, and collects what comes.
    ///
    /// **Shapes**: `normed` `[T, D]`; arrivals `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn dispatch(&self, normed: &Tensor, routing: &Routing) -> Result<(Arrivals, Route), FabricError> {
        let (arrivals, first) = self.first().dispatch(normed, dispatch::choices_of(routing))?;
        let top_k = routing.expert_ids.cols();
        let Some(second) = self.second() else {
            return Ok((arrivals, Route { first, second: None, top_k }));
        };
        let Arrivals { rows, pairs, weights } = arrivals;
        let (arrivals, second) = second.dispatch(&rows, dispatch::choices_of_pairs(&pairs, &weights))?;
        Ok((arrivals, Route { first, second: Some(second), top_k }))
    }

    /// Sends each row's sum back to its token and adds what comes to `home`.
    ///
    /// **Shapes**: `outputs` `[N, D]`, `home` `[T, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn combine(&self, outputs: &Tensor, route: &Route, home: &mut Tensor) -> Result<(), FabricError> {
        let Some((second, passed_on)) = self.passed_on(route) else {
            return self.first().combine(outputs, &route.first, home);
        };
        let mut sums = Tensor::zeros(&[passed_on.num_rows, outputs.cols()]);
        second.combine(outputs, passed_on, &mut sums)?;
        self.first().combine(&sums.to(outputs.format()), &route.first, home)
    }

    /// The backward pass of [`AllToAll::combine`]: the gradient of the rows' sums, at the experts.
    ///
    /// **Shapes**: `dy` `[T, D]`, output `[N, D]`.
    ///
    /// **Errors**: those of the fabric.
    pub fn combine_backward(&self, dy: &Tensor, route: &Route) -> Result<Tensor, FabricError> {
        let arrived = self.first().combine_backward(dy, &route.first)?;
        match self.passed_on(route) {
            Some((second, passed_on)) => second.combine_backward(&arrived, passed_on),
            None => Ok(arrived),
        }
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
        let (home, d_weights) = match self.passed_on(route) {
            Some((second, passed_on)) => {
                let (sums, d_passed_on) = second.dispatch_backward(d_rows, d_pairs, passed_on)?;
                self.first().dispatch_backward(&sums.to(d_rows.format()), &d_passed_on, &route.first)?
            }
            None => self.first().dispatch_backward(d_rows, d_pairs, &route.first)?,
        };
        let tokens = home.rows();
        Ok((home, d_weights.reshape(&[tokens, route.top_k])))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::comm::address::StepId;
    use crate::comm::packets;
    use contraflow_kernels::host::HostValues;
    use contraflow_runtime::fabric::{FrameKind, LocalNetwork, LocalOptions, Phase};
    use contraflow_runtime::random::SplitMix64;
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
                    let group = ExpertGroup::new(&[0, 1], own, 2, 1);
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
            let copies: usize = route.first.sent_rows.iter().map(Tensor::len).sum();
            let ids: &[u32] = choice.expert_ids.values();
            let expected: usize =
                ids.chunks(TOP_K).map(|ids| if ids[0] / 2 == ids[1] / 2 { 1 } else { 2 }).sum();
            assert_eq!(copies, expected);
            assert_eq!(arrivals.rows.rows(), route.first.received_rows.iter().sum::<usize>());
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
        let group = ExpertGroup::new(&[0, 1], 0, 2, 1);
        let chunk = Chunk { stage: 0, micro_batch: 0 };
        let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
        let all_to_all = AllToAll { endpoint: &endpoint, group: &group, tag };
        if kind != FrameKind::Dispatch {
            let empty =
                [Tensor::zeros(&[0, 1]), Tensor::from_vec::<u32>(&[0, 2], vec![]), Tensor::zeros(&[0])];
            peer.send(0, all_to_all.first().tag(FrameKind::Dispatch, 1), empty.map(packets::tensor).into())
                .unwrap();
        }
        peer.send(0, all_to_all.first().tag(kind, 1), parts.into_iter().map(packets::tensor).collect())
            .unwrap();
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

    /// Ranks of a cluster of nodes: seeded choices of 4 of two experts a rank, rows and weights without a pattern.
    struct Nodes {
        count: usize,
        per_node: usize,
    }

    /// What a rank has of one exchange there and back, forward and backward.
    struct Seen {
        tokens: Tensor,
        routing: Routing,
        home: Tensor,
        d_tokens: Tensor,
        d_weights: Tensor,
        /// Rows as they arrived, and the gradients that arrived for them.
        arrived: [Tensor; 2],
    }

    const WIDTH: usize = 3;
    const CHOICES: usize = 4;

    impl Nodes {
        fn ranks(&self) -> usize {
            self.count * self.per_node
        }

        fn input(&self, rank: usize) -> (Tensor, Routing) {
            let mut random = SplitMix64::new(rank as u64);
            let mut values =
                |count: usize| -> Vec<f32> { (0..count).map(|_| random.next_f64() as f32 - 0.6).collect() };
            let (rows, weights) = (values(TOKENS * WIDTH), values(TOKENS * CHOICES));
            let experts = 2 * self.ranks();
            let ids = (0..TOKENS).flat_map(|_| {
                let mut all: Vec<u32> = (0..experts as u32).collect();
                let mut chosen = Vec::new();
                for _ in 0..CHOICES {
                    chosen.push(all.swap_remove(random.next_u64() as usize % all.len()));
                }
                chosen
            });
            let routing = Routing {
                expert_ids: Tensor::from_vec::<u32>(&[TOKENS, CHOICES], ids.collect()),
                weights: Tensor::from_vec(&[TOKENS, CHOICES], weights),
                scores: Tensor::zeros(&[TOKENS, experts]),
            };
            (Tensor::from_vec(&[TOKENS, WIDTH], rows), routing)
        }

        /// What rank `rank` makes of a row.
        fn factor(rank: usize) -> f32 {
            (rank as f32 + 1.0) / 7.0
        }

        /// One exchange of all ranks, and the bytes of combine's frames between nodes.
        fn run(&self, hops: usize) -> (Vec<Seen>, usize) {
            let network = LocalNetwork::new(LocalOptions { log_frames: true, ..LocalOptions::default() });
            let all: Vec<usize> = (0..self.ranks()).collect();
            let endpoints: Vec<Endpoint> = all.iter().map(|&rank| network.join(rank)).collect();
            let seen = std::thread::scope(|scope| {
                let threads: Vec<_> = endpoints
                    .iter()
                    .enumerate()
                    .map(|(rank, endpoint)| {
                        let nodes = if hops == 2 { self.count } else { 1 };
                        let group = ExpertGroup::new(&all, rank, 2, nodes);
                        scope.spawn(move || {
                            let chunk = Chunk { stage: 0, micro_batch: 0 };
                            let tag = StepId::first(Phase::Train).tag(FrameKind::Dispatch, chunk, 0, 0);
                            self.one_rank(&AllToAll { endpoint, group: &group, tag }, rank)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let node = |rank: usize| rank / self.per_node;
            let across = network.frame_log().into_iter().filter(|frame| {
                frame.tag.kind == FrameKind::Combine && node(frame.tag.source as usize) != node(frame.to)
            });
            (seen, across.map(|frame| frame.bytes).sum())
        }

        fn one_rank(&self, all_to_all: &AllToAll, rank: usize) -> Seen {
            let (tokens, routing) = self.input(rank);
            let (arrivals, route) = all_to_all.dispatch(&tokens, &routing).unwrap();
            let made = |rows: &Tensor| {
                let values = rows.values::<f32>().iter().map(|value| value * Self::factor(rank));
                Tensor::from_vec(rows.shape(), values.collect())
            };
            let mut home = tokens.clone();
            all_to_all.combine(&made(&arrivals.rows), &route, &mut home).unwrap();
            let d_arrived = all_to_all.combine_backward(&tokens, &route).unwrap();
            let (d_tokens, d_weights) =
                all_to_all.dispatch_backward(&made(&d_arrived), &arrivals.weights, &route).unwrap();
            Seen { tokens, routing, home, d_tokens, d_weights, arrived: [arrivals.rows, d_arrived] }
        }

        /// A token's row as often as ranks have experts that it chose, each time what the rank makes of it: summed up over the ranks
        /// of a node, then over the nodes.
        fn sum(&self, row: &[f32], choices: &[u32], from: &[f32]) -> Vec<f32> {
            let mut sum = from.to_vec();
            for node in 0..self.count {
                let mut of_node: Option<Vec<f32>> = None;
                for rank in node * self.per_node..(node + 1) * self.per_node {
                    if choices.iter().any(|&expert| expert as usize / 2 == rank) {
                        let of_node = of_node.get_or_insert_with(|| vec![0.0; WIDTH]);
                        of_node.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * Self::factor(rank));
                    }
                }
                of_node.iter().for_each(|node| sum.iter_mut().zip(node).for_each(|(sum, x)| *sum += x));
            }
            sum
        }
    }

    #[test]
    fn two_hops_add_up_by_node_to_the_bit_and_cross_once_to_each() {
        for (count, per_node) in [(2, 2), (2, 4), (4, 2)] {
            let nodes = Nodes { count, per_node };
            let (seen, bytes) = nodes.run(2);
            let mut crossings = 0;
            for (rank, seen) in seen.iter().enumerate() {
                let tokens: &[f32] = seen.tokens.values();
                let ids: &[u32] = seen.routing.expert_ids.values();
                for (token, (row, ids)) in tokens.chunks(WIDTH).zip(ids.chunks(CHOICES)).enumerate() {
                    let at = token * WIDTH..(token + 1) * WIDTH;
                    assert_eq!(seen.home.values::<f32>()[at.clone()], nodes.sum(row, ids, row));
                    assert_eq!(seen.d_tokens.values::<f32>()[at], nodes.sum(row, ids, &[0.0; WIDTH]));
                    let targets: BTreeSet<usize> = ids.iter().map(|&id| id as usize / 2 / per_node).collect();
                    crossings += targets.iter().filter(|&&node| node != rank / per_node).count();
                }
                assert_eq!(seen.d_weights.values::<f32>(), seen.routing.weights.values::<f32>());
                assert_eq!(seen.arrived[0].values::<f32>(), seen.arrived[1].values::<f32>());
            }
            // A frame names its shape: so much for a frame without a row.
            let frames = nodes.ranks() * (count - 1);
            let empty = packets::tensor(Tensor::zeros(&[0, WIDTH])).len();
            assert_eq!(bytes, frames * empty + crossings * WIDTH * 4, "{count} nodes of {per_node}");
            let (one_hop, more) = nodes.run(1);
            assert!(more > bytes, "{count} nodes of {per_node}: {more} bytes in one hop, {bytes} in two");
            for (two, one) in seen.iter().zip(&one_hop) {
                let sorted = |seen: &Seen| {
                    let rows = seen.arrived[0].values::<f32>().chunks(WIDTH);
                    let mut rows: Vec<_> =
                        rows.map(|row| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect();
                    rows.sort();
                    rows
                };
                assert_eq!(sorted(two), sorted(one), "the same rows arrive");
                // Either way four sums of less than 4, each rounded by half of an epsilon of it.
                let bound = 2.0 * 4.0 * 4.0 * f32::EPSILON / 2.0;
                let near = |a: &Tensor, b: &Tensor| {
                    a.values::<f32>().iter().zip(b.values::<f32>()).all(|(a, b)| (a - b).abs() <= bound)
                };
                assert!(near(&two.home, &one.home) && near(&two.d_tokens, &one.d_tokens));
            }
        }
    }
}
