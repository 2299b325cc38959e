//! `contraflow train`: a recipe in, a run's folder out. A run is in `run`, resuming one in `resume`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use contraflow_runtime::files::objects::{Location, fetch};
use contraflow_runtime::layout::MemoryLimit;
use contraflow_runtime::recipe::{Recipe, RecipeSource, path_override, paths_override};
use contraflow_runtime::trace::SPAN;
use contraflow_workers::data::batches::TaskKind;
use contraflow_workers::data::from_recipe::{Text, load_text};
use contraflow_workers::engine::plans::{Plans, train_shape};
use contraflow_workers::hf::check;

use crate::dashboard::{Door, DoorArgs, Subject};
use crate::failure::Failure;
use crate::import::config_note;
use crate::machine::check_memory;
use crate::otlp::metrics::Exporter;
use crate::output::{count, print, quoted, say};
use crate::plan::pictures::Pictures;
use crate::resume::Resumed;
use crate::run::Run;
use crate::telemetry::webhook::WebhookArgs;
use crate::{run_dir, telemetry};

/// Arguments of `contraflow train`.
#[derive(clap::Args, Debug)]
pub struct TrainArgs {
    /// A built-in recipe, or the path of a recipe file; with --resume the run's own if not given [default: tiny]
    pub recipe: Option<String>,
    /// Change a key of the recipe: section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Files or folders to train on, instead of the default corpus: text, JSONL, JSON, Parquet (also in gzip, zstd, bzip2), or
    /// prepared folders; also in an object store (s3://, gs://, az://, https://)
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub data: Vec<String>,
    /// Start from the weights of a run or of an HF directory, with a fresh optimizer; also its model, unless model.config
    /// names another or the recipe is a file, which says its own
    #[arg(long, value_name = "RUN|DIR")]
    pub init: Option<String>,
    /// Name of the run's folder in runs/; the recipe's name if not given
    #[arg(long)]
    pub name: Option<String>,
    /// Resume a run from its newest checkpoint, from the given checkpoint folder, or from s3://, gs:// or az://
    #[arg(long, value_name = "RUN", num_args = 0..=1, default_missing_value = "runs/latest", conflicts_with = "name")]
    pub resume: Option<String>,
    /// Pictures of the last step.
    #[command(flatten)]
    pub pictures: Pictures,
    /// Where the run can be looked at while it trains.
    #[command(flatten)]
    pub dashboard: DoorArgs,
    /// Who is told what happens to the run.
    #[command(flatten)]
    pub webhook: WebhookArgs,
    /// Train although memory looks too small: what ranks need is an estimate
    #[arg(long)]
    pub force: bool,
    /// Print the recipe with every key resolved, and stop
    #[arg(long)]
    pub print_recipe: bool,
}

/// Runs the command.
///
/// **Errors**: code 2 with every fault of recipe, data and checkpoint at once; code 1 if the run failed; 130 if it was
/// interrupted.
pub fn run(args: &TrainArgs) -> Result<(), Failure> {
    if let Some(name) = &args.name {
        run_dir::check_name(name)?;
    }
    args.pictures.check()?;
    let overrides = overrides(args)?;
    let resumed = args.resume.as_deref().map(Resumed::open).transpose()?;
    let (name, mut recipe) = match (&args.recipe, &resumed) {
        (None, Some(resumed)) => (resumed.name(), resumed.recipe(&overrides)?),
        (recipe, _) => {
            let source = RecipeSource::parse(recipe.as_deref().unwrap_or("tiny"));
            (source.name(), Recipe::load(&source, &overrides)?)
        }
    };
    let name = args.name.clone().unwrap_or(name);
    if resumed.is_none() && !args.print_recipe {
        // A recipe's file may have a name that no run can have.
        run_dir::check_name(&name)?;
    }
    if let (Some(dir), None) = (recipe.model.init_dir(), &resumed) {
        check::check_against(&recipe.model_config, &fetch(dir)?).map_err(|faults| {
            let mut failure = Failure::faults("model.init", &faults);
            failure.message += &config_hint(args, &recipe, dir);
            failure
        })?;
    }
    if args.print_recipe {
        return print(&recipe.resolved_toml());
    }
    let webhook = args.webhook.open()?;
    let _spans = telemetry::init(recipe.log.level, "contraflow-train")?;
    let metrics = Exporter::open("contraflow-train")?;
    let _train = tracing::info_span!(target: SPAN, "train").entered();
    let began = Instant::now();
    let (text, datasets) =
        load_text(&recipe).map_err(|faults| Failure::faults(faults.key, &faults.faults))?;
    recipe.model_config.eos_token_id = text.tokenizer.end_ids(&recipe.model_config.eos_token_id);
    text.corpus.warnings.iter().for_each(|warning| say(format_args!("warning: {warning}")));
    match &resumed {
        Some(resumed) => resumed.check(&recipe, &text.corpus.hash)?,
        None => say_of_start(&recipe, &text),
    }
    // What is refused is refused also where nothing is left to do.
    if let Some(done) = resumed.as_ref().and_then(|resumed| nothing_to_do(resumed, &recipe)) {
        return print(&done);
    }
    recipe.tokenizer = text.tokenizer_section.clone();
    print_fallbacks(&recipe)?;
    let warning = check_memory(&recipe, MemoryLimit::of_process(), args.force)?;
    warning.iter().for_each(|words| say(format_args!("warning: {words}")));
    let door = Door::open(&args.dashboard)?;
    let run = match resumed {
        Some(resumed) => Run::resume(resumed, recipe, text)?,
        None => Run::create(&name, recipe, text)?,
    };
    let run = run.telling(webhook)?;
    let subject = Subject::of_runs(vec![run.shown()]);
    let _dashboard = door.map(|door| door.serve(subject.clone())).transpose()?.inspect(|dashboard| {
        say(format_args!("dashboard: {}", dashboard.url()));
    });
    let source = async move || subject.metrics(None).await.ok();
    let _metrics = metrics.map(|exporter| exporter.start(source)).transpose()?;
    let datasets = Arc::new(datasets);
    let trained = run.train(&datasets, &args.pictures);
    run.ended(trained.and_then(|tally| run.finish(&datasets, tally, began)))
}

/// What a fresh run takes along or leaves out.
fn say_of_start(recipe: &Recipe, text: &Text) {
    let of_config = config_note(Path::new(&recipe.model.config));
    let of_layouts = (!recipe.elastic.layouts.is_empty()).then(|| {
        "elastic.layouts is for jobs of a cluster: this run stays in the layout of parallel".to_owned()
    });
    let notes = of_config.iter().chain(&of_layouts).chain(&text.notes);
    notes.for_each(|note| say(format_args!("note: {note}")));
}

/// What the command line changes in the recipe.
///
/// **Errors**: code 2 if there is no model where `--init` says.
fn overrides(args: &TrainArgs) -> Result<Vec<String>, Failure> {
    let mut overrides = args.overrides.clone();
    if !args.data.is_empty() {
        overrides.push(paths_override(&args.data));
    }
    if let Some(model) = &args.init {
        let dir = run_dir::find_model(model, run_dir::Wanted::Model).map_err(Failure::input)?;
        let named = if Location::is(model) { Path::new(model) } else { &dir };
        // In front: what the user sets by hand comes last and holds.
        overrides.insert(0, path_override("model.init", named));
        // A recipe of the user's own says which model it is for; a built-in one is taken for all else that it says.
        if !is_own_recipe(args) {
            overrides.insert(0, path_override("model.config", &dir.join("config.json")));
        }
    }
    Ok(overrides)
}

fn is_own_recipe(args: &TrainArgs) -> bool {
    args.recipe.as_deref().is_some_and(|recipe| matches!(RecipeSource::parse(recipe), RecipeSource::File(_)))
}

/// The way out where the weights are of another model than the user's recipe.
fn config_hint(args: &TrainArgs, recipe: &Recipe, dir: &Path) -> String {
    if args.init.is_none() || !is_own_recipe(args) {
        return String::new();
    }
    let config = dir.join("config.json");
    format!(
        "\nthe recipe's own model counts ({}); --set model.config={} takes that of the weights",
        recipe.model.config,
        quoted(config.display())
    )
}

/// What is said of a run that has made all its steps and ended; its checkpoint is there, and so is its model, if it wants one.
fn nothing_to_do(resumed: &Resumed, recipe: &Recipe) -> Option<String> {
    let (run, manifest) = (&resumed.run, &resumed.checkpoint.manifest);
    let is_whole = run.join("summary.json").is_file()
        && (!recipe.checkpoint.save_model || run.join("model/config.json").is_file());
    // Only the run's newest checkpoint is resumed in its own folder.
    if !is_whole || resumed.lock.is_none() {
        return None;
    }
    let (step, dir) = (manifest.position.step, quoted(run.display()));
    if step >= recipe.training.steps as u64 {
        let made = count(step, "step");
        return Some(format!("nothing to do: {dir} has made its {made}; --set training.steps=N goes on\n"));
    }
    let patience = recipe.validate.patience;
    manifest.watch.validation.is_exhausted(patience).then(|| {
        format!(
            "nothing to do: {dir} has ended after step {step}, as its validation loss had not fallen {} in a row; \
             a larger validate.patience goes on, 0 makes all steps\n",
            count(patience, "time")
        )
    })
}

/// Makes and checks every plan that the run will need, and notes where a fallback runs.
fn print_fallbacks(recipe: &Recipe) -> Result<(), Failure> {
    let mut plans = Plans::new(recipe).map_err(Failure::input)?;
    for size in recipe.batch_sizes() {
        let shape = train_shape(recipe, size);
        plans.get(shape.micro_batches, TaskKind::Train).map_err(Failure::input)?;
    }
    recipe.fallbacks().iter().for_each(|note| say(format_args!("note: {note}")));
    Ok(())
}
