//! The steps of a job as they are watched: reports of all ranks put together, each step once.

use std::collections::VecDeque;

use contraflow_proto::{LayerLoad, StepReport};
use contraflow_runtime::topology::{Generation, Topology};
use tokio::sync::watch;

use crate::core::facts::{Formed, JobSpec};
use crate::metrics::pace::{Change, Pace};
use crate::metrics::record::{Collector, JobConstants, StepRecord};

/// How far a job's kept steps go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepProgress {
    /// The latest step that is durable.
    pub step: u64,
    /// How often the job has gone back to a checkpoint, and to which step the last time: those after it come again.
    pub returns: u64,
    /// See `returns`.
    pub back_to: u64,
    /// Log lines so far.
    pub lines: u64,
    /// Nothing more will come.
    pub has_ended: bool,
}

/// Steps whose pace tells how long the rest will take.
const PACED: usize = 32;

/// The steps of one job.
pub struct Steps {
    collector: Collector,
    generation: Generation,
    /// The latest step that is complete.
    pub last: u64,
    /// Its loss.
    pub loss: Option<f64>,
    /// Its tokens per expert, layer by layer, if it was completed since this process began.
    pub loads: Vec<LayerLoad>,
    /// By rank, the latest step that it has reported.
    pub by_rank: Vec<u64>,
    /// By rank, the memory of its process at its latest step. **Units**: bytes.
    pub memory: Vec<u64>,
    /// How long they work and wait.
    pub pace: Pace,
    /// When the latest steps of this formation ended. **Units**: milliseconds since 1970.
    ended_ms: VecDeque<u64>,
    /// By rank, the workers of the latest formation and of the one before: its lines may come late.
    places: [Vec<u64>; 2],
    /// Wakes watchers.
    pub progress: watch::Sender<StepProgress>,
}

impl Steps {
    /// Of a job whose steps up to `last` are kept.
    pub fn new(last: u64, loss: Option<f64>, lines: u64, has_ended: bool) -> Self {
        Steps {
            collector: Collector::default(),
            generation: Generation::default(),
            last,
            loss,
            loads: Vec::new(),
            by_rank: Vec::new(),
            memory: Vec::new(),
            pace: Pace::new(Topology { pipeline: 0, expert: 0, data: 0 }),
            ended_ms: VecDeque::new(),
            places: Default::default(),
            progress: watch::Sender::new(StepProgress {
                step: last,
                lines,
                has_ended,
                ..StepProgress::default()
            }),
        }
    }

    /// The job has been formed.
    pub fn formed(&mut self, spec: &JobSpec, formed: &Formed) {
        let world = formed.places.len();
        let peak_flops = Some(formed.peak_flops as f64);
        self.collector.reform(JobConstants::new(&spec.recipe, world, peak_flops));
        self.generation = formed.generation;
        (self.by_rank, self.memory) = (vec![0; world], vec![0; world]);
        self.pace = Pace::new(formed.topology);
        self.ended_ms.clear();
        self.places.swap(0, 1);
        self.places[0].clone_from(&formed.places);
    }

    /// How long a step takes, with all that is between two: checkpoints, validation. **Units**: seconds. `None` before the second
    /// one of a formation.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let (first, last) = (self.ended_ms.front()?, self.ended_ms.back()?);
        let steps = self.ended_ms.len() - 1;
        (steps > 0).then(|| last.saturating_sub(*first) as f64 / 1e3 / steps as f64)
    }

    /// Whether a worker hosts a rank of the job, or did so in the formation before.
    pub fn hosts(&self, worker: u64, rank: u32) -> bool {
        self.places.iter().any(|places| places.get(rank as usize) == Some(&worker))
    }

    /// After a step, what has changed of which ranks hold the others up: the worker of each.
    pub fn judge(&mut self) -> Vec<(u64, Change)> {
        let [places, _] = &self.places;
        let changes = self.pace.judge().into_iter();
        changes.filter_map(|change| Some((*places.get(change.rank)?, change))).collect()
    }

    /// The job goes back to the checkpoint of this step: those after it are of a history that was left, and will be made
    /// again of other sequences.
    pub fn rolled_back(&mut self, to: u64) {
        self.collector.go_back();
        if to < self.last {
            (self.last, self.loss) = (to, None);
        }
    }

    /// Takes a report in; the record of its step, if that made it complete. A step that was complete before is recomputed
    /// after the loss of a rank: it is recorded once.
    pub fn record(&mut self, report: StepReport) -> Option<StepRecord> {
        if let Some(latest) = self.by_rank.get_mut(report.rank as usize) {
            *latest = (*latest).max(report.step);
        }
        if report.generation != self.generation.number() {
            return None;
        }
        self.pace.take(&report);
        if let Some(memory) = self.memory.get_mut(report.rank as usize) {
            *memory = report.memory_bytes;
        }
        if report.step <= self.last {
            return None;
        }
        let record = self.collector.record(report)?;
        (self.last, self.loss) = (record.step, Some(record.loss));
        self.ended_ms.push_back(record.unix_ms);
        if self.ended_ms.len() > PACED {
            self.ended_ms.pop_front();
        }
        self.loads.clone_from(&record.loads);
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use contraflow_runtime::recipe::{Recipe, RecipeSource};

    use super::*;

    fn spec() -> JobSpec {
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &["watch.collapse_steps=1".into()]);
        JobSpec {
            name: "job".into(),
            priority: 0,
            min_ranks: 1,
            max_ranks: 0,
            key: String::new(),
            user: String::new(),
            recipe: Arc::new(recipe.unwrap()),
            rank_bytes: 0,
            traceparent: String::new(),
            origin: None,
        }
    }

    fn formed(generation: u32, world: u64) -> Formed {
        let spec = spec();
        Formed {
            generation: Generation::new(generation),
            topology: spec.topology(),
            places: (0..world).collect(),
            resume_step: 0,
            memory: None,
            buddies: Vec::new(),
            cursor: 0,
            peak_flops: 1_000_000_000,
            rank_bytes: 0,
            on_loan: false,
            layout: String::new(),
        }
    }

    fn report(generation: u32, rank: u32, step: u64) -> StepReport {
        StepReport { generation, rank, step, tokens: 100, seconds: 2.0, loss: 3.0, ..StepReport::default() }
    }

    #[test]
    fn lines_of_a_rank_come_from_who_hosts_it_or_did_so_last() {
        let mut steps = Steps::new(0, None, 0, false);
        assert!(!steps.hosts(0, 0));
        steps.formed(&spec(), &Formed { places: vec![7, 8], ..formed(1, 2) });
        steps.formed(&spec(), &Formed { places: vec![9, 8], ..formed(2, 2) });
        let hosts = |steps: &Steps, rank| [7, 8, 9, 10].map(|worker| steps.hosts(worker, rank));
        assert_eq!(hosts(&steps, 0), [true, false, true, false]);
        assert_eq!(hosts(&steps, 1), [false, true, false, false]);
        assert_eq!(hosts(&steps, 2), [false; 4]);
        steps.formed(&spec(), &Formed { places: vec![10, 8], ..formed(3, 2) });
        assert_eq!(hosts(&steps, 0), [false, false, true, true]);
    }

    #[test]
    fn gates_are_watched_as_the_recipe_says() {
        let mut steps = Steps::new(0, None, 0, false);
        steps.formed(&spec(), &formed(1, 1));
        let loads = vec![LayerLoad { layer: 4, counts: vec![400, 0] }];
        let record = steps.record(StepReport { loads, ..report(1, 0, 1) }).unwrap();
        assert!(record.warnings[0].starts_with("layer 4: its gate collapses"), "{:?}", record.warnings);
    }

    #[test]
    fn the_pace_is_that_of_the_latest_steps_of_a_formation() {
        let mut steps = Steps::new(0, None, 0, false);
        steps.formed(&spec(), &formed(1, 1));
        let made = |steps: &mut Steps, generation, step, unix_ms| {
            drop(steps.record(StepReport { unix_ms, ..report(generation, 0, step) }));
            steps.seconds_per_step()
        };
        assert_eq!(made(&mut steps, 1, 1, 10_000), None);
        assert_eq!(made(&mut steps, 1, 2, 13_000), Some(3.0));
        assert_eq!(made(&mut steps, 1, 3, 14_000), Some(2.0));
        // Told again.
        assert_eq!(made(&mut steps, 1, 3, 90_000), Some(2.0));
        // Steps of an earlier formation say nothing of this one.
        steps.formed(&spec(), &formed(2, 1));
        assert_eq!(made(&mut steps, 2, 4, 50_000), None);
        let last = (5..=60).map(|step| made(&mut steps, 2, step, 50_000 + 500 * (step - 4))).last();
        assert_eq!(last.flatten(), Some(0.5));
    }

    #[test]
    fn a_record_has_its_rate_and_its_mfu() {
        let mut steps = Steps::new(0, None, 0, false);
        steps.formed(&spec(), &formed(1, 1));
        let record = steps.record(report(1, 0, 1)).unwrap();
        let flops_per_token = JobConstants::new(&spec().recipe, 1, None).flops_per_token;
        assert_eq!(record.tokens_per_second, 50.0);
        assert_eq!(record.mfu, Some(50.0 * flops_per_token / 1e9));
        steps.formed(&spec(), &Formed { peak_flops: 0, ..formed(2, 1) });
        assert_eq!(steps.record(report(2, 0, 2)).unwrap().mfu, None);
    }

    #[test]
    fn a_step_is_recorded_once_and_again_only_after_a_rollback() {
        let mut steps = Steps::new(0, None, 0, false);
        steps.formed(&spec(), &formed(1, 2));
        let make = |steps: &mut Steps, generation, step| {
            let first = steps.record(report(generation, 0, step));
            assert_eq!(first, None);
            steps.record(report(generation, 1, step)).map(|record| (record.generation, record.step))
        };
        assert_eq!([1, 2, 3].map(|step| make(&mut steps, 1, step)), [1, 2, 3].map(|step| Some((1, step))));
        steps.formed(&spec(), &formed(2, 2));
        assert_eq!(make(&mut steps, 1, 4), None, "of a formation that is over");
        assert_eq!([2, 3, 4].map(|step| make(&mut steps, 2, step)), [None, None, Some((2, 4))]);
        steps.rolled_back(2);
        assert_eq!((steps.last, steps.loss), (2, None));
        steps.formed(&spec(), &formed(3, 2));
        assert_eq!([2, 3].map(|step| make(&mut steps, 3, step)), [None, Some((3, 3))]);
    }
}
