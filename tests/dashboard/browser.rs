//! The pages in a real browser, in front of the binary: a run that trains, runs that are over, a cluster that loses a worker. Skipped, with a
//! word, where node, chromium, playwright-core or axe-core cannot be had; screenshots stay in target/screenshots.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_contraflow");

/// How long a process may take to say where it is.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A process that ends with its test.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        // It is heard to its end, so that it is never held up by what it says.
        std::thread::spawn(move || {
            said.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)))
        });
        Running { child, lines }
    }

    /// The word behind `start` in the next line that has it.
    pub fn said(&self, start: &str) -> String {
        let mut all = String::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {start:?} in {all}"));
            if let Some((_, rest)) = line.split_once(start) {
                return rest.trim().split([',', ' ']).next().unwrap().to_owned();
            }
            all += &(line + "\n");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The folder with the browser's packages; `None`, with a word, where something is missing.
fn packages() -> Option<PathBuf> {
    let named = std::env::var_os("CONTRAFLOW_PLAYWRIGHT").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/browser"));
    let has = |program: &str| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    let is_there = |package: &str| folder.join("node_modules").join(package).is_dir();
    let missing = if !has("node") || !has("chromium") {
        "node or chromium"
    } else if !is_there("playwright-core") || !is_there("axe-core") {
        "playwright-core or axe-core in CONTRAFLOW_PLAYWRIGHT"
    } else {
        return Some(folder);
    };
    eprintln!("skipped: there is no {missing}");
    None
}

/// Runs a scenario of pages.mjs; what it has to say.
fn pages(packages: &Path, scenario: &str, url: &str, variables: &[(&str, &str)]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let output = Command::new("node")
        .arg(root.join("tests/dashboard/pages.mjs"))
        .args([scenario, url])
        .arg(target.join("screenshots").join(scenario))
        .env("CONTRAFLOW_PLAYWRIGHT", packages)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{scenario}:\n{said}");
    String::from_utf8(output.stdout).unwrap()
}

const SMALL: [&str; 6] = [
    "--set",
    "training.sequence_length=64",
    "--set",
    "training.validation_sequences=16",
    "--set",
    "checkpoint.every=20",
];

#[test]
fn a_run_is_shown_while_it_trains_and_runs_are_compared_when_they_are_over() {
    let Some(packages) = packages() else { return };
    let dir = tempfile::tempdir().unwrap();
    let long = [
        "train",
        "--dashboard",
        "127.0.0.1:0",
        "--set",
        "training.steps=100000",
        "--set",
        "validate.every=40",
    ];
    let run = Running::start(dir.path(), &[&long[..], &SMALL].concat());
    let url = run.said("dashboard: ");
    pages(&packages, "live", &url, &[]);
    drop(run);
    let short = ["train", "--dashboard", "off", "--name", "second", "--set", "training.steps=60"];
    let status = Command::new(PROGRAM)
        .args([&short[..], &SMALL].concat())
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let shown = Running::start(dir.path(), &["dashboard", "second", "tiny", "--listen", "127.0.0.1:0"]);
    pages(&packages, "finished", &shown.said("runs: "), &[]);
}

#[test]
fn a_job_is_submitted_on_a_page_and_the_loss_of_a_worker_is_told() {
    let Some(packages) = packages() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = ["orchestrator", "--state", "state", "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0"];
    let orchestrator = Running::start(dir.path(), &state);
    let join = orchestrator.said("orchestrator at ");
    let url = orchestrator.said("dashboard: ");
    std::fs::create_dir_all(dir.path().join("data")).unwrap();
    let text = (0..4_000)
        .map(|line| format!("line {line} of a text that is there to be learned\n"))
        .collect::<String>();
    std::fs::write(dir.path().join("data/text.txt"), text).unwrap();
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(
        &recipe,
        "[model]\nconfig = \"tiny\"\n[parallel]\npipeline = 2\nexpert = 1\ndata = 1\n[training]\nsteps = 100000\n\
         global_batch_size = 8\nmicro_batch_size = 2\nsequence_length = 64\nvalidation_sequences = 4\n[lr]\npeak = 1e-3\n\
         [data]\npaths = [\"text.txt\"]\n",
    )
    .unwrap();
    let worker = |node: &str| {
        let label = format!("node={node}");
        let args = [
            "worker",
            "--join",
            &join,
            "--slots",
            "2",
            "--storage",
            "storage",
            "--data-root",
            "data",
            "--labels",
            &label,
        ];
        Running::start(dir.path(), &args)
    };
    let first = worker("one");
    let said = pages(&packages, "cluster", &url, &[("RECIPE", recipe.to_str().unwrap())]);
    let job = said.lines().find_map(|line| line.strip_prefix("job ")).unwrap().to_owned();
    let _second = worker("two");
    // A SIGKILL: nobody says goodbye.
    drop(first);
    pages(&packages, "incident", &url, &[("JOB", &job)]);
}
