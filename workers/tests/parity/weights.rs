//! Configuration and weights in files: both spellings read alike, and what is written is what was read.

use std::collections::BTreeMap;

use contraflow_runtime::fabric::Phase;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::topology::FormationId;
use contraflow_workers::comm::address::StepId;
use contraflow_workers::comm::collectives::Collectives;
use contraflow_workers::hf::weights::SINGLE_FILE;
use contraflow_workers::rank::checkpointer::export;

use crate::findings::Findings;
use crate::fixture::{Fixture, read_config, read_values};
use crate::one_rank::{OneRank, PLAIN};

pub fn spellings(fixture: &Fixture, findings: &mut Findings) {
    let config = &fixture.config;
    let older = fixture.dir.join("config_deepseek.json");
    if older.exists() {
        let older = read_config(&older);
        findings.check(older == *config, || {
            format!("expected both spellings to read alike: {config:?}; {older:?}")
        });
    }
    let again = ModelConfig::from_hf_json(&config.to_hf_json()).unwrap();
    findings.check(again == *config, || format!("expected to read what was written: {config:?}; {again:?}"));
}

/// Reads the whole model and writes it again: the same tensors, multi-token prediction's copies of embedding and head too.
pub fn round_trip(fixture: &Fixture, findings: &mut Findings) {
    let rank = OneRank::load(fixture.config.clone(), &fixture.dir, PLAIN.schedule);
    let dir = tempfile::tempdir().unwrap();
    let id = StepId { formation: FormationId::default(), phase: Phase::Update, step: 1 };
    let collectives = Collectives { endpoint: &rank.endpoint, id };
    let written = export(dir.path(), 1, &fixture.config, &rank.params, &collectives).unwrap();
    let before = read_values(&fixture.dir.join(SINGLE_FILE));
    let after = read_values(&dir.path().join(&written.file));
    let same_names = before.keys().eq(after.keys());
    findings.check(same_names, || format!("expected {:?}, got {:?}", before.keys(), after.keys()));
    findings.check(after.keys().eq(&written.tensors), || {
        "the list of written tensors is not what is in the file".into()
    });
    for (name, before) in &before {
        let same = after
            .get(name)
            .is_some_and(|after| (&after.shape, &after.values) == (&before.shape, &before.values));
        findings.check(same, || format!("{name}: not what was read"));
    }
    let listed: BTreeMap<_, _> =
        fixture.config.weights().into_iter().map(|weight| (weight.name, weight.shape)).collect();
    let shapes: BTreeMap<_, _> = before.into_iter().map(|(name, truth)| (name, truth.shape)).collect();
    findings
        .check(listed == shapes, || format!("expected the configuration to list {shapes:?}, got {listed:?}"));
}
