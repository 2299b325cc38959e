//! A bench of several processes: the command starts itself once for each rank, and the ranks come to know each other.
//!
//! The `--part` argument says what a process does. Its first line on stdout is its address, and those of all come by its stdin,
//! which is closed when all have ended. Knows no figures.

use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::io::{Write, stdin};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use contraflow_runtime::fabric::{Address, DelayInjection, Formation, Listener, Transport, WiredNetwork};
use contraflow_runtime::topology::FormationId;
use serde::Serialize;

/// How long a rank waits for another one.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// One process for each rank.
pub struct Processes(Vec<(Child, ChildStdin, BufReader<ChildStdout>)>);

impl Processes {
    /// Starts `contraflow bench BENCH --part PART` for each part, by rank.
    ///
    /// **Errors**: a process that does not start, or ends before it has said its address.
    pub fn start(bench: &str, parts: &[impl Serialize]) -> Result<Self, Box<dyn Error>> {
        let mut children = Vec::new();
        let mut addresses = Vec::new();
        for part in parts {
            let mut child = Command::new(std::env::current_exe()?)
                .args(["bench", bench, "--part", &serde_json::to_string(part)?])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            let (input, output) = input.zip(output).ok_or("a child without pipes")?;
            let mut output = BufReader::new(output);
            let mut line = String::new();
            output.read_line(&mut line)?;
            addresses.push(serde_json::from_str::<Address>(&line)?);
            children.push((child, input, output));
        }
        let addresses = serde_json::to_string(&addresses)? + "\n";
        for (_, input, _) in &mut children {
            input.write_all(addresses.as_bytes())?;
        }
        Ok(Processes(children))
    }

    /// The next line of a rank, with its end; empty after the last.
    ///
    /// **Errors**: what the system says.
    pub fn line(&mut self, rank: usize) -> Result<String, Box<dyn Error>> {
        let mut line = String::new();
        self.0[rank].2.read_line(&mut line)?;
        Ok(line)
    }

    /// Lets all ranks end, and waits for that.
    ///
    /// **Errors**: a rank that fails.
    pub fn end(self) -> Result<(), Box<dyn Error>> {
        let (mut children, inputs): (Vec<_>, Vec<_>) =
            self.0.into_iter().map(|(child, input, output)| ((child, output), input)).unzip();
        drop(inputs);
        for (child, _) in &mut children {
            let status = child.wait()?;
            if !status.success() {
                return Err(format!("a rank ended with {status}").into());
            }
        }
        Ok(())
    }
}

/// In a process that was started as a rank: joins the others.
///
/// **Errors**: the process that started this one has ended; those of the fabric.
pub fn join(
    rank: usize,
    transport: Transport,
    delay_injection: Option<DelayInjection>,
) -> Result<Arc<WiredNetwork>, Box<dyn Error>> {
    let listener = Listener::bind("127.0.0.1:0".parse()?, Duration::from_secs(10))?;
    println!("{}", serde_json::to_string(&listener.address())?);
    let mut line = String::new();
    stdin().lock().read_line(&mut line)?;
    let formation = Formation {
        id: FormationId::default(),
        secret: *blake3::hash(line.as_bytes()).as_bytes(),
        ranks: serde_json::from_str(&line)?,
        local: vec![rank],
        timeout: TIMEOUT,
        transport,
        delay_injection,
        links: None,
    };
    Ok(WiredNetwork::form(&listener, formation, Arc::new(|_| {}))?)
}

/// In a process that was started as a rank: waits until all have ended.
///
/// **Errors**: what the system says.
pub fn await_end() -> Result<(), Box<dyn Error>> {
    stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}
