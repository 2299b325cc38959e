//! `TrainingCluster`: what a user writes of an orchestrator and its workers, and what is shown of them. Knows no API server.

#![allow(clippy::duplicated_attributes, reason = "each column of a list has its own type")]

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{CustomResource, CustomResourceExt};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::conditions::Condition;
use crate::definition::{rule, ruled};

/// An orchestrator with its state on a claim, and groups of workers that share a storage.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "contraflow.dev",
    version = "v1alpha1",
    kind = "TrainingCluster",
    plural = "trainingclusters",
    shortname = "tc",
    category = "contraflow",
    namespaced,
    derive = "PartialEq",
    doc = "An orchestrator and its workers, as the chart of Contraflow makes them.",
    status = "TrainingClusterStatus",
    printcolumn(
        name = "READY",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(name = "WORKERS", type_ = "string", json_path = ".status.workers"),
    printcolumn(name = "ORCHESTRATOR", type_ = "string", json_path = ".status.orchestrator"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "WHY",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct TrainingClusterSpec {
    /// The image of every pod. Orchestrator and workers are of one version; jobs go on from their checkpoints after it has changed.
    #[schemars(length(min = 1))]
    pub image: String,
    /// Always, IfNotPresent or Never.
    #[serde(default = "if_not_present")]
    #[schemars(extend("enum" = ["Always", "IfNotPresent", "Never"]))]
    pub image_pull_policy: String,
    /// Secrets that the image is pulled with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<Named>,
    /// Who proves what by which Secrets.
    pub tls: Tls,
    /// The orchestrator.
    #[serde(default)]
    pub orchestrator: Orchestrator,
    /// Checkpoints and results, shared by all workers. The claim stays when this object is deleted.
    #[serde(default)]
    pub storage: Storage,
    /// A claim with training data, read-only at /data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_claim: Option<String>,
    /// Each group is a StatefulSet.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub workers: Vec<WorkerGroup>,
    /// Where workers reach each other.
    #[serde(default = "worker_port")]
    #[schemars(range(min = 1024, max = 65535))]
    pub worker_port: i32,
    /// How many workers a voluntary disruption may take at once.
    #[serde(default = "one")]
    #[schemars(range(min = 0))]
    pub max_unavailable: i32,
    /// User, group and group of files of every pod, none of which is root.
    #[serde(default = "user")]
    #[schemars(range(min = 1))]
    pub run_as: i64,
}

fn if_not_present() -> String {
    "IfNotPresent".into()
}

fn worker_port() -> i32 {
    7071
}

fn port() -> i32 {
    7070
}

fn one() -> i32 {
    1
}

fn user() -> i64 {
    10001
}

/// An object of this namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Named {
    /// Its name.
    pub name: String,
}

/// Secrets of this namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tls {
    /// The orchestrator's: ca.pem, server.pem, server.key and tokens of `contraflow certs init`.
    #[schemars(length(min = 1))]
    pub orchestrator_secret: String,
    /// That of all workers: ca.pem, client.pem and client.key of `contraflow certs issue --role worker`, and its token under `token`.
    #[schemars(length(min = 1))]
    pub worker_secret: String,
    /// The operator's: the same of `contraflow certs issue --role submit`.
    #[schemars(length(min = 1))]
    pub client_secret: String,
}

/// Where the orchestrator runs, and where its state is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Orchestrator {
    /// Where it listens.
    #[serde(default = "port")]
    #[schemars(range(min = 1024, max = 65535))]
    pub port: i32,
    /// The claim of its state.
    #[serde(default = "state")]
    pub state: Claim,
    /// More flags of `contraflow orchestrator`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_args: Vec<String>,
    /// What of a node it takes.
    #[serde(default = "orchestrator_resources")]
    #[schemars(schema_with = "any_object")]
    pub resources: Value,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// What of nodes it bears.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "any_objects")]
    pub tolerations: Vec<Value>,
    /// Its priority among pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
}

impl Default for Orchestrator {
    fn default() -> Self {
        Orchestrator {
            port: port(),
            state: state(),
            extra_args: Vec::new(),
            resources: orchestrator_resources(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            priority_class_name: None,
        }
    }
}

fn state() -> Claim {
    Claim { size: "10Gi".into(), storage_class_name: None }
}

fn orchestrator_resources() -> Value {
    serde_json::json!({"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}})
}

/// A claim of a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// How much it holds.
    pub size: String,
    /// Of which class; none: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_class_name: Option<String>,
}

/// A claim that is there, or one that is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// One that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub existing_claim: Option<String>,
    /// How much one that is made holds.
    #[serde(default = "storage_size")]
    pub size: String,
    /// Of which class; none: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_class_name: Option<String>,
    /// Who may use it.
    #[serde(default = "read_write_many")]
    pub access_modes: Vec<String>,
}

impl Default for Storage {
    fn default() -> Self {
        Storage {
            existing_claim: None,
            size: storage_size(),
            storage_class_name: None,
            access_modes: read_write_many(),
        }
    }
}

fn storage_size() -> String {
    "100Gi".into()
}

fn read_write_many() -> Vec<String> {
    vec!["ReadWriteMany".into()]
}

/// Workers that are alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerGroup {
    /// Its name.
    #[schemars(length(max = 40), regex(pattern = r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$"))]
    pub name: String,
    /// How many there are at least.
    #[schemars(range(min = 0))]
    pub min_workers: i32,
    /// How many there are at most, where jobs wait for slots; none: always `minWorkers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_workers: Option<i32>,
    /// Ranks that each of them hosts.
    #[schemars(range(min = 1, max = 1024))]
    pub slots: i32,
    /// What is near each other: a rack, a rail, a zone.
    #[serde(default = "default_block")]
    #[schemars(regex(pattern = "^[^,=]+$"))]
    pub block: String,
    /// The label of nodes whose value is the block instead, as topology.kubernetes.io/zone; the API server has to copy it to pods
    /// (PodTopologyLabelsAdmission).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["topology.kubernetes.io/zone", "topology.kubernetes.io/region"]))]
    pub block_from_node_label: Option<String>,
    /// What of a node each takes.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    #[schemars(schema_with = "any_object")]
    pub resources: Value,
    /// Whether it may lock memory, which RDMA needs.
    #[serde(default)]
    pub lock_memory: bool,
    /// What ranks of one pod exchange in.
    #[serde(default = "shm")]
    pub shm: String,
    /// More flags of `contraflow worker`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_args: Vec<String>,
    /// More variables: credentials of an object store, OTEL_EXPORTER_OTLP_ENDPOINT.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "any_objects")]
    pub env: Vec<Value>,
    /// Labels of the StatefulSet, as kueue.x-k8s.io/queue-name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pod_annotations: BTreeMap<String, String>,
    /// Where they run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// What of nodes they bear.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "any_objects")]
    pub tolerations: Vec<Value>,
    /// Where they run, and beside what.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    #[schemars(schema_with = "any_object")]
    pub affinity: Value,
    /// Their priority among pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
}

fn default_block() -> String {
    "default".into()
}

fn shm() -> String {
    "1Gi".into()
}

/// A part of a pod, which the API server checks when the pod is made.
fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn any_objects(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}})
}

/// What is known of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainingClusterStatus {
    /// The generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the orchestrator listens.
    #[serde(default)]
    pub orchestrator: String,
    /// Workers that are ready, of how many there are to be.
    #[serde(default)]
    pub workers: String,
    /// Each group.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub groups: Vec<GroupStatus>,
    /// Ready, OrchestratorReady, WorkersReady, QueueFits.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What is known of a group of workers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// The group.
    pub name: String,
    /// Workers that there are to be.
    pub wanted: i32,
    /// Workers that are ready.
    pub ready: i32,
    /// Since when its last workers have hosted no rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_since: Option<String>,
}

/// The definition, with the rules that a type cannot say.
pub fn definition() -> CustomResourceDefinition {
    // Pods of a StatefulSet have its name and eleven characters more in a label, which takes 63.
    let whole = [
        rule(
            "self.metadata.name.size() <= 39 && !self.metadata.name.contains('.')",
            "metadata.name: expected at most 39 characters and no dot",
            None,
        ),
        rule(
            "self.spec.workers.all(group, self.metadata.name.size() + group.name.size() <= 51)",
            "metadata.name: expected at most 51 characters together with the name of each group in spec.workers",
            None,
        ),
    ];
    let of_spec = [
        rule(
            "self.workers.all(group, !has(group.maxWorkers) || group.minWorkers <= group.maxWorkers)",
            "expected minWorkers to be at most maxWorkers",
            Some(".workers"),
        ),
        rule(
            "self.workers.all(group, group.name != 'orchestrator')",
            "expected another name than orchestrator, which is that of another StatefulSet",
            Some(".workers"),
        ),
        rule(
            "self.orchestrator.state == oldSelf.orchestrator.state",
            "orchestrator.state is immutable: it is the claim of a StatefulSet",
            Some(".orchestrator.state"),
        ),
    ];
    ruled(TrainingCluster::crd(), &whole, &of_spec, |_| ())
}
