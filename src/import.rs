//! `contraflow import`: a Hugging Face directory becomes a run, after every file and tensor of it has been checked.

pub mod dtype;

use std::path::{Path, PathBuf};

use contraflow_runtime::files::{self, objects, sync_dir};
use contraflow_runtime::model_config::ModelConfig;
use contraflow_workers::data::model_tokenizer::tokenizer_files;
use contraflow_workers::data::tokenizer;
use contraflow_workers::error::RankError;
use contraflow_workers::hf::check::check;
use contraflow_workers::hf::export::{Export, ExportFormat, Written};
use contraflow_workers::hf::unfinished::{Journal, staged};
use contraflow_workers::hf::weights::HfWeights;

use self::dtype::{Dtype, QUANTIZATION};
use crate::failure::Failure;
use crate::output::{count, print, quoted, say};
use crate::run_dir;

/// Largest weight file of an imported model.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Arguments of `contraflow import`.
#[derive(clap::Args, Debug)]
pub struct ImportArgs {
    /// The HF directory
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the run's folder in runs/; the directory's name if not given
    #[arg(long)]
    pub name: Option<String>,
    /// Data type of the run's weights [default: what they are; f32 if they are FP8]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of the directory, nothing written; the same if writing failed, nothing left. If it is killed,
/// the same command goes on with the files that are not made yet.
pub fn run(args: &ImportArgs) -> Result<(), Failure> {
    let args = &ImportArgs { dir: objects::fetch(&args.dir)?, name: args.name.clone(), ..*args };
    let name = run_name(args)?;
    let checked = check(&args.dir).map_err(|faults| Failure::faults("import", &faults))?;
    let config = args.dir.join("config.json");
    let notes = [config_note(&config), buffers_note(&checked.weights), tokenizer_note(&args.dir)];
    let text = files::read_to_string(&config)
        .map_err(|error| Failure::input(format!("{}: {error}", config.display())))?;
    let (config_json, numbers_note) = match args.dtype {
        Some(dtype) => (dtype.config_json(&text).map_err(Failure::input)?, None),
        None => without_quantization(text),
    };
    let export = Export {
        source: &checked.weights,
        config: &checked.config,
        config_json,
        companions: &args.dir,
        format: args.dtype.map_or(ExportFormat::AsIs, Dtype::format),
        shard_bytes: SHARD_BYTES,
    };
    let becomes = export.identity()?;
    let make = |run: &Path| {
        staged(run, &becomes, |part, journal| write(&export, part, journal)).map_err(ImportError)
    };
    let (run, written) = run_dir::adopt(Path::new(run_dir::RUNS), &name, make)?;
    let taken_up = taken_up_note(&written);
    notes
        .iter()
        .flatten()
        .chain(&numbers_note)
        .chain(&taken_up)
        .for_each(|note| say(format_args!("note: {note}")));
    let (next, run) = (quoted(run.display()), run.display());
    print(&format!(
        "{run}: {}, {:.1} MB, every one checked\n\
         next: contraflow eval {next} --data TEXT   contraflow generate {next}   contraflow train RECIPE --init {next}\n",
        count(written.num_tensors, "tensor"),
        written.bytes as f64 / 1e6
    ))
}

/// What is said of tensors that are no weights.
pub fn buffers_note(weights: &HfWeights) -> Option<String> {
    let first = weights.buffers().first()?;
    let more = match weights.buffers().len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!("{first}{more}: skipped, as config.json implies them"))
}

/// What is said of files that an earlier process had made.
pub fn taken_up_note(written: &Written) -> Option<String> {
    let (taken_up, all) = (written.num_taken_up, count(written.num_shards, "weight file"));
    (taken_up > 0).then(|| format!("{taken_up} of {all} had been made before this was stopped, and are kept"))
}

/// What is said of keys of a `config.json` that change nothing.
pub fn config_note(config: &Path) -> Option<String> {
    // One that cannot be read is a fault, and reported as such.
    let ignored = ModelConfig::ignored_keys(&files::read_to_string(config).ok()?);
    (!ignored.is_empty())
        .then(|| format!("{}: keys without effect: {}", config.display(), ignored.join(", ")))
}

/// What is said of a tokenizer that is not read.
fn tokenizer_note(dir: &Path) -> Option<String> {
    let files = tokenizer_files(dir).ok().filter(|files| !files.is_empty())?;
    let is_read = files.iter().any(|file| file == tokenizer::FILE);
    (!is_read).then(|| {
        format!(
            "{} has {} and no tokenizer.json: eval and generate need one in the run's model folder",
            dir.display(),
            files.join(", ")
        )
    })
}

/// The configuration of weights that are written as numbers, and what is said of those that came in FP8.
fn without_quantization(text: String) -> (String, Option<String>) {
    let Ok(serde_json::Value::Object(mut config)) = serde_json::from_str(&text) else { return (text, None) };
    if config.remove(QUANTIZATION).is_none_or(|value| value.is_null()) {
        return (text, None);
    }
    let note = "FP8 weights become f32, and config.json has no quantization_config any more";
    (format!("{:#}\n", serde_json::Value::Object(config)), Some(note.to_owned()))
}

/// An error on the way into a run's folder.
struct ImportError(RankError);

impl From<std::io::Error> for ImportError {
    fn from(source: std::io::Error) -> Self {
        ImportError(RankError::File { path: run_dir::RUNS.into(), source })
    }
}

impl From<ImportError> for Failure {
    fn from(ImportError(error): ImportError) -> Self {
        error.into()
    }
}

fn run_name(args: &ImportArgs) -> Result<String, Failure> {
    let own = || args.dir.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = args.name.clone().or_else(own).unwrap_or_else(|| "import".into());
    run_dir::check_name(&name)?;
    Ok(name)
}

fn write(export: &Export, part: &Path, journal: &mut Journal) -> Result<Written, RankError> {
    let model = part.join("model");
    let file_error = RankError::file(&model);
    files::make_dir(&model).map_err(&file_error)?;
    let written = export.write(&model, journal)?;
    sync_dir(&model).map_err(&file_error)?;
    Ok(written)
}
