//! The objects of Kubernetes that a `TrainingCluster` stands for: those that the chart makes of the same values. Pure.

use kube::{Resource, ResourceExt};
use serde_json::{Map, Value, json};

use crate::cluster::{TrainingCluster, WorkerGroup};

/// An object that is to be there.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its API, as apps/v1.
    pub api_version: &'static str,
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Whether it goes with its cluster. Checkpoints do not.
    pub is_owned: bool,
    /// All that is said of it but that.
    pub body: Value,
}

/// Where the orchestrator of a cluster listens, as its certificate has the host.
pub fn orchestrator_address(cluster: &TrainingCluster) -> String {
    format!("{}-orchestrator:{}", cluster.name_any(), cluster.spec.orchestrator.port)
}

/// The StatefulSet of a group.
pub fn group_name(cluster: &TrainingCluster, group: &WorkerGroup) -> String {
    format!("{}-{}", cluster.name_any(), group.name)
}

/// All of them. `workers` is how many a group is to have.
pub fn objects(cluster: &TrainingCluster, workers: impl Fn(&WorkerGroup) -> i32) -> Vec<Object> {
    let made = cluster.spec.storage.existing_claim.is_none().then(|| storage(cluster));
    let groups = cluster.spec.workers.iter().map(|group| group_set(cluster, group, workers(group)));
    let common = [
        orchestrator_service(cluster),
        orchestrator_set(cluster),
        workers_service(cluster),
        budget(cluster),
        worker_policy(cluster),
        orchestrator_policy(cluster),
    ];
    made.into_iter().chain(common).chain(groups).collect()
}

/// What tells the pods and objects of a cluster from others.
pub fn selector(cluster: &TrainingCluster) -> Value {
    json!({"app.kubernetes.io/name": "contraflow", "app.kubernetes.io/instance": cluster.name_any()})
}

fn component(cluster: &TrainingCluster, component: &str) -> Value {
    with(selector(cluster), json!({"app.kubernetes.io/component": component}))
}

fn labels(cluster: &TrainingCluster) -> Value {
    with(selector(cluster), json!({"app.kubernetes.io/managed-by": "contraflow-operator"}))
}

/// An object with the fields of another.
fn with(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

/// Adds a field where there is something to say.
fn put<T: serde::Serialize>(object: &mut Value, field: &str, value: &T) {
    let value = serde_json::to_value(value).unwrap_or_default();
    let is_empty = value.is_null()
        || value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty);
    if let Some(object) = object.as_object_mut().filter(|_| !is_empty) {
        object.insert(field.to_owned(), value);
    }
}

fn object(
    cluster: &TrainingCluster,
    (api_version, kind): (&'static str, &'static str),
    suffix: &str,
    spec: Value,
) -> Object {
    let name = format!("{}-{suffix}", cluster.name_any());
    let metadata = json!({"name": name, "labels": labels(cluster)});
    let body = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec});
    Object { api_version, kind, name, is_owned: true, body }
}

const SERVICE: (&str, &str) = ("v1", "Service");
const SET: (&str, &str) = ("apps/v1", "StatefulSet");
const POLICY: (&str, &str) = ("networking.k8s.io/v1", "NetworkPolicy");

fn orchestrator_service(cluster: &TrainingCluster) -> Object {
    let port = json!({"name": "grpc", "port": cluster.spec.orchestrator.port, "targetPort": "grpc", "appProtocol": "grpc"});
    let selector = component(cluster, "orchestrator");
    // One that starts anew finds its workers before it is ready for clients.
    let spec =
        json!({"type": "ClusterIP", "selector": selector, "publishNotReadyAddresses": true, "ports": [port]});
    object(cluster, SERVICE, "orchestrator", spec)
}

fn workers_service(cluster: &TrainingCluster) -> Object {
    let port = json!({"name": "data", "port": cluster.spec.worker_port, "targetPort": "data"});
    let spec = json!({"clusterIP": "None", "selector": component(cluster, "worker"), "ports": [port]});
    object(cluster, SERVICE, "workers", spec)
}

/// What all pods have in common: the restricted profile of Pod Security Standards.
fn pod(cluster: &TrainingCluster) -> Value {
    let user = cluster.spec.run_as;
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": user, "runAsGroup": user, "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    });
    put(&mut pod, "imagePullSecrets", &cluster.spec.image_pull_secrets);
    pod
}

fn secret_volume(secret: &str) -> Value {
    json!({"name": "tls", "secret": {"secretName": secret, "defaultMode": 0o440}})
}

/// Never two at once: the state belongs to one process, and is locked by it. Jobs train on while none is there.
fn orchestrator_set(cluster: &TrainingCluster) -> Object {
    let own = &cluster.spec.orchestrator;
    let probe = |period: u32, failures: u32| json!({"tcpSocket": {"port": "grpc"}, "periodSeconds": period, "failureThreshold": failures});
    let mut arguments = vec![
        "orchestrator".to_owned(),
        "--state=/state/contraflow".to_owned(),
        format!("--listen=0.0.0.0:{}", own.port),
        "--tls=/tls".to_owned(),
    ];
    arguments.extend(own.extra_args.iter().cloned());
    let container = json!({
        "name": "orchestrator",
        "image": cluster.spec.image,
        "imagePullPolicy": cluster.spec.image_pull_policy,
        "args": arguments,
        "ports": [{"name": "grpc", "containerPort": own.port}],
        // It listens once its state has been read.
        "startupProbe": probe(2, 150),
        "readinessProbe": {"tcpSocket": {"port": "grpc"}, "periodSeconds": 5},
        "livenessProbe": probe(10, 6),
        "resources": own.resources,
        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "state", "mountPath": "/state"},
            {"name": "tls", "mountPath": "/tls", "readOnly": true},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    });
    let mut pod = with(
        pod(cluster),
        json!({
            "containers": [container],
            "volumes": [secret_volume(&cluster.spec.tls.orchestrator_secret), {"name": "tmp", "emptyDir": {}}],
        }),
    );
    put(&mut pod, "nodeSelector", &own.node_selector);
    put(&mut pod, "tolerations", &own.tolerations);
    put(&mut pod, "priorityClassName", &own.priority_class_name);
    let mut claim =
        json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": own.state.size}}});
    put(&mut claim, "storageClassName", &own.state.storage_class_name);
    let component = component(cluster, "orchestrator");
    let spec = json!({
        "serviceName": format!("{}-orchestrator", cluster.name_any()),
        "replicas": 1,
        "selector": {"matchLabels": component},
        "template": {"metadata": {"labels": with(labels(cluster), component.clone())}, "spec": pod},
        "volumeClaimTemplates": [{"metadata": {"name": "state"}, "spec": claim}],
    });
    object(cluster, SET, "orchestrator", spec)
}

/// A pod that fails is replaced alone; the job's ranks on the others stay.
fn group_set(cluster: &TrainingCluster, group: &WorkerGroup, replicas: i32) -> Object {
    let of_group = with(component(cluster, "worker"), json!({"contraflow/group": group.name}));
    let mut template = json!({"labels": with(labels(cluster), of_group.clone())});
    put(&mut template, "annotations", &group.pod_annotations);
    let spec = json!({
        "serviceName": format!("{}-workers", cluster.name_any()),
        "replicas": replicas,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": of_group},
        "template": {"metadata": template, "spec": worker_pod(cluster, group)},
    });
    let mut set = object(cluster, SET, &group.name, spec);
    if let Some(labels) = set.body.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.extend(group.labels.iter().map(|(key, value)| (key.clone(), value.as_str().into())));
    }
    set
}

fn worker_pod(cluster: &TrainingCluster, group: &WorkerGroup) -> Value {
    let spec = &cluster.spec;
    let claim =
        spec.storage.existing_claim.clone().unwrap_or_else(|| format!("{}-storage", cluster.name_any()));
    let mut volumes = vec![json!({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})];
    let mut mounts = vec![json!({"name": "storage", "mountPath": "/storage"})];
    if let Some(claim) = &spec.data_claim {
        volumes
            .push(json!({"name": "data", "persistentVolumeClaim": {"claimName": claim, "readOnly": true}}));
        mounts.push(json!({"name": "data", "mountPath": "/data", "readOnly": true}));
    }
    volumes.extend([
        secret_volume(&spec.tls.worker_secret),
        json!({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": group.shm}}),
        json!({"name": "tmp", "emptyDir": {}}),
    ]);
    mounts.extend([
        json!({"name": "tls", "mountPath": "/tls", "readOnly": true}),
        json!({"name": "shm", "mountPath": "/dev/shm"}),
        json!({"name": "tmp", "mountPath": "/tmp"}),
    ]);
    let mut capabilities = json!({"drop": ["ALL"]});
    put(&mut capabilities, "add", &if group.lock_memory { vec!["IPC_LOCK"] } else { Vec::new() });
    // No liveness probe: one whose rank has stalled is told to exit by the orchestrator, which alone can tell.
    let mut container = json!({
        "name": "worker",
        "image": spec.image,
        "imagePullPolicy": spec.image_pull_policy,
        "args": worker_arguments(cluster, group),
        "env": worker_variables(cluster, group),
        "ports": [{"name": "data", "containerPort": spec.worker_port}],
        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": capabilities},
        "volumeMounts": mounts,
    });
    put(&mut container, "resources", &group.resources);
    let mut pod = with(
        pod(cluster),
        // Its ranks move to other workers first, which takes up to 25 s.
        json!({"terminationGracePeriodSeconds": 40, "containers": [container], "volumes": volumes}),
    );
    put(&mut pod, "priorityClassName", &group.priority_class_name);
    put(&mut pod, "nodeSelector", &group.node_selector);
    put(&mut pod, "affinity", &group.affinity);
    put(&mut pod, "tolerations", &group.tolerations);
    pod
}

fn worker_arguments(cluster: &TrainingCluster, group: &WorkerGroup) -> Vec<String> {
    let block = if group.block_from_node_label.is_some() { "$(BLOCK)" } else { &group.block };
    let fixed = [
        "worker".to_owned(),
        format!("--join={}", orchestrator_address(cluster)),
        format!("--listen=$(POD_IP):{}", cluster.spec.worker_port),
        "--storage=/storage".to_owned(),
    ];
    let data = cluster.spec.data_claim.as_ref().map(|_| "--data-root=/data".to_owned());
    let own = [
        format!("--slots={}", group.slots),
        format!("--labels=node=$(NODE_NAME),block={block}"),
        "--tls=/tls".to_owned(),
    ];
    fixed.into_iter().chain(data).chain(own).chain(group.extra_args.iter().cloned()).collect()
}

fn worker_variables(cluster: &TrainingCluster, group: &WorkerGroup) -> Vec<Value> {
    let field =
        |name: &str, path: String| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let block = group
        .block_from_node_label
        .as_ref()
        .map(|label| field("BLOCK", format!("metadata.labels['{label}']")));
    let token = json!({"name": cluster.spec.tls.worker_secret, "key": "token"});
    let fixed = [
        field("POD_IP", "status.podIP".into()),
        field("NODE_NAME", "spec.nodeName".into()),
        json!({"name": "CONTRAFLOW_TOKEN", "valueFrom": {"secretKeyRef": token}}),
    ];
    fixed.into_iter().chain(block).chain(group.env.iter().cloned()).collect()
}

fn storage(cluster: &TrainingCluster) -> Object {
    let own = &cluster.spec.storage;
    let mut spec = json!({"accessModes": own.access_modes, "resources": {"requests": {"storage": own.size}}});
    put(&mut spec, "storageClassName", &own.storage_class_name);
    Object { is_owned: false, ..object(cluster, ("v1", "PersistentVolumeClaim"), "storage", spec) }
}

fn budget(cluster: &TrainingCluster) -> Object {
    let selector = json!({"matchLabels": component(cluster, "worker")});
    let spec = json!({"maxUnavailable": cluster.spec.max_unavailable, "selector": selector});
    object(cluster, ("policy/v1", "PodDisruptionBudget"), "workers", spec)
}

fn policy(cluster: &TrainingCluster, target: &str, suffix: &str, from: Vec<Value>, port: i32) -> Object {
    let rule = json!({"from": from, "ports": [{"protocol": "TCP", "port": port}]});
    let selector = json!({"matchLabels": component(cluster, target)});
    object(
        cluster,
        POLICY,
        suffix,
        json!({"podSelector": selector, "policyTypes": ["Ingress"], "ingress": [rule]}),
    )
}

/// Data between workers is authenticated but not encrypted: nobody else gets there.
fn worker_policy(cluster: &TrainingCluster) -> Object {
    let workers = json!({"podSelector": {"matchLabels": component(cluster, "worker")}});
    policy(cluster, "worker", "workers", vec![workers], cluster.spec.worker_port)
}

fn orchestrator_policy(cluster: &TrainingCluster) -> Object {
    let workers = json!({"podSelector": {"matchLabels": component(cluster, "worker")}});
    let anybody = json!({"podSelector": {}});
    policy(cluster, "orchestrator", "orchestrator", vec![workers, anybody], cluster.spec.orchestrator.port)
}

/// The object as it is applied.
pub fn applied(cluster: &TrainingCluster, object: &Object) -> Value {
    let mut body = object.body.clone();
    let owner = object.is_owned.then(|| cluster.controller_owner_ref(&())).flatten();
    if let (Some(owner), Some(metadata)) = (owner, body.pointer_mut("/metadata")) {
        put(metadata, "ownerReferences", &[owner]);
    }
    body
}
