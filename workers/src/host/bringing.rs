//! A worker that hosts no rank of a job's new formation and has parts of the state that it begins with: it brings them to those that
//! need them, until it is released. Knows no rank's model.

use std::sync::Arc;

use contraflow_proto::v1;
use contraflow_runtime::control::wire::{formation_numbers, formation_of};
use contraflow_runtime::fabric::{Listener, WiredNetwork};
use contraflow_runtime::topology::FormationId;

use super::formation::{fabric_formation, recovered};
use crate::error::RankError;
use crate::replica::{self, ReplicaStore};

/// What is brought to one formation.
pub(super) struct Bringing {
    pub(super) id: FormationId,
    network: Arc<WiredNetwork>,
}

impl Bringing {
    /// The formation that an order is about.
    ///
    /// **Errors**: no formation has such numbers.
    pub(super) fn id_of(bring: &v1::Bring) -> Result<FormationId, String> {
        formation_of(bring.job, bring.generation)
    }

    /// Joins the formation's network, and brings what is in the store beside the loop.
    ///
    /// **Errors**: the network cannot be formed; the order is malformed.
    pub(super) fn begin(
        bring: &v1::Bring,
        store: &Arc<ReplicaStore>,
        listener: &Listener,
    ) -> Result<Self, RankError> {
        let wrong = |message| RankError::Content { path: "the order to bring a state".into(), message };
        let id = Bringing::id_of(bring).map_err(wrong)?;
        let v1::Bring { fabric, workers, bringers, secret, memory, place, .. } = bring;
        let place = usize::try_from(*place).map_err(|_| wrong(format!("place: no rank has {place}")))?;
        let memory = memory.as_ref().ok_or_else(|| wrong("memory: expected a state, got none".into()))?;
        let recovered = recovered(memory, (workers, *bringers), store).map_err(wrong)?;
        let formation = fabric_formation(id, (fabric, workers), secret, vec![place]).map_err(wrong)?;
        let on_fault = |_| ();
        let network = WiredNetwork::form(listener, formation, Arc::new(on_fault))?;
        let endpoint = network.join(place)?;
        let its = network.clone();
        let bring = move || {
            if let Err(error) = RankError::catch(|| replica::bring(&recovered, &endpoint, id)) {
                let (job, generation) = formation_numbers(id);
                tracing::warn!(job, generation, "the state in memory could not be brought: {error}");
                its.close();
            }
        };
        let thread = std::thread::Builder::new().name("bringing".into()).spawn(bring);
        thread.map_err(|source| RankError::File { path: "a thread".into(), source })?;
        Ok(Bringing { id, network })
    }

    /// Leaves the network.
    pub(super) fn end(self) {
        // Goodbyes take a moment.
        tokio::task::spawn_blocking(move || self.network.close());
    }
}
