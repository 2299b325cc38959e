//! What an orchestrator knows of a job, for whoever looks into it: its state, its recipe, where its files are, and what the orchestrator
//! itself has written into its log. Shows nothing.

use std::collections::VecDeque;
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::Owner;
use contraflow_runtime::topology::JobId;
use contraflow_workers::host::FILES_LINE;

use super::{Common, jobs};
use crate::failure::Failure;
use crate::interrupt;

/// How long all of it may take.
const MOST: Duration = Duration::from_secs(60);

/// Lines that are kept, the latest.
const LINES: usize = 2_000;

/// A job, as far as the orchestrator knows it.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Its state.
    pub job: v1::Job,
    /// Whose its folder is.
    pub owner: Option<Owner>,
    /// Resolved, TOML.
    pub recipe: String,
    /// Its folder in the storage, as the worker of rank 0 sees it; none before it has been formed.
    pub folder: Option<String>,
    /// What the orchestrator has written into its log, the earliest first.
    pub lines: Vec<v1::LogsResponse>,
}

/// Asks for all of it.
///
/// **Errors**: code 2 if there is no such job; code 1 if the orchestrator is out of reach.
pub fn known(common: &Common, job: &str) -> Result<Known, Failure> {
    let ask = async {
        let mut client = jobs(common).await?;
        let request = v1::GetRequest { job: job.to_owned(), with_recipe: true };
        let answer = client.get(request).await.map_err(|status| common.refused(&status))?;
        let v1::GetResponse { job: found, recipe, id, state } = answer.into_inner();
        let owner = Some(Owner { state, job: JobId::of(id) });
        let request = v1::LogsRequest { job: job.to_owned(), ..v1::LogsRequest::default() };
        let mut log = client.logs(request).await.map_err(|status| common.refused(&status))?.into_inner();
        let (mut folder, mut lines) = (None, VecDeque::new());
        while let Some(line) = log.message().await.map_err(|status| common.refused(&status))? {
            match &line.ranks[..] {
                [] => lines.push_back(line),
                [0] => folder = line.message.strip_prefix(FILES_LINE).map(str::to_owned).or(folder),
                _ => {}
            }
            if lines.len() > LINES {
                lines.pop_front();
            }
        }
        Ok(Known { job: found.unwrap_or_default(), owner, recipe, folder, lines: lines.into() })
    };
    let late =
        || Failure::run(format!("the orchestrator has not told all of {job} within {} s", MOST.as_secs()));
    interrupt::runtime()?
        .block_on(async { tokio::time::timeout(MOST, ask).await.unwrap_or_else(|_| Err(late())) })
}
