//! `contraflow submit`: a recipe, or what a job or run has come to, becomes a job of a cluster.

use contraflow_proto::v1;
use contraflow_runtime::recipe::{Recipe, RecipeSource, paths_override};
use contraflow_runtime::topology::JobId;
use contraflow_runtime::trace::SPAN;
use serde_json::json;

use super::{Common, jobs, show};
use crate::failure::Failure;
use crate::resume::ToResume;
use crate::{interrupt, telemetry};

/// Arguments of `contraflow submit`.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// A built-in recipe, or the path of a recipe file; with --resume that of the job or run if not given
    #[arg(required_unless_present = "resume")]
    pub recipe: Option<String>,
    /// Change a key of the recipe: section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Files or folders to train on, below the workers' data root, which this machine does not look into; or in object stores, where
    /// the workers allow it
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub data: Vec<String>,
    /// Name of the job; the recipe's name if not given
    #[arg(long)]
    pub name: Option<String>,
    /// Begin with the newest checkpoint of a job that has ended, or with one of a run or in a folder that is below the workers'
    /// storage or data root
    #[arg(long, value_name = "JOB|DIR")]
    pub resume: Option<String>,
    /// Jobs of a higher priority start first and preempt lower ones
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,
    /// Minimum number of ranks with which the job starts and continues where there are no more [default: those of the recipe, or of the smallest
    /// layout that it names]
    #[arg(long, value_name = "N")]
    pub min_ranks: Option<u32>,
    /// Maximum number of ranks to which the job grows into slots that nobody else has a use for [default: those of the recipe, or of
    /// the largest layout that it names]
    #[arg(long, value_name = "N")]
    pub max_ranks: Option<u32>,
    /// A second submission with the same key is answered with the job of the first
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Let ranks go wherever there is a slot, although their memory looks too small: what they need is an estimate
    #[arg(long)]
    pub force: bool,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

/// What `contraflow submit` asks for.
fn submission(args: &Arguments) -> Result<v1::SubmitRequest, Failure> {
    let mut overrides = args.overrides.clone();
    if !args.data.is_empty() {
        overrides.push(paths_override(&args.data));
    }
    let source = args.recipe.as_deref().map(RecipeSource::parse);
    let is_job = |name: &&String| JobId::parse_number(name).is_some();
    let job = args.resume.as_ref().filter(is_job);
    let run =
        args.resume.as_ref().filter(|name| !is_job(name)).map(|name| ToResume::open(name)).transpose()?;
    let mut name = source.as_ref().map_or_else(String::new, RecipeSource::name);
    let (recipe, model_config) = match (&source, &run) {
        (Some(source), _) => Recipe::to_submit(source, &overrides)?,
        (None, Some(run)) => {
            name.clone_from(&run.name);
            run.to_submit(&std::mem::take(&mut overrides))?
        }
        // The orchestrator knows the job's.
        (None, None) => Default::default(),
    };
    let of_job = |job: &String| v1::ResumeFrom { job: job.clone(), ..v1::ResumeFrom::default() };
    let resume = run.as_ref().map(ToResume::resume_from).or_else(|| job.map(of_job));
    Ok(v1::SubmitRequest {
        recipe,
        overrides,
        model_config,
        name: args.name.clone().unwrap_or(name),
        priority: args.priority,
        idempotency_key: args.key.clone().unwrap_or_default(),
        min_ranks: args.min_ranks.unwrap_or(0),
        max_ranks: args.max_ranks.unwrap_or(0),
        resume,
        force: args.force,
    })
}

/// Runs `contraflow submit`.
///
/// **Errors**: code 2 with every fault of the recipe; code 1 if the orchestrator is out of reach.
pub fn run(args: &Arguments) -> Result<(), Failure> {
    let request = submission(args)?;
    let _spans = telemetry::init_client("contraflow-submit")?;
    let _submit = tracing::info_span!(target: SPAN, "submit", otel.kind = "client").entered();
    interrupt::runtime()?.block_on(async {
        let mut jobs = jobs(&args.common).await?;
        let job = jobs.submit(request).await.map_err(|status| args.common.refused(&status))?.into_inner().job;
        show(&args.common, &json!({"job": job}), &format!("{job}\n"))
    })
}
