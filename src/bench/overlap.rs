//! `contraflow bench overlap`: how much of the all-to-alls nothing hides, with and without overlap, over links whose speed makes
//! communication a given share of computation; and what the virtual clock makes of the same durations.
//!
//! Two ranks of one thread each, so that no rank waits for a core and none computes while another one waits for it: DualPipeV on
//! one pipeline position, two expert ranks. Only frames of the passes take time. Runs with and without overlap alternate.
//!
//! Communication is all that an exchange takes: rows are copied out and in, and then there is the link. An exchange hides behind a part
//! of a layer's pair, so no order hides all of it where attention and experts differ much: the experts are as wide as makes both take
//! equally long on this machine.

mod measured;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use contraflow_orchestrator::job::Outcome;
use contraflow_runtime::fabric::{LinkSpeed, Links, LocalOptions, Phase};
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::{Component, Program, Work};
use contraflow_runtime::topology::Generation;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::engine::plans::{Planned, Plans};
use contraflow_workers::engine::probe::{Probe, ProbePoint};
use parking_lot::Mutex;
use serde::Serialize;

use self::measured::{Costs, Passes, is_exchange, median};
use super::{WARM_UP, seeded_datasets};
use crate::failure::Failure;
use crate::local::{LocalCluster, LocalClusterSpec};

const RANKS: usize = 2;
/// Communication over computation, where the user asks for no other.
pub(super) const RATIOS: [f64; 6] = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5];
/// Of each frame, and longer by up to [`JITTER`] of it.
const LATENCY: Duration = Duration::from_micros(50);
const JITTER: f64 = 0.25;
/// A row says nothing unless a run without overlap waits for this share of the links' time.
const LEAST_EXPOSED: f64 = 0.8;
/// Nor if its computations, with overlap or without, took longer than without links by more than this factor: something else ran.
const MOST_STRETCHED: f64 = 1.25;

/// Four mixture layers a stage, as in DeepSeek-V3's run; with 16 sequences of this length as many tokens in a micro-batch, too.
const RECIPE: &str = "small";
const CHANGES: [&str; 18] = [
    "model.vocab_size=512",
    "model.num_hidden_layers=8",
    "model.first_k_dense_replace=0",
    "model.n_routed_experts=8",
    "model.n_group=2",
    "model.topk_group=2",
    "model.num_experts_per_tok=2",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=8",
    "parallel.schedule=dualpipev",
    "parallel.expert=2",
    "parallel.threads_per_rank=1",
    "training.sequence_length=256",
    "training.validation_sequences=0",
    "memory.recompute=[]",
    "balance.bias_speed=0",
    "checkpoint.save_model=false",
    "watch.on_spike=warn",
];
/// Of a step, on both ranks together.
const MICRO_BATCHES: usize = 12;
/// Width of the experts with which attention and experts are timed first, and what widths are multiples of.
const FIRST_WIDTH: usize = 128;
const WIDTH_STEP: usize = 16;

/// What the command prints as JSON. Units are in the names.
#[derive(Debug, Serialize)]
pub(super) struct OverlapFigures {
    recipe: &'static str,
    schedule: &'static str,
    pipeline: usize,
    expert: usize,
    threads_per_rank: usize,
    cores: usize,
    /// Width with which the experts take as long as attention does.
    expert_width: usize,
    micro_batches: usize,
    micro_batch_sequences: usize,
    measured_steps: usize,
    rows: Vec<Row>,
}

/// One ratio; the passes of a step, medians over steps, means over ranks.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// Time of the exchanges, copies and links, over time of the computations without links.
    ratio: f64,
    overlap_s: f64,
    no_overlap_s: f64,
    /// What the compute lane works, in the run with overlap.
    compute_s: f64,
    /// What the links take in all.
    link_s: f64,
    /// Waits of the compute lane for exchanges, over the passes with overlap.
    exposed_share: f64,
    /// The same inside of pairs of a forward and a backward pass.
    exposed_in_pairs: f64,
    /// Of the links' time what the run without overlap waits for.
    no_overlap_exposed: f64,
    /// The passes with overlap on the virtual clock: the same programs, each operation as long as it took in the run.
    predicted_s: f64,
    /// What is exposed in pairs there.
    predicted_in_pairs: f64,
    /// The passes without overlap there.
    predicted_no_overlap_s: f64,
    /// Computations with links over those without.
    stretched: f64,
    /// The row says nothing: without overlap too little is exposed, so the links did not take what they should; or something else ran on
    /// the machine.
    void: bool,
}

/// Measures it.
///
/// **Errors**: code 2 without sequences, rounds or steps, for a ratio that is none, or with fewer cores than ranks; code 1 if a run fails.
pub(super) fn run(
    ratios: &[f64],
    sequences: usize,
    rounds: usize,
    steps: usize,
) -> Result<OverlapFigures, Failure> {
    if let Some(ratio) = ratios.iter().find(|ratio| !(0.01..=100.0).contains(*ratio)) {
        return Err(Failure::input(format!("--ratios: expected numbers from 0.01 to 100, got {ratio}")));
    }
    if sequences == 0 || rounds == 0 || steps == 0 {
        return Err(Failure::input("--sequences, --rounds and --steps: expected at least 1"));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores < RANKS {
        let message = format!(
            "expected a core for each of {RANKS} ranks, got {cores}: a rank would wait for another's work"
        );
        return Err(Failure::input(message));
    }
    let first = Bench::new((sequences, steps), FIRST_WIDTH)?.train(false, None)?;
    let (attention_s, experts_s) = halves(&first.passes);
    let width = FIRST_WIDTH as f64 * attention_s / experts_s;
    let bench =
        Bench::new((sequences, steps), WIDTH_STEP * ((width / WIDTH_STEP as f64).round() as usize).max(1))?;
    // Without links: what computations take, and what an exchange takes besides.
    let Trained { passes: free, bytes } = bench.train(false, None)?;
    let compute_s = median(free.iter().map(|passes| passes.compute_s).collect());
    let copies_s = bench.exchanges_s(&free);
    let least = copies_s / compute_s;
    if let Some(ratio) = ratios.iter().find(|ratio| **ratio <= least) {
        let message =
            format!("--ratios: expected more than {least:.2}, which copies alone take here, got {ratio}");
        return Err(Failure::input(message));
    }
    let mut rows = Vec::new();
    for &ratio in ratios {
        let link_s = ratio * compute_s - copies_s;
        let links = Links {
            only: Some(Phase::Train),
            jitter: JITTER,
            seed: 1,
            ..Links::even(LinkSpeed { bytes_per_s: bytes / link_s, latency: LATENCY })
        };
        let mut passes: [Vec<Passes>; 2] = Default::default();
        for _ in 0..rounds {
            passes[0].extend(bench.train(true, Some(&links))?.passes);
            passes[1].extend(bench.train(false, Some(&links))?.passes);
        }
        rows.push(bench.row((ratio, link_s), &free, &passes)?);
    }
    let recipe = bench.recipe(true)?;
    Ok(OverlapFigures {
        recipe: RECIPE,
        schedule: "dualpipev",
        pipeline: 1,
        expert: RANKS,
        threads_per_rank: 1,
        cores,
        expert_width: bench.width,
        micro_batches: recipe.micro_batches(recipe.training.global_batch_size),
        micro_batch_sequences: sequences,
        measured_steps: rounds * steps,
        rows,
    })
}

/// What computations of attention take in a step, and those of the experts. **Units**: seconds, medians over steps.
fn halves(passes: &[Passes]) -> (f64, f64) {
    let of = |components: &[Component]| {
        let of_step = |passes: &Passes| {
            let is_of = |work: &Work| matches!(work, Work::Component { component, .. } if components.contains(component));
            passes.took.iter().filter(|(work, _)| is_of(work)).map(|(_, took)| took).sum()
        };
        median(passes.iter().map(of_step).collect())
    };
    (of(&[Component::Attention]), of(&[Component::Experts, Component::SharedExpert]))
}

/// Of so many sequences in a micro-batch, so many steps, and experts of this width.
fn recipe(((sequences, steps), width): ((usize, usize), usize), overlap: bool) -> Result<Recipe, Failure> {
    let mut changes: Vec<String> = CHANGES.iter().map(|&change| change.to_owned()).collect();
    changes.push(format!("model.moe_intermediate_size={width}"));
    changes.push(format!("training.micro_batch_size={sequences}"));
    changes.push(format!("training.global_batch_size={}", MICRO_BATCHES * sequences));
    changes.push(format!("parallel.overlap={overlap}"));
    changes.push(format!("training.steps={}", WARM_UP + steps));
    Ok(Recipe::load(&RecipeSource::Builtin(RECIPE.to_owned()), &changes)?)
}

struct Bench {
    /// Sequences of a micro-batch, and measured steps of a run.
    size: (usize, usize),
    /// Of the experts.
    width: usize,
    /// The passes of a step, as the ranks run them, with overlap and without.
    programs: [(Arc<Planned>, Program); 2],
}

/// The measured steps of a run.
struct Trained {
    passes: Vec<Passes>,
    /// What a rank sends for the passes of a step, in the mean. **Units**: bytes.
    bytes: f64,
}

impl Bench {
    fn new(size: (usize, usize), width: usize) -> Result<Self, Failure> {
        let programs = |overlap| {
            let recipe = recipe((size, width), overlap)?;
            let mut plans = Plans::new(&recipe).map_err(Failure::run)?;
            let micro_batches = recipe.micro_batches(recipe.training.global_batch_size);
            let planned = plans.get(micro_batches, TaskKind::Train).map_err(Failure::run)?;
            let program = plans.passes(&planned.plan).remove(0);
            Ok::<_, Failure>((planned, program))
        };
        Ok(Bench { size, width, programs: [programs(true)?, programs(false)?] })
    }

    fn recipe(&self, overlap: bool) -> Result<Recipe, Failure> {
        recipe((self.size, self.width), overlap)
    }

    /// What all exchanges of a step take in runs without links and overlap. **Units**: seconds.
    fn exchanges_s(&self, free: &[Passes]) -> f64 {
        let program = &self.programs[1].1;
        let costs = Costs::of(program, free);
        program.ops.iter().filter(|op| is_exchange(op)).map(|op| costs.get(&op.work)).sum()
    }

    fn train(&self, overlap: bool, links: Option<&Links>) -> Result<Trained, Failure> {
        let recipe = self.recipe(overlap)?;
        let datasets = seeded_datasets(&recipe);
        let measured: Arc<Mutex<Vec<Passes>>> = Arc::default();
        let noted = measured.clone();
        let plan = self.programs[usize::from(!overlap)].0.plan.clone();
        let probe = Probe::new(move |point| {
            if let ProbePoint::Recorded { rank, step, recording, .. } = point
                && step > WARM_UP as u64
            {
                let (program, spans) = (&recording.programs[0], &recording.timeline.spans[0]);
                noted.lock().push(Passes::of(rank, program, spans, &plan.actions[0]));
            }
        });
        let spec = LocalClusterSpec {
            recipe: Arc::new(recipe),
            datasets: Arc::new(datasets),
            generation: Generation::FIRST,
            peak_flops: None,
            resume: None,
            checkpoints: None,
            export_dir: None,
            network: LocalOptions { links: links.cloned(), log_frames: true, ..LocalOptions::default() },
            flight: Recorders::default(),
            probe,
            subscribers: Vec::new(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failure::run(error.to_string()))?;
        let (outcome, frames) = runtime.block_on(async {
            let cluster = LocalCluster::start(spec).await.map_err(Failure::run)?;
            let network = cluster.network.clone();
            Ok::<_, Failure>((cluster.wait().await, network.frame_log()))
        })?;
        if !matches!(outcome, Outcome::Done { .. }) {
            return Err(Failure::run(format!("expected the steps to complete, got {outcome:?}")));
        }
        let of_passes = frames.iter().filter(|sent| sent.tag.phase == Phase::Train);
        let bytes: usize = of_passes.map(|sent| sent.bytes).sum();
        let bytes = bytes as f64 / (RANKS * (WARM_UP + self.size.1)) as f64;
        let passes = std::mem::take(&mut *measured.lock());
        Ok(Trained { passes, bytes })
    }

    fn row(
        &self,
        (ratio, link_s): (f64, f64),
        free: &[Passes],
        [with, without]: &[Vec<Passes>; 2],
    ) -> Result<Row, Failure> {
        let of = |passes: &[Passes], figure: fn(&Passes) -> f64| median(passes.iter().map(figure).collect());
        let predicted = |index: usize, passes: &[Passes]| {
            let (planned, program) = &self.programs[index];
            let exchanges = program.ops.iter().filter(|op| is_exchange(op)).count();
            let each = link_s / exchanges as f64 + (1.0 + JITTER / 2.0) * LATENCY.as_secs_f64();
            let costs = Costs::of(program, passes).with_exchanges(program, &Costs::of(program, free), each);
            costs.walk(program, &planned.plan.actions[0]).map_err(Failure::run)
        };
        let (overlapped, sequential) = (predicted(0, with)?, predicted(1, without)?);
        let no_overlap_exposed = of(without, |passes| passes.waits_s) / link_s;
        let compute_s = |passes: &[Passes]| of(passes, |passes| passes.compute_s);
        let stretched = compute_s(with).max(compute_s(without)) / compute_s(free);
        Ok(Row {
            ratio,
            overlap_s: of(with, |passes| passes.span_s),
            no_overlap_s: of(without, |passes| passes.span_s),
            compute_s: compute_s(with),
            link_s,
            exposed_share: of(with, |passes| passes.waits_s / passes.span_s),
            exposed_in_pairs: of(with, |passes| passes.pair_waits_s / passes.pairs_s),
            no_overlap_exposed,
            predicted_s: overlapped.span_s,
            predicted_in_pairs: overlapped.pair_waits_s / overlapped.pairs_s,
            predicted_no_overlap_s: sequential.span_s,
            stretched,
            void: no_overlap_exposed < LEAST_EXPOSED || stretched > MOST_STRETCHED,
        })
    }
}

impl fmt::Display for OverlapFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} with eight mixture layers, experts {} wide, {}, pipeline {}, expert {}, one thread a rank on {} cores: \
             {} micro-batches, medians over {} steps",
            self.recipe,
            self.expert_width,
            self.schedule,
            self.pipeline,
            self.expert,
            self.cores,
            self.micro_batches,
            self.measured_steps
        )?;
        writeln!(
            f,
            "{:>6} {:>10} {:>12} {:>10} {:>9} {:>9} {:>11} {:>9} {:>14}",
            "ratio",
            "overlap s",
            "no overlap s",
            "compute s",
            "exposed",
            "in pairs",
            "predicted s",
            "in pairs",
            "no overlap"
        )?;
        for row in &self.rows {
            let (exposed, in_pairs) = (100.0 * row.exposed_share, 100.0 * row.exposed_in_pairs);
            write!(
                f,
                "{:>6} {:>10.3} {:>12.3} {:>10.3} {exposed:>7.1} % {in_pairs:>7.1} % {:>11.3} {:>7.1} % {:>14.3}",
                row.ratio,
                row.overlap_s,
                row.no_overlap_s,
                row.compute_s,
                row.predicted_s,
                100.0 * row.predicted_in_pairs,
                row.predicted_no_overlap_s
            )?;
            if row.no_overlap_exposed < LEAST_EXPOSED {
                let of_links = 100.0 * row.no_overlap_exposed;
                write!(f, "  void: without overlap {of_links:.0} % of the links' time is exposed")?;
            } else if row.void {
                let times = row.stretched;
                write!(
                    f,
                    "  void: computations take {times:.2} times what they take without links, something else runs"
                )?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
