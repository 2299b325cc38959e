//! What a seed stands for: a cluster, jobs, and which faults happen how often. Every seed draws a subset of the faults, so
//! that some runs see one alone and some see all of them at once.

use std::sync::Arc;

use contraflow_runtime::recipe::{ElasticSection, Recipe, RecipeSource};
use contraflow_runtime::topology::Topology;

use super::random::Random;
use crate::core::facts::JobSpec;
use crate::core::{STALL_MS, Times, axes_overrides};

/// A fault, or a request of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SimFault {
    /// A worker's process dies; its connections are reset.
    Kill,
    /// A worker's host loses power silently.
    PowerLoss,
    /// A worker freezes and continues later as if nothing had happened.
    Freeze,
    /// The ranks of a worker stall while the worker itself lives.
    Hang,
    /// A stream between worker and orchestrator breaks.
    Break,
    /// A worker and the orchestrator cannot reach each other for a while.
    CutOff,
    /// Ranks of two workers cannot reach each other any more.
    Split,
    /// A worker computes slowly for a while.
    Slow,
    /// The orchestrator dies, and what it was writing may be lost.
    Crash,
    /// Another orchestrator is started while the one before lives on.
    Double,
    /// The orchestrator freezes for a while.
    Pause,
    /// The orchestrator's clock is set.
    Clock,
    /// The orchestrator's disk is slow for a while.
    Disk,
    /// A rank finds a defect.
    Defect,
    /// A job is cancelled.
    Cancel,
    /// A node is drained.
    Drain,
    /// The same job is submitted a second time.
    SubmitAgain,
    /// The orchestrator's state is lost, and it begins with another one.
    Loss,
    /// Nobody reaches the orchestrator for a while.
    Silence,
    /// A node cannot write to the storage for a while.
    Full,
    /// A part of the newest checkpoint of a job is damaged.
    Rot,
    /// The ranks of two nodes do not reach each other for a while, however often they try.
    Apart,
    /// Nothing passes between the orchestrator and any worker for a while, and no stream is closed.
    Mute,
    /// The orchestrator's disk takes nothing for a while.
    Unkept,
    /// A user says how many ranks a job is to have.
    Scale,
}

impl SimFault {
    /// All that a plan draws from, but for those that came later.
    pub(super) const ALL: [SimFault; 16] = [
        SimFault::Kill,
        SimFault::PowerLoss,
        SimFault::Freeze,
        SimFault::Break,
        SimFault::CutOff,
        SimFault::Split,
        SimFault::Slow,
        SimFault::Crash,
        SimFault::Double,
        SimFault::Pause,
        SimFault::Clock,
        SimFault::Disk,
        SimFault::Defect,
        SimFault::Cancel,
        SimFault::Drain,
        SimFault::SubmitAgain,
    ];

    /// How long it takes on the average until it happens, in a run in which it happens. **Units**: ms.
    fn mean_ms(self, random: &mut Random) -> u64 {
        match self {
            SimFault::Defect | SimFault::Cancel | SimFault::Drain => random.between(20_000, 90_000),
            SimFault::Double | SimFault::Clock => random.between(8_000, 40_000),
            SimFault::Hang => random.between(20_000, 60_000),
            SimFault::Loss => random.between(25_000, 90_000),
            SimFault::Silence | SimFault::Apart => random.between(10_000, 40_000),
            _ => random.between(2_000, 30_000),
        }
    }
}

/// A seed's plan.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Slots of the worker of each node.
    pub(super) nodes: Vec<usize>,
    pub(super) jobs: Vec<SimJob>,
    /// Faults, and the mean time between two of a kind. **Units**: ms.
    pub(super) faults: Vec<(SimFault, u64)>,
    /// When they stop. **Units**: ms.
    pub(super) calm_ms: u64,
    /// Within which time thereafter every job has to end, beside the work of all jobs. **Units**: ms.
    pub(super) settle_ms: u64,
    /// Of messages, mostly; one in sixteen takes up to `late_ms`. **Units**: ms.
    pub(super) delay_ms: u64,
    pub(super) late_ms: u64,
    /// Time that a write of the orchestrator takes at most. **Units**: ms.
    pub(super) sync_ms: u64,
    /// Whether some commit finds the storage full.
    pub(super) fills_up: bool,
    /// Checkpoints that a job keeps; the workers keep two at least.
    pub(super) keep: usize,
    /// Finished jobs to retain.
    pub(super) retained_jobs: usize,
    /// By which workers beat and are judged.
    pub(super) times: Times,
}

/// A job of the plan.
#[derive(Clone, Debug)]
pub(super) struct SimJob {
    pub(super) spec: JobSpec,
    /// When it is submitted. **Units**: ms.
    pub(super) at_ms: u64,
    pub(super) step_ms: u64,
    /// Steps between checkpoints.
    pub(super) every: u64,
    /// Sequences at which the watch sends the run back.
    pub(super) bad: Vec<u64>,
    /// Its ranks end their worker's process when they are made.
    pub(super) crashes: bool,
}

/// Sequences of a step.
pub(super) const BATCH: u64 = 4;

impl Plan {
    /// Of a seed.
    pub(super) fn draw(random: &mut Random) -> Self {
        let nodes: Vec<usize> = (0..random.between(3, 9)).map(|_| random.between(1, 4) as usize).collect();
        // Two nodes may be out of use, drained or spare, and still every job finds a place.
        let mut sizes = nodes.clone();
        sizes.sort_unstable();
        let room: usize = sizes[..sizes.len() - 2].iter().sum();
        let jobs: Vec<SimJob> =
            (0..random.between(1, 6)).map(|number| SimJob::draw(number, room, random)).collect();
        let strength = random.between(1, 5);
        let chosen: Vec<SimFault> =
            SimFault::ALL.into_iter().filter(|_| random.between(0, 6) < strength).collect();
        let mut faults: Vec<(SimFault, u64)> =
            chosen.into_iter().map(|fault| (fault, fault.mean_ms(random))).collect();
        // From here on draws of their own: seeds that showed something stay what they were.
        let mut later = random.clone();
        let calm_ms = random.between(30_000, 90_000);
        let (delay_ms, late_ms) = (random.between(2, 40), random.between(20, 900));
        let (sync_ms, keep) = (random.between(1, 30), random.between(2, 4) as usize);
        let retained_jobs = later.between(1, 7) as usize;
        let is_stalled = later.is_one_in(3);
        faults.extend(is_stalled.then(|| (SimFault::Hang, SimFault::Hang.mean_ms(&mut later))));
        let loses = later.is_one_in(4);
        faults.extend(loses.then(|| (SimFault::Loss, SimFault::Loss.mean_ms(&mut later))));
        let mut jobs = jobs;
        if later.is_one_in(6) {
            let crashes = later.between(0, jobs.len() as u64) as usize;
            jobs[crashes].crashes = true;
        }
        let is_silent = later.is_one_in(3);
        faults.extend(is_silent.then(|| (SimFault::Silence, SimFault::Silence.mean_ms(&mut later))));
        for fault in [SimFault::Full, SimFault::Rot, SimFault::Apart] {
            let happens = later.is_one_in(4);
            faults.extend(happens.then(|| (fault, fault.mean_ms(&mut later))));
        }
        let times = if later.is_one_in(4) {
            let beat_ms = later.between(100, 1_500);
            // A lease that a late beat outlasts loses workers for ever.
            let least = (3 * beat_ms).max(2 * beat_ms + late_ms);
            let lease_ms = later.between(least, 6_000);
            Times::new(beat_ms, Some(lease_ms)).unwrap_or_default()
        } else {
            Times::default()
        };
        let fails = later.is_one_in(3);
        faults.extend(fails.then(|| (SimFault::Unkept, SimFault::Unkept.mean_ms(&mut later))));
        for job in &mut jobs {
            let more = if later.is_one_in(2) { later.between(0, 8) as usize } else { 0 };
            job.spec.max_ranks += more;
        }
        let scales = later.is_one_in(3);
        faults.extend(scales.then(|| (SimFault::Scale, SimFault::Scale.mean_ms(&mut later))));
        if later.is_one_in(6) {
            for job in &mut jobs {
                job.name_layouts(&mut later);
            }
        }
        // Workers that hang are found one after the other.
        let hanging = if is_stalled { nodes.len() as u64 * (STALL_MS + 20_000) } else { 0 };
        // Commits that find the storage full are tried again, with growing pauses.
        let settle_ms = 240_000 + hanging;
        Plan {
            nodes,
            jobs,
            faults,
            calm_ms,
            settle_ms,
            delay_ms,
            late_ms,
            sync_ms,
            fills_up: true,
            keep,
            retained_jobs,
            times,
        }
    }

    /// One job that nothing happens to, but that the orchestrator and all workers do not hear each other for 20 s several times.
    pub(super) fn muted(random: &mut Random) -> Self {
        let mut plan = Plan::draw(random);
        let mut job = SimJob::draw(0, 4, random);
        (job.spec.min_ranks, job.spec.priority, job.step_ms) = (1, 0, 400);
        // All workers are there by then: it does not begin with fewer ranks and grow.
        (job.bad, job.at_ms) = (Vec::new(), 5_000);
        (plan.nodes, plan.jobs, plan.faults) = (vec![1; 6], vec![job], vec![(SimFault::Mute, 60_000)]);
        // A lease that is shorter than frames may be late loses workers by itself.
        let times = Times::default();
        Plan { calm_ms: 600_000, settle_ms: 240_000, fills_up: false, times, ..plan }
    }

    /// One job of this many ranks, eight per worker; workers die, streams break, the orchestrator restarts.
    pub(super) fn large(ranks: usize, steps: u64) -> Self {
        let mut random = Random::new(1);
        let mut job = SimJob::draw(0, 1, &mut random);
        let topology = Topology { pipeline: 1, expert: 8, data: ranks / 8 };
        job.spec.recipe = recipe(topology, &[format!("training.steps={steps}")]);
        (job.spec.min_ranks, job.spec.max_ranks, job.spec.priority) = (ranks, ranks, 0);
        (job.step_ms, job.every, job.bad, job.at_ms) = (500, 50, Vec::new(), 1_000);
        let faults = [
            (SimFault::Kill, 60_000),
            (SimFault::Freeze, 90_000),
            (SimFault::Break, 1_000),
            (SimFault::Crash, 120_000),
            (SimFault::Slow, 30_000),
        ];
        Plan {
            nodes: vec![8; ranks / 8 + 8],
            jobs: vec![job],
            faults: faults.to_vec(),
            calm_ms: 600 * steps,
            settle_ms: 1_000_000,
            delay_ms: 5,
            late_ms: 100,
            sync_ms: 10,
            fills_up: false,
            keep: 2,
            retained_jobs: 1,
            times: Times::default(),
        }
    }
}

impl SimJob {
    fn draw(number: u64, room: usize, random: &mut Random) -> Self {
        let steps = random.between(1, 120);
        let world = random.between(1, room as u64 + 1) as usize;
        let axes = random.pick(&[1, 2, 4]).filter(|axis| world.is_multiple_of(*axis)).unwrap_or(1);
        let step_ms = random.between(50, 700);
        let has_bad = random.is_one_in(3);
        let count = if has_bad { random.between(1, 4) } else { 0 };
        let bad = (0..count).map(|_| random.between(0, steps * BATCH + 1)).collect();
        let priority = random.between(0, 3) as i32 - 1;
        let min_ranks = random.between(1, world as u64 + 1) as usize;
        let key = if random.is_one_in(3) { String::new() } else { format!("key {number}") };
        let changes = [
            format!("training.steps={steps}"),
            format!("checkpoint.save_model={}", random.is_one_in(2)),
            format!("watch.max_skips={}", random.between(0, 4).max(1)),
        ];
        let recipe = recipe(Topology { pipeline: 1, expert: axes, data: world / axes }, &changes);
        let name = format!("job {number}");
        SimJob {
            spec: JobSpec {
                name,
                priority,
                min_ranks,
                max_ranks: world,
                key,
                user: String::new(),
                recipe,
                rank_bytes: 0,
                traceparent: String::new(),
                origin: None,
            },
            at_ms: random.between(0, 20_000),
            step_ms,
            every: random.between(1, 20),
            bad,
            crashes: false,
        }
    }
}

impl SimJob {
    /// Its recipe names some numbers of columns, its own among them, and it may have no others.
    fn name_layouts(&mut self, random: &mut Random) {
        let spec = &mut self.spec;
        let own = spec.topology();
        let columns = (1..=8).filter(|_| random.is_one_in(3)).filter(|data| *data != own.data);
        let named = columns.chain([own.data]).map(|data| [own.pipeline, own.expert, data]);
        let elastic = ElasticSection { layouts: named.collect() };
        spec.recipe = Arc::new(Recipe { elastic, ..(*spec.recipe).clone() });
        let ranks = spec.named_ranks();
        let (least, most) = (spec.min_ranks, spec.max_ranks);
        spec.min_ranks = ranks.iter().copied().find(|ranks| *ranks >= least).unwrap_or(own.world());
        spec.max_ranks = ranks.into_iter().rfind(|ranks| *ranks <= most).unwrap_or(own.world());
    }
}

/// Sequences of the largest batch that a recipe may have.
const MAX_BATCH: usize = 1 << 20;

/// A recipe that can be cut along data and experts in many ways, on these axes and with these changes.
fn recipe(axes: Topology, changes: &[String]) -> Arc<Recipe> {
    // 840 is divisible by 1 to 8: fewer ranks find a share too. Very large jobs do not shrink.
    let per_rank = 840.min(MAX_BATCH / axes.world());
    let batch = format!("training.global_batch_size={}", per_rank * axes.world());
    let fixed = ["parallel.schedule=1f1b", "training.micro_batch_size=1", &batch].map(str::to_owned);
    let changes = [&fixed[..], &axes_overrides(&axes), changes].concat();
    let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &changes);
    Arc::new(recipe.unwrap_or_else(|faults| panic!("the recipe of a simulated job: {faults}")))
}
