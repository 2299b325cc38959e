//! A cluster of real processes in a folder of its own; all of them end with it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::deadline;
use crate::network::{Network, address};

/// How long anything may take, on a machine that builds something else meanwhile.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A small model on four ranks, with a checkpoint every few steps.
pub const JOB: [&str; 9] = [
    "parallel.pipeline=2",
    "parallel.expert=2",
    "parallel.data=1",
    "training.steps=60",
    "training.sequence_length=32",
    "training.validation_sequences=8",
    "checkpoint.every=4",
    "checkpoint.save_model=false",
    "model.config=model.json",
];

/// Change of [`JOB`] for tests that act on a job while it trains: however slow the machine is, it has not ended by then.
pub const ENDLESS: &str = "training.steps=100000";

/// The model of [`JOB`].
pub const MODEL: &str = include_str!("../fixtures/small-model.json");

/// A process that is killed when it is dropped.
pub struct Process {
    child: Child,
    /// Where its stderr goes.
    pub log: PathBuf,
}

impl Process {
    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Any signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Its exit code, once it has ended.
    pub fn wait(&mut self) -> Option<i32> {
        let ended = || self.child.try_wait().unwrap();
        until("the end of a process", ended).code()
    }

    /// What it has in memory. **Units**: bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn stdout(&self) -> String {
        std::fs::read_to_string(self.log.with_extension("out")).unwrap_or_default()
    }
}

/// How many lines of what a process has said are shown where a test fails.
const LAST: usize = 40;

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.stderr();
            let last = said.lines().count().saturating_sub(LAST);
            let lines: Vec<&str> = said.lines().skip(last).collect();
            eprintln!("{} said at last:\n{}", self.log.display(), lines.join("\n"));
        }
        // One that has ended is no fault.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Asks until there is an answer.
pub fn until<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(began.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The credentials of a client.
#[derive(Clone, Debug)]
pub struct Who {
    /// Folder of the certificate.
    pub tls: String,
    pub token: String,
}

impl Who {
    /// A new client.
    pub fn issue(dir: &Path, certs: &str, name: &str, role: &str) -> Who {
        let arguments = ["certs", "issue", "--dir", certs, "--name", name, "--role", role];
        let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
        let output = deadline::output(command.args(arguments).current_dir(dir));
        assert!(output.status.success(), "{output:?}");
        let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Who { tls: format!("{certs}/{name}"), token }
    }

    pub fn arguments(&self) -> [&str; 4] {
        ["--tls", &self.tls, "--token", &self.token]
    }
}

/// Who the clients and the workers are of a cluster that asks.
struct Parties {
    client: Who,
    worker: Who,
}

/// Variables that every process of a cluster has, clients too.
pub type Environment = Vec<(&'static str, String)>;

/// An orchestrator, workers, and the folder they live in.
pub struct Cluster {
    dir: tempfile::TempDir,
    pub address: String,
    pub orchestrator: Process,
    /// None where one was killed and not replaced.
    pub workers: Vec<Option<Process>>,
    parties: Option<Parties>,
    environment: Environment,
    /// None where all processes are on one host.
    network: Option<Network>,
}

impl Cluster {
    pub fn start(workers: usize) -> Self {
        Self::start_with(workers, Environment::new())
    }

    pub fn start_with(workers: usize, environment: Environment) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), workers, None, environment, None)
    }

    /// Another cluster with the storage of one.
    pub fn start_beside(one: &Cluster, workers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(one.path().join("storage"), dir.path().join("storage")).unwrap();
        Self::start_in(dir, workers, None, Environment::new(), None)
    }

    /// With TLS and tokens; its certificates are in the folder `certs`, its clients are an admin.
    pub fn secured(workers: usize) -> Self {
        Self::secured_on(workers, None)
    }

    /// The same, on the hosts of a network.
    pub fn secured_on(workers: usize, network: Option<Network>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = address(0);
        let mut arguments = vec!["certs", "init", "--dir", "certs"];
        if network.is_some() {
            arguments.extend(["--host", &host]);
        }
        assert_eq!(spawn(dir.path(), "init", &arguments).wait(), Some(0));
        let [client, worker] =
            ["admin", "worker"].map(|role| Who::issue(dir.path(), "certs", &format!("the-{role}"), role));
        Self::start_in(dir, workers, Some(Parties { client, worker }), Environment::new(), network)
    }

    fn start_in(
        dir: tempfile::TempDir,
        workers: usize,
        parties: Option<Parties>,
        environment: Environment,
        network: Option<Network>,
    ) -> Self {
        std::fs::write(dir.path().join("model.json"), MODEL).unwrap();
        let listen = network.as_ref().map_or_else(|| "127.0.0.1:0".into(), |_| format!("{}:0", address(0)));
        let mut arguments = vec!["orchestrator", "--state", "state", "--listen", &listen];
        if parties.is_some() {
            arguments.extend(["--tls", "certs"]);
        }
        let mut command = program(network.as_ref(), 0);
        command.args(arguments);
        let orchestrator = start(command, dir.path(), "orchestrator", &environment);
        let address = until("the orchestrator's address", || address_of(&orchestrator));
        let mut cluster =
            Cluster { dir, address, orchestrator, workers: Vec::new(), parties, environment, network };
        for number in 0..workers {
            let worker = cluster.worker(number);
            cluster.workers.push(Some(worker));
        }
        until("all workers", || (cluster.nodes().len() == workers).then_some(()));
        cluster
    }

    /// Another worker; the number is that of its node.
    pub fn worker(&self, number: usize) -> Process {
        self.worker_with(number, &[])
    }

    /// The same with variables of its own.
    pub fn worker_with(&self, number: usize, environment: &[(&'static str, String)]) -> Process {
        let label = format!("node=n{number}");
        let mut arguments =
            vec!["worker", "--join", &self.address, "--storage", "storage", "--labels", &label];
        if let Some(Parties { worker, .. }) = &self.parties {
            arguments.extend(worker.arguments());
        }
        let host = number + 1;
        let listen = format!("{}:0", address(host));
        if self.network.is_some() {
            arguments.extend(["--listen", &listen]);
        }
        let mut command = program(self.network.as_ref(), host);
        command.args(arguments);
        let environment = [&self.environment[..], environment].concat();
        start(command, self.path(), &format!("worker-{number}"), &environment)
    }

    /// What is between the hosts.
    pub fn network(&mut self) -> &mut Network {
        self.network.as_mut().unwrap()
    }

    /// The orchestrator once more, at the same address, with another state.
    pub fn start_orchestrator_with(&mut self, state: &str) {
        let arguments = ["orchestrator", "--state", state, "--listen", &self.address];
        self.orchestrator = spawn_with(self.dir.path(), "orchestrator", &arguments, &self.environment);
        until("the orchestrator's address", || address_of(&self.orchestrator));
    }

    /// The orchestrator once more, at the same address, with the same state.
    pub fn start_orchestrator(&mut self, options: &[&str]) {
        let arguments = ["orchestrator", "--state", "state", "--listen", &self.address];
        let arguments = [&arguments[..], options].concat();
        self.orchestrator = spawn_with(self.dir.path(), "orchestrator", &arguments, &self.environment);
        until("the orchestrator's address", || address_of(&self.orchestrator));
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(self.network.as_ref(), 0);
        command.args(arguments).current_dir(self.path()).env("CONTRAFLOW_ORCHESTRATOR", &self.address);
        command.env("NO_COLOR", "1").envs(self.environment.clone());
        if let Some(Parties { client, .. }) = &self.parties {
            command.env("CONTRAFLOW_TLS", &client.tls).env("CONTRAFLOW_TOKEN", &client.token);
        }
        command
    }

    /// Runs a command that ends by itself: exit code, stdout, stderr.
    pub fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        Self::end_of(self.command(arguments))
    }

    /// The same for a client with only the given credentials.
    pub fn run_as_nobody(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = self.command(arguments);
        command.env_remove("CONTRAFLOW_TLS").env_remove("CONTRAFLOW_TOKEN");
        Self::end_of(command)
    }

    fn end_of(mut command: Command) -> (i32, String, String) {
        let output = deadline::output(&mut command);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, arguments: &[&str]) -> Option<Value> {
        let (code, out, _) = self.run(&[arguments, &["--format", "json"]].concat());
        (code == 0).then(|| serde_json::from_str(&out).unwrap())
    }

    pub fn nodes(&self) -> Vec<Value> {
        self.json(&["nodes"]).map_or_else(Vec::new, |nodes| nodes["workers"].as_array().unwrap().clone())
    }

    /// Submits [`JOB`] with changes.
    pub fn submit(&self, changes: &[&str], options: &[&str]) -> String {
        let mut arguments = vec!["submit", "tiny"];
        for change in JOB.iter().chain(changes) {
            arguments.extend(["--set", change]);
        }
        arguments.extend(options);
        let job = self.json(&arguments).unwrap();
        job["job"].as_str().unwrap().to_owned()
    }

    /// None while the orchestrator is away.
    pub fn status(&self, job: &str) -> Option<Value> {
        self.json(&["status", job])
    }

    /// Waits until the job has reported a step.
    pub fn until_step(&self, job: &str, step: u64) {
        until(&format!("step {step} of {job}"), || {
            let status = self.status(job)?;
            assert_ne!(status["state"], "failed", "{status}");
            (status["step"].as_u64()? >= step).then_some(())
        });
    }

    /// Waits for the end of a job: its steps as they are watched from the first on.
    pub fn finish(&self, job: &str) -> Vec<Value> {
        let mut command = self.command(&["watch", job, "--format", "json"]);
        let mut child = deadline::spawn(command.stdout(Stdio::piped()));
        let out = BufReader::new(child.stdout.take().unwrap());
        let steps = out.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        let code = until("the end of watch", || child.try_wait().unwrap());
        assert!(code.success(), "{}", self.run(&["status", job]).1);
        steps
    }

    /// The first steps of a job that continues for longer, as they are watched; it is cancelled then.
    pub fn first_steps(&self, job: &str, count: usize) -> Vec<Value> {
        let mut command = self.command(&["watch", job, "--format", "json"]);
        let mut child = deadline::spawn(command.stdout(Stdio::piped()));
        let out = BufReader::new(child.stdout.take().unwrap());
        let steps: Vec<Value> =
            out.lines().take(count).map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(steps.len(), count, "{}", self.run(&["status", job]).1);
        let (code, out, errors) = self.run(&["cancel", job]);
        assert_eq!(code, 0, "{out}{errors}");
        steps
    }

    /// Lets a job make ten more steps and cancels it: all its steps.
    pub fn ten_more_steps(&self, job: &str) -> Vec<Value> {
        let reached = until("the steps of the job", || self.status(job)?["step"].as_u64());
        self.first_steps(job, usize::try_from(reached).unwrap() + 10)
    }

    /// So many steps of a job with these changes to which nothing happens.
    pub fn undisturbed(&self, changes: &[&str], count: usize) -> Vec<Value> {
        self.first_steps(&self.submit(changes, &[]), count)
    }

    /// The worker that hosts a rank, as its place in [`Cluster::workers`].
    pub fn host_of(&self, job: &str, rank: usize) -> usize {
        let node = until("a place of the rank", || {
            let status = self.status(job)?;
            Some(status["ranks"][rank]["node"].as_str()?.to_owned())
        });
        node.trim_start_matches('n').parse().unwrap()
    }
}

/// Steps of the checkpoints in a job's folder; the orchestrator removes old ones meanwhile.
pub fn committed(folder: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    let step = |entry: std::fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

/// What is compared between runs, bit for bit.
pub fn curve(steps: &[Value]) -> Vec<(u64, u64, u64)> {
    let bits = |value: &Value| value.as_f64().unwrap().to_bits();
    steps
        .iter()
        .map(|step| (step["step"].as_u64().unwrap(), bits(&step["loss"]), bits(&step["grad_norm"])))
        .collect()
}

fn address_of(orchestrator: &Process) -> Option<String> {
    let stderr = orchestrator.stderr();
    let rest = stderr.split("orchestrator at ").nth(1)?;
    // It may be written only in part by now.
    Some(rest.split_once(',')?.0.to_owned())
}

/// The binary, on a host of the network if there is one.
fn program(network: Option<&Network>, host: usize) -> Command {
    let binary = env!("CARGO_BIN_EXE_contraflow");
    network.map_or_else(|| Command::new(binary), |network| network.program(host, binary))
}

/// A worker that may use so much address space. **Units**: KiB.
pub fn spawn_in_memory(cluster: &Cluster, number: usize, kibibytes: u64) -> Process {
    spawn_after(cluster, number, &format!("ulimit -v {kibibytes}"))
}

/// A worker whose process has run a command of the shell before.
pub fn spawn_after(cluster: &Cluster, number: usize, command: &str) -> Process {
    let limited = format!("{command}; exec \"$0\" \"$@\"");
    let label = format!("node=n{number}");
    let arguments = ["worker", "--join", &cluster.address, "--storage", "storage", "--labels", &label];
    let mut command = Command::new("sh");
    command.args(["-c", &limited, env!("CARGO_BIN_EXE_contraflow")]).args(arguments);
    start(command, cluster.path(), &format!("worker-{number}"), &cluster.environment)
}

/// The orchestrator once more, at the same address, with the same state; its process has run a command of the shell before.
pub fn spawn_orchestrator_after(cluster: &Cluster, command: &str) -> Process {
    let changed = format!("{command}; exec \"$0\" \"$@\"");
    let arguments = ["orchestrator", "--state", "state", "--listen", &cluster.address];
    let mut command = Command::new("sh");
    command.args(["-c", &changed, env!("CARGO_BIN_EXE_contraflow")]).args(arguments);
    start(command, cluster.path(), "orchestrator", &cluster.environment)
}

pub fn spawn(dir: &Path, name: &str, arguments: &[&str]) -> Process {
    spawn_with(dir, name, arguments, &Environment::new())
}

/// The same with variables.
pub fn spawn_with(dir: &Path, name: &str, arguments: &[&str], environment: &Environment) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_contraflow"));
    command.args(arguments);
    start(command, dir, name, environment)
}

fn start(mut command: Command, dir: &Path, name: &str, environment: &Environment) -> Process {
    let log = dir.join(format!("{name}.log"));
    let stderr = std::fs::File::create(&log).unwrap();
    let stdout = std::fs::File::create(log.with_extension("out")).unwrap();
    command.current_dir(dir).env("NO_COLOR", "1").envs(environment.clone());
    let child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
    Process { child, log }
}
