//! The folder in which the README is followed: the user's own data, an object store, and the terminals that stay open. Everything
//! in it ends with it. Knows the blocks by how they begin.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::blocks::Block;
use crate::deadline;
use crate::server::Server;

/// Commands that go on beside the others.
struct Terminal {
    commands: String,
    shell: Child,
    log: PathBuf,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Once it has been waited for, its number may be another one's.
        if matches!(self.shell.try_wait(), Ok(None)) {
            let _has_ended = kill_process_group(Pid::from_child(&self.shell), Signal::KILL);
            drop(self.shell.wait());
        }
    }
}

pub struct Stage {
    dir: tempfile::TempDir,
    store: Server,
    terminals: Vec<Terminal>,
    /// What `{NAME}` stands for.
    names: BTreeMap<&'static str, String>,
}

impl Stage {
    /// Puts down what the README takes for granted: the user's texts, and the README itself.
    pub fn set() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let text =
            ["README.md", "ARCHITECTURE.md"].map(|name| std::fs::read_to_string(root.join(name)).unwrap());
        let path = |name: &str| dir.path().join(name);
        for folder in ["notes", "bin", "shared"] {
            std::fs::create_dir(path(folder)).unwrap();
        }
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_contraflow"), path("bin/contraflow")).unwrap();
        std::fs::write(path("README.md"), &text[0]).unwrap();
        std::fs::write(path("notes/own.txt"), &text[1]).unwrap();
        std::fs::copy(root.join("tests/fixtures/forms/gzip.parquet"), path("pages.parquet")).unwrap();
        for (name, field) in [("corpus.jsonl", "text"), ("code.jsonl", "content")] {
            let rows = text
                .concat()
                .split("\n\n")
                .map(|row| format!("{}\n", serde_json::json!({ field: row })))
                .collect::<String>();
            std::fs::write(path(name), rows).unwrap();
        }
        let stage = Stage { dir, store: Server::start(), terminals: Vec::new(), names: BTreeMap::new() };
        stage.run("gzip --keep corpus.jsonl");
        stage
    }

    /// What the text around a block has told the user to do before.
    ///
    /// **Errors**: the machine cannot run it.
    pub fn prepare(&mut self, block: &Block) -> Result<(), &'static str> {
        match block.begins {
            "contraflow plan --schedule" => {
                self.run("cp runs/latest/plan.txt PLAN.txt");
            }
            "contraflow train --resume s3://" => {
                self.run(
                    "contraflow train --name stored --set checkpoint.store=s3://bucket/run --set checkpoint.every=1 \
                     --set training.steps=2 --set training.validation_sequences=0\nrm -r runs/stored",
                );
            }
            "contraflow orchestrator --state state" | "contraflow orchestrator --state cluster" => {
                self.end();
                self.names.insert("PORT", free_port().to_string());
            }
            "contraflow status job-1" => {
                let worker = until("step 3 of job-1", || {
                    let status = self.json("contraflow status job-1")?;
                    let ranks = status["ranks"].as_array()?;
                    (status["step"].as_u64()? >= 3).then(|| ranks[1]["worker"].as_str().unwrap().to_owned())
                });
                self.names.insert("PID", worker.rsplit('-').next().unwrap().to_owned());
            }
            "contraflow certs init" => {
                self.names.insert("HOST", own_address());
            }
            "contraflow worker --join node0.example" => {
                if self.names["HOST"] == LOOPBACK {
                    return Err("workers of an orchestrator on a network need an address besides loopback");
                }
                self.run("cp -r certs/w1 certs/ann .");
            }
            _ => {}
        }
        Ok(())
    }

    /// The commands of a block as they are run here.
    pub fn substituted(&self, text: &str, block: &Block) -> String {
        let replaced = block.instead.iter().fold(text.to_owned(), |text, (shown, instead)| {
            assert!(text.contains(shown), "expected {shown:?} in the block\n{text}");
            text.replace(shown, instead)
        });
        self.names.iter().fold(replaced, |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    }

    fn shell(&self, commands: &str) -> Command {
        let mut shell = Command::new("bash");
        shell.args(["-euo", "pipefail", "-c", commands]).current_dir(self.dir.path());
        let path = format!("{}:{}", self.dir.path().join("bin").display(), std::env::var("PATH").unwrap());
        shell.env("PATH", path).env("NO_COLOR", "1").env_remove("CONTRAFLOW_TOKEN");
        self.store.configure(&mut shell, &self.dir.path().join("cache"));
        if let Some(port) = self.names.get("PORT") {
            shell.env("CONTRAFLOW_ORCHESTRATOR", format!("127.0.0.1:{port}"));
        }
        shell
    }

    /// What commands write to stdout.
    ///
    /// **Errors**: one of them has failed; what they wrote to stderr.
    pub fn end_of(&self, commands: &str) -> Result<String, String> {
        let output = deadline::output(&mut self.shell(commands));
        let [out, err] =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let failed = || format!("{}:\n{commands}\n{err}", output.status);
        if output.status.success() { Ok(out) } else { Err(failed()) }
    }

    /// Runs commands to their end: what they write to stdout.
    pub fn run(&self, commands: &str) -> String {
        self.end_of(commands).unwrap_or_else(|failed| panic!("expected commands that succeed, got {failed}"))
    }

    /// Starts commands in a terminal of their own; nothing of what they write is known yet.
    pub fn begin(&mut self, commands: &str) -> String {
        let log = self.dir.path().join(format!("terminal-{}.log", self.terminals.len()));
        let file = File::create(&log).unwrap();
        let mut shell = self.shell(commands);
        shell.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).process_group(0);
        self.terminals.push(Terminal { commands: commands.into(), shell: deadline::spawn(&mut shell), log });
        String::new()
    }

    fn json(&self, command: &str) -> Option<Value> {
        let out = self.end_of(&format!("{command} --format json")).ok()?;
        Some(serde_json::from_str(&out).unwrap())
    }

    fn until_workers(&self, client: &str, count: usize) {
        until(&format!("{count} workers"), || {
            let nodes = self.json(&format!("{client}contraflow nodes"))?;
            (nodes["workers"].as_array()?.len() == count).then_some(())
        });
    }

    /// What has to come of a block.
    pub fn check(&mut self, block: &Block, out: &str) {
        match block.begins {
            "contraflow orchestrator --state state" | "contraflow orchestrator --state cluster" => {
                until("the orchestrator", || {
                    TcpStream::connect(format!("127.0.0.1:{}", self.names["PORT"])).ok().map(drop)
                })
            }
            "for i in 1 2 3 4 5" => self.until_workers("", 5),
            "contraflow status job-1" => {
                until("a second generation", || {
                    let log = self.run("contraflow logs job-1");
                    (log.contains("generation 2") && log.contains("resume from memory")).then_some(())
                });
                let watch = self.terminals.last_mut().unwrap();
                assert_eq!(watch.commands.lines().last(), Some("contraflow watch job-1"));
                let ended = until("the end of job-1", || watch.shell.try_wait().unwrap());
                assert!(ended.success(), "{}", std::fs::read_to_string(&watch.log).unwrap());
                self.terminals.pop();
            }
            "contraflow certs init" => {
                // What else is said has several words.
                let tokens = out.lines().filter(|line| !line.contains(' ')).map(String::from);
                self.names.extend(["CLIENT_TOKEN", "WORKER_TOKEN"].into_iter().zip(tokens));
            }
            "contraflow worker --join node0.example" => {
                let [token, host, port] = ["CLIENT_TOKEN", "HOST", "PORT"].map(|name| &self.names[name]);
                let client = format!(
                    "CONTRAFLOW_TLS=ann CONTRAFLOW_TOKEN={token} CONTRAFLOW_ORCHESTRATOR={host}:{port} "
                );
                self.until_workers(&client, 1);
            }
            _ => {}
        }
    }

    /// Closes all terminals.
    ///
    /// **Panics** if one of them has ended already.
    pub fn end(&mut self) {
        for mut terminal in self.terminals.drain(..).rev() {
            let ended = terminal.shell.try_wait().unwrap();
            let log = std::fs::read_to_string(&terminal.log).unwrap();
            assert!(
                ended.is_none(),
                "expected commands that go on, got {ended:?}:\n{}\n{log}",
                terminal.commands
            );
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

const LOOPBACK: &str = "127.0.0.1";

/// The address by which others would reach this machine, or loopback. Nothing is sent.
fn own_address() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let routed = socket.connect("198.51.100.1:9").and_then(|()| socket.local_addr());
    routed.map_or(LOOPBACK.into(), |own| own.ip().to_string())
}

fn until<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(began.elapsed() < deadline::DEADLINE, "waited {:?} for {what}", deadline::DEADLINE);
        std::thread::sleep(Duration::from_millis(100));
    }
}
