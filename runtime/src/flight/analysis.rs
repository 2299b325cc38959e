//! What the rings of all ranks say together: what each rank was about at the end, which waited for which, and the first that
//! waited for nobody. A pure function; knows no file and no clock.

mod words;

use std::collections::{BTreeMap, BTreeSet};

use super::record::{Event, Frame};
use super::ring::{Ring, Unreadable};
use super::{CLOCK_SKEW, RankRing};
use crate::fabric::Phase;
use crate::schedule::Work;

/// Who is behind all others by as much is gone: a process says each second that it is alive. **Units**: ns.
const SILENT: u64 = 5_000_000_000;

/// The same where the ranks are on several machines, whose clocks differ: only what is more than that can be silence. **Units**: ns.
const SILENT_ELSEWHERE: u64 = CLOCK_SKEW.as_nanos() as u64;

/// What lasts less is no hang, whatever it is. **Units**: ns.
const HANG: u64 = 10_000_000_000;

/// How many times longer than anything that ended something has to last to be one.
const HANG_FACTOR: u64 = 10;

/// No formation has more ranks. A header that says so is believed no further.
const MAX_RANKS: usize = 1 << 16;

/// An operation, and the step it belongs to.
pub type OfStep = (Work, u64);

/// What a rank was about at the end of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doing {
    /// In an operation that needs no other rank; of several, in the one that began first.
    Operation(Work, u64),
    /// Reading from storage, or writing to it.
    Storage,
    /// Waiting for frames of other ranks, for the first of them the longest.
    Waiting(Vec<Frame>),
    /// Waiting for a frame that the other rank has sent: whoever carries it holds this rank up, and not its peer.
    InFlight(Frame),
    /// Between two operations.
    Idle,
    /// Nothing: it has done all that it was asked.
    Finished,
    /// Nothing that anybody knows: its process ended before those of the others.
    Silent,
    /// It has left no record that can be read.
    Unknown(String),
}

/// A rank at the end of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankState {
    /// The rank.
    pub rank: usize,
    /// What it was about.
    pub doing: Doing,
    /// For how long. **Units**: ns.
    pub lasted: u64,
    /// The operation that it ended last.
    pub last: Option<OfStep>,
    /// Records that are torn or damaged.
    pub unreadable: usize,
    /// Whether it is known from elsewhere that its process was lost: that is what it was about until then.
    pub is_lost: bool,
}

/// Why there is no progress, if there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is recorded.
    NoRecord,
    /// Every rank has done what it was asked.
    Finished,
    /// An operation of a rank failed before any other did.
    Failed(usize, OfStep),
    /// The first divergent rank: it waits for nobody, and these wait for it, directly or through others.
    Held(RankState, Vec<usize>),
    /// Each waits for the next one, the last for the first.
    Circle(Vec<(usize, Frame)>),
    /// No rank waits for another one. The one that has been about the same for the longest.
    AtWork(RankState),
}

/// What the rings say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Analysis {
    /// By rank.
    pub ranks: Vec<RankState>,
    /// See [`Verdict`].
    pub verdict: Verdict,
    /// What took the longest of all that ended. **Units**: ns.
    pub longest: u64,
    /// The end of the record. **Units**: ns since 1970.
    pub ended: u64,
}

impl Analysis {
    /// Of the rings of a formation on one machine, by rank. `now`, in ns since 1970, where its processes are alive; else all ends with
    /// the last sign of life.
    pub fn of(rings: &[RankRing], now: Option<u64>) -> Analysis {
        Analysis::knowing(rings, now, Some(SILENT), None)
    }

    /// The same of a job, whose ranks may be on several machines: their clocks, and that of `now`, may differ by [`CLOCK_SKEW`].
    pub fn of_job(rings: &[RankRing], now: Option<u64>) -> Analysis {
        Analysis::knowing(rings, now, Some(SILENT_ELSEWHERE), None)
    }

    /// The same where it is known which ranks were lost. The others were there to the end, whatever the clocks of their machines say.
    pub fn after_loss(rings: &[RankRing], lost: &BTreeSet<usize>) -> Analysis {
        Analysis::knowing(rings, None, None, Some(lost))
    }

    /// `silent`: who is behind by more is gone; none where no clock says who is.
    fn knowing(
        rings: &[RankRing],
        now: Option<u64>,
        silent: Option<u64>,
        lost: Option<&BTreeSet<usize>>,
    ) -> Analysis {
        let readable = || rings.iter().filter_map(|(rank, ring)| Some((*rank, ring.as_ref().ok()?)));
        let ended = readable().map(|(_, ring)| last_sign(ring)).max().unwrap_or_default();
        let ended = now.map_or(ended, |now| now.max(ended));
        let newest = readable().map(|(_, ring)| ring).max_by_key(|ring| ring.header.began);
        let Some(newest) = newest else {
            let ranks = rings.iter().map(|(rank, ring)| RankState::unknown(*rank, why(ring.as_ref().err())));
            return Analysis { ranks: ranks.collect(), verdict: Verdict::NoRecord, longest: 0, ended };
        };
        let formation = |ring: &Ring| (ring.header.job, ring.header.generation);
        let by_rank: BTreeMap<usize, &Result<Ring, Unreadable>> =
            rings.iter().map(|(rank, ring)| (*rank, ring)).collect();
        let highest = by_rank.keys().last().map_or(0, |rank| rank + 1);
        let world = highest.max(newest.header.world as usize).min(MAX_RANKS);
        // What a rank awaits from another one, as that one has recorded it.
        let is_sent = |to: usize, frame: &Frame| {
            let ring = by_rank.get(&(frame.peer as usize)).and_then(|ring| ring.as_ref().ok());
            let sent = |event| matches!(event, Event::Sent(sent) if sent.peer as usize == to && Frame { peer: frame.peer, ..sent } == *frame);
            ring.is_some_and(|ring| {
                formation(ring) == formation(newest) && ring.records.iter().any(|record| sent(record.event))
            })
        };
        let mut tracks = Vec::new();
        for rank in 0..world {
            let mut track = match by_rank.get(&rank) {
                None => Track::unknown(rank, why(None)),
                Some(Err(fault)) => Track::unknown(rank, why(Some(fault))),
                Some(Ok(ring)) if ring.header.rank as usize != rank => {
                    Track::unknown(rank, format!("its file is of rank {}", ring.header.rank))
                }
                Some(Ok(ring)) if formation(ring) != formation(newest) => {
                    Track::unknown(rank, "its file is of another formation".into())
                }
                Some(Ok(ring)) if ring.records.is_empty() && ring.alive == 0 => {
                    Track::unknown(rank, "nothing was recorded".into())
                }
                Some(Ok(ring)) => Track::of(rank, ring, (ended, silent), |frame| is_sent(rank, frame)),
            };
            track.state.is_lost = lost.is_some_and(|lost| lost.contains(&rank));
            tracks.push(track);
        }
        let verdict = verdict(&tracks);
        let longest = tracks.iter().map(|track| track.longest).max().unwrap_or_default();
        Analysis { ranks: tracks.into_iter().map(|track| track.state).collect(), verdict, longest, ended }
    }

    /// Whether something lasts so long that it is no step of training any more: longer than ten seconds, and than ten times
    /// whatever ended.
    pub fn is_stuck(&self) -> bool {
        let least = HANG.max(self.longest.saturating_mul(HANG_FACTOR));
        match &self.verdict {
            Verdict::Held(state, _) => {
                state.is_lost || matches!(state.doing, Doing::Silent) || state.lasted > least
            }
            Verdict::Circle(ranks) => {
                ranks.iter().all(|(rank, _)| self.ranks.get(*rank).is_some_and(|state| state.lasted > least))
            }
            Verdict::AtWork(state) => state.lasted > least,
            Verdict::NoRecord | Verdict::Finished | Verdict::Failed(..) => false,
        }
    }
}

fn why(fault: Option<&Unreadable>) -> String {
    fault.map_or_else(|| "its file is missing".into(), Unreadable::to_string)
}

/// When a ring last says that its process is alive. **Units**: ns since 1970.
fn last_sign(ring: &Ring) -> u64 {
    let recorded = ring.records.iter().map(|record| record.at).max().unwrap_or_default();
    ring.header.began.saturating_add(ring.alive.max(recorded))
}

/// A thread of a rank.
#[derive(Default)]
struct Lane {
    /// What it is in, and since when.
    work: Option<(OfStep, u64)>,
    /// What it waits for, and since when.
    awaited: Option<(Frame, u64)>,
}

/// A rank, as its ring shows it.
struct Track {
    state: RankState,
    /// The operation that failed of itself, and when. **Units**: ns since 1970.
    failed: Option<(u64, OfStep)>,
    /// **Units**: ns.
    longest: u64,
}

impl RankState {
    fn unknown(rank: usize, why: String) -> RankState {
        RankState { rank, doing: Doing::Unknown(why), lasted: 0, last: None, unreadable: 0, is_lost: false }
    }

    /// The ranks that it waits for, those that it has waited for the longest first.
    fn peers(&self) -> impl Iterator<Item = (usize, Frame)> {
        let frames = match &self.doing {
            // Who is gone waits for nobody any more.
            Doing::Waiting(frames) if !self.is_lost => frames.as_slice(),
            _ => &[],
        };
        frames.iter().map(|frame| (frame.peer as usize, *frame))
    }

    fn is_waiting(&self) -> bool {
        !self.is_lost && matches!(self.doing, Doing::Waiting(_))
    }

    fn is_gone(&self) -> bool {
        self.is_lost || matches!(self.doing, Doing::Silent | Doing::Unknown(_))
    }
}

impl Track {
    fn unknown(rank: usize, why: String) -> Track {
        Track { state: RankState::unknown(rank, why), failed: None, longest: 0 }
    }

    /// `silent`: a rank whose last sign is older at the end is gone.
    fn of(
        rank: usize,
        ring: &Ring,
        (ended, silent): (u64, Option<u64>),
        is_sent: impl Fn(&Frame) -> bool,
    ) -> Track {
        let wall = |at: u64| ring.header.began.saturating_add(at);
        let mut lanes: BTreeMap<u16, Lane> = BTreeMap::new();
        let (mut last, mut failed, mut longest, mut is_finished) = (None, None, 0, false);
        // Any thread may end what another one has begun.
        let mut storage: Vec<u64> = Vec::new();
        for record in &ring.records {
            let lane = lanes.entry(record.lane).or_default();
            match record.event {
                Event::Began(work, step) => {
                    *lane = Lane { work: Some(((work, step), record.at)), awaited: None }
                }
                Event::Ended(work, step) => {
                    if let Some((_, began)) = lane.work {
                        longest = longest.max(record.at.saturating_sub(began));
                    }
                    *lane = Lane::default();
                    last = Some((work, step));
                }
                Event::Failed(work, step) => {
                    *lane = Lane::default();
                    failed = failed.or(Some((wall(record.at), (work, step))));
                }
                Event::Sent(_) => {}
                Event::Awaited(frame) => lane.awaited = Some((frame, record.at)),
                Event::Received(_) => lane.awaited = None,
                Event::StorageBegan => storage.push(record.at),
                Event::StorageEnded => {
                    if !storage.is_empty() {
                        storage.remove(0);
                    }
                }
                Event::Finished => is_finished = true,
            }
        }
        let (doing, since) = doing(lanes.values(), storage.first().copied(), is_sent);
        let recorded = ring.records.last().map_or(0, |record| record.at);
        let sign = last_sign(ring);
        let (doing, since) = match doing {
            _ if is_finished => (Doing::Finished, wall(recorded)),
            _ if silent.is_some_and(|silent| sign.saturating_add(silent) < ended) => (Doing::Silent, sign),
            doing => (doing, wall(since.unwrap_or(recorded))),
        };
        let lasted = ended.saturating_sub(since);
        let state = RankState { rank, doing, lasted, last, unreadable: ring.unreadable, is_lost: false };
        Track { state, failed, longest }
    }
}

/// What a rank is about, by what its threads are, and since when.
fn doing<'a>(
    lanes: impl Iterator<Item = &'a Lane> + Clone,
    storage: Option<u64>,
    is_sent: impl Fn(&Frame) -> bool,
) -> (Doing, Option<u64>) {
    // That operation waits for what the replicator does, whose waits are no part of a step otherwise.
    let is_replica = |lane: &&Lane| matches!(lane.work, Some(((Work::AwaitReplica, _), _)));
    let awaits_replica = lanes.clone().any(|lane| is_replica(&lane));
    let works = lanes.clone().filter(|lane| lane.awaited.is_none() && !is_replica(lane));
    let oldest = works.filter_map(|lane| lane.work).min_by_key(|(_, at)| *at);
    if let Some(((work, step), at)) = oldest {
        return (Doing::Operation(work, step), Some(at));
    }
    if let Some(at) = storage {
        return (Doing::Storage, Some(at));
    }
    let counts = |(frame, _): &(Frame, u64)| awaits_replica || frame.phase != Phase::Replicate;
    let mut waits: Vec<(Frame, u64)> = lanes.filter_map(|lane| lane.awaited).filter(counts).collect();
    waits.sort_by_key(|(_, at)| *at);
    if let Some(&(frame, at)) = waits.iter().find(|(frame, _)| is_sent(frame)) {
        return (Doing::InFlight(frame), Some(at));
    }
    match waits.first() {
        Some(&(_, at)) => (Doing::Waiting(waits.into_iter().map(|(frame, _)| frame).collect()), Some(at)),
        None => (Doing::Idle, None),
    }
}

fn verdict(tracks: &[Track]) -> Verdict {
    let failed = tracks.iter().filter_map(|track| Some((track.failed?, track.state.rank)));
    if let Some(((_, of_step), rank)) = failed.min_by_key(|((at, _), rank)| (*at, *rank)) {
        return Verdict::Failed(rank, of_step);
    }
    let states: Vec<&RankState> = tracks.iter().map(|track| &track.state).collect();
    if states.iter().all(|state| state.doing == Doing::Finished) {
        return Verdict::Finished;
    }
    let waiters = waiters(&states);
    let held = |rank: usize| {
        let of_rank = waiters.get(&rank).into_iter().flatten().copied().collect();
        Verdict::Held(states[rank].clone(), of_rank)
    };
    let count = |state: &RankState| waiters.get(&state.rank).map_or(0, BTreeSet::len);
    let stands = |state: &&&RankState| !state.is_waiting() && state.doing != Doing::Finished;
    // Who is gone has to be first: the others may well be at work. Then who holds most up, and for the longest.
    let weight =
        |state: &&&RankState| (state.is_gone(), count(state), state.lasted, std::cmp::Reverse(state.rank));
    let candidates = states.iter().filter(stands);
    let blocking =
        candidates.filter(|state| count(state) > 0 || state.is_lost || state.doing == Doing::Silent);
    if let Some(state) = blocking.max_by_key(weight) {
        return held(state.rank);
    }
    // All that is waited for waits itself, or has finished.
    let Some(first) = states.iter().find(|state| state.is_waiting()) else {
        let longest = states.iter().filter(stands).max_by_key(|state| (!state.is_gone(), state.lasted));
        return longest.map_or(Verdict::NoRecord, |state| Verdict::AtWork(RankState::clone(state)));
    };
    let mut path: Vec<(usize, Frame)> = Vec::new();
    let mut rank = first.rank;
    loop {
        if let Some(begins) = path.iter().position(|(before, _)| *before == rank) {
            return Verdict::Circle(path.split_off(begins));
        }
        match states[rank].peers().find(|(peer, _)| *peer < states.len()) {
            Some((peer, frame)) => {
                path.push((rank, frame));
                rank = peer;
            }
            None => return held(rank),
        }
    }
}

/// By rank, those that wait for it, directly or through others that wait.
fn waiters(states: &[&RankState]) -> BTreeMap<usize, BTreeSet<usize>> {
    let mut waiters: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for state in states.iter().filter(|state| state.is_waiting()) {
        let mut open = vec![state.rank];
        let mut seen = BTreeSet::from([state.rank]);
        while let Some(rank) = open.pop() {
            for (peer, _) in states[rank].peers().filter(|(peer, _)| *peer < states.len()) {
                if seen.insert(peer) {
                    open.push(peer);
                    waiters.entry(peer).or_default().insert(state.rank);
                }
            }
        }
    }
    waiters
}

#[cfg(test)]
mod tests;
