//! `contraflow scale`: how many ranks a job is to have from now on.

use contraflow_proto::v1;

use super::{Common, job_json, jobs, show, state_of};
use crate::failure::Failure;
use crate::interrupt;

/// Arguments of `contraflow scale`.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// Id of the job
    pub job: String,
    /// As many ranks as it is to have at most; auto: it grows and shrinks with the cluster, as it was submitted
    #[arg(long, value_name = "N|auto", value_parser = parse_ranks)]
    pub ranks: u32,
    /// Connection and output format
    #[command(flatten)]
    pub common: Common,
}

/// 0 stands for `auto`.
fn parse_ranks(text: &str) -> Result<u32, String> {
    match text {
        "auto" => Ok(0),
        _ => text
            .parse()
            .ok()
            .filter(|ranks| *ranks > 0)
            .ok_or_else(|| "expected a number from 1 on, or auto".into()),
    }
}

/// Runs `contraflow scale`.
///
/// **Errors**: code 2 if there is no such job, it has ended, or cannot be run on so few ranks; code 1 if the orchestrator is out of
/// reach.
pub fn run(args: &Arguments) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let request = v1::ScaleRequest { job: args.job.clone(), ranks: args.ranks };
        let answer =
            jobs(&args.common).await?.scale(request).await.map_err(|status| args.common.refused(&status))?;
        let job = answer.into_inner().job.unwrap_or_default();
        let text = format!("{} {}: {} to {} ranks\n", job.job, state_of(&job), job.min_ranks, job.max_ranks);
        show(&args.common, &job_json(&job), &text)
    })
}
