//! Commands as documents and service units show them: every option is one that the binary has.

use std::process::{Command, Stdio};

use super::{assert_none, root};

const PROGRAM: &str = env!("CARGO_BIN_EXE_contraflow");

/// The help of a command; `None` if there is no such command.
fn help(command: &[&str]) -> Option<String> {
    let output = Command::new(PROGRAM).args(command).arg("--help").output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// Options in the words of a command that its help does not know.
fn unknown_options(words: &[&str]) -> Vec<String> {
    let commands = words.iter().take_while(|word| {
        word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-')
    });
    let commands: Vec<&str> = commands.copied().collect();
    let Some(help) = (1..=commands.len()).rev().find_map(|count| help(&commands[..count])) else {
        return Vec::new();
    };
    let known = |option: &str| {
        help.split(option)
            .skip(1)
            .any(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-'))
    };
    let options = words.iter().filter(|word| word.starts_with("--") && word.len() > 2);
    let name = |word: &str| {
        word.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').next().unwrap_or_default().to_owned()
    };
    options.map(|word| name(word)).filter(|option| !known(option)).collect()
}

/// What stands in single backticks.
fn inline_code(text: &str) -> Vec<&str> {
    let outside = text.split("```").step_by(2);
    outside.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn every_option_that_the_readme_names_beside_its_command_exists() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut checked = 0;
    let mut faults = Vec::new();
    for code in inline_code(&readme).into_iter().filter(|code| code.contains("--")) {
        let words: Vec<&str> = code.split_whitespace().filter(|word| !word.ends_with("contraflow")).collect();
        if words.first().is_some_and(|word| !word.starts_with('-')) {
            checked += 1;
            faults.extend(unknown_options(&words).into_iter().map(|option| format!("{option} in `{code}`")));
        }
    }
    assert!(checked > 10, "{checked}");
    assert_none("README.md names options that its commands do not have", &faults);
    assert_eq!(
        unknown_options(&["train", "--dance", "--set", "--data-rooms=3"]),
        ["--dance", "--data-rooms"]
    );
}

/// The units, with the folders of this test in the place of the system's.
fn units(etc: &str, program: &str) -> Vec<(String, String)> {
    let names = ["contraflow-orchestrator.service", "contraflow-worker.service"];
    let unit = |name: &str| std::fs::read_to_string(root().join("packaging/systemd").join(name)).unwrap();
    let placed =
        |text: String| text.replace("/etc/contraflow", etc).replace("/usr/local/bin/contraflow", program);
    names.map(|name| (name.to_owned(), placed(unit(name)))).into()
}

#[test]
fn units_start_commands_that_the_binary_takes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in units(dir.path().to_str().unwrap(), PROGRAM) {
        let start = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let variables =
            [("${JOIN}", "node0.example:7070"), ("${LISTEN}", "10.0.0.2:0"), ("${STORAGE}", "storage")];
        let start = variables
            .iter()
            .fold(start.replace("${SLOTS}", "1"), |start, (name, value)| start.replace(name, value));
        let words: Vec<&str> = start.split_whitespace().collect();
        assert_eq!(unknown_options(&words[1..]), [""; 0], "{name}");
        // The arguments are taken: what is missing is the folder of the certificates.
        let output = Command::new(words[0]).args(&words[1..]).current_dir(dir.path()).output().unwrap();
        let refusal = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {refusal}");
        assert!(refusal.contains("--tls") && !refusal.contains("Usage"), "{name}: {refusal}");
    }
}

#[test]
fn systemd_takes_the_units() {
    let has_systemd = Command::new("systemd-analyze").arg("--version").stdout(Stdio::null()).status();
    if !has_systemd.is_ok_and(|status| status.success()) {
        return eprintln!("skipped: there is no systemd-analyze");
    }
    let dir = tempfile::tempdir().unwrap();
    let verify = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    for (name, text) in units("/etc/contraflow", PROGRAM) {
        let (is_sound, words) = verify(&name, &text);
        assert!(is_sound && words.is_empty(), "{name}: {words}");
        let (_, words) = verify(&name, &text.replace("Restart=always", "Restart=gladly"));
        assert!(words.contains("gladly"), "{name}: {words}");
    }
}
