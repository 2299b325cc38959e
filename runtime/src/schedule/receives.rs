//! Puts the receives into programs that have their sends.
//!
//! Rules it keeps (`check` proves the first one):
//! - on lane `Receive(q)` of rank `r` the operations stand in the order of lane `Send(r)` of rank `q`, so that the
//!   k-th send matches the k-th receive on transports without tags;
//! - a receive is issued one receiving action ahead of its use, so that it is posted before it is needed, and at most
//!   the receives of two actions are open (more only where the sender's order demands it);
//! - it carries the index of the action that uses it.

use std::collections::HashMap;

use super::lower::DraftOp;
use super::messages::Product;
use super::program::{Lane, Op, OpId, Program, Work};

/// The programs of all ranks, receives included.
pub(super) fn insert(drafts: Vec<Vec<DraftOp>>) -> Vec<Program> {
    let incoming = incoming(&drafts);
    drafts.into_iter().zip(&incoming).map(|(draft, incoming)| insert_receives(draft, incoming)).collect()
}

/// What a rank's peers send it.
#[derive(Default)]
struct Incoming {
    /// By peer, in the peer's order.
    lanes: HashMap<usize, Vec<Product>>,
    /// Where in those lists a product is; more than once only if a faulty plan makes it more than once.
    places: HashMap<Product, Vec<(usize, usize)>>,
}

fn incoming(drafts: &[Vec<DraftOp>]) -> Vec<Incoming> {
    let mut all: Vec<Incoming> = drafts.iter().map(|_| Incoming::default()).collect();
    for (from, draft) in drafts.iter().enumerate() {
        for op in draft {
            if let (Lane::Send(to), Work::Send { kind, chunk }) = (op.lane, op.work) {
                let product = Product { kind, chunk };
                let lane = all[to].lanes.entry(from).or_default();
                lane.push(product);
                let place = (from, lane.len() - 1);
                all[to].places.entry(product).or_default().push(place);
            }
        }
    }
    all
}

/// Puts the receives in and numbers all operations.
fn insert_receives(draft: Vec<DraftOp>, incoming: &Incoming) -> Program {
    let receiving = receiving_actions(&draft, incoming);
    let mut placer = Placer::new(incoming, &receiving);
    let mut upcoming = receiving.iter();
    if let Some(first) = upcoming.next() {
        placer.post(first);
    }
    let mut begun = receiving.iter().peekable();
    let mut numbers: Vec<OpId> = Vec::with_capacity(draft.len());
    for op in draft {
        if begun.next_if(|(action, _)| *action == op.action).is_some()
            && let Some(next) = upcoming.next()
        {
            placer.post(next);
        }
        let mut after: Vec<OpId> = op.after.iter().map(|&earlier| numbers[earlier]).collect();
        after.extend(op.needs.iter().filter_map(|need| placer.received.get(need)).flatten());
        after.sort_unstable();
        numbers.push(placer.ops.len());
        placer.ops.push(Op { lane: op.lane, work: op.work, after, action: Some(op.action) });
    }
    Program::of(placer.ops)
}

/// The actions that need something from a peer, in order, and what.
fn receiving_actions(draft: &[DraftOp], incoming: &Incoming) -> Vec<(usize, Vec<Product>)> {
    let mut actions: Vec<(usize, Vec<Product>)> = Vec::new();
    for op in draft {
        let products = op.needs.iter().copied().filter(|need| incoming.places.contains_key(need));
        match actions.last_mut() {
            Some((action, known)) if *action == op.action => known.extend(products),
            _ => {
                let products: Vec<Product> = products.collect();
                if !products.is_empty() {
                    actions.push((op.action, products));
                }
            }
        }
    }
    actions
}

/// A program in the making and how far each receive lane has been posted.
struct Placer<'a> {
    incoming: &'a Incoming,
    consumers: HashMap<Product, usize>,
    posted: HashMap<usize, usize>,
    received: HashMap<Product, Vec<OpId>>,
    ops: Vec<Op>,
}

impl<'a> Placer<'a> {
    fn new(incoming: &'a Incoming, receiving: &[(usize, Vec<Product>)]) -> Placer<'a> {
        let mut consumers = HashMap::new();
        for (action, products) in receiving {
            for &product in products {
                consumers.entry(product).or_insert(*action);
            }
        }
        Placer { incoming, consumers, posted: HashMap::new(), received: HashMap::new(), ops: Vec::new() }
    }

    /// Issues the receives of these products, and before them whatever their sender sends earlier.
    fn post(&mut self, (receiving, products): &(usize, Vec<Product>)) {
        for &(peer, position) in products.iter().flat_map(|product| &self.incoming.places[product]) {
            let posted = self.posted.entry(peer).or_default();
            for &product in self.incoming.lanes[&peer].iter().take(position + 1).skip(*posted) {
                let Product { kind, chunk } = product;
                let action = self.consumers.get(&product).copied().unwrap_or(*receiving);
                self.received.entry(product).or_default().push(self.ops.len());
                let (lane, work) = (Lane::Receive(peer), Work::Receive { kind, chunk });
                self.ops.push(Op { lane, work, after: Vec::new(), action: Some(action) });
            }
            *posted = (*posted).max(position + 1);
        }
    }
}
