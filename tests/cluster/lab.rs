//! Runs small clusters for the tests beside it: a model of nine layers, generated text, recipes by layout.
//!
//! One cluster at a time, whatever the number of test threads: some tests measure time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use contraflow::local::{LocalCluster, LocalClusterSpec};
use contraflow_kernels::host::HostValues;
use contraflow_orchestrator::job::Outcome;
use contraflow_orchestrator::job_actor::Commits;
use contraflow_orchestrator::metrics::Subscriber;
use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::fabric::{
    Formation, Listener, LocalNetwork, LocalOptions, SentFrame, Transport, WiredNetwork,
};
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::topology::{FormationId, Generation, JobId};
use contraflow_workers::checkpoint::Checkpoint;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::engine::probe::Probe;
use contraflow_workers::engine::timelines::Timelines;
use contraflow_workers::model::params::{Param, RankParams};
use tempfile::TempDir;

/// No run of these tests takes longer than a few seconds; one that hangs fails here.
const DEADLINE: Duration = Duration::from_secs(60);

static ALONE: Mutex<()> = Mutex::new(());

/// Sizes of the axes and the schedule.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub schedule: &'static str,
    pub pipeline: usize,
    pub expert: usize,
    pub data: usize,
}

/// A layout, with the sizes in the order pipeline, expert, data.
pub fn layout(schedule: &'static str, (pipeline, expert, data): (usize, usize, usize)) -> Layout {
    Layout { schedule, pipeline, expert, data }
}

pub const ONE_RANK: Layout = Layout { schedule: "1f1b", pipeline: 1, expert: 1, data: 1 };

/// DualPipe on two pipeline ranks and two expert ranks: the layout of the default recipe.
pub const FOUR_RANKS: Layout = Layout { schedule: "dualpipe", pipeline: 2, expert: 2, data: 1 };

const SEQUENCE_LENGTH: usize = 6;

/// Weights are large, and the seed, of the first thousand, is the one that keeps every token furthest from a tie between
/// experts (`margins`): 3e-4.
const RECIPE: &str = r#"
[model]
config = "config.json"

[training]
steps = 5
sequence_length = 6
global_batch_size = 16
micro_batch_size = 1
validation_sequences = 4
init_std = 0.2
seed = 427

[lr]
peak = 1e-3

[balance]
bias_speed = 0.001
sequence_alpha = 0.05

[mtp]
weight = 0.3

[checkpoint]
save_model = false
"#;

/// Eight layers, three of them dense, so that DualPipeV has one for each stage on four pipeline ranks, and MTP.
const MODEL: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": null, "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1, "initializer_range": 0.02, "hidden_act": "silu", "attention_bias": false,
    "attention_dropout": 0.0, "tie_word_embeddings": false
}"#;

/// A folder with a recipe and its model, and nothing else running meanwhile.
pub struct Lab {
    _alone: MutexGuard<'static, ()>,
    dir: TempDir,
}

/// What is run.
pub struct Setup {
    pub recipe: Arc<Recipe>,
    pub datasets: Arc<Datasets>,
    pub resume: Option<Arc<Checkpoint>>,
    pub checkpoints: Option<Commits>,
    pub export_dir: Option<PathBuf>,
    pub network: LocalOptions,
    /// What carries the frames if every rank is as if in a process of its own.
    pub wire: Option<Transport>,
    pub probe: Probe,
    /// Also receives every step, and may panic in the metrics actor.
    pub subscriber: Option<Subscriber>,
    /// Cancel with this reason once the token says so.
    pub cancel: Option<(Arc<tokio::sync::Notify>, &'static str)>,
}

/// What a run leaves.
pub struct Finished {
    pub outcome: Outcome,
    pub records: Vec<StepRecord>,
    pub frame_log: Vec<SentFrame>,
    /// Frames in any inbox that were not received.
    pub num_waiting: usize,
    pub elapsed: Duration,
    /// From the cancellation, if there was one.
    pub since_cancel: Option<Duration>,
    /// What the ranks have recorded of the last steps.
    pub timelines: Timelines,
}

impl Finished {
    /// The losses, of a run that went well.
    pub fn losses(&self) -> Vec<f64> {
        assert!(matches!(self.outcome, Outcome::Done { .. }), "{:?}", self.outcome);
        self.records.iter().map(|record| record.loss).collect()
    }

    /// What a run that went wrong says.
    pub fn message(&self) -> &str {
        match &self.outcome {
            Outcome::Failed { message, .. } => message,
            Outcome::Diverged { divergence, .. } => &divergence.why,
            outcome => panic!("expected a run that failed, got {outcome:?}"),
        }
    }
}

impl Lab {
    /// Waits until no other test runs a cluster.
    pub fn new() -> Self {
        // A test that failed holding the lock leaves nothing behind that another could trip over.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), MODEL).unwrap();
        std::fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
        Lab { _alone: alone, dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The recipe in a layout, with changes to any of its keys.
    pub fn recipe(&self, layout: Layout, changes: &[&str]) -> Arc<Recipe> {
        let Layout { schedule, pipeline, expert, data } = layout;
        let mut overrides = vec![
            format!("parallel.schedule={schedule}"),
            format!("parallel.pipeline={pipeline}"),
            format!("parallel.expert={expert}"),
            format!("parallel.data={data}"),
        ];
        overrides.extend(changes.iter().map(|&change| change.to_owned()));
        let source = RecipeSource::File(self.path().join("recipe.toml"));
        Arc::new(Recipe::load(&source, &overrides).unwrap())
    }

    /// A run of a layout with changes to the recipe; the network logs frames.
    pub fn setup(&self, layout: Layout, changes: &[&str]) -> Setup {
        Setup {
            recipe: self.recipe(layout, changes),
            datasets: datasets(),
            resume: None,
            checkpoints: None,
            export_dir: None,
            network: LocalOptions { log_frames: true, ..LocalOptions::default() },
            wire: None,
            probe: Probe::default(),
            subscriber: None,
            cancel: None,
        }
    }

    /// Runs a cluster to its end.
    pub fn run(&self, setup: Setup) -> Finished {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let finished = runtime.block_on(async { tokio::time::timeout(DEADLINE, run(setup)).await });
        // A lane that a test has put to sleep must not hold up the end of the test.
        runtime.shutdown_background();
        finished.expect("the run hangs")
    }
}

async fn run(setup: Setup) -> Finished {
    let Setup {
        recipe,
        datasets,
        resume,
        checkpoints,
        export_dir,
        network,
        wire,
        probe,
        subscriber: another,
        cancel,
    } = setup;
    let records: Arc<Mutex<Vec<StepRecord>>> = Arc::default();
    let received = records.clone();
    let subscriber = move |record: &StepRecord| received.lock().unwrap().push(record.clone());
    let mut subscribers: Vec<Subscriber> = vec![Box::new(subscriber)];
    subscribers.extend(another);
    let began = Instant::now();
    let wires = wire.map(|transport| wires(transport, recipe.topology().world())).unwrap_or_default();
    let spec = LocalClusterSpec {
        generation: Generation::FIRST,
        peak_flops: None,
        recipe,
        datasets,
        resume,
        checkpoints,
        export_dir,
        network,
        flight: Recorders::default(),
        probe,
        subscribers,
    };
    let join = |local: &Arc<LocalNetwork>, rank: usize| {
        wires.get(rank).map_or_else(|| local.join(rank), |wire| wire.join(rank).unwrap())
    };
    let cluster = LocalCluster::start_over(spec, join).await.unwrap();
    let network: Arc<LocalNetwork> = cluster.network.clone();
    let timelines = cluster.timelines();
    let mut cancelled = None;
    if let Some((when, reason)) = cancel {
        let canceller = cluster.canceller();
        when.notified().await;
        cancelled = Some(Instant::now());
        canceller(reason);
    }
    let outcome = cluster.wait().await;
    std::thread::scope(|scope| wires.iter().for_each(|wire| drop(scope.spawn(|| wire.close()))));
    Finished {
        outcome,
        records: std::mem::take(&mut records.lock().unwrap()),
        frame_log: network.frame_log(),
        num_waiting: network.num_waiting(),
        elapsed: began.elapsed(),
        since_cancel: cancelled.map(|at| at.elapsed()),
        timelines,
    }
}

/// The part of each rank in a formation of processes that host one rank each.
fn wires(transport: Transport, world: usize) -> Vec<Arc<WiredNetwork>> {
    let listen = |_| Listener::bind("127.0.0.1:0".parse().unwrap(), Duration::from_secs(10)).unwrap();
    let listeners: Vec<Listener> = (0..world).map(listen).collect();
    let ranks: Vec<_> = listeners.iter().map(Listener::address).collect();
    let part = |(rank, listener): (usize, &Listener)| {
        let (ranks, local, timeout) = (ranks.clone(), vec![rank], DEADLINE);
        let id = FormationId::new(JobId::default(), Generation::FIRST);
        let (secret, delay_injection) = ([3; 32], None);
        let formation =
            Formation { id, secret, ranks, local, timeout, transport, delay_injection, links: None };
        let on_fault = |fault| panic!("a fault in a run that goes well: {fault:?}");
        WiredNetwork::form(listener, formation, Arc::new(on_fault)).unwrap()
    };
    listeners.iter().enumerate().map(part).collect()
}

/// Sentences of a small vocabulary in a seeded order: something can be learnt from them.
fn datasets() -> Arc<Datasets> {
    let words =
        ["stage", "rank", "expert", "token", "flows", "waits", "for", "the", "a", "other", "first", "last"];
    let mut state = 7_u64;
    let mut text = |num_words: usize| {
        let mut text = Vec::new();
        for _ in 0..num_words {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.extend(words[(state >> 33) as usize % words.len()].bytes());
            text.push(b' ');
        }
        PackedDataset::pack(&[Document { name: "text".into(), text }], SEQUENCE_LENGTH)
    };
    Arc::new(Datasets { train: text(400), validation: text(20) })
}

/// Tensors by published name.
pub type Tensors = BTreeMap<String, Vec<f64>>;

/// Adds a rank's gradients of a bucket to those of the others; what several ranks hold is summed.
pub fn add_gradients(sums: &mut Tensors, params: &RankParams, bucket: usize) {
    for (param, part) in parts(params).filter(|(param, _)| param.bucket == bucket) {
        let sum = sums.entry(part.name.clone()).or_insert_with(|| vec![0.0; part.len()]);
        if let Some(gradient) = &param.grad {
            let gradient = &gradient.values::<f32>()[part.range()];
            sum.iter_mut().zip(gradient).for_each(|(sum, &value)| *sum += f64::from(value));
        }
    }
}

/// Every published tensor a rank holds.
pub fn parts(
    params: &RankParams,
) -> impl Iterator<Item = (&Param, &contraflow_workers::model::params::PublishedTensor)> {
    let all = params.dense.iter().chain(params.experts.iter());
    all.flat_map(|param| param.parts.iter().map(move |part| (param, part)))
}
