//! `contraflow export`: a run's model, or any HF directory of the architecture, as a Hugging Face directory.
//!
//! What is wrong with the model or the target is found before anything is written.

use std::path::{Path, PathBuf};

use contraflow_runtime::files::objects::{self, Location, Staging};
use contraflow_runtime::schedule::parse_bytes;
use contraflow_workers::hf::check::{Checked, check};
use contraflow_workers::hf::export::{Export, Written};
use contraflow_workers::hf::unfinished::{Journal, obstacle, staged};

use crate::failure::Failure;
use crate::import::dtype::Dtype;
use crate::import::{buffers_note, taken_up_note};
use crate::output::{count, print, say};
use crate::run_dir::{self, Wanted};

/// Arguments of `contraflow export`.
#[derive(clap::Args, Debug)]
pub struct ExportArgs {
    /// A run (its folder or its name), or an HF directory
    #[arg(default_value = "runs/latest")]
    pub model: String,
    /// The new folder, or a prefix in an object store (s3://, gs://, az://)
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Largest weight file, as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_bytes)]
    pub shard_size: u64,
    /// Write the moving average of the weights, out of the newest checkpoint (training.ema_decay)
    #[arg(long)]
    pub ema: bool,
    /// Data type of the written weights
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of model and target, nothing written; the same if writing failed, nothing left. If it is
/// killed, the same command goes on with the files that are not made yet.
pub fn run(args: &ExportArgs) -> Result<(), Failure> {
    let remote = args.to.to_str().and_then(Location::parse).transpose().map_err(Failure::input)?;
    let target_fault = match &remote {
        Some(location) => objects::target_fault(location).map(|fault| format!("--to: {fault}")),
        None => target_fault(&args.to),
    };
    let dir = run_dir::find_model(&args.model, Wanted::of(args.ema));
    let model = match dir.map_err(|fault| vec![fault]).and_then(|dir| Ok((checked(&dir, args.ema)?, dir))) {
        Ok(model) if target_fault.is_none() => model,
        model => {
            let faults: Vec<String> =
                target_fault.into_iter().chain(model.err().unwrap_or_default()).collect();
            return Err(Failure::faults("export", &faults));
        }
    };
    let (model, dir) = model;
    let export = Export {
        source: &model.weights,
        config: &model.config,
        config_json: args.dtype.config_json(&model.config.to_hf_json()).map_err(Failure::run)?,
        companions: &dir,
        format: args.dtype.format(),
        shard_bytes: args.shard_size,
    };
    let written = match &remote {
        Some(location) => publish(&export, location)?,
        None => staged(&args.to, &export.identity()?, |part, journal| export.write(part, journal))?,
    };
    taken_up_note(&written).iter().for_each(|note| say(format_args!("note: {note}")));
    buffers_note(&model.weights).iter().for_each(|note| say(format_args!("note: {note}")));
    print(&format!(
        "{}: {}, {:.1} MB in {}, {}\n",
        args.to.display(),
        count(written.num_tensors, "tensor"),
        written.bytes as f64 / 1e6,
        count(written.num_shards, "weight file"),
        args.dtype.name()
    ))
}

/// A directory without faults, with the average of its weights in their place if that is wanted.
fn checked(dir: &Path, averaged: bool) -> Result<Checked, Vec<String>> {
    let Checked { config, weights } = check(dir)?;
    let weights =
        if averaged { weights.averaged().map_err(|fault| vec![fault.to_string()])? } else { weights };
    Ok(Checked { config, weights })
}

/// Writes it beside what is fetched, then sends it; `config.json`, by which it is found, last.
fn publish(export: &Export, location: &Location) -> Result<Written, Failure> {
    let staging = Staging::create().map_err(|error| Failure::input(format!("{location}: {error}")))?;
    let written = export.write(staging.path(), &mut Journal::default())?;
    objects::publish(staging.path(), location, "config.json")?;
    Ok(written)
}

/// Why nothing can be written there.
fn target_fault(target: &Path) -> Option<String> {
    let reported = |message: String| Some(format!("--to: {}: {message}", target.display()));
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if target.file_name().is_none() {
        return reported("expected the name of a folder".into());
    }
    if !parent.is_dir() {
        return reported(format!("expected a folder {} to make it in, got none", parent.display()));
    }
    if let Some(obstacle) = obstacle(target) {
        return reported(obstacle);
    }
    match std::fs::read_dir(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => reported(error.to_string()),
        Ok(mut entries) => match entries.next() {
            Some(_) => reported("expected a new or an empty folder, got one with files in it".into()),
            None => None,
        },
    }
}
