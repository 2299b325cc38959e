//! The structure inside the crates: rooms, who imports whom, circles. A room is a direct file or folder under `src/`.
//!
//! Reads `use` paths and other paths that begin with `crate::`, `super::` or `self::`, as text; leaves tests out. Knows no types.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::{assert_none, root, sources};

/// The rooms of `workers`, from top to bottom: each imports only those below it.
const WORKERS: [&str; 14] = [
    "host",
    "rank",
    "infer",
    "engine",
    "optimizer",
    "replica",
    "hf",
    "comm",
    "checkpoint",
    "error",
    "model",
    "data",
    "hashed_file",
    "background",
];

/// Maximum number of rooms side by side in a crate.
const MAX_ROOMS: [(&str, usize); 5] =
    [("kernels", 28), ("runtime", 19), ("workers", 14), ("orchestrator", 12), (".", 30)];

/// Files of one room that import each other in a circle: the present list. It may shrink, not grow.
const CIRCLES: [(&str, &str, &[&str]); 8] = [
    (
        "runtime",
        "fabric",
        &["endpoint", "inbox", "incoming", "listener", "local", "outgoing", "segment", "wired"],
    ),
    ("runtime", "schedule", &["check", "check_programs"]),
    ("runtime", "schedule", &["dualpipe", "fallback", "interleaved", "kind", "one_f_one_b", "zb1p"]),
    ("runtime", "schedule", &["lower", "receives"]),
    ("workers", "data", &["hf_tokenizer", "tokenizer"]),
    ("orchestrator", "server", &["acceptor", "auth"]),
    ("orchestrator", "server", &["hub", "log_dedup"]),
    ("orchestrator", "simulation", &["checks", "memory", "network", "ranks", "server", "worker"]),
];

/// Where workers name the fabric's `Endpoint`: the rooms that communicate, and the files that hand a rank's own one to them.
const ENDPOINTS: [&str; 7] = [
    "workers/src/comm/",
    "workers/src/replica/",
    "workers/src/engine/running.rs",
    "workers/src/host/formation.rs",
    "workers/src/rank/build.rs",
    "workers/src/rank/checkpointer.rs",
    "workers/src/rank/loader.rs",
];

/// The longest file, tests included. **Units**: lines.
const MAX_LINES: usize = 500;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// A source file of a crate as a path of modules, with the text that is no test.
struct Module {
    path: Vec<String>,
    text: String,
}

/// The part before the first test of a file.
fn production(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default()
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are both module a::b.
fn module_path(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").split('/').map(str::to_owned);
    let mut path: Vec<String> = path.collect();
    if path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    path
}

/// The modules of a crate, without its root and without tests.
fn modules(crate_dir: &str) -> Vec<Module> {
    let prefix = if crate_dir == "." { "src/".to_owned() } else { format!("{crate_dir}/src/") };
    let own = |(path, text): (String, String)| {
        let file = path.strip_prefix(&prefix)?;
        let path = module_path(file);
        let is_test = path.iter().any(|name| name == "tests");
        let is_root = matches!(file, "lib.rs" | "main.rs");
        (!is_test && !is_root).then(|| Module { path, text: production(&text).to_owned() })
    };
    sources().into_iter().filter_map(own).collect()
}

/// The segments of a path that begins at `text`: `a::b` of `a::b::{c, d}`, and every branch of a group one level deep.
fn branches(text: &str) -> Vec<Vec<String>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut path = Vec::new();
    let mut rest = text;
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 1;
            let end = group.find(|c| {
                depth += match c {
                    '{' => 1,
                    '}' => -1,
                    _ => 0,
                };
                depth == 0
            });
            let inside = &group[..end.unwrap_or(group.len())];
            let with = |branch: &str| {
                let words = branch.trim_start().split(|c: char| !is_word(c) && c != ':').next();
                let words = words.unwrap_or_default().split("::").map(str::to_owned);
                path.iter().cloned().chain(words.filter(|word| word != "self")).collect()
            };
            return inside.split(',').filter(|branch| !branch.trim().is_empty()).map(with).collect();
        }
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if end == 0 {
            return vec![path];
        }
        path.push(rest[..end].to_owned());
        match rest[end..].strip_prefix("::") {
            Some(more) => rest = more,
            None => return vec![path],
        }
    }
}

/// Paths that a module names, from the root of its crate. `super` within an inline module would be read one level too high;
/// the only inline modules are tests.
fn named(module: &Module) -> Vec<Vec<String>> {
    let mut named = Vec::new();
    for line in module.text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for (at, _) in line.match_indices("crate::") {
            if !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                named.extend(branches(&line[at + "crate::".len()..]));
            }
        }
        let Some(at) = line.find("super::") else { continue };
        let rest = line[at..].trim_start_matches("super::");
        let levels = (line.len() - at - rest.len()) / "super::".len();
        let above = module.path[..module.path.len().saturating_sub(levels)].to_vec();
        named.extend(branches(rest).into_iter().map(|path| above.iter().cloned().chain(path).collect()));
    }
    named
}

/// Uses that stand on several lines are joined first.
fn one_line_uses(text: &str) -> String {
    let mut joined = String::new();
    let mut open = false;
    for line in text.lines() {
        let begins = line.trim_start().trim_start_matches("pub ").starts_with("use ");
        open |= begins && !line.contains(';');
        joined += line;
        if open && !line.contains(';') {
            continue;
        }
        open = false;
        joined.push('\n');
    }
    joined
}

/// Who imports whom, by the first `depth` segments of a module's path.
fn graph(crate_dir: &str, node: impl Fn(&[String]) -> String) -> Graph {
    let mut modules = modules(crate_dir);
    modules.iter_mut().for_each(|module| module.text = one_line_uses(&module.text));
    let known: BTreeSet<Vec<String>> = modules.iter().map(|module| module.path.clone()).collect();
    let owner = |path: &[String]| {
        (1..=path.len()).rev().map(|len| path[..len].to_vec()).find(|prefix| known.contains(prefix))
    };
    let mut graph = Graph::new();
    for module in &modules {
        let from = node(&module.path);
        let to: BTreeSet<String> =
            named(module).iter().filter_map(|path| Some(node(&owner(path)?))).collect();
        graph.entry(from.clone()).or_default().extend(to.into_iter().filter(|to| *to != from));
    }
    graph
}

fn rooms(crate_dir: &str) -> Graph {
    graph(crate_dir, |path| path[0].clone())
}

/// All nodes that can be reached.
fn reachable(graph: &Graph, from: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(node) = open.pop() {
        for next in graph.get(&node).into_iter().flatten() {
            if seen.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    seen
}

/// Groups of nodes that reach each other, each once.
fn circles(graph: &Graph) -> BTreeSet<Vec<String>> {
    let reach: BTreeMap<&String, BTreeSet<String>> =
        graph.keys().map(|node| (node, reachable(graph, node))).collect();
    let circle = |node: &String| -> Vec<String> {
        let mutual =
            reach[node].iter().filter(|other| reach.get(other).is_some_and(|back| back.contains(node)));
        mutual.cloned().collect()
    };
    graph.keys().map(circle).filter(|circle| circle.len() > 1).collect()
}

#[test]
fn no_crate_has_a_circle_between_rooms_or_too_many_of_them() {
    let mut faults = Vec::new();
    for (crate_dir, most) in MAX_ROOMS {
        let rooms = rooms(crate_dir);
        assert!(rooms.len() > 5, "{crate_dir}: {rooms:?}");
        faults.extend(
            circles(&rooms).into_iter().map(|circle| format!("{crate_dir}: {}", circle.join(" <-> "))),
        );
        if rooms.len() > most {
            faults.push(format!("{crate_dir}: {} rooms side by side, at most {most}", rooms.len()));
        }
    }
    assert_none("rooms", &faults);
}

#[test]
fn the_rooms_of_workers_import_only_those_below_them() {
    let rooms = rooms("workers");
    let names: BTreeSet<&str> = rooms.keys().map(String::as_str).collect();
    assert_eq!(names, WORKERS.into_iter().collect());
    let floor = |room: &str| WORKERS.iter().position(|known| *known == room).unwrap();
    let up = |(from, to): (&String, &String)| {
        (floor(to) <= floor(from)).then(|| format!("{from} imports {to}, which stands above it"))
    };
    let arrows = rooms.iter().flat_map(|(from, to)| to.iter().map(move |to| (from, to)));
    assert_none("imports that run up", &arrows.filter_map(up).collect::<Vec<_>>());
}

#[test]
fn no_new_circles_of_files_inside_a_room() {
    let is_known = |crate_dir: &str, circle: &[String]| {
        CIRCLES.iter().any(|(of, room, files)| {
            let names: BTreeSet<String> = files.iter().map(|file| format!("{room}::{file}")).collect();
            *of == crate_dir && circle.iter().all(|file| names.contains(file))
        })
    };
    let mut faults = Vec::new();
    for (crate_dir, _) in MAX_ROOMS {
        let files = graph(crate_dir, |path| path.join("::"));
        let new = circles(&files).into_iter().filter(|circle| !is_known(crate_dir, circle));
        faults.extend(new.map(|circle| format!("{crate_dir}: {}", circle.join(" <-> "))));
    }
    assert_none("files that import each other", &faults);
}

#[test]
fn endpoints_are_named_only_where_ranks_communicate() {
    let names_endpoint = |line: &str| {
        line.starts_with("use contraflow_runtime::fabric")
            && line.split(|c: char| !c.is_alphanumeric()).any(|word| word == "Endpoint")
    };
    let elsewhere = |(path, text): (String, String)| {
        let is_known =
            !path.starts_with("workers/src/") || ENDPOINTS.iter().any(|known| path.starts_with(known));
        let text = one_line_uses(production(&text));
        (!is_known && text.lines().any(names_endpoint)).then_some(path)
    };
    assert!(names_endpoint("use contraflow_runtime::fabric::{Address, Endpoint};"));
    assert_none("endpoints", &sources().into_iter().filter_map(elsewhere).collect::<Vec<_>>());
}

#[test]
fn no_file_is_long() {
    let long = |(path, text): (String, String)| {
        let lines = text.lines().count();
        (lines > MAX_LINES).then(|| format!("{path}: {lines} lines, at most {MAX_LINES}"))
    };
    assert_none("long files", &sources().into_iter().filter_map(long).collect::<Vec<_>>());
}

#[test]
fn imports_are_found_in_every_form() {
    assert!(root().join("workers/src").is_dir() && Path::new("a").is_relative());
    let text = "use crate::b::{C, D};\nuse super::{e::F, g};\npub use super::super::h::I;\nlet x = crate::j::k();\n// crate::no\n";
    let module = Module { path: vec!["a".into(), "m".into()], text: one_line_uses(text) };
    let found: BTreeSet<String> = named(&module).iter().map(|path| path.join("::")).collect();
    let expected = ["b::C", "b::D", "a::e::F", "a::g", "h::I", "j::k"];
    assert_eq!(found, expected.into_iter().map(str::to_owned).collect());
    let split = one_line_uses("use crate::{\n    a,\n    b::c,\n};\nfn f() {}\n");
    assert_eq!(split.lines().count(), 2, "{split}");
    let graph = Graph::from([
        ("a".to_owned(), BTreeSet::from(["b".to_owned()])),
        ("b".to_owned(), BTreeSet::from(["a".to_owned(), "c".to_owned()])),
        ("c".to_owned(), BTreeSet::new()),
    ]);
    assert_eq!(circles(&graph), BTreeSet::from([vec!["a".to_owned(), "b".to_owned()]]));
}
