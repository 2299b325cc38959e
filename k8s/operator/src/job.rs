//! `TrainingJob`: what a user writes of a job, and what is shown of it. Knows no API server and no orchestrator.

#![allow(clippy::duplicated_attributes, reason = "each column of a list has its own type")]

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, ValidationRule,
};
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::Condition;
use crate::definition::{rule, ruled};

/// What is to be trained, and on how many ranks.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "contraflow.dev",
    version = "v1alpha1",
    kind = "TrainingJob",
    plural = "trainingjobs",
    shortname = "tj",
    category = "contraflow",
    namespaced,
    derive = "PartialEq",
    doc = "A job of a Contraflow orchestrator: it is submitted once, followed, and cancelled when it is deleted.",
    status = "TrainingJobStatus",
    scale(spec_replicas_path = ".spec.ranks", status_replicas_path = ".status.ranks"),
    printcolumn(name = "STATE", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "STEP", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "LOSS", type_ = "string", json_path = ".status.loss"),
    printcolumn(name = "LEFT", type_ = "string", json_path = ".status.left"),
    printcolumn(name = "RANKS", type_ = "integer", json_path = ".status.ranks"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "JOB", type_ = "string", json_path = ".status.job", priority = 1),
    printcolumn(name = "WHY", type_ = "string", json_path = ".status.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct TrainingJobSpec {
    /// What is trained, and how. Exactly one of its sources is set.
    pub recipe: RecipeSource,
    /// Changes of the recipe, each section.key=value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub overrides: Vec<String>,
    /// The TrainingCluster of this namespace that it runs on; none: the orchestrator that the operator was installed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Any other orchestrator; not together with `cluster`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orchestrator: Option<OrchestratorRef>,
    /// Jobs of a higher priority start first and preempt lower ones.
    #[serde(default)]
    pub priority: i32,
    /// With fewer ranks it neither starts nor continues; none: those of the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub min_ranks: Option<i32>,
    /// It grows to so many into slots that nobody else has a use for; none: those of the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub max_ranks: Option<i32>,
    /// As many ranks as it is to have at most from now on, as of `contraflow scale` and `kubectl scale`; none: it grows and shrinks with
    /// the cluster. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub ranks: Option<i32>,
    /// Whether it gives up its ranks. Once it is not suspended any more, it goes on from its newest checkpoint. May be changed at any time.
    #[serde(default)]
    pub suspend: bool,
    /// This object is deleted so many seconds after the job has ended; none: it stays. Checkpoints stay. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
}

/// Where a recipe is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecipeSource {
    /// The name of one that comes with Contraflow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built_in: Option<String>,
    /// The recipe itself, TOML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 524288))]
    pub inline: Option<String>,
    /// It is in a ConfigMap of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapRef>,
    /// The model's config.json of Hugging Face, where `inline` names no model that is built in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 262144))]
    pub model_config: Option<String>,
}

/// A recipe in a ConfigMap.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapRef {
    /// The ConfigMap.
    pub name: String,
    /// The key of the recipe; recipe.toml if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The key of the model's config.json, where the recipe names no model that is built in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_config_key: Option<String>,
}

/// An orchestrator by its address.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrchestratorRef {
    /// HOST:PORT, as its certificate has the host.
    #[schemars(length(min = 1, max = 253))]
    pub address: String,
    /// A Secret of this namespace with ca.pem, client.pem and client.key of `contraflow certs issue --role submit` and its token under
    /// `token`. The operator has to be allowed to read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// What is known of the job. All of it can be found again from the orchestrator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainingJobStatus {
    /// The generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The job's id at the orchestrator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// Pending, Submitting, Queued, Forming, Running, Recovering, Suspended, Done, Failed or Cancelled.
    #[serde(default)]
    pub state: String,
    /// What it waits for, how it ended, or what is wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The latest step of which every rank has reported.
    #[serde(default)]
    pub step: i64,
    /// Steps of the recipe.
    #[serde(default)]
    pub steps: i64,
    /// Both of them, as 12/720.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub progress: String,
    /// Loss of the latest step, in nats per token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub loss: String,
    /// Mean loss of the validation sequences at the end, in nats per token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub validation_loss: String,
    /// How long the rest takes at the present pace, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// The same, as 1h05m.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub left: String,
    /// Ranks that it has.
    #[serde(default)]
    pub ranks: i32,
    /// With fewer it does not start.
    #[serde(default)]
    pub min_ranks: i32,
    /// As many as it takes.
    #[serde(default)]
    pub max_ranks: i32,
    /// The number of ranks that the orchestrator was told last by `spec.ranks`; 0: none.
    #[serde(default)]
    pub scaled_to: i32,
    /// Times it lost a rank.
    #[serde(default)]
    pub losses: i32,
    /// What to look at though it goes on.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub warning: String,
    /// When it was submitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub submitted_at: Option<String>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Identifies the recipe and what else was submitted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fingerprint: String,
    /// Ready, Reachable, Submitted, Suspended, Current, Scaled, Complete, Failed.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The definition, with the rules that a type cannot say.
pub fn definition() -> CustomResourceDefinition {
    let short =
        rule("self.metadata.name.size() <= 63", "metadata.name: expected at most 63 characters", None);
    ruled(TrainingJob::crd(), &[short], &rules(), constrain)
}

/// What a job was submitted with stays as it is.
const FIXED: [&str; 7] =
    ["recipe", "overrides", "cluster", "orchestrator", "priority", "minRanks", "maxRanks"];

fn rules() -> Vec<ValidationRule> {
    let fixed = FIXED.map(|field| {
        let both = format!("has(self.{field}) == has(oldSelf.{field})");
        let same = format!("{both} && (!has(self.{field}) || self.{field} == oldSelf.{field})");
        let words = format!("{field} of a job is immutable: make another TrainingJob, or take this one up with `contraflow submit --resume`");
        rule(&same, &words, Some(&format!(".{field}")))
    });
    let others = [
        rule(
            "!(has(self.cluster) && has(self.orchestrator))",
            "expected cluster or orchestrator, got both",
            None,
        ),
        rule(
            "!has(self.minRanks) || !has(self.maxRanks) || self.minRanks <= self.maxRanks",
            "expected minRanks to be at most maxRanks",
            None,
        ),
        rule(
            "(has(self.recipe.builtIn) ? 1 : 0) + (has(self.recipe.inline) ? 1 : 0) + (has(self.recipe.configMap) ? 1 : 0) == 1",
            "expected exactly one of builtIn, inline and configMap",
            Some(".recipe"),
        ),
    ];
    fixed.into_iter().chain(others).collect()
}

/// Bounds the texts that a rule compares: its cost is estimated from them.
fn constrain(spec: &mut JSONSchemaProps) {
    let overrides = spec.properties.as_mut().and_then(|properties| properties.get_mut("overrides"));
    if let Some(JSONSchemaPropsOrArray::Schema(item)) =
        overrides.and_then(|overrides| overrides.items.as_mut())
    {
        item.max_length = Some(4096);
    }
}

/// The recipes that come with Contraflow, by name.
pub fn built_in() -> BTreeMap<&'static str, &'static str> {
    BTreeMap::from([
        ("tiny", include_str!("../../../recipes/tiny.toml")),
        ("small", include_str!("../../../recipes/small.toml")),
        ("base", include_str!("../../../recipes/base.toml")),
        ("deepseek-v3", include_str!("../../../recipes/deepseek-v3.toml")),
    ])
}
