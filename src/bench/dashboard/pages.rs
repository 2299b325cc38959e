//! A script that opens pages in a browser: what it prints, line by line. Knows no page.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::failure::Failure;

/// How long the script may take to its next line.
const PATIENCE: Duration = Duration::from_secs(180);

/// A script that runs. It ends with this.
pub(super) struct Pages {
    child: Child,
    input: ChildStdin,
    lines: UnboundedReceiver<String>,
}

impl Drop for Pages {
    fn drop(&mut self) {
        // One that has ended is no fault.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Pages {
    /// Starts `node SCRIPT http://HOST/ SCENARIO ABOUT`.
    ///
    /// **Errors**: code 1 if there is no node.
    pub(super) fn open(script: &str, host: &str, scenario: &str, about: &Value) -> Result<Self, Failure> {
        let mut command = Command::new("node");
        command.args([script, &format!("http://{host}/"), scenario, &about.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| Failure::run(format!("node: {error}")))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| Failure::run("a script without pipes"))?;
        let (sender, lines) = unbounded_channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.for_each(|line| drop(sender.send(line)));
        });
        Ok(Pages { child, input, lines })
    }

    async fn line(&mut self) -> Result<Option<Value>, Failure> {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await;
        let Some(line) = line.map_err(|_| Failure::run("the script of the pages says nothing"))? else {
            return Ok(None);
        };
        serde_json::from_str(&line).map(Some).map_err(|error| Failure::run(format!("{error}: {line}")))
    }

    /// All that it prints.
    ///
    /// **Errors**: code 1 if it fails.
    pub(super) async fn all(mut self) -> Result<Vec<Value>, Failure> {
        let mut all = Vec::new();
        while let Some(line) = self.line().await? {
            all.push(line);
        }
        let status = self.child.wait().map_err(|error| Failure::run(error.to_string()))?;
        if status.success() {
            Ok(all)
        } else {
            Err(Failure::run(format!("the script of the pages: {status}")))
        }
    }

    /// Has it look at the page that it keeps open.
    ///
    /// **Errors**: code 1 if it has ended.
    pub(super) async fn sample(&mut self) -> Result<Value, Failure> {
        self.input.write_all(b"sample\n").map_err(|error| Failure::run(error.to_string()))?;
        self.line().await?.ok_or_else(|| Failure::run("the script of the pages has ended"))
    }
}
