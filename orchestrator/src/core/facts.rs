//! What the orchestrator has decided, as plain values: kept in the event log, and folded into the state at the next start.
//!
//! A fact says what is so, not why: the rules may change between two versions of the program, the past does not.

use std::collections::BTreeSet;
use std::sync::Arc;

use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::Recipe;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank, Topology};
use serde::{Deserialize, Serialize};

use crate::metrics::goodput::Stop;
use crate::recovery::InMemory;
use crate::rollback::Checkpoint;

/// What a job takes besides the texts and lists of its recipe, and an entry of a list besides its text. **Units**: bytes.
const PER_JOB: usize = 4 << 10;
const PER_ENTRY: usize = 32;

/// A job as it was submitted. What the orchestrator has to know of the training it reads from the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SpecText", into = "SpecText")]
pub struct JobSpec {
    /// Display name.
    pub name: String,
    /// Jobs of a higher priority start first.
    pub priority: i32,
    /// Minimum number of ranks with which it starts and continues.
    pub min_ranks: usize,
    /// Maximum number of ranks to which it grows; none where that is less than the recipe's.
    pub max_ranks: usize,
    /// A second submission with the same key is the same job; empty: no key.
    pub key: String,
    /// Whose token submitted it; empty where nobody needs one.
    pub user: String,
    /// What is trained, and how.
    pub recipe: Arc<Recipe>,
    /// What the rank that needs most of it needs of memory at least, in bytes; 0: it goes wherever there is a slot.
    pub rank_bytes: u64,
    /// The span of its submission, as a W3C traceparent; empty without tracing.
    pub traceparent: String,
    /// The checkpoint that it begins with, if it does not begin at step 0.
    pub origin: Option<Origin>,
}

/// The checkpoint that a job begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The job whose checkpoint it is; `None`: the folder says where it is.
    pub job: Option<JobId>,
    /// The checkpoint's folder; empty if it is a job's.
    pub folder: String,
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// [`super::jobs::JobRecord::cursor`] of the job.
    pub cursor: u64,
}

impl JobSpec {
    /// The axes that the recipe asks for.
    pub fn topology(&self) -> Topology {
        self.recipe.topology()
    }

    /// The layouts that the recipe names; none: every one that it can be run on will do.
    pub fn named(&self) -> Vec<Topology> {
        self.recipe.elastic.named().collect()
    }

    /// How many ranks its named layouts have, from the fewest on, each number once.
    pub fn named_ranks(&self) -> Vec<usize> {
        let mut ranks: Vec<usize> = self.recipe.elastic.named().map(|axes| axes.world()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Steps of the recipe.
    pub fn steps(&self) -> u64 {
        self.recipe.training.steps as u64
    }

    /// What it takes in memory and in a snapshot, roughly. **Units**: bytes.
    pub fn bytes(&self) -> u64 {
        let Recipe { model, parallel, elastic, data, tokenizer, balance, mtp, model_config, .. } =
            &*self.recipe;
        let texts = [
            &self.name,
            &self.key,
            &self.user,
            &self.traceparent,
            &model.config,
            &model.init,
            &tokenizer.path,
            &data.field,
        ];
        let folder = self.origin.iter().map(|origin| &origin.folder);
        let texts = texts.into_iter().chain(folder).chain(&data.paths).chain(&data.validation);
        let texts = texts.map(|text| text.len() + PER_ENTRY).sum::<usize>();
        let entries = data.weights.len() + parallel.stages.layers().len() + model_config.eos_token_id.len();
        let entries =
            entries + balance.bias_speed.num_steps() + mtp.weight.num_steps() + elastic.layouts.len();
        (PER_JOB + texts + PER_ENTRY * entries) as u64
    }

    /// The recipe on the axes of a formation, which may have fewer ranks than were asked for.
    pub fn recipe_on(&self, axes: &Topology) -> Recipe {
        let mut recipe = (*self.recipe).clone();
        let Topology { pipeline, expert, data } = *axes;
        (recipe.parallel.pipeline, recipe.parallel.expert, recipe.parallel.data) = (pipeline, expert, data);
        recipe
    }
}

/// A job as it is kept: the recipe as TOML, so that a later version reads it like any other recipe.
#[derive(Serialize, Deserialize)]
struct SpecText {
    name: String,
    priority: i32,
    min_ranks: usize,
    #[serde(default)]
    max_ranks: usize,
    key: String,
    #[serde(default)]
    user: String,
    /// Resolved.
    recipe: String,
    /// HF config.json.
    model_config: String,
    rank_bytes: u64,
    #[serde(default)]
    traceparent: String,
    #[serde(default)]
    origin: Option<Origin>,
}

impl From<JobSpec> for SpecText {
    fn from(spec: JobSpec) -> Self {
        let JobSpec {
            name,
            priority,
            min_ranks,
            max_ranks,
            key,
            user,
            recipe,
            rank_bytes,
            traceparent,
            origin,
        } = spec;
        let (recipe, model_config) = (recipe.resolved_toml(), recipe.model_config.to_hf_json());
        SpecText {
            name,
            priority,
            min_ranks,
            max_ranks,
            key,
            user,
            recipe,
            model_config,
            rank_bytes,
            traceparent,
            origin,
        }
    }
}

impl TryFrom<SpecText> for JobSpec {
    type Error = String;

    fn try_from(text: SpecText) -> Result<Self, String> {
        let SpecText {
            name,
            priority,
            min_ranks,
            max_ranks,
            key,
            user,
            recipe,
            model_config,
            rank_bytes,
            traceparent,
            origin,
        } = text;
        let read = || {
            let model = ModelConfig::from_hf_json(&model_config)?;
            Recipe::submitted(&recipe, &name, &[], Some(model))
        };
        let recipe = read().map_err(|faults| format!("the recipe of the job {name:?}: {faults}"))?;
        let recipe = Arc::new(recipe);
        Ok(JobSpec {
            name,
            priority,
            min_ranks,
            max_ranks,
            key,
            user,
            recipe,
            rank_bytes,
            traceparent,
            origin,
        })
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Everything was done.
    Done,
    /// A rank could not continue.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// A formation: which ranks a job has, where they are and what they resume from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Formed {
    /// Count of (re)formations, from 1.
    pub generation: Generation,
    /// Axes of this formation.
    pub topology: Topology,
    /// By rank, the worker; see [`Formed::place_of`].
    pub places: Vec<u64>,
    /// Step that it resumes from; 0: a fresh start.
    pub resume_step: u64,
    /// Where the state of that step is, if it does not come from a checkpoint.
    #[serde(default)]
    pub memory: Option<InMemory>,
    /// By rank, the rank whose worker holds its replica; empty without replicas.
    #[serde(default)]
    pub buddies: Vec<Rank>,
    /// Sequences used, where that is more than the checkpoint says; else 0.
    pub cursor: u64,
    /// Measured peak of the cores that its ranks compute on; 0 if not measured. **Units**: FLOP/s.
    #[serde(default)]
    pub peak_flops: u64,
    /// [`JobSpec::rank_bytes`] with these axes.
    pub rank_bytes: u64,
    /// Whether it holds slots that a job before it in line waits for.
    pub on_loan: bool,
    /// The axes, and why it has these, in a sentence.
    #[serde(default)]
    pub layout: String,
}

impl Formed {
    /// The worker of a rank, if there is such a rank.
    pub fn place_of(&self, rank: Rank) -> Option<u64> {
        self.places.get(rank.index()).copied()
    }

    /// Its ranks and their workers, in order.
    pub fn ranks(&self) -> impl Iterator<Item = (Rank, u64)> {
        self.places.iter().enumerate().map(|(index, &worker)| (Rank::at(index), worker))
    }

    /// Workers without a rank of it that bring it the state it begins with, numbered after its ranks.
    pub fn bringers(&self) -> impl Iterator<Item = (Rank, u64)> {
        let all = self.memory.iter().flat_map(|memory| &memory.bringers);
        all.enumerate().map(|(index, &worker)| (Rank::at(self.places.len() + index), worker))
    }

    /// Everybody who has a part in it: the workers of its ranks, and those that bring it something.
    pub fn workers(&self) -> BTreeSet<u64> {
        self.places.iter().copied().chain(self.bringers().map(|(_, worker)| worker)).collect()
    }

    /// Whether a worker has a part in it.
    pub fn has(&self, worker: u64) -> bool {
        self.places.contains(&worker) || self.bringers().any(|(_, bringer)| bringer == worker)
    }

    /// As one of this job's.
    pub fn id(&self, job: JobId) -> FormationId {
        FormationId::new(job, self.generation)
    }
}

/// Something that is so from now on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum Fact {
    /// The id of the cluster's storage.
    StorageIdentified {
        /// The id.
        storage_id: String,
    },
    /// A job is in the queue.
    Submitted {
        /// Drawn and counted by the orchestrator.
        job: JobId,
        /// As it was submitted.
        spec: Box<JobSpec>,
        /// **Units**: milliseconds since 1970.
        at_ms: u64,
    },
    /// A job has its ranks.
    Formed {
        /// Was in line, or had lost its formation.
        job: JobId,
        /// The formation and its places.
        formed: Formed,
        /// **Units**: milliseconds since 1970.
        #[serde(default)]
        at_ms: u64,
    },
    /// A formation has ended, the job has not.
    Broken {
        /// Keeps its claim to ranks.
        job: JobId,
        /// Of the formation.
        generation: Generation,
        /// Ranks that were lost; none where the same workers re-form.
        lost: Vec<Rank>,
        /// The furthest step that it is known to have completed; else the one it resumed from.
        reached: u64,
        /// Whether it counts as failed: it completed no step, and no external cause ended it.
        idle: bool,
        /// Whether it completed no step because its storage could not be read.
        #[serde(default)]
        unreadable: bool,
        /// Whether a worker that stood still or was cut off ended it.
        #[serde(default)]
        paused: bool,
        /// Human-readable.
        why: String,
        /// **Units**: milliseconds since 1970.
        at_ms: u64,
        /// Where the formation stood.
        #[serde(default)]
        stop: Stop,
    },
    /// Ranks of a job that had lost its formation before are lost, too.
    RanksLost {
        /// Has not been formed again.
        job: JobId,
        /// Of the formation.
        generation: Generation,
        /// Held slots until now.
        lost: Vec<Rank>,
        /// Human-readable.
        why: String,
        /// **Units**: milliseconds since 1970.
        at_ms: u64,
    },
    /// A job has given up its place for one of a higher priority or because its node is drained, and is in the queue again.
    Requeued {
        /// Keeps its place among those of its priority.
        job: JobId,
        /// Human-readable.
        why: String,
        /// Where the formation stood.
        #[serde(default)]
        stop: Stop,
    },
    /// A job has stopped after a step, whose state is in memory, to go on at once in another layout or on other workers.
    Rearranged {
        /// Keeps its claim to ranks.
        job: JobId,
        /// How many ranks it is to have; 0: as many as it had.
        ranks: usize,
        /// Human-readable.
        why: String,
        /// **Units**: milliseconds since 1970.
        at_ms: u64,
        /// Where the formation stood.
        stop: Stop,
    },
    /// A job is to have so many ranks.
    Scaled {
        /// Has not ended.
        job: JobId,
        /// At most this many; 0: as it was submitted.
        ranks: usize,
    },
    /// The watch sent a job back to its newest checkpoint.
    RolledBack {
        /// Re-forms from there.
        job: JobId,
        /// Sequences used when it went.
        cursor: u64,
        /// Human-readable.
        why: String,
        /// Where the formation stood.
        #[serde(default)]
        stop: Stop,
    },
    /// A formation has made its first step, or the last of those that had been made before.
    Stepped {
        /// Whose latest formation it is.
        job: JobId,
        /// The step.
        step: u64,
        /// When it began. **Units**: milliseconds since 1970.
        #[serde(default)]
        began_ms: u64,
        /// When a rank had made it. **Units**: milliseconds since 1970.
        #[serde(default)]
        at_ms: u64,
    },
    /// A checkpoint is committed.
    CheckpointCommitted {
        /// In whose folder.
        job: JobId,
        /// Of the checkpoint.
        step: u64,
        /// Sequences used by then.
        #[serde(default)]
        cursor: u64,
    },
    /// The newest checkpoint of a job is damaged: the one before is the newest now.
    CheckpointDamaged {
        /// In whose folder.
        job: JobId,
        /// Of the damaged one.
        step: u64,
    },
    /// A job has ended.
    Ended {
        /// Known until it is forgotten.
        job: JobId,
        /// How.
        end: End,
        /// Human-readable.
        outcome: String,
        /// Mean loss of the validation sequences, in nats per token.
        validation_loss: Option<f64>,
        /// **Units**: milliseconds since 1970.
        at_ms: u64,
        /// Where its formation stood.
        #[serde(default)]
        stop: Stop,
    },
    /// A job that had failed or was cancelled is in the queue again.
    Retried {
        /// It goes on from its newest checkpoint.
        job: JobId,
        /// **Units**: milliseconds since 1970.
        #[serde(default)]
        at_ms: u64,
    },
    /// A finished job is removed with its data.
    Forgotten {
        /// No other one gets its id.
        job: JobId,
    },
    /// A node takes no ranks any more.
    Drained {
        /// Its label.
        node: String,
    },
    /// A drained node takes ranks again.
    Undrained {
        /// Its label.
        node: String,
    },
}

impl Fact {
    /// The job it is about, if it is about one.
    pub fn job(&self) -> Option<JobId> {
        match self {
            Fact::Submitted { job, .. }
            | Fact::Formed { job, .. }
            | Fact::Broken { job, .. }
            | Fact::RanksLost { job, .. }
            | Fact::Stepped { job, .. }
            | Fact::Requeued { job, .. }
            | Fact::Rearranged { job, .. }
            | Fact::Scaled { job, .. }
            | Fact::RolledBack { job, .. }
            | Fact::CheckpointCommitted { job, .. }
            | Fact::CheckpointDamaged { job, .. }
            | Fact::Ended { job, .. }
            | Fact::Retried { job, .. }
            | Fact::Forgotten { job } => Some(*job),
            Fact::StorageIdentified { .. } | Fact::Drained { .. } | Fact::Undrained { .. } => None,
        }
    }
}
