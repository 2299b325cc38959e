//! The commands about the members of a cluster: nodes, drain.

use contraflow_orchestrator::server::NOTICE;
use contraflow_proto::v1;
use contraflow_runtime::control::text::printable;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{Common, Drain, cluster, goodput, show};
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{Format, count, say, table};

/// **Units**: seconds.
const DAY: u64 = 86_400;

/// Runs `contraflow nodes`.
///
/// **Errors**: code 1 if the orchestrator is out of reach.
pub fn nodes(common: &Common) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let answer =
            cluster(common).await?.nodes(v1::NodesRequest {}).await.map_err(|status| common.refused(&status))?;
        let v1::NodesResponse { workers, incarnation, certificate_expires_unix_s: certificate, warning, goodput } = answer.into_inner();
        let now = u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(0);
        let json: Vec<Value> = workers
            .iter()
            .map(|worker| {
                json!({
                    "worker": worker.worker, "node": worker.node, "block": worker.block, "slots": worker.slots,
                    "used": worker.used, "draining": worker.draining, "silent_ms": worker.silent_ms,
                    "memory_bytes": worker.memory_bytes, "unreachable": worker.unreachable,
                    "token_expires_unix_s": worker.token_expires_unix_s,
                })
            })
            .collect();
        let rows = workers.into_iter().map(|worker| {
            let (slots, used) = (worker.slots.to_string(), worker.used.to_string());
            let note = note(&worker, now);
            [worker.node, worker.block, worker.worker, slots, used, note]
        });
        let mut text = table(["NODE", "BLOCK", "WORKER", "SLOTS", "USED", ""], 3..5, rows);
        if let Some(words) = goodput.as_ref().and_then(goodput::words) {
            text += &format!("goodput since the orchestrator started: {words}\n");
        }
        let json = json!({
            "incarnation": incarnation, "certificate_expires_unix_s": certificate, "warning": warning, "workers": json,
            "goodput": goodput::json(goodput.as_ref()),
        });
        show(common, &json, &text)?;
        if common.format == Format::Text && !warning.is_empty() {
            say(format_args!("warning: {}", printable(&warning)));
        }
        if let Some(end) = certificate.and_then(|expires| end_of(expires, now)).filter(|_| common.format == Format::Text) {
            say(format_args!("warning: the orchestrator's certificate {end}: contraflow certs renew"));
        }
        Ok(())
    })
}

/// What an operator has to know of a worker.
fn note(worker: &v1::Worker, now: u64) -> String {
    let certificate = worker.token_expires_unix_s.and_then(|expires| end_of(expires, now));
    let notes = [
        worker.draining.then(|| "draining".to_owned()),
        worker.unreachable.then(|| "data port does not answer".to_owned()),
        certificate.map(|end| format!("certificate {end}")),
    ];
    notes.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The end of something, in words, if it is near. Times are seconds since 1970.
fn end_of(expires: u64, now: u64) -> Option<String> {
    match expires.saturating_sub(now) {
        0 => Some("has expired".to_owned()),
        left if left <= NOTICE => Some(format!("expires in {}", count(left.div_ceil(DAY), "day"))),
        _ => None,
    }
}

/// Runs `contraflow drain`.
///
/// **Errors**: code 2 if there is no such node, or it is not drained; code 1 if the orchestrator is out of reach.
pub fn drain(args: &Drain) -> Result<(), Failure> {
    interrupt::runtime()?.block_on(async {
        let request = v1::DrainRequest { node: args.node.clone(), undo: args.undo };
        let answer = cluster(&args.common)
            .await?
            .drain(request)
            .await
            .map_err(|status| args.common.refused(&status))?;
        let v1::DrainResponse { workers, ranks } = answer.into_inner();
        let text = match args.undo {
            false => {
                let (workers, ranks) = (count(workers, "worker"), count(ranks, "rank"));
                format!("{}: {workers} to take no new ranks, {ranks} to move\n", args.node)
            }
            true => format!("{}: {} to take ranks again\n", args.node, count(workers, "worker")),
        };
        show(&args.common, &json!({"node": args.node, "workers": workers, "ranks": ranks}), &text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_has_to_know_of_a_worker_is_all_there() {
        let now = 1_000 * DAY;
        let worker = |draining, unreachable, token_expires_unix_s| v1::Worker {
            draining,
            unreachable,
            token_expires_unix_s,
            ..v1::Worker::default()
        };
        for (worker, expected) in [
            (worker(false, false, None), ""),
            (worker(false, false, Some(now + 31 * DAY)), ""),
            (worker(false, false, Some(now + 30 * DAY)), "certificate expires in 30 days"),
            (worker(false, true, Some(now + 1)), "data port does not answer, certificate expires in 1 day"),
            (worker(true, false, Some(now)), "draining, certificate has expired"),
        ] {
            assert_eq!(note(&worker, now), expected);
        }
    }
}
