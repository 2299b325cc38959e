//! What goes wrong, and when all is well again.

use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::network::ORCHESTRATOR;
use super::plan::SimFault;
use super::ranks::Gang;
use super::{SimEvent, World};
use crate::core::Event;

/// For how long nothing passes. **Units**: ms.
const MUTE_MS: u64 = 20_000;

impl World {
    pub(super) fn plan_fault(&mut self, fault: usize) {
        let (_, mean) = self.plan.faults[fault];
        let after = self.random.between(mean / 2, mean * 3 / 2);
        self.plan_in(after, SimEvent::Faulty(fault));
    }

    pub(super) fn faulty(&mut self, number: usize) {
        if self.is_calm {
            return;
        }
        self.plan_fault(number);
        let (fault, _) = self.plan.faults[number];
        *self.report.faults.entry(fault).or_default() += 1;
        self.note([30, number as u64, 0], || format!("fault: {fault:?}"));
        match fault {
            SimFault::Crash
            | SimFault::Double
            | SimFault::Pause
            | SimFault::Clock
            | SimFault::Disk
            | SimFault::Unkept
            | SimFault::Mute
            | SimFault::Silence => self.fault_of_server(fault),
            SimFault::Defect
            | SimFault::Cancel
            | SimFault::Drain
            | SimFault::SubmitAgain
            | SimFault::Scale => self.wish(fault),
            SimFault::Loss => self.lose_state(),
            SimFault::Rot => self.rot(),
            SimFault::Apart => self.part_nodes(),
            _ => self.fault_of_worker(fault),
        }
    }

    fn fault_of_worker(&mut self, fault: SimFault) {
        let workers: Vec<u64> = self.workers.keys().copied().collect();
        let Some(id) = self.random.pick(&workers) else { return };
        let node = self.workers[&id].node;
        let long = if self.random.is_one_in(2) { 2_000 } else { 30_000 };
        let takes = self.random.between(50, long);
        match fault {
            SimFault::Kill | SimFault::PowerLoss => {
                let within = if fault == SimFault::Kill { 50 } else { 20_000 };
                self.kill_worker(id, within);
                if !self.random.is_one_in(4) {
                    self.plan_in(takes, SimEvent::WorkerStarts(node));
                }
            }
            SimFault::Freeze => {
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.is_frozen = true;
                }
                self.note([31, id, takes], || format!("worker {id} stands still for {takes} ms"));
                self.plan_in(takes, SimEvent::WorkerThaws(id));
            }
            // Until the process ends, when all is well too: it has to be noticed.
            SimFault::Hang => {
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.is_stalled = true;
                }
                self.note([34, id, 0], || format!("worker {id} hangs"));
            }
            SimFault::Break => {
                let within = if self.random.is_one_in(3) { 8_000 } else { 100 };
                self.links_of(|link| link.worker == id)
                    .into_iter()
                    .for_each(|link| self.break_link(link, within));
            }
            SimFault::CutOff => self.cut_off(id, node, takes),
            SimFault::Split => {
                let other = self.random.pick(&workers).filter(|other| *other != id);
                let has_both = |workers: &std::collections::BTreeMap<u64, bool>| {
                    workers.contains_key(&id) && other.is_some_and(|other| workers.contains_key(&other))
                };
                let gangs = self.gangs.iter().filter(|(_, gang)| has_both(&gang.workers));
                let gangs: Vec<FormationId> = gangs.map(|(&of, _)| of).collect();
                gangs.into_iter().for_each(|of| self.break_gang(of, 0, 9_000));
            }
            SimFault::Slow => {
                self.network.slow.insert(node);
                self.plan_in(takes, SimEvent::Quickens(node));
            }
            SimFault::Full => {
                self.storage.full.insert(node);
                self.plan_in(takes, SimEvent::Writes(node));
            }
            _ => {}
        }
    }

    /// A part of the newest checkpoint of a job is not any more what was written.
    fn rot(&mut self) {
        let open = self.store.jobs.all.iter().filter(|(_, record)| !record.has_ended());
        let open: Vec<JobId> = open.map(|(&job, _)| job).collect();
        let (job, rank) = (self.random.pick(&open), Rank::at(self.random.between(0, 8) as usize));
        let Some(job) = job else { return };
        if let Some(step) = self.storage.of_mut(job).and_then(|folder| folder.rot(rank)) {
            self.note([36, job.bits(), step], || format!("{job}: the checkpoint of step {step} is damaged"));
        }
    }

    /// The ranks of two nodes lose each other, and find each other later.
    fn part_nodes(&mut self) {
        let nodes: Vec<usize> = (0..self.plan.nodes.len()).collect();
        let (Some(one), Some(other)) = (self.random.pick(&nodes), self.random.pick(&nodes)) else { return };
        let takes = self.random.between(1_000, 90_000);
        if one == other || self.network.apart.is_some() {
            return;
        }
        self.network.apart = Some((one, other));
        self.note([37, one as u64, other as u64], || {
            format!("nodes {one} and {other} are apart for {takes} ms")
        });
        self.plan_in(takes, SimEvent::Meet(one, other));
        let gangs: Vec<FormationId> =
            self.gangs.iter().filter(|(_, gang)| self.is_apart(gang)).map(|(&of, _)| of).collect();
        gangs.into_iter().for_each(|of| self.break_gang(of, 0, 3_000));
    }

    fn is_apart(&self, gang: &Gang) -> bool {
        gang.workers.keys().any(|&id| self.out_of_reach(id, gang.workers.keys().copied()).is_some())
    }

    /// A worker and the orchestrator do not reach each other: streams break, or what they carry is late.
    fn cut_off(&mut self, id: u64, node: usize, takes: u64) {
        let links = self.links_of(|link| link.worker == id);
        if self.random.is_one_in(2) {
            return links.into_iter().for_each(|link| self.stall_link(link, takes));
        }
        self.network.cuts.insert((node, ORCHESTRATOR));
        links.into_iter().for_each(|link| self.break_link(link, 10_000));
        self.plan_in(takes, SimEvent::Heals(node, ORCHESTRATOR));
    }

    fn fault_of_server(&mut self, fault: SimFault) {
        let server = self.newest_server();
        let long = if self.random.is_one_in(2) { 2_000 } else { 20_000 };
        let takes = self.random.between(50, long);
        match fault {
            SimFault::Crash => {
                self.kill_server(server);
                self.plan_in(takes, SimEvent::ServerStarts);
            }
            SimFault::Double if self.servers[server].is_alive => {
                self.start_server();
                if self.random.is_one_in(2) {
                    let links = self.links_of(|link| link.server == server);
                    links.into_iter().for_each(|link| self.break_link(link, 3_000));
                }
            }
            SimFault::Pause if !self.servers[server].is_paused => {
                self.servers[server].is_paused = true;
                self.plan_in(takes, SimEvent::ServerResumes(server));
            }
            SimFault::Clock => {
                let far = if self.random.is_one_in(2) { 2_000 } else { 3_600_000 };
                let by = self.random.between(0, 2 * far) as i64 - far as i64;
                self.servers[server].clock_ms += by;
                self.note([32, by.unsigned_abs(), 0], || {
                    format!("the orchestrator's clock is set by {by} ms")
                });
            }
            SimFault::Disk => self.servers[server].is_disk_slow = !self.servers[server].is_disk_slow,
            SimFault::Unkept if !self.servers[server].disk_fails => {
                self.servers[server].disk_fails = true;
                self.note([38, takes, 0], || format!("the orchestrator's disk takes nothing for {takes} ms"));
                self.plan_in(takes, SimEvent::ServerKeeps(server));
                // Its mailbox fills up, and it lets go of all workers.
                if self.random.is_one_in(2) {
                    let links = self.links_of(|link| link.server == server);
                    links.into_iter().for_each(|link| self.break_link(link, 3_000));
                }
            }
            SimFault::Mute => {
                let all = self.links_of(|_| true);
                all.into_iter().for_each(|link| self.stall_link(link, MUTE_MS));
            }
            SimFault::Silence => {
                self.note([35, server as u64, takes], || format!("nobody is heard for {takes} ms"));
                let nodes: Vec<(u64, usize)> =
                    self.workers.iter().map(|(&id, worker)| (id, worker.node)).collect();
                nodes.into_iter().for_each(|(id, node)| self.cut_off(id, node, takes));
            }
            _ => {}
        }
    }

    /// What people do, and a rank that finds a defect.
    fn wish(&mut self, fault: SimFault) {
        let server = self.newest_server();
        let open = self.store.jobs.all.iter().filter(|(_, record)| !record.has_ended());
        let open: Vec<JobId> = open.map(|(&job, _)| job).collect();
        let job = self.random.pick(&open);
        match (fault, job) {
            (SimFault::Cancel, Some(job)) => {
                self.checks.cancelled.insert(job);
                let reason = "enough".to_owned();
                self.ask_for(server, Event::Cancel { job, reason });
            }
            (SimFault::Scale, Some(job)) => {
                let ranks = self.random.between(0, 9) as usize;
                // A number that no named layout has is refused before it comes to the core.
                let named =
                    self.store.jobs.all.get(&job).map_or_else(Vec::new, |record| record.spec.named_ranks());
                if ranks == 0 || named.is_empty() || named.contains(&ranks) {
                    self.ask_for(server, Event::Scale { job, ranks });
                }
            }
            (SimFault::Defect, Some(job)) => {
                let hosts = self.workers.iter().filter_map(|(&id, worker)| {
                    let hosted = worker.hosted.get(&job).filter(|_| !worker.is_frozen)?;
                    Some((id, FormationId::new(job, hosted.generation)))
                });
                let hosts: Vec<(u64, FormationId)> = hosts.collect();
                if let Some((id, of)) = self.random.pick(&hosts) {
                    self.checks.excused.insert(job);
                    self.find_defect(id, of);
                }
            }
            (SimFault::Drain, _) if self.store.jobs.drained.is_empty() => {
                let node = self.random.between(0, self.plan.nodes.len() as u64);
                self.ask_for(server, Event::Drain { node: format!("n{node}") });
            }
            (SimFault::SubmitAgain, _) => {
                let jobs: Vec<usize> = (0..self.plan.jobs.len()).collect();
                let spec = self.random.pick(&jobs).map(|job| self.plan.jobs[job].spec.clone());
                if let Some(spec) = spec.filter(|spec| !spec.key.is_empty()) {
                    self.ask_for(server, Event::Submit(Box::new(spec)));
                }
            }
            _ => {}
        }
    }

    /// The faults have ended: all are alive, reach each other and continue.
    pub(super) fn calm_down(&mut self) {
        self.is_calm = true;
        self.note([33, 0, 0], || "all is well from here on".into());
        let newest = self.newest_server();
        (0..newest).for_each(|server| self.kill_server(server));
        self.server_starts();
        let newest = self.newest_server();
        self.server_resumes(newest);
        (self.servers[newest].is_disk_slow, self.servers[newest].disk_fails) = (false, false);
        self.network.cuts.clear();
        self.network.slow.clear();
        self.network.apart = None;
        self.storage.full.clear();
        let workers: Vec<u64> = self.workers.keys().copied().collect();
        workers.into_iter().for_each(|id| self.thaw(id));
        (0..self.plan.nodes.len()).for_each(|node| self.start_worker(node));
    }
}
