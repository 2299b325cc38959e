//! Prompts, and names of runs.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::place::{Place, assert_contains, text};

#[test]
fn a_prompt_may_come_from_stdin_be_empty_and_is_never_cut_in_silence() {
    let place = Place::new();
    let speak = ["generate", ".", "--tokens", "4", "--temperature", "0", "--prompt"];
    let argument = place.done(&[&speak[..], &["abc"]].concat()).0;
    let mut child = Command::new(env!("CARGO_BIN_EXE_contraflow"))
        .args([&speak[..], &["-"]].concat())
        .current_dir(place.path("."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"abc").unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), argument);
    let unprompted = place.run(&[&speak[..], &[""]].concat());
    assert!(unprompted.status.success() && unprompted.stdout.len() > 1, "{unprompted:?}");
    let long = "word ".repeat(240);
    let stderr = place.refused(&[&speak[..], &[&long]].concat());
    assert_contains(&stderr, &["--prompt: expected at most 512 tokens, the model's context, got 1200"]);
    let nearly = ["generate", ".", "--tokens", "9", "--temperature", "0", "--prompt", &long[..510]];
    let (_, stderr) = place.done(&nearly);
    assert_contains(&stderr, &["note: the text ends where the model's context does, at 512 tokens"]);
}

#[test]
fn a_run_has_the_name_of_a_folder_in_runs() {
    let place = Place::new();
    for name in ["../x", "a/b", "", ".hidden", "latest", "a\nb"] {
        let stderr = place.refused(&["train", "recipe.toml", "--data", "text.txt", "--name", name]);
        assert_contains(&stderr, &["--name: expected the name of a folder in runs/"]);
    }
    std::fs::copy(place.path("recipe.toml"), place.path("latest.toml")).unwrap();
    let stderr = place.refused(&["train", "latest.toml", "--data", "text.txt"]);
    assert_contains(&stderr, &["--name: expected", "got \"latest\""]);
    let (stdout, _) = place.done(&["train", "recipe.toml", "--data", "text.txt", "--name", "x y"]);
    assert_contains(&stdout, &["next: contraflow generate 'runs/x y' "]);
}

#[test]
fn a_folder_in_the_place_of_the_link_to_the_newest_run_stays() {
    let place = Place::new();
    place.write("runs/latest/plan.txt", "x");
    for run in ["recipe", "recipe-2"] {
        let (_, stderr) = place.done(&["train", "recipe.toml", "--data", "text.txt"]);
        assert_contains(&stderr, &["note: runs/latest does not point at", "it is a folder and no link"]);
        assert!(place.path("runs").join(run).join("summary.json").is_file());
    }
    assert!(place.path("runs/latest/plan.txt").is_file());
    assert!(place.entries().iter().all(|path| !path.display().to_string().contains(".latest-")));
}
