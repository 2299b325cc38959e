//! `contraflow bench load`: an orchestrator under many submissions, many workers and many finished jobs.
//!
//! Orchestrator and workers are those of `cluster`; no worker gets a rank.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use serde::Serialize;
use tokio::task::JoinSet;
use v1::job_service_client::JobServiceClient;

use super::cluster::{BEAT, CLIENTS, ROUND, Server, answer, cancel, fake, submit};
use crate::failure::Failure;
use crate::interrupt;

/// Rounds: finished jobs in the end, in thousands.
const ROUNDS: usize = 10;

/// Lists of jobs that are asked for.
const LISTS: usize = 50;

/// Fake workers.
const WORKERS: u64 = 1_000;

/// For how long their load is measured.
const WATCHED: Duration = Duration::from_secs(20);

/// What the orchestrator made of it.
#[derive(Debug, Serialize)]
pub(super) struct LoadFigures {
    clients: usize,
    /// Each one durable: the median and the slowest of the rounds.
    submissions_per_second_median: f64,
    submissions_per_second_slowest: f64,
    finished_jobs: usize,
    /// A page of 100 jobs.
    list_ms_median: f64,
    list_ms_longest: f64,
    workers: u64,
    /// Share of one core, with a beat of each worker a second.
    cores: f64,
}

/// Measures it.
///
/// **Errors**: code 1 if the orchestrator cannot be started or does not answer.
pub(super) fn run() -> Result<LoadFigures, Failure> {
    let server = Server::start()?;
    interrupt::runtime()?.block_on(async {
        let jobs = JobServiceClient::new(server.channel().await?);
        let mut rates = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let names = submit(&jobs).await?;
            rates.push(ROUND as f64 / began.elapsed().as_secs_f64());
            cancel(&jobs, names).await?;
        }
        rates.sort_by(f64::total_cmp);
        let mut times = Vec::new();
        for _ in 0..LISTS {
            let began = Instant::now();
            let listed =
                jobs.clone().list(v1::ListRequest::default()).await.map_err(|status| answer(&status))?;
            assert_eq!(listed.into_inner().jobs.len(), 100, "a page of the list");
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let share = beats(&server).await?;
        Ok(LoadFigures {
            clients: CLIENTS,
            submissions_per_second_median: rates[ROUNDS / 2],
            submissions_per_second_slowest: rates[0],
            finished_jobs: ROUND * ROUNDS,
            list_ms_median: 1e3 * times[LISTS / 2],
            list_ms_longest: 1e3 * times[LISTS - 1],
            workers: WORKERS,
            cores: share,
        })
    })
}

impl fmt::Display for LoadFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:.0} submissions/s (median of {ROUNDS} rounds of {ROUND}; slowest {:.0}), {} at a time, each durable",
            self.submissions_per_second_median, self.submissions_per_second_slowest, self.clients
        )?;
        writeln!(
            f,
            "list of 100 among {} finished jobs: {:.1} ms median, {:.1} ms longest",
            self.finished_jobs, self.list_ms_median, self.list_ms_longest
        )?;
        writeln!(
            f,
            "{} workers that beat once a second: {:.0}% of one core",
            self.workers,
            100.0 * self.cores
        )
    }
}

/// The share of a core that the orchestrator takes while many workers beat.
async fn beats(server: &Server) -> Result<f64, Failure> {
    let mut streams = JoinSet::new();
    for worker in 1..=WORKERS {
        let channel = server.channel().await?;
        streams.spawn(fake(channel, worker, "127.0.0.1:1".into(), Arc::default()));
    }
    tokio::time::sleep(3 * BEAT).await;
    let (began, before) = (Instant::now(), server.cpu());
    tokio::time::sleep(WATCHED).await;
    let share = (server.cpu() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    if let Some(ended) = streams.try_join_next() {
        return Err(Failure::run(format!("a worker's stream has ended: {ended:?}")));
    }
    Ok(share)
}
