//! The checker against plans and programs that were tampered with: it always answers, and it is right.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashSet;

use contraflow_runtime::schedule::{
    Action, Chunk, Lane, LayerKind, Mode, Plan, Program, ScheduleKind, StageLayout, check, lower, pair_up,
    text,
};
use proptest::prelude::*;

/// A plan of a random schedule with at least two micro-batches, so that no single loss turns a training plan into
/// a forward-only one.
fn plans() -> impl Strategy<Value = Plan> {
    prop_oneof![plans_of(Mode::Train), plans_of(Mode::ForwardOnly)]
}

fn plans_of(mode: Mode) -> impl Strategy<Value = Plan> {
    let any = (0..ScheduleKind::ALL.len(), 1..6usize, 2..14usize, any::<bool>());
    any.prop_map(move |(kind, pipeline, micro_batches, is_paired)| {
        let kind = ScheduleKind::ALL[kind];
        let pipeline = if kind == ScheduleKind::Dualpipe { pipeline.next_multiple_of(2) } else { pipeline };
        let plan = kind.plan(pipeline, micro_batches, mode).unwrap().0;
        let layouts = layouts(plan.stages);
        if is_paired { pair_up(plan, &layouts) } else { plan }
    })
}

fn layouts(stages: usize) -> Vec<StageLayout> {
    let layers = vec![LayerKind::Dense, LayerKind::Moe];
    let layout = |stage| StageLayout {
        first_layer: 2 * stage,
        layers: layers.clone(),
        embedding: false,
        head: false,
        tied: false,
        mtp_layer: None,
    };
    (0..stages).map(layout).collect()
}

/// All lowerings must come back, whatever the plan.
fn verdict(plan: &Plan) -> Result<(), Vec<String>> {
    let layouts = layouts(plan.stages.min(20));
    let bare = check(plan, &lower(plan, None, 1)).map(|_| ());
    let _ = check(plan, &lower(plan, Some(&layouts), 2));
    bare.map_err(|faults| faults.iter().map(ToString::to_string).collect())
}

fn pick(plan: &Plan, rank: prop::sample::Index, action: prop::sample::Index) -> (usize, usize) {
    let rank = rank.index(plan.ranks());
    (rank, action.index(plan.actions[rank].len()))
}

/// Runs a plan the slow way: any rank whose next action has what it needs runs it, until nothing moves. With
/// `own_order` an action also needs what its own rank should have made before.
fn gets_stuck(plan: &Plan, own_order: bool) -> bool {
    let mut done: HashSet<(char, Chunk)> = HashSet::new();
    let rank_of = |letter: char, chunk: Chunk| {
        plan.actions.iter().position(|list| list.iter().any(|action| runs(action).contains(&(letter, chunk))))
    };
    let mut next = vec![0; plan.ranks()];
    loop {
        let mut moved = false;
        for (rank, list) in plan.actions.iter().enumerate() {
            while let Some(action) = list.get(next[rank]) {
                let ready =
                    runs(action).iter().flat_map(needs).all(|(letter, chunk)| match rank_of(letter, chunk) {
                        None => true,
                        Some(owner) if owner == rank && !own_order => true,
                        Some(_) => done.contains(&(letter, chunk)),
                    });
                if !ready {
                    break;
                }
                done.extend(runs(action));
                next[rank] += 1;
                moved = true;
            }
        }
        if !moved {
            return next.iter().zip(&plan.actions).any(|(&next, list)| next < list.len());
        }
    }
}

fn runs(action: &Action) -> Vec<(char, Chunk)> {
    match *action {
        Action::Forward(chunk) => vec![('F', chunk)],
        Action::Backward(chunk) => vec![('I', chunk)],
        Action::BackwardInput(chunk) => vec![('I', chunk)],
        Action::BackwardWeight(chunk) => vec![('W', chunk)],
        Action::ForwardBackward { forward, backward } => vec![('F', forward), ('I', backward)],
        Action::ForwardForward { first, second } => vec![('F', first), ('F', second)],
        // Of one chunk: a backward pass.
        Action::InputWeight { input, weight } if input == weight => vec![('I', input)],
        Action::InputWeight { input, weight } => vec![('I', input), ('W', weight)],
    }
}

fn needs(&(letter, chunk): &(char, Chunk)) -> Vec<(char, Chunk)> {
    let Chunk { stage, micro_batch } = chunk;
    let at = |stage| Chunk { stage, micro_batch };
    match letter {
        'F' => stage.checked_sub(1).map(|stage| ('F', at(stage))).into_iter().collect(),
        'I' => vec![('F', chunk), ('I', at(stage + 1))],
        _ => vec![('I', chunk)],
    }
}

fn tampered_action() -> impl Strategy<Value = Action> {
    let number = || prop_oneof![4 => 0..16usize, 1 => Just(usize::MAX)];
    let chunk = move || (number(), number()).prop_map(|(stage, micro_batch)| Chunk { stage, micro_batch });
    prop_oneof![
        chunk().prop_map(Action::Forward),
        chunk().prop_map(Action::Backward),
        chunk().prop_map(Action::BackwardInput),
        chunk().prop_map(Action::BackwardWeight),
        (chunk(), chunk()).prop_map(|(forward, backward)| Action::ForwardBackward { forward, backward }),
        (chunk(), chunk()).prop_map(|(first, second)| Action::ForwardForward { first, second }),
        (chunk(), chunk()).prop_map(|(input, weight)| Action::InputWeight { input, weight }),
    ]
}

#[derive(Clone, Debug)]
enum Tampering {
    Replace(prop::sample::Index, prop::sample::Index, Action),
    Insert(prop::sample::Index, Action),
    Move(prop::sample::Index, prop::sample::Index),
    Stages(usize),
    MicroBatches(usize),
    Place(prop::sample::Index, Vec<usize>),
    ForgetRank,
    ForgetPlacement,
}

fn tampering() -> impl Strategy<Value = Tampering> {
    use prop::sample::Index;
    let sizes = || prop_oneof![0..20usize, Just(usize::MAX)];
    prop_oneof![
        (any::<Index>(), any::<Index>(), tampered_action())
            .prop_map(|(r, a, action)| Tampering::Replace(r, a, action)),
        (any::<Index>(), tampered_action()).prop_map(|(r, action)| Tampering::Insert(r, action)),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Tampering::Move(from, to)),
        sizes().prop_map(Tampering::Stages),
        sizes().prop_map(Tampering::MicroBatches),
        (any::<Index>(), prop::collection::vec(sizes(), 0..3))
            .prop_map(|(r, held)| Tampering::Place(r, held)),
        Just(Tampering::ForgetRank),
        Just(Tampering::ForgetPlacement),
    ]
}

fn tamper(plan: &mut Plan, with: Tampering) {
    if plan.actions.is_empty() {
        return;
    }
    let ranks = plan.ranks();
    match with {
        Tampering::Replace(rank, action, new) => {
            let list = &mut plan.actions[rank.index(ranks)];
            if !list.is_empty() {
                let at = action.index(list.len());
                list[at] = new;
            }
        }
        Tampering::Insert(rank, new) => plan.actions[rank.index(ranks)].push(new),
        Tampering::Move(from, to) => {
            if let Some(action) = plan.actions[from.index(ranks)].pop() {
                plan.actions[to.index(ranks)].insert(0, action);
            }
        }
        Tampering::Stages(stages) => plan.stages = stages,
        Tampering::MicroBatches(micro_batches) => plan.micro_batches = micro_batches,
        Tampering::Place(rank, held) => plan.placement[rank.index(ranks)] = held,
        Tampering::ForgetRank => drop(plan.actions.pop()),
        Tampering::ForgetPlacement => {
            plan.placement.truncate(1);
            plan.placement.resize(ranks, Vec::new());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lost_action_is_a_fault(mut plan in plans(), rank: prop::sample::Index, action: prop::sample::Index) {
        let (rank, action) = pick(&plan, rank, action);
        let lost = plan.actions[rank].remove(action);
        let faults = verdict(&plan).unwrap_err();
        let mut chunks = lost.forwards().chain(lost.backward_input()).chain(lost.backward_weight());
        let chunk = chunks.next().unwrap();
        let named = format!("of {chunk} never runs");
        prop_assert!(faults.iter().any(|fault| fault.contains(&named)), "lost {lost}: {faults:?}");
    }

    #[test]
    fn a_doubled_action_is_a_fault(
        mut plan in plans(),
        rank: prop::sample::Index,
        action: prop::sample::Index,
        at: prop::sample::Index,
    ) {
        let (rank, action) = pick(&plan, rank, action);
        let doubled = plan.actions[rank][action];
        let at = at.index(plan.actions[rank].len() + 1);
        plan.actions[rank].insert(at, doubled);
        let faults = verdict(&plan).unwrap_err();
        prop_assert!(faults.iter().any(|fault| fault.contains("runs again")), "doubled {doubled}: {faults:?}");
    }

    #[test]
    fn a_swap_is_a_fault_exactly_if_it_cannot_run(
        mut plan in plans(),
        rank: prop::sample::Index,
        one: prop::sample::Index,
        other: prop::sample::Index,
    ) {
        let (rank, one) = pick(&plan, rank, one);
        let other = other.index(plan.actions[rank].len());
        plan.actions[rank].swap(one, other);
        let faults = verdict(&plan).err().unwrap_or_default();
        prop_assert_eq!(!faults.is_empty(), gets_stuck(&plan, true), "{:?}", faults);
        let deadlock = faults.iter().any(|fault| fault.contains("deadlock"));
        prop_assert_eq!(deadlock, gets_stuck(&plan, false), "{:?}", faults);
    }

    #[test]
    fn any_plan_is_answered(mut plan in plans(), with in prop::collection::vec(tampering(), 1..6)) {
        with.into_iter().for_each(|with| tamper(&mut plan, with));
        let _ = verdict(&plan);
        // The text form holds any plan, sound or not, but one of more chunks than any run has.
        match text::parse(&text::write(&plan)) {
            Err(faults) => {
                let chunks = plan.stages.checked_mul(plan.micro_batches);
                prop_assert!(chunks.is_none_or(|chunks| chunks > text::MAX_CHUNKS), "{:?}", faults);
            }
            read => prop_assert_eq!(read, Ok(plan)),
        }
    }

    #[test]
    fn any_text_is_answered(text in "(schedule|stages|micro-batches|placement|rank|#|[FBIW&.:0-9 \n]|é){0,40}") {
        let _ = text::parse(&text);
    }

    // Without a backward pass nothing determines what a chunk's forward consists of, so training plans only.
    #[test]
    fn a_tampered_program_is_a_fault(plan in plans_of(Mode::Train), rank: prop::sample::Index, op: prop::sample::Index, how in 0..5) {
        let mut programs = lower(&plan, Some(&layouts(plan.stages)), 2);
        let rank = rank.index(plan.ranks());
        let at = op.index(programs[rank].ops.len());
        let Program { ops, .. } = &mut programs[rank];
        match how {
            0 => drop(ops.remove(at)),
            1 => ops.insert(at, ops[at].clone()),
            2 => ops[at].lane = if matches!(ops[at].lane, Lane::Send(_)) { Lane::Compute } else { Lane::Send(usize::MAX) },
            3 => ops[at].after.push(usize::MAX),
            _ => ops[at].action = Some(usize::MAX),
        }
        // A transfer's action is only a label.
        let label = how == 4 && matches!(programs[rank].ops[at].lane, Lane::Send(_) | Lane::Receive(_));
        prop_assert_eq!(check(&plan, &programs).is_ok(), label);
    }
}

#[test]
fn programs_of_another_plan_are_refused() {
    let plan = |micro_batches| ScheduleKind::Dualpipe.plan(4, micro_batches, Mode::Train).unwrap().0;
    let faults = check(&plan(8), &lower(&plan(10), None, 1)).unwrap_err();
    assert!(faults.iter().any(|fault| fault.text.contains("not what the plan does here")), "{faults:?}");
    let faults = check(&plan(8), &lower(&plan(8), None, 1)[1..]).unwrap_err();
    assert_eq!(faults[0].to_string(), "expected 4 programs, one per rank, got 3");
}

#[test]
fn faults_name_rank_action_and_cause() {
    let parse = |rows: &str| {
        text::parse(&format!(
            "schedule mine\nstages 2\nmicro-batches 2\nplacement 0: 0\nplacement 1: 1\n{rows}"
        ))
        .unwrap()
    };
    let faults =
        verdict(&parse("rank 0: F0.0 F0.1 B0.0 B0.1 F0.1\nrank 1: F1.0 B1.0 B1.1 F0.0")).unwrap_err();
    let expected = [
        "rank 0, action 4: F0.1: the forward of 0.1 runs again, first as action 1 of rank 0",
        "rank 1, action 3: F0.0: the rank holds stages [1], not stage 0",
        "rank 1, action 3: F0.0: the forward of 0.0 runs again, first as action 0 of rank 0",
        "rank 1: the forward of 1.1 never runs",
        "rank 1, action 2: the input gradient of 1.1 has no forward",
    ];
    assert_eq!(faults, expected);
    let faults = verdict(&parse("rank 0: F0.0 B0.0 F0.1 B0.1\nrank 1: F1.1 B1.1 F1.0 B1.0")).unwrap_err();
    let expected = [
        "rank 0, action 1: deadlock: input gradient of stage 0, micro-batch 0 waits for the gradient of 1.0 from rank 1",
        "rank 1, action 0: deadlock: forward of stage 1, micro-batch 1 waits for the activation of 0.1 from rank 0",
    ];
    assert_eq!(faults, expected);
}
