//! How ranks fail: a peer is gone or out of reach, a checkpoint is damaged, a defect is found. Knows nothing of what is concluded.

use contraflow_runtime::control::RankEvent;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::{FormationId, Rank};

use super::ranks::GangState;
use super::{RankTask, World};

impl World {
    /// The connections to a worker end: the others notice within `within_ms`.
    pub(super) fn break_gang(&mut self, of: FormationId, gone: u64, within_ms: u64) {
        let Some(gang) = self.gangs.get_mut(&of).filter(|gang| !gang.is_broken) else { return };
        gang.is_broken = true;
        let left: Vec<u64> = gang.workers.keys().copied().filter(|id| *id != gone).collect();
        for id in left {
            let after = self.random.between(1, within_ms + 1);
            self.plan_own(id, of, after, RankTask::PeerLost);
        }
    }

    pub(super) fn peer_lost(&mut self, id: u64, of: FormationId) {
        let Some(group) = self.group(id, of).filter(|group| group.state == GangState::InStep) else {
            // No rank waits for a peer: it is noticed in the next step.
            if self.group(id, of).is_some_and(|group| group.state != GangState::Over) {
                self.plan_own(id, of, 500, RankTask::PeerLost);
            }
            return;
        };
        group.state = GangState::Over;
        for rank in group.ranks.clone() {
            let (action, cause) = ("F0.0".to_owned(), "a peer is gone".to_owned());
            self.send_event(
                id,
                of,
                RankEvent::Failed { rank, action, cause, kind: ErrorKind::Lost, peer: None },
            );
        }
    }

    /// A rank of a worker finds a defect.
    pub(super) fn find_defect(&mut self, id: u64, of: FormationId) {
        let Some(group) = self.group(id, of).filter(|group| group.state == GangState::InStep) else { return };
        group.state = GangState::Over;
        let rank = group.ranks[0];
        let (action, cause) = ("F0.0".to_owned(), "a defect".to_owned());
        self.send_event(id, of, RankEvent::Failed { rank, action, cause, kind: ErrorKind::Bug, peer: None });
    }

    /// What a rank reads of a checkpoint is not what was written.
    pub(super) fn fail_damaged(&mut self, id: u64, of: FormationId) {
        let Some(group) = self.group(id, of) else { return };
        group.state = GangState::Over;
        let rank = group.ranks[0];
        let (action, cause) = ("joining the formation".to_owned(), "the checkpoint is damaged".to_owned());
        self.send_event(
            id,
            of,
            RankEvent::Failed { rank, action, cause, kind: ErrorKind::Damaged, peer: None },
        );
    }

    /// The first of these workers whose ranks a worker's ranks do not reach.
    pub(super) fn out_of_reach(&self, id: u64, others: impl IntoIterator<Item = u64>) -> Option<u64> {
        let (one, other) = self.network.apart?;
        let node = |id: u64| self.workers.get(&id).map(|worker| worker.node);
        let away = match node(id)? {
            node if node == one => other,
            node if node == other => one,
            _ => return None,
        };
        others.into_iter().find(|&id| node(id) == Some(away))
    }

    /// The ranks of a worker do not reach a peer.
    pub(super) fn fail_apart(&mut self, id: u64, of: FormationId, peer: Option<Rank>) {
        let Some(group) = self.group(id, of) else { return };
        group.state = GangState::Over;
        for rank in group.ranks.clone() {
            let (action, cause) = ("connecting".to_owned(), "no answer".to_owned());
            self.send_event(id, of, RankEvent::Failed { rank, action, cause, kind: ErrorKind::Lost, peer });
        }
    }
}
