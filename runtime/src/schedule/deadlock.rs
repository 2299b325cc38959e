//! The report of a deadlock: every lane that is stuck, and what it waits for.

use std::fmt;

use serde::Serialize;

use super::program::{Lane, OpId, Work};

/// What the head of a lane waits for in vain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum WaitsFor {
    /// An operation of the same rank.
    Own(OpId),
    /// An operation of another rank: the other end of a transfer.
    Peer {
        /// The other rank.
        rank: usize,
        /// Its operation.
        op: OpId,
    },
    /// The other end of a transfer that no program contains.
    Nobody,
    /// The other members of a collective: the pipeline ranks that have not come to it, or never do.
    Members(Vec<usize>),
}

/// The head of a lane that never moved on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stuck {
    /// Pipeline rank.
    pub rank: usize,
    /// Which lane.
    pub lane: Lane,
    /// The operation at its head.
    pub op: OpId,
    /// What that operation does.
    pub work: Work,
    /// Index of the action it belongs to, if it belongs to one.
    pub action: Option<usize>,
    /// What it waits for.
    pub waits_for: WaitsFor,
}

/// The programs come to a halt: every lane that has not reached its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Deadlock {
    /// By rank and lane.
    pub stuck: Vec<Stuck>,
}

/// `rank 1` or `ranks 1, 2`.
pub(super) fn list_ranks(ranks: &[usize]) -> String {
    let numbers: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waits for ", self.work)?;
        match &self.waits_for {
            WaitsFor::Own(op) => write!(f, "its own operation {op}"),
            WaitsFor::Peer { rank, op } => write!(f, "operation {op} of rank {rank}"),
            WaitsFor::Nobody => f.write_str("a peer that never comes"),
            WaitsFor::Members(ranks) => f.write_str(&list_ranks(ranks)),
        }
    }
}

impl fmt::Display for Deadlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("deadlock")?;
        for stuck in &self.stuck {
            let action = stuck.action.map_or_else(|| "update".into(), |action| format!("action {action}"));
            write!(f, "\n  rank {}, {:?} lane, {action}: {stuck}", stuck.rank, stuck.lane)?;
        }
        Ok(())
    }
}

impl std::error::Error for Deadlock {}
