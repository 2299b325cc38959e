//! Carries what is decided about `TrainingCluster` objects: applies their objects, and writes their status and events.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use crate::autoscale::{self, GroupSize};
use crate::cluster::{TrainingCluster, TrainingClusterStatus, WorkerGroup};
use crate::cluster_status::{Found, notices, status};
use crate::context::{Context, Fault, MANAGER, is_code};
use crate::objects::{Object, applied, group_name, objects, orchestrator_address};
use crate::watching::Faults;

/// Clusters that are looked at, at once.
const AT_ONCE: u16 = 8;

/// Looks after every object of a namespace until `end`.
pub async fn run(
    context: Arc<Context>,
    namespace: &str,
    end: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let clusters: Api<TrainingCluster> = Api::namespaced(context.client.clone(), namespace);
    let sets: Api<StatefulSet> = Api::namespaced(context.client.clone(), namespace);
    let faults = Faults::default();
    let ours = watcher::Config::default().labels("app.kubernetes.io/managed-by=contraflow-operator");
    Controller::new(clusters, watcher::Config::default())
        .owns(sets, ours)
        .with_config(Config::default().concurrency(AT_ONCE))
        .graceful_shutdown_on(end)
        .run(reconcile, again, context)
        .for_each(|looked| {
            looked.as_ref().err().inspect(|error| faults.tell(error));
            std::future::ready(())
        })
        .await;
}

fn again(cluster: Arc<TrainingCluster>, fault: &Fault, context: Arc<Context>) -> Action {
    tracing::warn!("{}: {fault}", cluster.name_any());
    Action::requeue(context.pace.waiting)
}

/// One look at an object.
///
/// **Errors**: of the API server.
pub async fn reconcile(cluster: Arc<TrainingCluster>, context: Arc<Context>) -> Result<Action, Fault> {
    if cluster.meta().deletion_timestamp.is_some() {
        // What it owns goes with it.
        return Ok(Action::await_change());
    }
    let before = cluster.status.clone().unwrap_or_default();
    let namespace = cluster.namespace().unwrap_or_default();
    let sets: Api<StatefulSet> = Api::namespaced(context.client.clone(), &namespace);
    let labels =
        format!("app.kubernetes.io/managed-by={MANAGER},app.kubernetes.io/instance={}", cluster.name_any());
    let there = sets.list(&ListParams::default().labels(&labels)).await?.items;
    let (sizes, too_large) = sizes(&cluster, &context, &there).await?;
    let mut faults = Vec::new();
    for object in objects(&cluster, |group| wanted(&sizes, group)) {
        if let Some(fault) = apply(&cluster, &context, &object).await? {
            faults.push(fault);
        }
    }
    let kept: BTreeSet<String> =
        cluster.spec.workers.iter().map(|group| group_name(&cluster, group)).collect();
    let orchestrator = format!("{}-orchestrator", cluster.name_any());
    for set in there.iter().filter(|set| is_ours(&cluster, set.meta())) {
        let name = set.name_any();
        if name != orchestrator && !kept.contains(&name) {
            sets.delete(&name, &DeleteParams::default()).await.map(drop).or_else(gone)?;
        }
    }
    let ready = |name: &str| {
        let set = there.iter().find(|set| set.name_any() == name);
        set.and_then(|set| set.status.as_ref()).and_then(|status| status.ready_replicas).unwrap_or(0)
    };
    let groups = cluster.spec.workers.iter().zip(&sizes);
    let groups = groups.map(|(group, size)| (size.clone(), ready(&group_name(&cluster, group))));
    let found = Found {
        generation: cluster.meta().generation,
        orchestrator: orchestrator_address(&cluster),
        is_orchestrator_ready: ready(&orchestrator) > 0,
        groups: groups.collect(),
        faults,
        too_large,
        now: context.now(),
    };
    let after = status(&before, &found);
    if after != before {
        show(&cluster, &context, &after).await?;
        context.tell(&*cluster, notices(&before, &after)).await;
    }
    let is_scaled = cluster.spec.workers.iter().any(|group| group.max_workers.is_some());
    Ok(Action::requeue(if is_scaled { context.pace.waiting } else { context.pace.ended }))
}

fn wanted(sizes: &[GroupSize], group: &WorkerGroup) -> i32 {
    sizes.iter().find(|size| size.name == group.name).map_or(group.min_workers, |size| size.workers)
}

/// How many workers each group is to have, and what of the queue no number of them has room for; none: nobody said what is in the queue.
async fn sizes(
    cluster: &TrainingCluster,
    context: &Context,
    there: &[StatefulSet],
) -> Result<(Vec<GroupSize>, Option<Vec<String>>), Fault> {
    let replicas = |group: &WorkerGroup| {
        let set = there.iter().find(|set| set.name_any() == group_name(cluster, group));
        set.and_then(|set| set.spec.as_ref()).and_then(|spec| spec.replicas)
    };
    let idle_since = |group: &WorkerGroup| {
        let known =
            cluster.status.iter().flat_map(|status| &status.groups).find(|known| known.name == group.name);
        known.and_then(|known| known.idle_since.as_ref()?.parse().ok())
    };
    let present = |group: &WorkerGroup| autoscale::present(group, replicas(group), idle_since(group));
    let present: Vec<GroupSize> = cluster.spec.workers.iter().map(present).collect();
    if cluster.spec.workers.iter().all(|group| group.max_workers.is_none()) {
        return Ok((present, None));
    }
    let namespace = cluster.namespace().unwrap_or_default();
    let place = context
        .place(&namespace, orchestrator_address(cluster), Some(&cluster.spec.tls.client_secret))
        .await?;
    let Ok(link) = place.and_then(|place| context.links.to(&place)) else { return Ok((present, None)) };
    // Nothing changes while nobody says what is lacking.
    let Ok((jobs, workers)) = link.cluster().await else { return Ok((present, None)) };
    let asked = (jobs.as_slice(), workers.as_slice());
    let groups = &cluster.spec.workers;
    let too_large = autoscale::too_large(groups, &jobs);
    Ok((autoscale::sizes(&cluster.name_any(), groups, &present, asked, context.now()), Some(too_large)))
}

/// Makes an object as it is to be; a fault in words where somebody else has one of its name.
async fn apply(
    cluster: &TrainingCluster,
    context: &Context,
    object: &Object,
) -> Result<Option<String>, Fault> {
    let (group, version) = object.api_version.split_once('/').unwrap_or(("", object.api_version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, object.kind));
    let namespace = cluster.namespace().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &namespace, &resource);
    let there = api.get_opt(&object.name).await?;
    let (kind, name) = (object.kind, &object.name);
    if let Some(there) = &there {
        if object.is_owned && !is_ours(cluster, &there.metadata) {
            return Ok(Some(format!("{kind} {name} is there and not of this TrainingCluster")));
        }
        // What a claim asks for is fixed once it is made.
        if !object.is_owned {
            return Ok(None);
        }
    }
    let parameters = PatchParams::apply(MANAGER).force();
    match api.patch(name, &parameters, &Patch::Apply(applied(cluster, object))).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(refused)) if refused.code == 422 => {
            Ok(Some(format!("{kind} {name}: {}", refused.message)))
        }
        Err(error) => Err(error.into()),
    }
}

fn is_ours(cluster: &TrainingCluster, meta: &kube::api::ObjectMeta) -> bool {
    let owners = meta.owner_references.iter().flatten();
    owners
        .filter(|owner| owner.controller == Some(true))
        .any(|owner| Some(&owner.uid) == cluster.meta().uid.as_ref())
}

async fn show(
    cluster: &TrainingCluster,
    context: &Context,
    status: &TrainingClusterStatus,
) -> Result<(), Fault> {
    let api: Api<TrainingCluster> =
        Api::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default());
    let object = json!({
        "apiVersion": TrainingCluster::api_version(&()),
        "kind": TrainingCluster::kind(&()),
        "metadata": {"name": cluster.name_any(), "uid": cluster.uid()},
        "status": status,
    });
    let parameters = PatchParams::apply(MANAGER).force();
    api.patch_status(&cluster.name_any(), &parameters, &Patch::Apply(object)).await.map(drop).or_else(gone)
}

/// An object that is gone meanwhile needs nothing.
fn gone(error: kube::Error) -> Result<(), Fault> {
    if is_code(&error, 404) || is_code(&error, 409) { Ok(()) } else { Err(error.into()) }
}
