//! What is shown: runs, or the jobs of a cluster; and its metrics, for pages and for a collector alike.

use std::sync::Arc;

use contraflow_orchestrator::server::Front;
use tokio::sync::Semaphore;
use tonic::Status;

use super::cluster::figures::{MAX_JOBS, of_cluster};
use super::cluster::{Cluster, Viewer, api};
use super::metrics;
use super::shown::Shown;
use crate::otlp::families::Metrics;

/// Live streams at once.
pub const MAX_VIEWERS: usize = 64;

/// Where it is from.
pub enum Source {
    /// These runs.
    Runs(Vec<Arc<Shown>>),
    /// The jobs of a cluster.
    Cluster(Arc<Cluster>),
}

/// What is shown, and room for those who follow it live.
pub struct Subject {
    /// Where it is from.
    pub source: Source,
    /// As many permits as there may be more viewers.
    pub viewers: Arc<Semaphore>,
}

impl Subject {
    /// These runs.
    pub fn of_runs(runs: Vec<Arc<Shown>>) -> Arc<Self> {
        Subject::new(Source::Runs(runs))
    }

    /// The jobs of an orchestrator in this process.
    pub fn of_cluster(front: Front) -> Arc<Self> {
        Subject::new(Source::Cluster(Arc::new(Cluster::new(front))))
    }

    fn new(source: Source) -> Arc<Self> {
        Arc::new(Subject { source, viewers: Arc::new(Semaphore::new(MAX_VIEWERS)) })
    }

    /// All metrics, for a viewer of a page; or for this process itself, which tells them to whom its operator wants.
    ///
    /// **Errors**: the viewer may not look, or the cluster does not answer any more.
    pub async fn metrics(&self, viewer: Option<&Viewer>) -> Result<Metrics, Status> {
        let mut out = Metrics::default();
        metrics::of_build(&mut out);
        match &self.source {
            Source::Runs(runs) => metrics::of_runs(&mut out, runs),
            Source::Cluster(cluster) => {
                if let Some(viewer) = viewer {
                    api::let_in(cluster, viewer).await?;
                }
                let census = cluster.front().census(MAX_JOBS).await;
                let (jobs, members) = census.ok_or_else(|| Status::unavailable("the cluster has ended"))?;
                of_cluster(&mut out, &jobs, &members);
            }
        }
        let viewers = MAX_VIEWERS - self.viewers.available_permits();
        out.family(&metrics::VIEWERS, [(Vec::new(), viewers as f64)]);
        Ok(out)
    }
}
