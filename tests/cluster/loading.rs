//! How a batch is read: beside the step before it, by each rank its own share only.

use std::sync::{Arc, Mutex};

use contraflow_orchestrator::job::Outcome;
use contraflow_workers::data::batches::Datasets;
use contraflow_workers::data::{Document, PackedDataset};
use contraflow_workers::engine::probe::{Probe, ProbePoint};

use crate::lab::{FOUR_RANKS, Lab, ONE_RANK, Setup};

/// Many short documents, so that most sequences hold the end of one.
fn short_documents() -> Arc<Datasets> {
    let split = |first: usize, count: usize| {
        let text = |number: usize| format!("document {number} of {count}").into_bytes();
        let documents =
            (first..first + count).map(|number| Document { name: "text".into(), text: text(number) });
        PackedDataset::pack(&documents.collect::<Vec<_>>(), 6)
    };
    Arc::new(Datasets { train: split(0, 90), validation: split(100, 20) })
}

#[test]
fn documents_apart_cost_the_same_loss_in_every_layout() {
    let lab = Lab::new();
    let run = |layout| {
        let setup = lab.setup(layout, &["data.attend_across_documents=false"]);
        let finished = lab.run(Setup { datasets: short_documents(), ..setup });
        assert_eq!(finished.num_waiting, 0, "frames that nobody took");
        let validation = match finished.outcome {
            Outcome::Done { validation, .. } => validation.map(|(loss, _)| loss),
            ref outcome => panic!("{outcome:?}"),
        };
        let tokens: Vec<u64> = finished.records.iter().map(|record| record.tokens).collect();
        (finished.losses(), tokens, validation.unwrap())
    };
    let (one, four) = (run(ONE_RANK), run(FOUR_RANKS));
    assert!(one.1.iter().all(|&tokens| tokens < 16 * 6), "every target counts: {:?}", one.1);
    assert_eq!(one.1, four.1, "targets that count");
    // Sums are rounded in another order; a divisor that missed a target would be off by more than 1 %.
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-3 * a, "{a} {b}");
    one.0.iter().zip(&four.0).for_each(|(&a, &b)| near(a, b));
    near(one.2, four.2);
}

#[test]
fn the_next_batch_is_asked_for_before_the_step_has_its_update() {
    let lab = Lab::new();
    let seen: Arc<Mutex<Vec<(u64, &'static str)>>> = Arc::default();
    let note = seen.clone();
    let probe = Probe::new(move |point| match point {
        ProbePoint::Actor { rank: 0, step, name } => note.lock().unwrap().push((step, name)),
        ProbePoint::Gradients { rank: 0, step, .. } => note.lock().unwrap().push((step, "gradients")),
        _ => {}
    });
    lab.run(Setup { probe, ..lab.setup(FOUR_RANKS, &[]) }).losses();
    let seen = seen.lock().unwrap();
    let at = |what| {
        seen.iter().position(|seen| *seen == what).unwrap_or_else(|| panic!("no {what:?} in {seen:?}"))
    };
    for step in 1..5 {
        assert!(at((step + 1, "loader")) < at((step, "gradients")), "step {step}: {seen:?}");
    }
    let loads = seen.iter().filter(|(step, name)| *name == "loader" && *step > 0).count();
    assert_eq!(loads, 5, "each batch is read once, none beyond the last step: {seen:?}");
}
