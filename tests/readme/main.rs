//! The README as a new user follows it: every shell block in order, in one folder, with the binary. What is changed to make it
//! quick and to fit the machine is in `blocks`; what a block needs, and what has to come of it, in `stage`.

#![allow(clippy::unwrap_used, missing_docs)]

mod blocks;
#[path = "../common/deadline.rs"]
mod deadline;
#[path = "../objects/server.rs"]
#[allow(dead_code)]
mod server;
mod stage;

use std::path::Path;
use std::time::Instant;

use blocks::{BLOCKS, Block, How};
use stage::Stage;

fn readme() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// What stands between "```sh" and "```".
fn shell_blocks(text: &str) -> Vec<&str> {
    text.split("\n```sh\n").skip(1).map(|rest| rest.split_once("\n```").unwrap().0).collect()
}

/// **Errors**: the first block that has no entry at its place, or the entry without a block.
fn matched<'a>(shown: &[&'a str]) -> Result<Vec<(&'a str, &'static Block)>, String> {
    for at in 0..shown.len().max(BLOCKS.len()) {
        match (shown.get(at), BLOCKS.get(at)) {
            (Some(text), Some(block)) if text.starts_with(block.begins) => {}
            (Some(text), _) => {
                return Err(format!("no entry in tests/readme/blocks.rs for block {at}:\n{text}"));
            }
            (None, block) => return Err(format!("README.md has no block for {:?}", block.unwrap().begins)),
        }
    }
    Ok(shown.iter().copied().zip(&BLOCKS).collect())
}

#[test]
fn every_shell_block_of_the_readme_runs() {
    let readme = readme();
    let mut stage = Stage::set();
    for (text, block) in matched(&shell_blocks(&readme)).unwrap() {
        let began = Instant::now();
        if let How::Skipped(why) = block.how {
            println!("not run: {why}\n{text}\n");
            continue;
        }
        if let Err(why) = stage.prepare(block) {
            println!("not run here: {why}\n{text}\n");
            continue;
        }
        let commands = stage.substituted(text, block);
        let out = match block.how {
            How::Terminal => stage.begin(&commands),
            _ => stage.run(&commands),
        };
        stage.check(block, &out);
        println!("ran in {:.1} s:\n{commands}\n", began.elapsed().as_secs_f64());
    }
    stage.end();
}

#[test]
fn a_block_without_an_entry_and_an_entry_without_a_block_are_told() {
    let readme = readme();
    let shown = shell_blocks(&readme);
    assert!(matched(&shown).is_ok());
    assert!(matched(&shown[1..]).unwrap_err().contains("no entry"));
    assert!(matched(&shown[..shown.len() - 1]).unwrap_err().contains("README.md has no block"));
    let longer = [&shown[..], &["contraflow dance"]].concat();
    assert!(matched(&longer).unwrap_err().ends_with("contraflow dance"));
}

#[test]
fn a_refused_command_fails_its_block() {
    let stage = Stage::set();
    let refused = |commands: &str| stage.end_of(commands).unwrap_err();
    assert!(refused("contraflow plan --dance\ncontraflow recipes").contains("--dance"));
    assert!(refused("contraflow recipes\ncontraflow plan --pipeline 3").contains("pipeline"));
    assert!(stage.end_of("contraflow recipes").is_ok());
}
