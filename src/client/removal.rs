//! The command that removes jobs with their files: jobs rm.

use contraflow_proto::v1;
use serde_json::json;

use super::{Common, jobs, show};
use crate::failure::Failure;
use crate::interrupt;

/// Arguments of `contraflow jobs rm`.
#[derive(clap::Args, Debug)]
pub struct Remove {
    /// Ids of the jobs
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<String>,
    /// Connection and output format
    #[command(flatten)]
    common: Common,
}

/// Removes one job after the other, and goes on past those that cannot be.
///
/// **Errors**: code 2 with every job that is not there or cannot be removed; code 1 if the orchestrator is out of reach.
pub fn remove(args: &Remove) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let mut client = jobs(&args.common).await?;
        let mut faults = Vec::new();
        for job in &args.jobs {
            match client.remove(v1::RemoveRequest { job: job.clone() }).await {
                Ok(_) => show(&args.common, &json!({"removed": job}), &format!("{job}: removed\n"))?,
                Err(status) => faults.push(args.common.refused(&status)),
            }
        }
        let code = faults.iter().map(|fault| fault.code).max();
        let words: Vec<String> = faults.into_iter().map(|fault| fault.message).collect();
        code.map_or(Ok(()), |code| Err(Failure { code, message: words.join("\n") }))
    })
}
