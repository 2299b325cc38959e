//! What the orchestrator reads from the recipe of a job, and how a job is kept.

use super::*;

#[test]
fn a_job_round_trips_through_its_text_form() {
    let spec = JobSpec { key: "once".into(), traceparent: "00-ab".into(), ..*spec(3, -1) };
    let text = serde_json::to_value(&spec).unwrap();
    assert!(text["recipe"].as_str().unwrap().contains("data = 3"), "{text}");
    assert!(text["model_config"].as_str().unwrap().contains("DeepseekV3ForCausalLM"), "{text}");
    assert_eq!(serde_json::from_value::<JobSpec>(text).unwrap(), spec);
    assert_eq!((spec.topology().world(), spec.steps()), (3, 9));
}

#[test]
fn a_job_whose_recipe_makes_no_sense_is_refused_with_its_name_and_the_key() {
    let mut text = serde_json::to_value(*spec(1, 0)).unwrap();
    let recipe = text["recipe"].as_str().unwrap().replace("max_skips", "max_hops");
    text["recipe"] = recipe.into();
    let refusal = serde_json::from_value::<JobSpec>(text).unwrap_err().to_string();
    assert!(
        refusal.contains("the recipe of the job \"job\"") && refusal.contains("watch.max_hops"),
        "{refusal}"
    );
}

fn notes(effects: &[Effect]) -> Vec<&str> {
    logged(effects).into_iter().filter_map(|line| line.strip_prefix("note: ")).collect()
}

#[test]
fn a_fallback_is_noted_when_a_job_is_formed_in_a_layout_and_not_again_in_the_same_one() {
    let mut world = World::new();
    (1..=3).for_each(|worker| drop(world.attach(worker, Vec::new())));
    // Two micro-batches a pipeline, where dualpipe needs four.
    let changes = ["parallel.schedule=dualpipe", "parallel.pipeline=2", "training.global_batch_size=2"];
    let effects = world.step(Event::Submit(spec_with(1, 0, &changes)));
    let note = "batches of 2 sequences: dualpipe on 2 pipeline ranks needs at least 4 micro-batches, got 2; a \
                plan of the kind of 1f1b runs instead";
    assert_eq!(notes(&effects), [note]);
    assert_eq!(world.places(), [1, 2]);
    let effects = world.pass(LEASE_MS + TICK_MS, &[1, 3]);
    assert_eq!(world.places(), [1, 3]);
    assert_eq!(notes(&effects), [""; 0]);
}

#[test]
fn a_formation_knows_the_peak_of_its_hosts() {
    let mut world = World::new();
    for worker in 1..=2 {
        let tcp = ([127, 0, 0, 1], 1).into();
        let fabric = contraflow_runtime::fabric::Address { host: "one".into(), tcp, unix: String::new() };
        let registration = Registration {
            worker,
            slots: 1,
            node: format!("n{worker}"),
            fabric: Some(fabric),
            cores: 4,
            peak_flops: 4_000,
            ..Registration::default()
        };
        drop(world.join(Attachment { registration, ..Attachment::default() }));
    }
    drop(world.step(Event::Submit(spec(2, 0))));
    // Two of the host's four cores.
    assert_eq!(world.core.jobs().all[&JOB].formed.as_ref().unwrap().peak_flops, 2_000);
}
