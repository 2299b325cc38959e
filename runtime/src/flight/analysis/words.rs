//! The analysis in words: rank, operation and why. Knows no records.

use std::fmt;

use super::{Analysis, Doing, OfStep, RankState, Verdict};
use crate::control::text::tidy;

/// More than these are counted.
const LISTED: usize = 8;

/// Length of what is said of an incident. **Units**: bytes.
const INCIDENT: usize = 1_024;

/// `12.3 s`, `4.5 ms`. **Units**: ns.
fn time(ns: u64) -> String {
    match ns {
        0..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

/// `forward of Experts, layer 3, stage 0, micro-batch 2, of step 7`.
fn of_step((work, step): &OfStep) -> String {
    format!("{work}, of step {step}")
}

/// `rank 1 waits`, `ranks 0, 1 and 5 more wait`.
fn who(ranks: &[usize]) -> String {
    let shown: Vec<String> = ranks.iter().take(LISTED).map(usize::to_string).collect();
    let shown = shown.join(", ");
    match ranks.len() {
        1 => format!("rank {shown} waits"),
        0..=LISTED => format!("ranks {shown} wait"),
        more => format!("ranks {shown} and {} more wait", more - LISTED),
    }
}

impl fmt::Display for RankState {
    /// What the rank was about and for how long, as the rest of a sentence that begins with the rank.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = time(self.lasted);
        let after = self.last.as_ref().map_or_else(String::new, |last| format!(", after {}", of_step(last)));
        let (has_been, until) = match self.is_lost {
            true => ("had been", " when it was lost"),
            false => ("has been", ""),
        };
        match &self.doing {
            Doing::Operation(work, step) => {
                write!(f, "{has_been} in {} for {time}{until}", of_step(&(*work, *step)))
            }
            Doing::Storage => {
                write!(f, "{has_been} reading from storage or writing to it for {time}{until}{after}")
            }
            Doing::Waiting(frames) => match frames.as_slice() {
                [] => write!(f, "{has_been} waiting for {time}{until}{after}"),
                [frame] => write!(f, "{has_been} waiting for {frame} for {time}{until}{after}"),
                [frame, more @ ..] => {
                    write!(
                        f,
                        "{has_been} waiting for {frame} and {} more for {time}{until}{after}",
                        more.len()
                    )
                }
            },
            Doing::InFlight(frame) => {
                write!(f, "{has_been} waiting for {frame}, which has sent it, for {time}{until}{after}")
            }
            Doing::Idle => write!(f, "{has_been} between two operations for {time}{until}{after}"),
            Doing::Finished => f.write_str("has done all that it was asked"),
            Doing::Silent => write!(f, "has given no sign of life for {time}{after}"),
            Doing::Unknown(why) => write!(f, "has left no record that can be read ({why})"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::NoRecord => f.write_str("there is no record of what the ranks did"),
            Verdict::Finished => f.write_str("all ranks have done what they were asked"),
            Verdict::Failed(rank, last) => {
                write!(f, "rank {rank} was the first to fail, in {}", of_step(last))
            }
            Verdict::Held(state, waiters) => {
                write!(f, "rank {} {state}", state.rank)?;
                if waiters.is_empty() { Ok(()) } else { write!(f, "; {} for it", who(waiters)) }
            }
            Verdict::Circle(ranks) => {
                let numbers: Vec<usize> = ranks.iter().map(|(rank, _)| *rank).collect();
                write!(f, "{} for each other: ", who(&numbers))?;
                let shown = ranks.iter().take(LISTED);
                let waits = shown.map(|(rank, frame)| format!("rank {rank} for {frame}"));
                f.write_str(&waits.collect::<Vec<_>>().join("; "))
            }
            Verdict::AtWork(state) => {
                write!(f, "no rank waits for another one; rank {} {state}", state.rank)
            }
        }
    }
}

impl fmt::Display for Analysis {
    /// The verdict in one sentence.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.verdict.fmt(f)
    }
}

impl Analysis {
    /// What is said of a formation that was lost: the verdict, and what the first of those waits for who wait for that rank. At most 1 KiB
    /// without control characters; nothing where no rank holds anything up.
    pub fn incident(&self) -> Option<String> {
        let frame = |of: usize, by: usize| self.ranks.get(by)?.peers().find(|(peer, _)| *peer == of);
        let mut words = match &self.verdict {
            Verdict::NoRecord | Verdict::Finished => return None,
            Verdict::AtWork(state) if matches!(state.doing, Doing::Idle | Doing::Unknown(_)) => return None,
            Verdict::Held(state, waiters) => {
                let first = waiters.iter().find_map(|&by| Some((by, frame(state.rank, by)?.1)));
                let what = first.map(|(by, frame)| format!(": rank {by} for {frame}"));
                format!("{}{}", self.verdict, what.unwrap_or_default())
            }
            Verdict::Failed(..) | Verdict::Circle(_) | Verdict::AtWork(_) => self.verdict.to_string(),
        };
        tidy(&mut words, INCIDENT);
        Some(words)
    }
}
