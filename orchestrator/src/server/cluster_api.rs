//! ClusterService: who is a member, and taking a node out of use and back.

use std::sync::Arc;

use contraflow_proto::v1;
use tonic::{Request, Response, Status};
use v1::cluster_service_server::ClusterService;

use super::auth::Session;
use super::hub::Hub;
use super::jobs_api::goodput;
use super::security::Security;
use super::{Handle, bounds, refused};
use crate::core::Event;

/// The service.
pub(super) struct ClusterApi {
    pub(super) hub: Handle,
    /// None without TLS.
    pub(super) security: Option<Arc<Security>>,
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Result<Response<v1::NodesResponse>, Status> {
        let mut nodes = self.hub.ask(nodes).await?;
        nodes.certificate_expires_unix_s = self.security.as_ref().map(|security| security.expires());
        Ok(Response::new(nodes))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let (session, request) = (Session::of(&request), request.into_inner());
        bounds::drain(&request).map_err(|faults| refused(&faults))?;
        let (call, node) = (if request.undo { "undrain" } else { "drain" }, request.node.clone());
        let drained = self.drained(request).await;
        session.note(call, &node, &drained).await;
        drained.map(Response::new)
    }
}

impl ClusterApi {
    /// **Errors**: `NOT_FOUND`.
    async fn drained(&self, request: v1::DrainRequest) -> Result<v1::DrainResponse, Status> {
        let v1::DrainRequest { node, undo } = request;
        let is_drained = {
            let node = node.clone();
            self.hub.ask(move |hub| hub.core().jobs().drained.contains(&node)).await?
        };
        let label = node.clone();
        let on_node = move |hub: &Hub| {
            let workers = hub.core().members().filter(|member| member.registration.node == label);
            let used = workers.map(|member| hub.core().used(member.registration.worker) as u64);
            used.fold((0, 0), |(workers, ranks), used| (workers + 1, ranks + used))
        };
        let (workers, ranks) = self.hub.ask(on_node).await?;
        if undo {
            if !is_drained {
                return Err(Status::not_found(format!("node: expected one that is drained, got {node:?}")));
            }
            self.hub.change(Event::Undrain { node }).await?;
            return Ok(v1::DrainResponse { workers, ranks: 0 });
        }
        if workers == 0 {
            return Err(Status::not_found(format!("node: expected that of a member, got {node:?}")));
        }
        self.hub.change(Event::Drain { node }).await?;
        Ok(v1::DrainResponse { workers, ranks })
    }
}

/// Every member that is there.
pub(super) fn nodes(hub: &Hub) -> v1::NodesResponse {
    let core = hub.core();
    let mut workers: Vec<v1::Worker> = core
        .members()
        .filter(|member| member.is_attached)
        .map(|member| v1::Worker {
            worker: member.registration.name.clone(),
            node: member.registration.node.clone(),
            block: member.registration.block.clone(),
            slots: member.registration.slots as u64,
            used: core.used(member.registration.worker) as u64,
            draining: core.is_draining(member),
            silent_ms: core.silent_ms(member),
            address: member
                .registration
                .fabric
                .as_ref()
                .map_or_else(String::new, |address| address.tcp.to_string()),
            memory_bytes: member.registration.memory_bytes,
            unreachable: member.registration.is_unreachable,
            token_expires_unix_s: hub
                .links
                .get(&member.registration.worker)
                .and_then(|link| link.shown.as_ref().map(|shown| shown.expires)),
        })
        .collect();
    workers.sort_by(|a, b| (&a.node, &a.worker).cmp(&(&b.node, &b.worker)));
    let warning = hub.trouble().unwrap_or_default();
    v1::NodesResponse {
        workers,
        incarnation: core.incarnation(),
        certificate_expires_unix_s: None,
        warning,
        goodput: Some(goodput(core.cluster_account())),
    }
}
