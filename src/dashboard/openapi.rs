//! The addresses of `/api/v1`, and the OpenAPI document that describes them. One table makes both the routes and the document.

use serde_json::{Map, Value, json};

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// What is served here.
    About,
    /// This document.
    OpenApi,
    /// All runs.
    Runs,
    /// One run.
    Overview,
    /// Figures of a run over an axis.
    Series,
    /// The same as comma-separated values, every step.
    Csv,
    /// Loads of experts.
    Experts,
    /// Where experts would stand for even load.
    Placement,
    /// Norms by layer.
    Layers,
    /// A timeline.
    Pipeline,
    /// A timeline for Perfetto.
    Trace,
    /// Generated text.
    Samples,
    /// The live stream.
    Live,
    /// Jobs of a cluster.
    Jobs,
    /// Puts a job into the queue.
    Submit,
    /// What a recipe would need.
    Check,
    /// A job.
    Job,
    /// Ends a job.
    Cancel,
    /// Takes a job up again.
    Retry,
    /// Says how many ranks a job is to have.
    Scale,
    /// The log of a job.
    Log,
    /// The failures of a job.
    Incidents,
    /// The members of a cluster.
    Nodes,
    /// Takes a node out of use, or back.
    Drain,
}

impl Answers {
    /// Whether it changes something.
    pub fn is_action(self) -> bool {
        matches!(
            self,
            Answers::Submit
                | Answers::Check
                | Answers::Cancel
                | Answers::Retry
                | Answers::Scale
                | Answers::Drain
        )
    }
}

/// An address.
pub struct Route {
    /// Path, with its parameters in braces.
    pub path: &'static str,
    /// What answers.
    pub answers: Answers,
    /// What it gives.
    summary: &'static str,
    /// Media type of the answer.
    media: &'static str,
    /// Parameters behind the question mark, and what they mean.
    query: &'static [(&'static str, &'static str)],
}

const JSON: &str = "application/json";

const VIEW: (&str, &str) = (
    "view",
    "actions: the plan, a forward pass taking one unit; operations: simulated on a cluster; recorded: the latest step as it ran; \
     expected: what the plan makes of that step's operations",
);

/// All of them.
pub const ROUTES: [Route; 13] = [
    Route {
        path: "/api/v1",
        answers: Answers::About,
        summary: "What is served here",
        media: JSON,
        query: &[],
    },
    Route {
        path: "/api/v1/openapi.json",
        answers: Answers::OpenApi,
        summary: "This document",
        media: JSON,
        query: &[],
    },
    Route { path: "/api/v1/runs", answers: Answers::Runs, summary: "Every run", media: JSON, query: &[] },
    Route {
        path: "/api/v1/runs/{run}",
        answers: Answers::Overview,
        summary: "A run: its phase, layout, latest figures, and what happened",
        media: JSON,
        query: &[],
    },
    Route {
        path: "/api/v1/runs/{run}/series",
        answers: Answers::Series,
        summary: "Figures over an axis, thinned to what a plot shows, extremes included",
        media: JSON,
        query: &[
            ("figures", "Keys, separated by commas"),
            ("axis", "step, tokens or time (seconds of training)"),
            ("from", "The first place on the axis"),
            ("to", "The last place on the axis"),
            ("points", "About how many points"),
        ],
    },
    Route {
        path: "/api/v1/runs/{run}/series.csv",
        answers: Answers::Csv,
        summary: "Every step with every figure",
        media: "text/csv",
        query: &[],
    },
    Route {
        path: "/api/v1/runs/{run}/experts",
        answers: Answers::Experts,
        summary: "Tokens per expert at a step, and of a layer over time",
        media: JSON,
        query: &[
            ("layer", "Which layer over time; the first if none"),
            ("step", "Which step; the latest if none"),
        ],
    },
    Route {
        path: "/api/v1/runs/{run}/placement",
        answers: Answers::Placement,
        summary: "Where the experts of each layer would stand for even load, by the mean of the sampled steps: largest load of a \
                  rank over the mean as they are, with experts moved, and with a copy more a rank; experts by rank and slot",
        media: JSON,
        query: &[],
    },
    Route {
        path: "/api/v1/runs/{run}/layers",
        answers: Answers::Layers,
        summary: "Norms of the gradient by layer over time",
        media: JSON,
        query: &[],
    },
    Route {
        path: "/api/v1/runs/{run}/pipeline",
        answers: Answers::Pipeline,
        summary: "A step of the pipeline: operations by rank and lane, bubbles, what each operation waited for",
        media: JSON,
        query: &[VIEW],
    },
    Route {
        path: "/api/v1/runs/{run}/trace.json",
        answers: Answers::Trace,
        summary: "The same as a trace for Perfetto",
        media: JSON,
        query: &[VIEW],
    },
    Route {
        path: "/api/v1/runs/{run}/samples",
        answers: Answers::Samples,
        summary: "The latest texts that the run has generated",
        media: JSON,
        query: &[],
    },
    Route {
        path: "/api/v1/runs/{run}/live",
        answers: Answers::Live,
        summary: "Server-sent events: the steps behind `after`, then each step as it is made",
        media: "text/event-stream",
        query: &[("after", "The latest step that the viewer has")],
    },
];

const fn of_cluster(path: &'static str, answers: Answers, summary: &'static str) -> Route {
    Route { path, answers, summary, media: JSON, query: &[] }
}

/// Those that a cluster has besides.
pub const CLUSTER_ROUTES: [Route; 11] = [
    of_cluster("/api/v1/jobs", Answers::Jobs, "Jobs, the newest first"),
    of_cluster(
        "/api/v1/jobs",
        Answers::Submit,
        "Puts a job into the queue: recipe, overrides, name, priority, min_ranks, max_ranks",
    ),
    of_cluster(
        "/api/v1/check",
        Answers::Check,
        "What a recipe would need; all of its faults, if it has some",
    ),
    of_cluster(
        "/api/v1/jobs/{job}",
        Answers::Job,
        "A job: its state, what it waits for, where its ranks are, what its slots were used for (goodput: share, slot_seconds and its parts)",
    ),
    of_cluster("/api/v1/jobs/{job}/cancel", Answers::Cancel, "Cancels a job, for a reason"),
    of_cluster("/api/v1/jobs/{job}/retry", Answers::Retry, "Takes up a job that has failed or was cancelled"),
    of_cluster(
        "/api/v1/jobs/{job}/scale",
        Answers::Scale,
        "Says how many ranks a job is to have at most: ranks; 0: as it was submitted",
    ),
    Route {
        path: "/api/v1/jobs/{job}/log",
        answers: Answers::Log,
        summary: "The latest lines of a job's log",
        media: JSON,
        query: &[("rank", "Only lines of this rank")],
    },
    of_cluster(
        "/api/v1/jobs/{job}/incidents",
        Answers::Incidents,
        "The failures of a job as stories, the latest first",
    ),
    of_cluster(
        "/api/v1/nodes",
        Answers::Nodes,
        "The members of the cluster, and what all slots were used for",
    ),
    of_cluster(
        "/api/v1/nodes/{node}/drain",
        Answers::Drain,
        "Takes a node out of use; with undo back into it",
    ),
];

/// Every route of a dashboard of runs, or of a cluster.
pub fn routes(is_cluster: bool) -> impl Iterator<Item = &'static Route> {
    ROUTES.iter().chain(CLUSTER_ROUTES.iter().filter(move |_| is_cluster))
}

/// The document.
pub fn document(is_cluster: bool) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for route in routes(is_cluster) {
        let method = if route.answers.is_action() { "post" } else { "get" };
        paths.entry(route.path).or_insert_with(|| json!({}))[method] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Contraflow dashboard", "version": env!("CARGO_PKG_VERSION"),
            "description": "What the pages of the dashboard show, and the actions of the pages of a cluster.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"securitySchemes": {
            "token": {"type": "http", "scheme": "bearer"},
            "cookie": {"type": "apiKey", "in": "cookie", "name": super::guard::COOKIE},
        }},
    })
}

fn operation(route: &Route) -> Value {
    let in_path = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = in_path
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
    let in_query = route.query.iter().map(|(name, meaning)| {
        json!({"name": name, "in": "query", "required": false, "description": meaning, "schema": {"type": "string"}})
    });
    let schema = if route.media == JSON { json!({"type": "object"}) } else { json!({"type": "string"}) };
    let mut responses =
        json!({"200": {"description": route.summary, "content": {route.media: {"schema": schema}}}});
    let fault =
        |words: &str| json!({"description": words, "content": {JSON: {"schema": {"type": "object"}}}});
    if route.path.contains('{') {
        responses["404"] = fault("There is no such run, or it has nothing of the kind");
    }
    if !route.query.is_empty() {
        responses["400"] = fault("Every parameter that makes no sense");
    }
    responses["401"] = fault("A token is needed");
    let mut parameters: Vec<Value> = in_path.chain(in_query).collect();
    let mut operation = json!({"operationId": format!("{:?}", route.answers), "summary": route.summary});
    if route.answers.is_action() {
        parameters.push(json!({
            "name": super::guard::ACTION, "in": "header", "required": true, "schema": {"type": "string"},
            "description": "Any value: what a page of another site cannot send",
        }));
        operation["requestBody"] = json!({"content": {JSON: {"schema": {"type": "object"}}}});
        responses["400"] = fault("Every fault of the request");
        responses["403"] = fault("The token's role does not allow it, or another site's page asks");
    }
    operation["parameters"] = json!(parameters);
    operation["responses"] = responses;
    operation
}
