//! The ranks of a formation, worker by worker: they train in step, and each step needs all of them. Follows the workers'
//! `rank`. What they compute is only a digest of what they were fed.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use contraflow_runtime::checkpoint::{Pinned, Position, ShardFile};
use contraflow_runtime::control::wire::RankAddress;
use contraflow_runtime::control::{ExportedFile, RankCommand, RankEvent};
use contraflow_runtime::random::mix;
use contraflow_runtime::stability::{Divergence, StepAction};
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use super::memory::step_done;
use super::mutation::Mutation;
use super::plan::BATCH;
use super::storage::Trained;
use super::{RankTask, SimEvent, World};
use crate::core::facts::Formed;

/// The ranks of one formation in one worker.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) ranks: Vec<Rank>,
    pub(super) state: GangState,
    /// After the last step.
    pub(super) trained: Trained,
    /// Ranks that have been told to begin.
    begun: usize,
    /// Some rank was told to stop after the running step, and to keep the state in memory.
    stop: bool,
    stops_in_memory: bool,
    /// The step after which the ranks stop once it is in memory everywhere.
    kept: Option<u64>,
    is_saving: bool,
    /// The save under way is the last one: training does not go on.
    is_last: bool,
    /// The latest save has failed: it is tried again after the next step, by all.
    saves_again: bool,
    /// What waits until the checkpoint before is written.
    parked: Option<Parked>,
    /// Workers that have not yet said that they keep the latest step.
    pub(super) unacknowledged: BTreeSet<u64>,
    /// Rank and step of what was reported before this formation.
    pub(super) reports: BTreeSet<(Rank, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GangState {
    /// Reads recipe and data.
    Preparing,
    /// Makes the model.
    Building,
    /// Has a model, and waits for commands.
    Idle,
    /// Trains.
    InStep,
    /// Does nothing any more.
    Over,
}

#[derive(Clone, Copy, Debug)]
enum Parked {
    Save { goes_on: bool },
    Diverge { cursor: u64 },
}

/// The data connections between the ranks of one formation.
#[derive(Clone, Debug, Default)]
pub(super) struct Gang {
    /// Workers, and whether they wait for the others in the running step.
    pub(super) workers: BTreeMap<u64, bool>,
    waiting: usize,
    pub(super) is_broken: bool,
    /// What came of the running step.
    made: Trained,
    stops: bool,
    stops_in_memory: bool,
    saves_again: bool,
    diverges: bool,
}

/// The digest after a step that begins at this place in the order of the sequences.
pub(super) fn feed(digest: u64, step: u64, cursor: u64) -> u64 {
    mix(digest ^ mix(step).rotate_left(17) ^ cursor)
}

impl Group {
    pub(super) fn new(ranks: Vec<Rank>) -> Self {
        let (trained, parked, state) = (Trained::default(), None, GangState::Preparing);
        let (unacknowledged, reports) = (BTreeSet::new(), BTreeSet::new());
        Group {
            ranks,
            state,
            trained,
            begun: 0,
            stop: false,
            stops_in_memory: false,
            kept: None,
            is_saving: false,
            is_last: false,
            saves_again: false,
            parked,
            unacknowledged,
            reports,
        }
    }

    /// A peer that the ranks need is gone.
    pub(super) fn give_up(&mut self) {
        self.state = GangState::Over;
    }

    pub(super) fn is_in_step(&self) -> bool {
        self.state == GangState::InStep
    }

    /// Whether there are ranks that take commands.
    pub(super) fn is_started(&self) -> bool {
        self.state != GangState::Preparing
    }
}

impl World {
    /// Recipe, data and checkpoint have been read: the ranks can be started.
    pub(super) fn prepared(
        &mut self,
        id: u64,
        of: FormationId,
        formed: &Formed,
        (pinned, is_reachable): (Pinned, bool),
    ) {
        let job = of.job;
        let Some(folder) = self.folder(job) else { return };
        let (stands, oldest) = (folder.stands(formed.resume_step), folder.oldest());
        let damaged =
            folder.damaged(formed.resume_step).map(|rank| Rank::at(rank.index() % formed.places.len()));
        let is_damaged = damaged.is_some_and(|rank| formed.place_of(rank) == Some(id));
        let reads_damage = self.breaks(Mutation::ReadsDamage);
        let mut trained = Trained::default();
        if formed.resume_step > 0 && formed.memory.is_none() {
            match stands {
                Some(_) if self.mutation == Some(Mutation::ResumesEarlier) => {
                    trained = oldest.unwrap_or_default();
                }
                Some(_) if is_damaged && !reads_damage => return self.fail_damaged(id, of),
                // What it cannot tell from the rest it takes for the state.
                Some(stands) if is_damaged => trained = Trained { digest: !stands.digest, ..stands },
                Some(stands) => trained = stands,
                // A worker that was cut off for long finds that others have moved on.
                None if !self.is_running(of) => return self.fail_all(id, of, "no such checkpoint"),
                None => {
                    let words = format!("no checkpoint of step {} to resume from", formed.resume_step);
                    return self.violate(format!("{of}: {words}"));
                }
            }
        }
        let goes_past = formed.cursor > 0 && self.mutation != Some(Mutation::ForgetsCursor);
        trained.cursor = if goes_past { formed.cursor } else { trained.cursor };
        let Some(group) = self.group(id, of) else { return };
        group.trained = trained;
        let tidies = group.ranks.contains(&Rank::ZERO);
        if !is_reachable {
            return self.fail_all(id, of, "an address of nobody");
        }
        group.state = GangState::Building;
        if tidies {
            let retention = self.retention(pinned);
            let newest = formed.memory.is_none().then_some(formed.resume_step);
            let Some(folder) = self.folder(job) else { return };
            if !folder.begin(of.generation) {
                return self.refused_folder(id, of);
            }
            folder.tidy(of.generation, retention, newest);
            self.check_known(job);
        }
        let gang = self.gangs.entry(of).or_default();
        if gang.workers.is_empty() {
            gang.workers = formed.places.iter().map(|&worker| (worker, false)).collect();
        }
        let is_broken = gang.is_broken;
        let takes = self.random.between(5, 800);
        self.plan_own(id, of, takes, RankTask::Built);
        if is_broken {
            self.plan_own(id, of, takes + 20, RankTask::PeerLost);
        }
    }

    /// A later formation has begun in the job's folder: right only for one that has ended.
    fn refused_folder(&mut self, id: u64, of: FormationId) {
        if self.is_running(of) {
            return self.violate(format!("{of}: its folder is a later one's"));
        }
        self.fail_all(id, of, "its folder is a later formation's");
    }

    pub(super) fn built(&mut self, id: u64, of: FormationId, formed: &Formed) {
        let Some(group) = self.group(id, of).filter(|group| group.state == GangState::Building) else {
            return;
        };
        group.state = GangState::Idle;
        if self.job_plan(of.job).is_some_and(|planned| planned.crashes) {
            return self.crash_worker(id);
        }
        if let Some(peer) = self.out_of_reach(id, formed.places.iter().copied()) {
            let peer = formed.ranks().find(|(_, worker)| *worker == peer).map(|(rank, _)| rank);
            return self.fail_apart(id, of, peer);
        }
        let Some(group) = self.group(id, of) else { return };
        let ranks = group.ranks.clone();
        if let Some(memory) = &formed.memory
            && !self.recover(id, of, formed, memory)
        {
            return;
        }
        for rank in ranks {
            self.send_event(id, of, RankEvent::Ready { rank });
        }
        self.repeat_reports(id, of);
    }

    pub(super) fn deliver_to_rank(&mut self, id: u64, to: RankAddress, command: RankCommand) {
        let RankAddress { formation: of, rank } = to;
        let Some(group) = self.group(id, of) else { return };
        let state = group.state;
        match command {
            RankCommand::BeginStep { step } if state == GangState::Idle => {
                group.begun += 1;
                if step != group.trained.step + 1 {
                    let words = format!("rank {rank} of {} is to begin step {step}", of.job);
                    return self.violate(words);
                }
                if group.begun == group.ranks.len() {
                    self.arrive(id, of);
                }
            }
            RankCommand::Stop { in_memory } => (group.stop, group.stops_in_memory) = (true, in_memory),
            RankCommand::Abort { .. } if state != GangState::Over || group.begun > 0 => {
                group.state = GangState::Over;
                self.send_event(id, of, RankEvent::Aborted { rank });
            }
            RankCommand::Validate if state == GangState::Idle => {
                let takes = self.random.between(1, 900);
                self.plan_own(id, of, takes, RankTask::Validated(rank));
            }
            RankCommand::Export { .. } if state == GangState::Idle => {
                let takes = self.random.between(1, 900);
                self.plan_own(id, of, takes, RankTask::Exported(rank));
            }
            _ => {}
        }
    }

    /// The ranks of a worker begin the next step; the last to do so lets it happen.
    fn arrive(&mut self, id: u64, of: FormationId) {
        let Some(group) = self.group(id, of) else { return };
        group.state = GangState::InStep;
        let trained = group.trained;
        let Some(gang) = self.gangs.get_mut(&of) else { return };
        if gang.workers.insert(id, true) != Some(true) {
            gang.waiting += 1;
        }
        if gang.waiting > 1 && gang.made != trained {
            let words = format!("ranks of {of} hold different states");
            return self.violate(words);
        }
        gang.made = trained;
        if gang.waiting == gang.workers.len() {
            let takes = self.step_ms(of);
            self.plan_in(takes, SimEvent::StepMade(of));
        }
    }

    fn step_ms(&mut self, of: FormationId) -> u64 {
        let step_ms = self.job_plan(of.job).map_or(100, |job| job.step_ms);
        let Some(gang) = self.gangs.get(&of) else { return step_ms };
        let is_slow =
            |id: &u64| self.workers.get(id).is_some_and(|worker| self.network.slow.contains(&worker.node));
        let step_ms = if !self.network.slow.is_empty() && gang.workers.keys().any(is_slow) {
            4 * step_ms
        } else {
            step_ms
        };
        step_ms + self.random.between(0, 20)
    }

    /// What the plan says of a job, by its number.
    pub(super) fn job_plan(&self, job: JobId) -> Option<&super::plan::SimJob> {
        self.plan.jobs.get(self.checks.planned(job)?)
    }

    /// All ranks have given what the step needs: it is made, or the watch stops it, on all of them alike.
    pub(super) fn step_made(&mut self, of: FormationId) {
        let Some(gang) = self.gangs.get(&of).filter(|gang| !gang.is_broken) else { return };
        let workers: Vec<u64> = gang.workers.keys().copied().collect();
        let stands = |worker: &super::worker::Worker| worker.is_frozen || worker.is_stalled;
        if workers.iter().any(|id| self.workers.get(id).is_none_or(stands)) {
            // All ranks wait for it.
            return self.plan_in(50, SimEvent::StepMade(of));
        }
        let waits = !self.breaks(Mutation::OutrunsBuddies);
        let (mut stops, mut in_memory, mut saves_again) = (false, false, false);
        for &id in &workers {
            match self.group(id, of) {
                // What a rank gives to the step says that its buddy has the one before.
                Some(group)
                    if waits && group.state == GangState::InStep && !group.unacknowledged.is_empty() =>
                {
                    return self.plan_in(5, SimEvent::StepMade(of));
                }
                Some(group) if group.state == GangState::InStep => {
                    stops |= group.stop;
                    in_memory |= group.stops_in_memory;
                    saves_again |= group.saves_again;
                }
                // Aborted: the others wait until they are, too.
                _ => return,
            }
        }
        let bad = self.job_plan(of.job).map(|planned| planned.bad.clone()).unwrap_or_default();
        let Some(gang) = self.gangs.get_mut(&of) else { return };
        let Trained { step, cursor, digest } = gang.made;
        let batch = cursor..cursor + BATCH;
        let digest = feed(digest, step + 1, cursor);
        gang.diverges = bad.iter().any(|sequence| batch.contains(sequence));
        (gang.stops, gang.stops_in_memory, gang.saves_again) = (stops, in_memory, saves_again);
        gang.made = Trained { step: step + 1, cursor: batch.end, digest };
        gang.waiting = 0;
        gang.workers.values_mut().for_each(|waits| *waits = false);
        let (made, diverges) = (gang.made, gang.diverges);
        self.report.steps += 1;
        self.note([20, of.job.bits(), made.step], || {
            format!(
                "{of}: step {} of sequences from {cursor} on{}",
                made.step,
                if diverges { " diverges" } else { "" }
            )
        });
        self.check_step(of, cursor, made, diverges);
        for id in workers {
            let takes = self.random.between(0, 12);
            self.plan_own(id, of, takes, RankTask::StepDone);
        }
    }

    /// A worker's ranks have the result of the step.
    pub(super) fn step_done(&mut self, id: u64, of: FormationId, formed: &Rc<Formed>) {
        let Some(gang) = self.gangs.get(&of) else { return };
        let (made, stops, diverges, saves_again) = (gang.made, gang.stops, gang.diverges, gang.saves_again);
        let in_memory = gang.stops_in_memory;
        let (every, steps) = self.job_plan(of.job).map_or((1, 0), |job| (job.every, job.spec.steps()));
        let Some(group) = self.group(id, of).filter(|group| group.state == GangState::InStep) else { return };
        group.state = GangState::Idle;
        let (ranks, is_saving) = (group.ranks.clone(), group.is_saving);
        if diverges {
            match is_saving {
                true => group.parked = Some(Parked::Diverge { cursor: made.cursor }),
                false => self.diverge(id, of, made.cursor),
            }
            return;
        }
        group.trained = made;
        let in_memory = stops && in_memory && made.step < steps;
        group.kept = in_memory.then_some(made.step);
        for &rank in &ranks {
            self.send_event(id, of, step_done(of.generation, rank, made.step));
            if stops && !in_memory {
                self.send_event(id, of, RankEvent::Stopped { rank, step: made.step, in_memory });
            }
        }
        let is_last = made.step >= steps || stops;
        if formed.buddies.is_empty() && made.step == formed.resume_step + 1 {
            self.forget_earlier(id, of, made.step);
        }
        if in_memory || !is_last && !formed.buddies.is_empty() {
            self.keep_step(id, of, formed, &ranks);
        }
        if is_last && !in_memory || saves_again || made.step.is_multiple_of(every) {
            self.save(id, of, !is_last);
        } else if !in_memory {
            self.arrive(id, of);
        }
        self.stop_if_kept(id, of);
    }

    /// The ranks stop whose last state is in memory, and who write nothing any more.
    pub(super) fn stop_if_kept(&mut self, id: u64, of: FormationId) {
        let Some(group) = self.group(id, of) else { return };
        if group.state == GangState::Idle
            && group.unacknowledged.is_empty()
            && !group.is_saving
            && let Some(step) = group.kept.take()
        {
            for rank in group.ranks.clone() {
                self.send_event(id, of, RankEvent::Stopped { rank, step, in_memory: true });
            }
        }
    }

    fn diverge(&mut self, id: u64, of: FormationId, cursor: u64) {
        let Some(group) = self.group(id, of) else { return };
        let step = group.trained.step + 1;
        for rank in group.ranks.clone() {
            let why = format!("step {step}: a spike");
            let divergence = Box::new(Divergence { step, action: StepAction::RollBack, why, evidence: None });
            self.send_event(id, of, RankEvent::Diverged { rank, divergence, cursor });
        }
    }

    fn save(&mut self, id: u64, of: FormationId, goes_on: bool) {
        let Some(group) = self.group(id, of) else { return };
        if group.is_saving {
            group.parked = Some(Parked::Save { goes_on });
            return;
        }
        (group.is_saving, group.is_last, group.saves_again) = (true, !goes_on, false);
        let (trained, ranks) = (group.trained, group.ranks.clone());
        let takes = self.random.between(1, 900);
        self.plan_own(id, of, takes, RankTask::Saved(Box::new((trained, ranks))));
        if goes_on {
            self.arrive(id, of);
        }
    }

    /// Shards are on disk; their writers may have left the formation meanwhile.
    pub(super) fn saved(&mut self, id: u64, of: FormationId, (trained, ranks): (Trained, Vec<Rank>)) {
        let FormationId { job, generation } = of;
        let node = self.workers.get(&id).map(|worker| worker.node);
        if node.is_some_and(|node| self.storage.full.contains(&node)) {
            return self.save_failed(id, of, (trained, ranks));
        }
        for &rank in &ranks {
            let Some(folder) = self.folder(job) else { return };
            folder.save(generation, rank, trained);
        }
        let Some(group) = self.group(id, of) else { return };
        let is_over = group.state == GangState::Over;
        group.is_saving = false;
        let parked = group.parked.take();
        for rank in ranks {
            let Trained { step, cursor, .. } = trained;
            let position = Position { step, cursor, tokens: cursor };
            let shard = ShardFile::default();
            self.send_event(
                id,
                of,
                RankEvent::ShardSaved { rank, position, watch: Default::default(), shard },
            );
        }
        self.go_on_after_save(id, of, parked.filter(|_| !is_over));
        self.stop_if_kept(id, of);
    }

    fn go_on_after_save(&mut self, id: u64, of: FormationId, parked: Option<Parked>) {
        match parked {
            Some(Parked::Save { goes_on }) => self.save(id, of, goes_on),
            Some(Parked::Diverge { cursor }) => self.diverge(id, of, cursor),
            None => {}
        }
    }

    /// Nothing could be written: the last save is tried again at once, others after the next step.
    fn save_failed(&mut self, id: u64, of: FormationId, (trained, ranks): (Trained, Vec<Rank>)) {
        let Some(group) = self.group(id, of).filter(|group| group.state != GangState::Over) else { return };
        let is_last = group.is_last;
        group.saves_again = true;
        let parked = if is_last { None } else { group.parked.take() };
        group.is_saving = is_last;
        for &rank in &ranks {
            let cause = "no space left".to_owned();
            self.send_event(id, of, RankEvent::SaveFailed { rank, step: trained.step, cause });
        }
        if is_last {
            let wait = self.random.between(1_000, 4_000);
            self.plan_own(id, of, wait, RankTask::Saved(Box::new((trained, ranks))));
        }
        self.go_on_after_save(id, of, parked);
    }

    pub(super) fn validated(&mut self, id: u64, of: FormationId, rank: Rank) {
        if self.group(id, of).is_some_and(|group| group.state == GangState::Idle) {
            self.check_part(of, rank, false);
            self.send_event(id, of, RankEvent::Validated { rank, loss: 0.5, tokens: 8 });
        }
    }

    pub(super) fn exported(&mut self, id: u64, of: FormationId, rank: Rank) {
        if self.group(id, of).is_some_and(|group| group.state == GangState::Idle) {
            let Some(folder) = self.folder(of.job) else { return };
            folder.export(of.generation, rank);
            self.check_part(of, rank, true);
            let file = ExportedFile { file: format!("rank-{rank}"), ..ExportedFile::default() };
            self.send_event(id, of, RankEvent::Exported { rank, file });
        }
    }
}
