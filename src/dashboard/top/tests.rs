//! Frames of states that are known, at the sizes of terminals: what stands there, and in which colours.

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_runtime::control::text::is_control;
use contraflow_runtime::simulator::Shade;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};

use super::answers::*;
use super::asking::Asking;
use super::draw::draw;
use super::link::Link;
use super::look::{Colours, Look};
use super::view::{Event, Key, Run, View, update};
use super::{event, text};
use crate::access::Access;
use crate::dashboard::{Door, DoorArgs, Facts, Listen, Phase, Shown, Subject};

const PLAIN: Look = Look { colours: Colours::None, is_unicode: true };
const ASCII: Look = Look { colours: Colours::None, is_unicode: false };
const COLOURED: Look = Look { colours: Colours::True, is_unicode: true };

/// A second before an incident of the tests.
const CLOCK: u64 = 1_700_000_000_000;

fn shown(view: &View, look: Look, (width, height): (u16, u16)) -> String {
    text(view, look, width.into(), height).unwrap()
}

fn buffer(view: &View, look: Look, (width, height): (u16, u16)) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(view, look, frame)).unwrap().buffer.clone()
}

/// Four ranks: two in the pipeline, two along the experts. A forward and a backward pass a rank, those of the second two after a pause.
fn overview() -> Overview {
    let figures = [
        ("tokens_per_second", 12_345.0),
        ("mfu", 0.53),
        ("bubble_share", 0.11),
        ("grad_norm", 0.984),
        ("learning_rate", 3e-3),
        ("memory_bytes", (1_u64 << 30) as f64),
    ];
    Overview {
        id: "tiny".into(),
        name: "tiny".into(),
        phase: Phase::Training,
        step: 180,
        steps: Some(720),
        seconds_left: Some(133.0),
        planned_memory: Some(3 << 29),
        layout: Some(Layout { pipeline: 2, expert: 2, data: 1, schedule: "dualpipe".into() }),
        figures: figures.map(|(key, value)| Figure { key: key.into(), last: Some(value) }).into(),
        annotations: vec![
            Annotation { step: 100, kind: "checkpoint".into(), text: "written".into() },
            Annotation { step: 120, kind: "warning".into(), text: "a spike of the loss: 9.1".into() },
        ],
        ..Overview::default()
    }
}

fn pipeline() -> Pipeline {
    let op = |s, e, c| Op { s, e, c: Some(c) };
    let row = |stages: [u64; 2], ops| Row {
        stages: Some(stages.into()),
        lanes: vec![
            Lane { name: "compute".into(), ops },
            Lane { name: "send".into(), ops: vec![op(0.0, 8.0, 8)] },
        ],
    };
    let first = || row([0, 3], vec![op(0.0, 3.0, 0), op(3.0, 6.0, 1)]);
    let last = || row([1, 2], vec![op(2.0, 5.0, 0), op(5.0, 8.0, 1)]);
    let mut ranks = vec![first(), first(), last(), last()];
    // It works a little longer than the others.
    ranks[2].lanes[0].ops.push(op(0.0, 1.0, 7));
    Pipeline { source: "recorded in step 180".into(), makespan: 8.0, unit: "s".into(), ranks }
}

fn run() -> Run {
    let steps: Vec<u64> = (1..=180).collect();
    let loss = steps.iter().map(|step| Some(1.0 + 4.8 / *step as f64)).collect();
    Run {
        overview: overview(),
        loss: Series { step: steps, figures: [("loss".to_owned(), loss)].into() },
        pipeline: Some(pipeline()),
        experts: Experts {
            layers: [(1, 0.25), (2, 1.25), (3, 0.5)].map(|(layer, max_vio)| Load { layer, max_vio }).into(),
            max_vio: Vec::new(),
        },
        job: None,
        incidents: Vec::new(),
    }
}

fn about(kind: &str, ids: &[&str]) -> About {
    let entry = |id: &&str| Entry {
        id: (*id).into(),
        name: format!("name of {id}").into(),
        phase: Phase::Training,
        step: 180,
        steps: Some(720),
        loss: Some(1.5),
    };
    About { kind: kind.into(), runs: ids.iter().map(entry).collect() }
}

fn local() -> View {
    let view = View::new("http://127.0.0.1:7080/".into(), None);
    let view = update(view, Event::Answered { about: about("runs", &["tiny"]), run: None });
    update(view, Event::Answered { about: about("runs", &["tiny"]), run: Some(Box::new(run())) })
}

/// The same as a job that has lost a rank before.
fn cluster() -> View {
    let mut run = run();
    run.overview.id = "job-2".into();
    run.overview.name = "night · job-2".into();
    run.overview.annotations.clear();
    run.pipeline = run.pipeline.map(|mut pipeline| {
        (pipeline.source, pipeline.unit) = ("planned: a forward pass takes one unit".into(), "F".into());
        pipeline.ranks = vec![pipeline.ranks[0].clone(), pipeline.ranks[3].clone()];
        pipeline
    });
    let place = |rank, busy_seconds| Place {
        rank,
        node: format!("n{rank}").into(),
        busy_seconds,
        waited_seconds: 0.125,
        slow: rank == 3,
        ..Place::default()
    };
    run.job = Some(Job {
        step: 180,
        state: "recovering".into(),
        generation: 2,
        waiting_for: "4 ranks, 3 healthy".into(),
        warning: String::new().into(),
        ranks: vec![place(0, 0.5), place(1, 0.5), place(2, 0.5), place(3, 1.5)],
    });
    run.incidents = vec![Incident {
        began_unix_ms: CLOCK,
        over_unix_ms: Some(CLOCK + 2_500),
        sign: "rank 1 lost: worker w is silent".into(),
    }];
    let view = View::new("https://node0:7080/".into(), Some("job-2"));
    update(view, Event::Answered { about: about("cluster", &["job-2", "job-1"]), run: Some(Box::new(run)) })
}

/// Every kind of page there is.
fn pages() -> Vec<View> {
    let keyed = |view: View, key| update(view, Event::Key(key));
    let away = Event::Failed { why: "connection refused".into(), unix_ms: CLOCK };
    let still = View { is_still: true, ..local() };
    let empty = update(View::default(), Event::Answered { about: about("cluster", &[]), run: None });
    let unknown = View::new("http://127.0.0.1:7080/".into(), Some("job-1"));
    let bare = Event::Answered { about: about("runs", &["tiny"]), run: Some(Box::default()) };
    vec![
        View::default(),
        empty,
        update(unknown, away.clone()),
        update(local(), bare),
        local(),
        still,
        update(cluster(), away),
        keyed(cluster(), Key::Back),
        keyed(cluster(), Key::Help),
        keyed(cluster(), Key::Pause),
    ]
}

#[test]
fn a_terminal_of_any_size_is_drawn_to() {
    for view in pages() {
        for look in [ASCII, COLOURED] {
            for width in [1, 2, 7, 40, 61, 80, 300] {
                (1..=24).chain([34, 60]).for_each(|height| drop(buffer(&view, look, (width, height))));
            }
        }
    }
}

#[test]
fn a_terminal_without_more_than_ascii_gets_nothing_else() {
    for view in pages().into_iter().filter(|view| !format!("{view:?}").contains('·')) {
        let text = shown(&view, ASCII, (120, 40));
        assert!(text.is_ascii(), "{text}");
    }
}

#[test]
fn what_a_job_is_called_cannot_act_on_the_terminal() {
    // As JSON has it.
    let hostile = r"\u001b]0;owned\u0007\u001b[2J\u009b31m\u202e\r\n";
    let entry = format!(r#"{{"id": "{hostile}", "name": "{hostile}", "phase": "training"}}"#);
    let about: About =
        serde_json::from_str(&format!(r#"{{"kind": "cluster", "runs": [{entry}, {entry}]}}"#)).unwrap();
    let overview = format!(
        r#"{{"id": "{hostile}", "name": "{hostile}", "outcome": "{hostile}", "layout": {{"schedule": "{hostile}"}},
             "annotations": [{{"step": 1, "kind": "{hostile}", "text": "{hostile}"}}]}}"#
    );
    let job = format!(
        r#"{{"state": "{hostile}", "waiting_for": "{hostile}", "warning": "{hostile}", "ranks": [{{"node": "{hostile}"}}]}}"#
    );
    let sign = format!(r#"{{"incidents": [{{"sign": "{hostile}"}}]}}"#);
    let run = Run {
        overview: serde_json::from_str(&overview).unwrap(),
        job: Some(serde_json::from_str(&job).unwrap()),
        incidents: serde_json::from_str::<Incidents>(&sign).unwrap().incidents,
        pipeline: serde_json::from_str(&format!(r#"{{"source": "{hostile}", "ranks": [{{}}]}}"#)).unwrap(),
        ..Run::default()
    };
    let list = update(View::default(), Event::Answered { about: about.clone(), run: None });
    let asked = update(list.clone(), Event::Key(Key::Open));
    let open = update(asked, Event::Answered { about, run: Some(Box::new(run)) });
    let refused: Refused = serde_json::from_str(&format!(r#"{{"faults": ["{hostile}"]}}"#)).unwrap();
    let away = update(open.clone(), Event::Failed { why: refused.faults[0].clone(), unix_ms: u64::MAX });
    assert!(open.run.is_some());
    for view in [list, open, away] {
        let buffer = buffer(&view, PLAIN, (300, 40));
        let acts = |cell: &&ratatui::buffer::Cell| cell.symbol().contains(is_control);
        assert_eq!(buffer.content.iter().find(acts), None);
        assert!(shown(&view, PLAIN, (300, 40)).contains(r"\u{1b}]0;owned\u{7}"));
    }
}

#[test]
fn colours_are_the_palettes_and_all_text_has_the_terminals_own() {
    let page = buffer(&local(), COLOURED, (120, 40));
    assert!(page.content.iter().all(|cell| cell.bg == Color::Reset));
    let is_text = |cell: &&ratatui::buffer::Cell| cell.symbol().is_ascii() && cell.symbol() != " ";
    assert!(page.content.iter().filter(is_text).all(|cell| cell.fg == Color::Reset));
    // Right of the ranks' figures; the curve has long fallen there.
    let strips = page.content.iter().enumerate().filter(|(place, _)| place % 120 >= 50).map(|(_, cell)| cell);
    let blocks = strips.filter(|cell| cell.symbol() == "▆").map(|cell| cell.fg);
    let colours: std::collections::BTreeSet<String> = blocks.map(|colour| format!("{colour:?}")).collect();
    let of = |shade: Shade| match u32::from_str_radix(&shade.colour()[1..], 16).unwrap().to_be_bytes() {
        [0, 0, 0, 0] => Color::Reset,
        [_, red, green, blue] => Color::Rgb(red, green, blue),
    };
    let shades = [Shade::Forward, Shade::Backward, Shade::Optimizer];
    assert_eq!(colours, shades.map(|shade| format!("{:?}", of(shade))).into());
    let plain = buffer(&cluster(), PLAIN, (120, 40));
    assert!(plain.content.iter().all(|cell| (cell.fg, cell.bg) == (Color::Reset, Color::Reset)));
}

#[test]
fn a_slow_rank_and_the_chosen_job_stand_out() {
    let lines = |view: &View| -> Vec<(String, Modifier, Color)> {
        let page = buffer(view, COLOURED, (120, 40));
        let rows = page.content.chunks(120);
        rows.map(|row| (row.iter().map(|cell| cell.symbol()).collect(), row[3].modifier, row[3].fg)).collect()
    };
    let slow: Vec<_> = lines(&cluster()).into_iter().filter(|(text, ..)| text.contains(" slow ")).collect();
    assert!(slow.len() == 1 && slow[0].0.starts_with("   3 ") && slow[0].2 == Color::Red, "{slow:?}");
    let listed = lines(&update(cluster(), Event::Key(Key::Back)));
    let marked = |(_, modifier, _): &&(String, Modifier, Color)| modifier.contains(Modifier::REVERSED);
    let marked: Vec<_> = listed.iter().filter(marked).collect();
    assert!(marked.len() == 1 && marked[0].0.starts_with("job-2 "), "{marked:?}");
}

#[test]
fn a_dashboard_that_is_away_is_said_with_since_when() {
    let failed = |unix_ms| Event::Failed { why: "connection refused".into(), unix_ms };
    let away = update(update(local(), failed(CLOCK)), failed(CLOCK + 12_000));
    let text = shown(&away, PLAIN, (80, 24));
    let line = "no answer since 2023-11-14 22:13:20 UTC (12 s): connection refused";
    assert!(text.lines().nth(1) == Some(line) && text.contains("step 180/720"), "{text}");
    let back = update(away, Event::Answered { about: about("runs", &["tiny"]), run: None });
    assert!(!shown(&back, PLAIN, (80, 24)).contains("no answer"));
}

#[test]
fn as_many_ranks_are_shown_as_there_is_room_for_from_the_one_that_was_scrolled_to() {
    let mut view = cluster();
    let run = view.run.as_mut().unwrap();
    run.overview.layout = Some(Layout { pipeline: 2, expert: 50, data: 1, ..Layout::default() });
    let place = |rank| Place { rank, busy_seconds: 0.5, ..Place::default() };
    run.job.as_mut().unwrap().ranks = (0..100).map(place).collect();
    let numbers = |view: &View| -> Vec<usize> {
        let text = shown(view, PLAIN, (80, 24));
        let rows = text.lines().skip_while(|line| !line.starts_with("rank")).skip(1);
        rows.map_while(|line| line.split_whitespace().next()?.parse().ok()).collect()
    };
    let first = numbers(&view);
    assert!(first.len() >= 5 && first == (0..first.len()).collect::<Vec<_>>(), "{first:?}");
    let view = (0..7).fold(view, |view, _| update(view, Event::Key(Key::Down)));
    assert_eq!(numbers(&view), (7..7 + first.len()).collect::<Vec<_>>());
    let view = (0..200).fold(view, |view, _| update(view, Event::Key(Key::Down)));
    assert_eq!(numbers(&view), (100 - first.len()..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_dashboard_that_was_away_is_asked_again_over_a_new_connection() {
    let run = Shown::starting(Facts { id: "r".into(), name: "r".into(), steps: Some(9), ..Facts::default() });
    run.step(&StepRecord { step: 1, loss: 2.0, ..StepRecord::default() });
    let open = |listen| Door::open(&DoorArgs { listen: Some(listen), token: None }).unwrap().unwrap();
    let dashboard = open("127.0.0.1:0".parse().unwrap()).serve(Subject::of_runs(vec![run.clone()])).unwrap();
    let address = dashboard.address();
    let none = Access { tls: None, token: None };
    let mut asking = Asking::new(Link::new(&address.to_string(), &none, None).unwrap());
    let step = |view: &View| view.run.as_ref().map(|run| run.overview.step);
    let mut view = View::new(String::new(), Some("r"));
    view = update(view, event(asking.ask(Some("r")).await));
    assert_eq!((step(&view), view.away.is_some()), (Some(1), false));
    drop(dashboard);
    // Its thread ends a moment later.
    while view.away.is_none() {
        view = update(view, event(asking.ask(Some("r")).await));
    }
    assert_eq!(step(&view), Some(1), "what is known stays");
    run.step(&StepRecord { step: 2, loss: 1.5, ..StepRecord::default() });
    let _again = open(Listen::At(address)).serve(Subject::of_runs(vec![run])).unwrap();
    view = update(view, event(asking.ask(Some("r")).await));
    assert_eq!((step(&view), view.away.is_some()), (Some(2), false));
}

#[test]
fn a_run_fits_the_smallest_terminal_that_is_common() {
    let expected = "\
tiny  training  step 180/720  25%  2:13 left  http://127.0.0.1:7080/
12.3k tok/s  MFU 53%  bubble 11%  |g| 0.98  lr 3.0e-3  memory 1.0 GiB, planned 1

Loss  5.800 → 1.027 nats/token
█
█▁
██▇▅▄▄▃▃▃▂▂▂▂▂▂▂▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁

Ranks  pipeline 2 x expert 2 x data 1, dualpipe  rank 2 works longest
rank stages  expert     busy    waits state    recorded in step 180  F  B  o opt
   0 0,3          0   6.00 s   2.00 s training FFFFFFFFFFFFBBBBBBBBBBBBB········
   1 0,3          1   6.00 s   2.00 s training FFFFFFFFFFFFBBBBBBBBBBBBB········
   2 1,2          0   7.00 s   1.00 s slowest  oooo····FFFFFFFFFFFFFBBBBBBBBBBBB
   3 1,2          1   6.00 s   2.00 s training ········FFFFFFFFFFFFFBBBBBBBBBBBB

Experts  MaxVio 0.67, most in layer 2: 1.25  ▂█▄

Incidents
  step 120  warning: a spike of the loss: 9.1




q quit  esc list  j/k ranks  p pause  ? help
";
    assert_eq!(shown(&local(), PLAIN, (80, 24)), expected);
}

#[test]
fn a_small_terminal_has_the_loss_and_the_ranks_and_a_cell_is_enough_for_something() {
    let expected = "\
tiny  training  step 180/720  25%  2:13
12.3k tok/s  MFU 53%  bubble 11%  |g| 0.
Loss  5.800 → 1.027 nats/token
█▃▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁
Ranks  pipeline 2 x expert 2 x data 1, d
rank     busy state    recorded in step
   0   6.00 s training FFFFFFBBBBBBB····
   1   6.00 s training FFFFFFBBBBBBB····
   2   7.00 s slowest  oo··FFFFFFFBBBBBB
   3   6.00 s training ····FFFFFFFBBBBBB


q quit  esc list  j/k ranks  p pause  ?
";
    assert_eq!(shown(&local(), PLAIN, (40, 13)), expected);
    assert_eq!(shown(&local(), PLAIN, (1, 1)), "t\n");
}

#[test]
fn a_job_says_on_which_nodes_it_is_what_it_waits_for_and_what_has_gone_wrong() {
    let text = shown(&cluster(), PLAIN, (120, 40));
    for line in [
        "night · job-2  recovering  step 180/720  25%  2:13 left  generation 2  https://node0:7080/",
        "waits for: 4 ranks, 3 healthy",
        "rank stages  expert node           busy    waits state    planned: a forward pass takes one unit  F  B",
        "   3 1,2          1 n3           1.50 s   0.12 s slow     ···············FFFFFFFFFFFFFFFFFFFFFFFFBBBBBBBBBBBBBBBBBBBBBBB",
        "Experts  MaxVio 0.67, most in layer 2: 1.25  ▂█▄",
        "  2023-11-14 22:13:20  rank 1 lost: worker w is silent (over after 2.5 s)",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
    }
    let listed = shown(&update(cluster(), Event::Key(Key::Back)), PLAIN, (80, 24));
    let expected = "\
2 jobs  https://node0:7080/
JOB          NAME                     STATE                STEP     LOSS
job-2        name of job-2            training          180/720    1.500
job-1        name of job-1            training          180/720    1.500
";
    assert!(listed.starts_with(expected), "{listed}");
}

#[test]
fn a_wide_terminal_has_the_memory_of_each_rank_beside_what_the_plan_says() {
    let mut view = local();
    view.run.as_mut().unwrap().overview.planned_ranks = vec![300 << 20, 3 << 28];
    let text = shown(&view, PLAIN, (120, 24));
    let rows: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("rank")).take(5).collect();
    assert!(rows[0].contains("waits         memory, planned state"), "{text}");
    // A gibibyte of the process is shared by four ranks.
    for (row, planned) in rows[1..].iter().zip(["300.0 MiB", "300.0 MiB", "768.0 MiB", "768.0 MiB"]) {
        assert!(row.contains(&format!(" 256.0 MiB, {planned} ")), "{text}");
    }
}
