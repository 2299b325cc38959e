//! What is observed of a machine whose costs are known.

use super::*;
use crate::recipe::RecipeSource;
use crate::schedule::{Chunk, Program};
use crate::simulator::{Cluster, Costs, MeasuredCosts, Run, simulate_recipe};

/// `tiny` in a layout, with micro-batches of so many sequences.
fn tiny([pipeline, expert, data]: [usize; 3], micro_batch_size: usize) -> Recipe {
    let overrides = [
        "parallel.schedule=1f1b".to_owned(),
        format!("parallel.pipeline={pipeline}"),
        format!("parallel.expert={expert}"),
        format!("parallel.data={data}"),
        format!("training.micro_batch_size={micro_batch_size}"),
    ];
    Recipe::load(&RecipeSource::Builtin("tiny".into()), &overrides).unwrap()
}

/// A machine on which every component takes another fixed time and another one for a token.
fn machine(operation_s: f64) -> Cluster {
    let recipe = tiny([1, 1, 2], 1);
    let stages = recipe_stages(&recipe).unwrap();
    let layers = with_shapes(&recipe, &[vec![0]], &stages, LayerShape::of);
    let pieces = [
        (Component::Embedding, None),
        (Component::Attention, Some(LayerKind::Dense)),
        (Component::Attention, Some(LayerKind::Moe)),
        (Component::Dispatch, None),
        (Component::SharedExpert, Some(LayerKind::Dense)),
        (Component::SharedExpert, Some(LayerKind::Moe)),
        (Component::Experts, None),
        (Component::Combine, None),
        (Component::Head, None),
        (Component::MtpJoin, None),
        (Component::MtpHead, None),
    ];
    let passes = [Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight];
    let all = pieces.into_iter().flat_map(|piece| passes.map(|pass| (piece, pass))).enumerate();
    let operations = all.map(|(number, ((component, layer), pass))| MeasuredOperation {
        component,
        pass,
        layer,
        fixed_s: 1e-3 * (number + 1) as f64,
        per_token_s: 1e-5 * (40 - number) as f64,
    });
    let update = UpdateSpeed { pack: 1e9, norm: 2e9, apply: 3e9, unpack: 4e9 };
    let operations = operations.collect();
    let model = MeasuredModel { name: "tiny".into(), layers, operation_s, update, operations };
    let link = |bytes_per_s, latency_s| Link { bytes_per_s, latency_s };
    let costs = MeasuredCosts {
        send: link(5e8, 1e-4),
        exchange: link(4e8, 2e-4),
        collective: link(3e8, 3e-4),
        models: vec![model],
    };
    Cluster {
        name: "desk".into(),
        ranks: 4,
        ranks_per_node: 4,
        memory_bytes: 1 << 33,
        peak_flops: 1e11,
        costs: Costs::Measured(Box::new(costs)),
        published: Vec::new(),
    }
}

fn costs(cluster: &Cluster) -> &MeasuredCosts {
    match &cluster.costs {
        Costs::Measured(costs) => costs,
        other => panic!("{other:?}"),
    }
}

/// What ranks on the machine would record.
fn recorded(recipe: &Recipe, cluster: &Cluster) -> RecordedStep {
    let Run { plan, programs, timeline, .. } = simulate_recipe(recipe, cluster).unwrap();
    let topology = recipe.topology();
    let rank = |rank| {
        let pipeline = topology.coordinates(rank).pipeline;
        let (program, spans) = (programs[pipeline].clone(), timeline.spans[pipeline].clone());
        RecordedRank { rank, pipeline, program, spans }
    };
    RecordedStep { step: 1, plan: plan.into(), ranks: (0..topology.world()).map(rank).collect() }
}

/// What is observed of runs in these layouts, each with micro-batches of two sizes.
fn with_runs<R>(layouts: &[[usize; 3]], cluster: &Cluster, then: impl FnOnce(&[Observed]) -> R) -> R {
    let recipes: Vec<Recipe> = layouts.iter().flat_map(|&axes| [tiny(axes, 2), tiny(axes, 1)]).collect();
    let steps: Vec<[RecordedStep; 1]> = recipes.iter().map(|recipe| [recorded(recipe, cluster)]).collect();
    let runs = recipes.iter().zip(&steps);
    then(&runs.map(|(recipe, steps)| Observed { recipe, steps }).collect::<Vec<_>>())
}

fn near(got: f64, wanted: f64) -> bool {
    (got - wanted).abs() <= 1e-9 * wanted.abs().max(1e-6)
}

#[test]
fn what_a_machine_takes_is_found_in_what_its_ranks_record() {
    let truth = machine(0.0);
    let model = with_runs(&[[1, 1, 2]], &truth, |runs| measured_model("tiny", runs).unwrap());
    let wanted = &costs(&truth).models[0];
    assert_eq!((&model.layers, model.operation_s), (&wanted.layers, 0.0));
    assert!(!model.operations.is_empty());
    for found in &model.operations {
        let same = |known: &&MeasuredOperation| {
            (known.component, known.pass, known.layer) == (found.component, found.pass, found.layer)
        };
        let known = wanted.operations.iter().find(same).unwrap();
        assert!(
            near(found.fixed_s, known.fixed_s) && near(found.per_token_s, known.per_token_s),
            "{found:?}, {known:?}"
        );
    }
    for (found, known) in [
        (model.update.pack, wanted.update.pack),
        (model.update.norm, wanted.update.norm),
        (model.update.apply, wanted.update.apply),
        (model.update.unpack, wanted.update.unpack),
    ] {
        assert!(near(found, known), "{found}, {known}");
    }
    let layouts = [[1, 1, 2], [1, 2, 1], [2, 1, 1]];
    let links = with_runs(&layouts, &truth, |runs| measured_links(&model, runs).unwrap());
    let known = [costs(&truth).send, costs(&truth).exchange, costs(&truth).collective];
    for (found, known) in links.into_iter().zip(known) {
        assert!(near(found.latency_s, known.latency_s), "{found:?}, {known:?}");
        assert!(near(1.0 / found.bytes_per_s, 1.0 / known.bytes_per_s), "{found:?}, {known:?}");
    }
}

#[test]
fn a_step_in_a_layout_that_was_not_measured_takes_what_the_machine_takes() {
    let truth = machine(2e-5);
    let layouts = [[1, 1, 2], [1, 2, 1], [2, 1, 1]];
    let model = with_runs(&layouts[..1], &truth, |runs| measured_model("tiny", runs).unwrap());
    let [send, exchange, collective] =
        with_runs(&layouts, &truth, |runs| measured_links(&model, runs).unwrap());
    let found = MeasuredCosts { send, exchange, collective, models: vec![model] };
    let text =
        format!("ranks = 4\nranks_per_node = 4\nmemory_bytes = 1\npeak_flops = 1.0\n{}", found.to_toml());
    let found_again = Cluster::from_toml("desk.toml", &text).unwrap();
    assert_eq!(costs(&found_again), &found);
    for axes in [[2, 2, 1], [4, 1, 1], [1, 4, 1], [1, 2, 2]] {
        let recipe = tiny(axes, 2);
        let wanted = simulate_recipe(&recipe, &truth).unwrap().step_s;
        let got = simulate_recipe(&recipe, &found_again).unwrap().step_s;
        assert!((got / wanted - 1.0).abs() < 1e-3, "{axes:?}: {got} s, not {wanted} s");
    }
}

#[test]
fn other_layers_and_what_was_not_measured_are_refused_in_words() {
    let mut truth = machine(0.0);
    let small = Recipe::load(&RecipeSource::Builtin("small".into()), &[]).unwrap();
    let refused = simulate_recipe(&small, &truth).unwrap_err().join("\n");
    assert!(
        refused.contains("tiny (vocab_size") && refused.contains("contraflow bench profile"),
        "{refused}"
    );
    let Costs::Measured(costs) = &mut truth.costs else { panic!("{:?}", truth.costs) };
    costs.models[0].operations.retain(|known| known.component != Component::Experts);
    costs.models[0].update.apply = 0.0;
    let refused = simulate_recipe(&tiny([1, 1, 1], 1), &truth).unwrap_err();
    let wanted = [
        "desk: measured: expected a speed update.apply of tiny, got none",
        "desk: measured: expected experts, backward_input, layer any of tiny, got none",
        "desk: measured: expected experts, backward_weight, layer any of tiny, got none",
        "desk: measured: expected experts, forward, layer any of tiny, got none",
    ];
    assert_eq!(refused, wanted);
}

#[test]
fn pauses_are_counted_from_the_end_of_what_was_waited_for() {
    let op = |lane, after: &[usize]| Op {
        lane,
        work: Work::Component {
            pass: Pass::Forward,
            chunk: Chunk { stage: 0, micro_batch: 0 },
            layer: 0,
            component: Component::Attention,
        },
        after: after.to_vec(),
        action: None,
    };
    let program = Program::of(vec![
        op(Lane::Compute, &[]),
        op(Lane::Expert, &[0]),
        op(Lane::Compute, &[1]),
        op(Lane::Compute, &[]),
    ]);
    let span = |start, end| Span { start, end };
    let spans = vec![span(0.0, 1.0), span(1.5, 3.0), span(3.25, 4.0), span(4.5, 5.0)];
    let rank = RecordedRank { rank: 0, pipeline: 0, program, spans };
    assert_eq!(pauses_of(&rank), [0.25, 0.5]);
}

#[test]
fn lines_do_not_go_below_nothing() {
    assert_eq!(line(&[(1.0, 3.0), (2.0, 5.0)]), (1.0, 2.0));
    assert_eq!(line(&[(1.0, 1.0), (2.0, 4.0)]), (0.0, 9.0 / 5.0), "through the origin");
    assert_eq!(line(&[(1.0, 4.0), (2.0, 2.0)]), (3.0, 0.0), "flat");
    assert_eq!(line(&[(2.0, 6.0)]), (0.0, 3.0), "of one point");
    assert_eq!(
        (median(vec![3.0, 1.0]), median(vec![5.0, 1.0, 2.0]), median(vec![])),
        (Some(2.0), Some(2.0), None)
    );
}
