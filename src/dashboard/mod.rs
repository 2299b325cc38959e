//! The dashboard: what a run or a cluster is doing, as a page that is served from this binary.
//!
//! Its shape, from the inside out; each part imports only those above it:
//!
//! - `history` holds what is shown of a run: its steps as columns, what happened beside them, loads and norms, thinned as it grows;
//!   `thin` takes from a long history what a plot of some width shows, extremes included. Pure.
//! - `views`, `placement` and `pipeline` make JSON of it, one function a page or a part of one; `metrics` makes families of figures,
//!   which `prometheus` writes as the text of `/metrics` and `crate::otlp` sends to a collector. Pure: they know no socket and no clock.
//! - `folder` reads a history from the folder of a run.
//! - `guard` decides who may ask: the host header, the token, what a page may load. Pure.
//! - `assets` are the page itself: hand-written modules, and uPlot whole, with its licence.
//! - `cluster` asks an orchestrator's services for what the pages of a cluster show, as the viewer who looks.
//! - `subject` is what of all that is shown, and its metrics.
//! - `routes` carries requests to the views, `stream` sends what comes piece by piece, `server` is the thread that does it.
//! - `top` is a viewer in a terminal, which asks one of these servers as a browser does.
//!
//! Training never waits for it: a step is copied into a history under a lock that is held for a moment, and whoever looks reads from
//! there. A viewer that does not read is let go.

mod assets;
pub mod cluster;
mod command;
mod folder;
mod guard;
pub mod history;
mod metrics;
mod openapi;
mod pipeline;
mod placement;
mod prometheus;
mod routes;
mod server;
mod shown;
mod stream;
mod subject;
mod thin;
pub mod top;
mod views;

pub use self::command::{DashboardArgs, run};
pub use self::folder::of_folder;
pub use self::guard::Token;
pub use self::openapi::document as openapi;
pub use self::prometheus::exposition;
pub use self::server::{Dashboard, Door, DoorArgs, Listen};
pub use self::shown::{Facts, Phase, Shown};
pub use self::subject::Subject;

/// Every family of `/metrics`: name, kind, meaning. Of runs and of the server first, then those of a cluster.
pub fn metric_families() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    let own = [&metrics::BUILD, &metrics::VIEWERS].into_iter().chain(&metrics::OF_RUNS);
    own.chain(&cluster::figures::OF_CLUSTERS).map(|family| (family.name, family.kind, family.help))
}
