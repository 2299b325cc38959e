//! Whether the orchestrator's state is an older copy of what its workers have seen of it. Pure.
//!
//! What happened after the copy was made it would do again, in another way: another curve under the same name, checkpoints that
//! are removed. So it must not act at all.

use contraflow_runtime::topology::{FormationId, JobId};

use crate::core::{Attachment, Core, Hosted};

const REMEDY: &str =
    "start it with the newest copy, or with an empty --state: what still runs is saved then, and ends";

/// Why the state is older than what a worker has seen of it, if it is. `last_step` is the last durable step of a job.
pub(super) fn outdated_by(
    core: &Core,
    last_step: impl Fn(JobId) -> Option<u64>,
    attachment: &Attachment,
) -> Option<String> {
    let Attachment { registration, hosted, state, facts, .. } = attachment;
    let (jobs, name) = (core.jobs(), &registration.name);
    if *state != core.state() {
        return None;
    }
    if *facts > jobs.facts {
        let own = jobs.facts;
        return Some(format!(
            "the state is an older copy: it has {own} facts, worker {name} has seen {facts}; {REMEDY}"
        ));
    }
    let ahead = |hosted: &Hosted| {
        let &Hosted { formation: FormationId { job, generation }, durable, .. } = hosted;
        // A formation before a roll-back has made steps that do not count any more.
        let record = jobs.all.get(&job).filter(|record| record.generation() == generation)?;
        let last = last_step(job).filter(|_| !record.has_ended())?;
        (durable > last).then_some((job, durable, last))
    };
    hosted.iter().find_map(ahead).map(|(job, durable, last)| {
        format!(
            "the state is an older copy: it has {job} up to step {last}, worker {name} up to {durable}; {REMEDY}"
        )
    })
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::topology::Generation;

    use super::*;
    use crate::core::facts::Fact;
    use crate::core::jobs::Jobs;
    use crate::core::{Registration, Times};

    fn core() -> Core {
        let mut jobs = Jobs::default();
        for node in ["n1", "n2", "n3"] {
            jobs.apply(&Fact::Drained { node: node.into() });
        }
        Core::new(jobs, 2, 0, Times::default()).identified(7, 1)
    }

    fn attachment(state: u64, facts: u64) -> Attachment {
        let registration = Registration { worker: 1, name: "w1".into(), ..Registration::default() };
        Attachment { registration, state, facts, ..Attachment::default() }
    }

    #[test]
    fn a_worker_that_has_seen_more_facts_of_the_same_state_shows_that_it_is_old() {
        let outdated = |state, facts| outdated_by(&core(), |_| None, &attachment(state, facts));
        assert_eq!([outdated(7, 3), outdated(8, 4), outdated(7, 0)], [None, None, None]);
        let why = outdated(7, 4).unwrap();
        assert!(why.contains("it has 3 facts, worker w1 has seen 4; start it with"), "{why}");
    }

    #[test]
    fn formations_that_the_state_does_not_have_are_not_compared() {
        let formation = FormationId::new(JobId::new(1, 1), Generation::FIRST);
        let hosted = vec![Hosted { formation, ranks: Vec::new(), world: 1, steps: 9, durable: 5 }];
        let attachment = Attachment { hosted, ..attachment(7, 3) };
        assert_eq!(outdated_by(&core(), |_| Some(4), &attachment), None);
    }
}
