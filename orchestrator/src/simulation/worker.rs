//! A worker's process: its stream, the formations that it hosts, and what it says again. Follows the workers' `host`.
//! Its ranks are in [`super::ranks`].

use std::collections::BTreeMap;
use std::rc::Rc;

use contraflow_runtime::checkpoint::Pinned;
use contraflow_runtime::control::outbox::Outbox;
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{RankCommand, RankEvent};
use contraflow_runtime::fabric::Address;
use contraflow_runtime::faults::ErrorKind;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

use super::memory::{SimReplicas, step_done};
use super::mutation::Mutation;
use super::network::{FromWorker, ToWorker};
use super::ranks::Group;
use super::{Own, RankTask, SimEvent, World};
use crate::core::facts::Formed;
use crate::core::{self, Left, Progress, Registration};

/// How often the loop looks at its clock. **Units**: ms.
const CLOCK_MS: u64 = 250;

/// A process.
pub(super) struct Worker {
    pub(super) node: usize,
    slots: usize,
    /// The state of the orchestrator whose member it was last.
    pub(super) state: u64,
    /// The highest incarnation of that state it has seen.
    pub(super) incarnation: u64,
    /// Its stream, and whether it has been welcomed on it.
    pub(super) link: Option<(u64, bool)>,
    beat_ms: u64,
    pub(super) hosted: BTreeMap<JobId, SimFormation>,
    /// By job, what it keeps of the state of ranks.
    pub(super) memory: BTreeMap<JobId, SimReplicas>,
    pub(super) is_frozen: bool,
    /// Its ranks make no progress, whatever the command, until the process ends.
    pub(super) is_stalled: bool,
    /// What it has not noticed while it stood still.
    pub(super) held: Vec<SimEvent>,
}

/// A formation in it.
pub(super) struct SimFormation {
    pub(super) generation: Generation,
    pub(super) formed: Rc<Formed>,
    is_reachable: bool,
    /// Steps of the recipe.
    steps: u64,
    /// Step of the checkpoint that was known to stand when it was assigned.
    pinned: Pinned,
    pub(super) group: Group,
    outbox: Outbox,
    pub(super) committed: Option<FromWorker>,
}

impl World {
    pub(super) fn start_worker(&mut self, node: usize) {
        if self.workers.values().any(|worker| worker.node == node) {
            return;
        }
        self.newest_worker += 1;
        let id = self.newest_worker;
        self.note([10, id, node as u64], || format!("worker {id} starts on node {node}"));
        self.workers.insert(
            id,
            Worker {
                node,
                slots: self.plan.nodes[node],
                state: 0,
                incarnation: 0,
                link: None,
                beat_ms: 0,
                hosted: BTreeMap::new(),
                memory: BTreeMap::new(),
                is_frozen: false,
                is_stalled: false,
                held: Vec::new(),
            },
        );
        self.plan_in(1, SimEvent::WorkerTick(id));
    }

    /// The process ends; its peers notice within `within_ms`.
    pub(super) fn kill_worker(&mut self, id: u64, within_ms: u64) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.note([11, id, within_ms], || format!("worker {id} dies"));
        for link in self.links_of(|link| link.worker == id) {
            self.break_link(link, within_ms);
        }
        for (job, hosted) in worker.hosted {
            self.break_gang(FormationId::new(job, hosted.generation), id, within_ms);
        }
    }

    /// Its ranks end the process; its supervisor starts another one.
    pub(super) fn crash_worker(&mut self, id: u64) {
        let Some(worker) = self.workers.get(&id) else { return };
        let node = worker.node;
        self.kill_worker(id, 50);
        let after = self.random.between(500, 3_000);
        self.plan_in(after, SimEvent::WorkerStarts(node));
    }

    pub(super) fn thaw(&mut self, id: u64) {
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| worker.is_frozen) else { return };
        worker.is_frozen = false;
        let held = std::mem::take(&mut worker.held);
        self.note([12, id, held.len() as u64], || {
            format!("worker {id} continues with {} messages", held.len())
        });
        for happening in held {
            self.happen(happening);
        }
    }

    pub(super) fn worker_tick(&mut self, id: u64) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.is_frozen {
            return worker.held.push(SimEvent::WorkerTick(id));
        }
        self.planned_tick(id);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        match worker.link {
            Some((link, true)) if worker.beat_ms <= self.now => {
                worker.beat_ms = self.now + self.plan.times.beat_ms() * 9 / 10;
                let progress = worker
                    .hosted
                    .iter()
                    .flat_map(|(&job, hosted)| hosted.progress(job, worker.is_stalled))
                    .collect();
                self.send_up(link, FromWorker::Beat(progress));
            }
            Some(_) => {}
            None => {
                let hello = worker.hello(id);
                let alive: Vec<usize> =
                    (0..self.servers.len()).filter(|&server| self.servers[server].is_alive).collect();
                let newest = self.newest_server();
                let server = if self.is_calm { newest } else { self.random.pick(&alive).unwrap_or(newest) };
                let link = self.open_link(id, server, hello);
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.link = Some((link, false));
                }
            }
        }
    }

    fn planned_tick(&mut self, id: u64) {
        self.plan_in(CLOCK_MS, SimEvent::WorkerTick(id));
    }

    /// An event of a rank.
    pub(super) fn send_event(&mut self, id: u64, formation: FormationId, event: RankEvent) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(hosted) = worker.hosted_mut(formation) else { return };
        hosted.outbox.note(&event);
        if let Some((link, true)) = worker.link {
            self.send_up(link, FromWorker::Event { formation, event });
        }
    }

    pub(super) fn deliver_to_worker(&mut self, id: u64, link: u64, down: ToWorker) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.link.is_none_or(|(current, _)| current != link) {
            return;
        }
        match down {
            ToWorker::Welcome { state, incarnation } => self.welcomed(id, link, (state, incarnation)),
            ToWorker::Refused => {
                // The process ends; its supervisor starts another one.
                let node = worker.node;
                self.kill_worker(id, 30);
                let after = self.random.between(500, 3_000);
                self.plan_in(after, SimEvent::WorkerStarts(node));
            }
            ToWorker::Assign { job, ranks, formed, is_reachable, pinned } => {
                self.assigned(id, (job, ranks), formed, (pinned, is_reachable));
            }
            ToWorker::Command { to, command } => self.commanded(id, to, command),
            ToWorker::Release { .. } if self.mutation == Some(Mutation::StaysOn) => {}
            ToWorker::Release { formation, keep } => self.released(id, formation, keep),
            ToWorker::Bring { formed, job } => self.brings(id, job, &formed),
            ToWorker::Durable { job, step } => {
                if let Some(hosted) = worker.hosted.get_mut(&job) {
                    hosted.outbox.durable(step);
                }
                if let Some(replicas) = worker.memory.get_mut(&job) {
                    replicas.durable(step);
                }
            }
            ToWorker::Commit { formation, position, pinned } => {
                if worker.hosted_mut(formation).is_some() {
                    let takes = self.random.between(1, 400);
                    self.plan_own(id, formation, takes, RankTask::Commits(position, pinned));
                }
            }
        }
    }

    fn welcomed(&mut self, id: u64, link: u64, (state, incarnation): (u64, u64)) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let is_earlier = worker.state == state && incarnation < worker.incarnation;
        if is_earlier && self.mutation != Some(Mutation::IgnoresIncarnations) {
            // Another orchestrator has taken over; this one has not noticed.
            worker.link = None;
            return self.break_link(link, 50);
        }
        (worker.state, worker.incarnation) = (state, incarnation);
        worker.link = Some((link, true));
        let mut words = Vec::new();
        for (&job, hosted) in &worker.hosted {
            let formation = FormationId::new(job, hosted.generation);
            words.extend(hosted.outbox.repeat().cloned().map(|event| FromWorker::Event { formation, event }));
            words.extend(hosted.committed.clone());
        }
        if self.breaks(Mutation::SaysOnce) {
            words.clear();
        }
        self.note([13, id, incarnation], || {
            format!("worker {id} is welcomed by {incarnation}, resends {} messages", words.len())
        });
        words.into_iter().for_each(|up| self.send_up(link, up));
    }

    fn assigned(
        &mut self,
        id: u64,
        (job, ranks): (JobId, Vec<Rank>),
        formed: Rc<Formed>,
        (pinned, is_reachable): (Pinned, bool),
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let of @ FormationId { generation, .. } = formed.id(job);
        if let Some(hosted) = worker.hosted.get(&job) {
            if hosted.generation >= generation {
                return;
            }
            self.leave(id, FormationId::new(job, generation.previous()));
        }
        self.note([14, id, job.bits()], || format!("worker {id} is assigned ranks {ranks:?} of {of}"));
        self.check_assigned(id, (job, &ranks), &formed);
        self.enter_memory(id, job, &formed);
        let steps = self.job_plan(job).map_or(0, |planned| planned.spec.steps());
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let (outbox, committed) = (Outbox::default(), None);
        let group = Group::new(ranks);
        let hosted =
            SimFormation { generation, formed, is_reachable, steps, pinned, group, outbox, committed };
        worker.hosted.insert(job, hosted);
        let used: usize = worker.hosted.values().map(|hosted| hosted.group.ranks.len()).sum();
        if used > worker.slots {
            let words = format!("worker {id} hosts {used} ranks with {} slots", worker.slots);
            return self.violate(words);
        }
        let takes = self.random.between(5, 1_500);
        self.plan_own(id, of, takes, RankTask::Prepared);
    }

    fn commanded(&mut self, id: u64, to: RankAddress, command: RankCommand) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let hosted = worker.hosted_mut(to.formation);
        let Some(hosted) = hosted.filter(|hosted| hosted.group.is_started()) else { return };
        if hosted.group.ranks.contains(&to.rank) && hosted.outbox.is_new(to.rank, &command) {
            self.deliver_to_rank(id, to, command);
        }
    }

    /// Leaves on an orchestrator's command, and reports its replicas or drops them.
    fn released(&mut self, id: u64, formation: FormationId, keep: bool) {
        let FormationId { job, generation } = formation;
        self.leave(id, formation);
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| !worker.hosted.contains_key(&job))
        else {
            return;
        };
        if !keep {
            worker.memory.retain(|of, replicas| *of != job || replicas.is_after(generation));
        } else if let Some((link, true)) = worker.link {
            let nothing = Left { formation, replicas: Vec::new() };
            let left = worker.memory.get(&job).map_or(nothing, |replicas| replicas.left(job));
            let reports = worker.memory.get(&job).map(|replicas| replicas.all_reports()).unwrap_or_default();
            // No rank of another layout can say them again.
            if !self.breaks(Mutation::RecoversInSilence) {
                for (rank, step) in reports {
                    let event = step_done(generation, rank, step);
                    self.send_up(link, FromWorker::Event { formation, event });
                }
            }
            self.send_up(link, FromWorker::Released(Left { formation, ..left }));
        }
    }

    /// Brings what it keeps to a formation that has no rank here.
    fn brings(&mut self, id: u64, job: JobId, formed: &Formed) {
        let of = formed.id(job);
        let is_later = |generation| generation >= of.generation;
        let hosted = self.workers.get(&id).and_then(|worker| worker.hosted.get(&job));
        if hosted.is_some_and(|hosted| is_later(hosted.generation)) {
            return;
        }
        self.leave(id, of);
        self.note([18, id, job.bits()], || format!("worker {id} brings what it keeps to {of}"));
        if self.breaks(Mutation::DropsWhatItBrings) {
            self.workers.get_mut(&id).into_iter().for_each(|worker| drop(worker.memory.remove(&job)));
        }
        self.enter_memory(id, job, formed);
    }

    /// Leaves this formation of a job, or an earlier one if that is here.
    fn leave(&mut self, id: u64, FormationId { job, generation }: FormationId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.hosted.get(&job).is_none_or(|hosted| hosted.generation > generation) {
            return;
        }
        if let Some(hosted) = worker.hosted.remove(&job) {
            let left = FormationId::new(job, hosted.generation);
            self.note([15, id, job.bits()], || format!("worker {id} leaves {left}"));
            self.break_gang(left, id, 50);
        }
    }

    pub(super) fn plan_own(&mut self, id: u64, formation: FormationId, ms: u64, what: RankTask) {
        self.plan_in(ms, SimEvent::Own(id, Own { formation, what }));
    }

    /// Something happens inside a worker. Work that was begun runs to its end even if the formation has been left.
    pub(super) fn inside(&mut self, id: u64, own: Own) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.is_frozen {
            return worker.held.push(SimEvent::Own(id, own));
        }
        let Own { formation: of, what } = own;
        let hosted = worker.hosted_mut(of);
        match (what, hosted) {
            (RankTask::Commits(position, pinned), hosted) => {
                let world = hosted.map(|hosted| hosted.formed.places.len());
                self.commit(id, of, (position, pinned), world);
            }
            (RankTask::Saved(what), _) => self.saved(id, of, *what),
            (RankTask::Prepared, Some(hosted)) => {
                let (formed, known) = (hosted.formed.clone(), (hosted.pinned, hosted.is_reachable));
                self.prepared(id, of, &formed, known);
            }
            (RankTask::Built, Some(hosted)) => {
                let formed = hosted.formed.clone();
                self.built(id, of, &formed);
            }
            (RankTask::StepDone, Some(hosted)) => {
                let formed = hosted.formed.clone();
                self.step_done(id, of, &formed);
            }
            (RankTask::PeerLost, Some(_)) => self.peer_lost(id, of),
            (RankTask::StoresReplicas(what), Some(_)) => self.keeps(id, of, *what),
            (RankTask::Acknowledged(buddy), Some(_)) => self.acknowledged(id, of, buddy),
            (RankTask::Validated(rank), Some(_)) => self.validated(id, of, rank),
            (RankTask::Exported(rank), Some(_)) => self.exported(id, of, rank),
            (_, None) => {}
        }
    }

    /// Ranks that could not be started say so.
    pub(super) fn fail_all(&mut self, id: u64, of: FormationId, cause: &str) {
        let ranks = self.group(id, of).map(|group| group.ranks.clone()).unwrap_or_default();
        for rank in ranks {
            let (action, cause) = ("joining the formation".to_owned(), cause.to_owned());
            self.send_event(
                id,
                of,
                RankEvent::Failed { rank, action, cause, kind: ErrorKind::Config, peer: None },
            );
        }
    }

    pub(super) fn group(&mut self, id: u64, formation: FormationId) -> Option<&mut Group> {
        Some(&mut self.workers.get_mut(&id)?.hosted_mut(formation)?.group)
    }
}

impl Worker {
    /// What it hosts of a formation, if it is in it.
    pub(super) fn hosted_mut(
        &mut self,
        FormationId { job, generation }: FormationId,
    ) -> Option<&mut SimFormation> {
        self.hosted.get_mut(&job).filter(|hosted| hosted.generation == generation)
    }

    fn hello(&self, id: u64) -> FromWorker {
        let registration = Registration {
            worker: id,
            name: format!("w{id}"),
            slots: self.slots,
            node: format!("n{}", self.node),
            block: format!("b{}", self.node / 3),
            fabric: Some(Address {
                host: format!("h{}", self.node),
                tcp: ([127, 0, 0, 1], 1).into(),
                unix: format!("f{id}"),
            }),
            cores: self.slots,
            peak_flops: 1,
            ..Registration::default()
        };
        let hosted = self.hosted.iter().map(|(&job, hosted)| core::Hosted {
            formation: FormationId::new(job, hosted.generation),
            ranks: hosted.group.ranks.clone(),
            world: hosted.formed.places.len(),
            steps: hosted.steps,
            durable: 0,
        });
        let hosted = hosted.collect();
        let left = self.memory.iter().filter(|(job, _)| !self.hosted.contains_key(job));
        let left = left.map(|(&job, replicas)| replicas.left(job)).collect();
        let (state, incarnation) = (self.state, self.incarnation);
        FromWorker::Hello { registration, hosted, left, state, incarnation }
    }
}

impl SimFormation {
    /// Progress of its ranks: in a step all wait, except stalled ones.
    fn progress(&self, job: JobId, is_stalled: bool) -> impl Iterator<Item = Progress> {
        let (formation, step) = (FormationId::new(job, self.generation), self.group.trained.step);
        let address = move |&rank: &Rank| RankAddress { formation, rank };
        let is_at_work = self.group.is_in_step() && is_stalled;
        self.group.ranks.iter().map(move |rank| Progress {
            rank: address(rank),
            step,
            operations: step,
            is_at_work,
            uses_storage: false,
        })
    }
}
