//! Every rule that can be broken is broken once: some seed shows it, and the check that is meant for it says so.

use contraflow_orchestrator::simulation::Mutation::{self, *};
use contraflow_orchestrator::simulation::run_broken;

/// Seeds within which a broken rule has to show.
const SEEDS: u64 = 4_000;

/// A rule, and what the check says that notices.
const CAUGHT: [(Mutation, &str); 35] = [
    (TakesAnyFolder, "for its own"),
    (CountsNothing, "is said to have made step"),
    (SpeaksFirst, "assigned by a formation that is not kept"),
    (GoesOnUnkept, "fold into another state than the core's"),
    (LosesAFact, "fold into another state than that they came from"),
    (KeepsIncarnation, "fold into another state"),
    (WritesOn, "fold into another state"),
    (IgnoresIncarnations, "which runs"),
    (ForgetsSteps, "is next"),
    (TellsStepsAgain, "is next"),
    (BelievesAnybody, "a message of an earlier formation has an effect"),
    (HearsStaleRanks, "a message of an earlier formation has an effect"),
    (CommitsEarly, "is committed with shards of"),
    (CommitsInWords, "None stands"),
    (AssignsTwice, "was meant"),
    (StaysOn, "hosts"),
    (SaysOnce, "is next"),
    (ForgetsCursor, "begins at sequence"),
    (IgnoresKeys, "is submitted twice"),
    (ForgetsNothing, "jobs are over and known"),
    (ForgetsHalf, "is forgotten, and its steps are not"),
    (ResumesEarlier, "is to begin step"),
    (OutrunsBuddies, "is in memory"),
    (LetsGoEarly, "is in memory"),
    (RecoversInSilence, "is next"),
    (MovesStale, "is put together of several"),
    (DropsWhatItBrings, "and has none"),
    (PinsNothing, "which is kept, is gone"),
    (BlamesNobody, "after the last fault"),
    (EndsOnFailedSave, "has ended without cause"),
    (ReadsDamage, "next is step"),
    (EndsOnDamage, "has ended without cause"),
    (HidesPeers, "both are used again"),
    (KnowsNoMost, "it may have"),
    (StaysSmall, "may grow, there is room"),
];

#[test]
fn a_broken_rule_is_noticed() {
    let unnoticed: Vec<Mutation> = CAUGHT
        .into_iter()
        .filter(|&(rule, check)| {
            let found = (1..=SEEDS).find_map(|seed| {
                let violation = run_broken(seed, rule).violation?;
                violation.contains(check).then_some((seed, violation))
            });
            match &found {
                Some((seed, words)) => println!("{rule:?}: seed {seed}: {words}"),
                None => println!("{rule:?}: not noticed"),
            }
            found.is_none()
        })
        .map(|(rule, _)| rule)
        .collect();
    assert!(unnoticed.is_empty(), "not noticed in {SEEDS} seeds: {unnoticed:?}");
}
