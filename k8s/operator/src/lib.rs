//! The operator: what `TrainingCluster` and `TrainingJob` objects say becomes so, by the public gRPC API of orchestrators and the objects of
//! Kubernetes. Pure functions decide, thin reconcilers carry, and nothing is kept but in the objects.

pub mod autoscale;
pub mod cluster;
pub mod cluster_status;
pub mod clusters;
pub mod conditions;
pub mod context;
pub mod decide;
mod definition;
pub mod job;
pub mod jobs;
pub mod link;
pub mod objects;
pub mod request;
pub mod status;
pub mod trouble;
pub mod watching;

/// An object as YAML that a person reads.
///
/// **Errors**: it cannot be written.
pub fn yaml<T: serde::Serialize>(object: &T) -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(object)
}
