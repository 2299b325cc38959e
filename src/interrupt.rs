//! What Ctrl-C, SIGTERM and SIGHUP (a lost terminal) do to a run: the first lets it finish its step and keep it, a second of
//! the first two ends the process.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Failure, INTERRUPTED};
use crate::output::say;

/// Which signal came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Ctrl-C or SIGTERM.
    Asked,
    /// SIGHUP: the terminal is gone. Shell and kernel may both say so.
    HungUp,
}

/// Ctrl-C, SIGTERM and SIGHUP, caught from construction on: one that arrives between two waits is kept for the next.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// None where the command was started to outlive its terminal.
    hang_up: Option<Signal>,
}

impl Signals {
    /// Installs the handlers, replacing the default actions. Under `nohup` a lost terminal stays without an effect.
    ///
    /// **Errors**: the system gives no signals.
    pub fn listen() -> Result<Self, Failure> {
        let install = |kind| signal(kind).map_err(|error| Failure::run(format!("signals: {error}")));
        Ok(Signals {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
            hang_up: (!ignores_hang_up()).then(|| install(SignalKind::hangup())).transpose()?,
        })
    }

    /// Waits for the next of them.
    pub async fn next(&mut self) -> Cause {
        let hang_up = self.hang_up.as_mut();
        tokio::select! {
            _ = self.interrupt.recv() => Cause::Asked,
            _ = self.terminate.recv() => Cause::Asked,
            () = next_of(hang_up) => Cause::HungUp,
        }
    }

    /// Waits for a first one and for a second that asks: a terminal that is gone may be heard of twice.
    pub async fn twice(&mut self) {
        self.next().await;
        while self.next().await == Cause::HungUp {}
    }
}

async fn next_of(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether this process was started with SIGHUP ignored.
fn ignores_hang_up() -> bool {
    // Elsewhere than on Linux there is no such file, and a lost terminal stops the run.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.is_some_and(has_hang_up)
}

/// Whether SIGHUP, the first signal, is in a set as the system prints it: a bit for each, in hex.
fn has_hang_up(set: &str) -> bool {
    u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & 1 == 1)
}

/// Calls `stop` at the first signal and ends the process at the second. Runs until it is aborted.
pub async fn watch(mut signals: Signals, stop: impl Fn()) {
    match signals.next().await {
        Cause::Asked => say("interrupted: finishing and saving the step; Ctrl-C again quits now"),
        Cause::HungUp => say("the terminal is gone: finishing and saving the step"),
    }
    stop();
    while signals.next().await == Cause::HungUp {}
    // The last committed checkpoint is safe, whatever is cut off now.
    std::process::exit(INTERRUPTED.into())
}

/// What commands that wait for the network run on.
///
/// **Errors**: the system gives no threads.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    built(tokio::runtime::Builder::new_multi_thread().worker_threads(2))
}

/// The same for an orchestrator: what blocks there is bounded, and a crowd that reads leaves no crowd of threads.
///
/// **Errors**: the system gives no threads.
pub fn runtime_of_orchestrator() -> Result<tokio::runtime::Runtime, Failure> {
    // Recipes are checked on half of the cores at once; the rest is for what reads and writes the state.
    let blocking = std::thread::available_parallelism().map_or(1, usize::from) + 16;
    built(tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(blocking))
}

fn built(builder: &mut tokio::runtime::Builder) -> Result<tokio::runtime::Runtime, Failure> {
    builder.enable_all().build().map_err(|error| Failure::run(error.to_string()))
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn a_signal_that_comes_between_two_waits_is_not_lost() {
        let (mut signals, mut delivered) = (Signals::listen().unwrap(), Signals::listen().unwrap());
        let sent = [Signal::INT, Signal::TERM, Signal::HUP, Signal::INT];
        // Whoever runs this test may have started it to outlive a terminal.
        for signal in sent.into_iter().filter(|signal| *signal != Signal::HUP || !ignores_hang_up()) {
            kill_process(getpid(), signal).unwrap();
            delivered.next().await;
            let at_once = std::time::Duration::ZERO;
            let cause = if signal == Signal::HUP { Cause::HungUp } else { Cause::Asked };
            let next = tokio::time::timeout(at_once, signals.next()).await;
            assert_eq!(next, Ok(cause), "{signal:?}");
        }
    }

    #[test]
    fn a_set_of_signals_is_read() {
        assert!(has_hang_up("\t0000000000000001") && has_hang_up("0000000000001001"));
        assert!(!has_hang_up("0000000000001000") && !has_hang_up("") && !has_hang_up("x"));
    }
}
