//! What is shown of a cluster: its status and its events, from what is there. Pure.

use k8s_openapi::jiff::Timestamp;

use crate::autoscale::GroupSize;
use crate::cluster::{GroupStatus, TrainingClusterStatus};
use crate::conditions::{Is, find, is, set, time};
use crate::status::Notice;

/// Whether the groups have room for every job in the queue, were there as many workers as there may be.
const FITS: &str = "QueueFits";

/// What a look has found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The generation of the object.
    pub generation: Option<i64>,
    /// Where the orchestrator listens.
    pub orchestrator: String,
    /// Whether it does.
    pub is_orchestrator_ready: bool,
    /// Each group, and how many of its workers are ready.
    pub groups: Vec<(GroupSize, i32)>,
    /// Jobs in the queue that no number of workers has room for; none: nobody said.
    pub too_large: Option<Vec<String>>,
    /// Objects that could not be made, and why.
    pub faults: Vec<String>,
    /// When.
    pub now: Timestamp,
}

/// The status after a look.
pub fn status(before: &TrainingClusterStatus, found: &Found) -> TrainingClusterStatus {
    let groups = found.groups.iter().map(|(size, ready)| GroupStatus {
        name: size.name.clone(),
        wanted: size.workers,
        ready: *ready,
        idle_since: size.idle_since.map(time),
    });
    let groups: Vec<GroupStatus> = groups.collect();
    let (ready, wanted) = groups.iter().fold((0, 0), |(ready, wanted), group| {
        (ready + group.ready.min(group.wanted), wanted + group.wanted)
    });
    let lacking = groups.iter().filter(|group| group.ready < group.wanted);
    let lacking: Vec<String> =
        lacking.map(|group| format!("{}: {} of {} ready", group.name, group.ready, group.wanted)).collect();
    let mut after = TrainingClusterStatus {
        observed_generation: found.generation,
        orchestrator: found.orchestrator.clone(),
        workers: format!("{ready}/{wanted}"),
        groups,
        conditions: before.conditions.clone(),
    };
    let mut say = |type_, is, reason, words: &str| {
        set(&mut after.conditions, (type_, is), (reason, words), found.generation, found.now)
    };
    let (lacking, faults) = (lacking.join(", "), found.faults.join("; "));
    let ready_or_not = |is_ready| if is_ready { "Ready" } else { "NotReady" };
    say(
        "OrchestratorReady",
        Is::so(found.is_orchestrator_ready),
        ready_or_not(found.is_orchestrator_ready),
        "",
    );
    say("WorkersReady", Is::so(lacking.is_empty()), ready_or_not(lacking.is_empty()), &lacking);
    let is_shown = find(&before.conditions, FITS).is_some();
    match found.too_large.as_deref() {
        Some([]) if is_shown => say(FITS, Is::True, "Fits", ""),
        Some([]) | None => {}
        Some(jobs) => say(FITS, Is::False, "TooLarge", &jobs.join("; ")),
    }
    match (faults.is_empty(), found.is_orchestrator_ready, lacking.is_empty()) {
        (false, ..) => say("Ready", Is::False, "Refused", &faults),
        (_, false, _) => {
            say("Ready", Is::False, "OrchestratorNotReady", "the orchestrator's pod is not ready")
        }
        (_, _, false) => say("Ready", Is::False, "WorkersNotReady", &lacking),
        _ => say("Ready", Is::True, "Ready", ""),
    }
    after
}

/// What has happened between two statuses of an object.
pub fn notices(before: &TrainingClusterStatus, after: &TrainingClusterStatus) -> Vec<Notice> {
    let mut notices = Vec::new();
    for group in &after.groups {
        let Some(was) = before.groups.iter().find(|was| was.name == group.name) else { continue };
        if was.wanted != group.wanted {
            let (name, wanted, was) = (&group.name, group.wanted, was.wanted);
            notices.push(Notice {
                is_warning: false,
                reason: "Resized",
                words: format!("{name}: {wanted} workers, before {was}"),
            });
        }
    }
    let message = |status: &TrainingClusterStatus| {
        find(&status.conditions, FITS)
            .filter(|fits| fits.reason == "TooLarge")
            .map(|fits| fits.message.clone())
    };
    if let Some(words) = message(after).filter(|words| message(before).as_ref() != Some(words)) {
        notices.push(Notice { is_warning: true, reason: "TooLarge", words });
    }
    let ready = find(&after.conditions, "Ready");
    let changed =
        ready.filter(|ready| find(&before.conditions, "Ready").map(|was| &was.reason) != Some(&ready.reason));
    match changed {
        Some(ready) if ready.reason == "Refused" => {
            notices.push(Notice { is_warning: true, reason: "Refused", words: ready.message.clone() });
        }
        Some(ready) if ready.status == Is::True.word() => {
            notices.push(Notice {
                is_warning: false,
                reason: "Ready",
                words: "orchestrator and workers are ready".into(),
            });
        }
        Some(ready) if is(&before.conditions, "Ready", Is::True) => {
            notices.push(Notice { is_warning: true, reason: "NotReady", words: ready.message.clone() });
        }
        _ => {}
    }
    notices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(is_orchestrator_ready: bool, ready: i32, faults: &[&str]) -> Found {
        let size = GroupSize { name: "a".into(), workers: 2, idle_since: None };
        Found {
            generation: Some(1),
            orchestrator: "c-orchestrator:7070".into(),
            is_orchestrator_ready,
            groups: vec![(size, ready)],
            too_large: None,
            faults: faults.iter().map(|fault| (*fault).to_owned()).collect(),
            now: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_job_that_is_too_large_for_all_groups_is_said_until_it_has_gone() {
        let with = |too_large: &[&str]| {
            let too_large = too_large.iter().map(|job| (*job).to_owned()).collect();
            Found { too_large: Some(too_large), ..found(true, 2, &[]) }
        };
        let none = status(&TrainingClusterStatus::default(), &with(&[]));
        assert_eq!(find(&none.conditions, FITS), None);
        let large = status(&none, &with(&["job-3 is too large"]));
        let fits = find(&large.conditions, FITS).cloned().unwrap_or_default();
        assert_eq!((fits.status.as_str(), fits.message.as_str()), ("False", "job-3 is too large"));
        assert_eq!(notices(&none, &large).iter().map(|it| it.reason).collect::<Vec<_>>(), ["TooLarge"]);
        assert_eq!(status(&large, &found(true, 2, &[])), large);
        assert_eq!(notices(&large, &large), []);
        assert!(is(&status(&large, &with(&[])).conditions, FITS, Is::True));
    }

    #[test]
    fn a_cluster_is_ready_once_all_of_it_is_and_says_what_lacks() {
        let none = TrainingClusterStatus::default();
        for (found, reason, message, workers) in [
            (found(false, 0, &[]), "OrchestratorNotReady", "the orchestrator's pod is not ready", "0/2"),
            (found(true, 1, &[]), "WorkersNotReady", "a: 1 of 2 ready", "1/2"),
            (found(true, 3, &[]), "Ready", "", "2/2"),
            (found(true, 2, &["Service c-workers is there"]), "Refused", "Service c-workers is there", "2/2"),
        ] {
            let after = status(&none, &found);
            let ready = find(&after.conditions, "Ready").cloned().unwrap_or_default();
            assert_eq!(
                (ready.reason.as_str(), ready.message.as_str(), after.workers.as_str()),
                (reason, message, workers)
            );
        }
        let ready = status(&none, &found(true, 2, &[]));
        let lost = status(&ready, &found(true, 1, &[]));
        let reasons =
            |before, after| notices(before, after).iter().map(|notice| notice.reason).collect::<Vec<_>>();
        assert_eq!(
            (reasons(&none, &ready), reasons(&ready, &lost), reasons(&lost, &lost)),
            (vec!["Ready"], vec!["NotReady"], vec![])
        );
    }
}
