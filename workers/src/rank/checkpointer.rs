//! The checkpointer actor: the rank's hand on storage. Writes the rank's part of a checkpoint, and at the end the weights
//! that the rank answers for as published files.
//!
//! A published weight that several ranks hold is written by the first of its replica group, which gets the masters that others
//! keep. Knows
//! files and parameters; when something is saved is the rank's business.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::checkpoint::{CheckpointFolder, Position, ShardFile};
use contraflow_runtime::control::ExportedFile;
use contraflow_runtime::fabric::{Endpoint, StorageUse};
use contraflow_runtime::failpoint::failpoint;
use contraflow_runtime::model_config::{ModelConfig, WeightShape};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::RankMessage;
use crate::background::yield_to_training;
use crate::checkpoint::saves::backoff;
use crate::checkpoint::writers;
use crate::checkpoint::{Snapshot, shard_name, write_shard};
use crate::comm::address::StepId;
use crate::comm::collectives::Collectives;
use crate::engine::probe::{Probe, ProbePoint};
use crate::error::RankError;
use crate::hf::shard::{Entry, write_file};
use crate::model::params::{Param, Params, RankParams, gate_bias_name};

/// Messages of the checkpointer actor.
pub enum CheckpointerMessage {
    /// Write the rank's part of a checkpoint; the answer is [`RankMessage::Saved`].
    Save {
        /// Where checkpoints are kept.
        folder: CheckpointFolder,
        /// This rank.
        rank: usize,
        /// Position of the run.
        position: Position,
        /// What is written.
        snapshot: Box<Snapshot>,
        /// The rank uses its storage until it is written.
        storage: StorageUse,
        /// For how long a failure is tried again; each is reported as [`RankMessage::SaveFailed`].
        retry: Duration,
    },
    /// Write the weights; the answer is [`RankMessage::Exported`].
    Export {
        /// The folder; it exists.
        dir: PathBuf,
        /// Where checkpoints are kept beside it, if anywhere.
        folder: Option<CheckpointFolder>,
        /// The rank's end of the fabric.
        endpoint: Box<Endpoint>,
        /// The step after which this is done.
        id: StepId,
        /// All ranks of the job.
        world: usize,
        /// The model, for the names of shared tensors' copies.
        config: Box<ModelConfig>,
        /// The parameters, handed over for the time of writing.
        params: Box<RankParams>,
    },
}

/// The masters of parameters that several ranks keep parts of, by name, at the first rank of each replica group.
///
/// **Errors**: those of the fabric.
fn whole_masters(
    collectives: &Collectives,
    params: &RankParams,
) -> Result<HashMap<String, Tensor>, RankError> {
    let mut buckets: BTreeMap<usize, Vec<&Param>> = BTreeMap::new();
    let is_spread = |param: &&Param| param.is_narrow() && param.group.len() > 1;
    for param in params.dense.iter().chain(params.experts.iter()).filter(is_spread) {
        buckets.entry(param.bucket).or_default().push(param);
    }
    let mut masters = HashMap::new();
    for (bucket, members) in buckets {
        let own = members.iter().map(|param| param.master().clone().reshape(&[param.kept().len(), 1]));
        let lens: Vec<usize> = members.iter().map(|param| param.len()).collect();
        let group = (members[0].group.as_slice(), bucket);
        let whole = collectives.gather_at_first(group, own.collect(), &lens)?;
        let names = members.iter().map(|param| param.parts[0].name.clone());
        masters.extend(whole.into_iter().flat_map(|whole| names.clone().zip(whole)));
    }
    Ok(masters)
}

/// The tensors this rank writes.
fn entries<'a>(
    rank: usize,
    config: &ModelConfig,
    params: &'a RankParams,
    masters: &'a HashMap<String, Tensor>,
) -> Vec<Entry<'a>> {
    let mut entries = Vec::new();
    let copies: Vec<WeightShape> =
        config.weights().into_iter().filter(|weight| weight.tied_to.is_some()).collect();
    let mut add = |store: &'a Params| {
        for param in store.iter().filter(|param| param.group[0] == rank) {
            let master = masters.get(&param.parts[0].name).unwrap_or(param.master());
            for part in &param.parts {
                let values = master.view(part.range());
                let entry = |name: String| Entry { name, shape: part.shape.clone(), values };
                entries.push(entry(part.name.clone()));
                // The published files hold a copy of each tensor that the MTP layer shares with the main model.
                let copies = copies.iter().filter(|copy| copy.tied_to == Some(part.name.as_str()));
                entries.extend(copies.map(|copy| entry(copy.name.clone())));
            }
        }
    };
    add(&params.dense);
    add(&params.experts);
    for (&layer, bias) in &params.dense.gate_biases {
        if params.dense.gate_holders(layer).is_some_and(|holders| holders[0] == rank) {
            let values = bias.view(0..bias.len());
            entries.push(Entry { name: gate_bias_name(layer), shape: vec![bias.len()], values });
        }
    }
    entries
}

/// Writes the rank's weights, in F32, into its own file of the directory. Ranks that keep parts of them come to this together.
///
/// **Errors**: what the system says, with the path; those of the fabric.
pub fn export(
    dir: &Path,
    world: usize,
    config: &ModelConfig,
    params: &RankParams,
    collectives: &Collectives,
) -> Result<ExportedFile, RankError> {
    let rank = collectives.endpoint.rank();
    let masters = whole_masters(collectives, params)?;
    let entries = entries(rank, config, params, &masters);
    if entries.is_empty() {
        return Ok(ExportedFile::default());
    }
    let _writing = collectives.endpoint.use_storage();
    // Only some ranks write one: they are numbered through once all are there.
    write_file(dir, &format!("rank-{rank:05}-of-{world:05}.safetensors"), entries)
}

/// Writes a rank's part of a checkpoint into its folder.
///
/// **Errors**: what the system says, with the path, or that the storage is gone.
fn save(
    folder: &CheckpointFolder,
    (step, rank): (u64, usize),
    snapshot: Snapshot,
) -> Result<ShardFile, RankError> {
    let _writer = writers::begin(folder.path(), (step, rank))?;
    failpoint("checkpoint.write-begins");
    let dir = folder.make_unfinished(step)?;
    failpoint("checkpoint.folder-made");
    write_shard(&dir, &shard_name(rank), snapshot).map_err(|error| blame(folder, error))
}

/// A storage that went away while something was written is the cause of whatever else was said.
fn blame(folder: &CheckpointFolder, error: RankError) -> RankError {
    folder.verify().map_or_else(RankError::from, |()| error.in_storage())
}

/// The same, tried again for `retry` while storage fails, `failed`, which gets to know each failure, says that it is wanted, and
/// what the rank is about is not given up.
///
/// **Errors**: those of the last try.
fn save_until(
    folder: &CheckpointFolder,
    (step, rank): (u64, usize),
    snapshot: Snapshot,
    (retry, storage): (Duration, &StorageUse),
    failed: impl Fn(String) -> bool,
) -> Result<ShardFile, RankError> {
    if retry.is_zero() {
        return save(folder, (step, rank), snapshot);
    }
    let began = Instant::now();
    for failures in 0.. {
        match save(folder, (step, rank), snapshot.clone()) {
            Err(RankError::Storage { message }) if began.elapsed() < retry => {
                let wait = backoff(failures);
                let is_wanted = failed(format!("{message}; tried again in {} s", wait.as_secs()));
                let again = Instant::now() + wait;
                while is_wanted && Instant::now() < again && !storage.is_aborted() {
                    std::thread::sleep(Duration::from_millis(50));
                }
                if !is_wanted || storage.is_aborted() {
                    return Err(RankError::Storage { message });
                }
            }
            result => return result,
        }
    }
    unreachable!("a loop without an end")
}

/// The checkpointer actor.
pub struct Checkpointer;

impl Actor for Checkpointer {
    type Msg = CheckpointerMessage;
    type State = (ActorRef<RankMessage>, Probe);
    type Arguments = (ActorRef<RankMessage>, Probe);

    async fn pre_start(
        &self,
        _myself: ActorRef<CheckpointerMessage>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _myself: ActorRef<CheckpointerMessage>,
        message: CheckpointerMessage,
        (rank_actor, probe): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CheckpointerMessage::Save { folder, rank, position, snapshot, storage, retry } => {
                probe.at(ProbePoint::Actor { rank, step: position.step, name: "checkpointer" });
                let rank_actor = rank_actor.clone();
                let write = move || {
                    yield_to_training();
                    let watch = snapshot.watch.clone();
                    let id = (position.step, rank);
                    let failed = |cause| {
                        rank_actor.cast(RankMessage::SaveFailed { step: position.step, cause }).is_ok()
                    };
                    let result = RankError::catch(|| {
                        Ok((watch, save_until(&folder, id, *snapshot, (retry, &storage), failed)?))
                    });
                    // Whoever ends a job removes what is not finished after the ranks were told; what was made later is ours to remove.
                    if storage.is_aborted()
                        && let Err(error) = folder.drop_given_up(position.step)
                    {
                        tracing::warn!(
                            "{}: an unfinished checkpoint stays: {error}",
                            folder.path().display()
                        );
                    }
                    drop(storage);
                    // The rank may be gone if the job has ended.
                    drop(rank_actor.cast(RankMessage::Saved { position, result: Box::new(result) }));
                };
                // A thread of its own: a priority that has been lowered cannot be raised again.
                std::thread::Builder::new().name("checkpoint".into()).spawn(write)?;
            }
            CheckpointerMessage::Export { dir, folder, endpoint, id, world, config, params } => {
                let rank = endpoint.rank();
                probe.at(ProbePoint::Actor { rank, step: 0, name: "checkpointer" });
                let rank_actor = rank_actor.clone();
                tokio::task::spawn_blocking(move || {
                    let write = || {
                        let _at_work = endpoint.work();
                        folder.iter().try_for_each(CheckpointFolder::verify)?;
                        let collectives = Collectives { endpoint: &endpoint, id };
                        let exported = export(&dir, world, &config, &params, &collectives);
                        exported.map_err(|error| match &folder {
                            Some(folder) => blame(folder, error),
                            None => error,
                        })
                    };
                    let result = RankError::catch(write);
                    // The rank may be gone if the job has ended.
                    drop(rank_actor.cast(RankMessage::Exported { params, result }));
                });
            }
        }
        Ok(())
    }
}
