//! What Ctrl-C and SIGTERM do to a run: the first lets it finish its step and keep it, the second ends the process.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Failure, INTERRUPTED};

/// Ctrl-C and SIGTERM, caught from construction on: one that arrives between two waits is kept for the next.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Installs the handlers, replacing the default actions.
    ///
    /// **Errors**: the system gives no signals.
    pub fn listen() -> Result<Self, Failure> {
        let install = |kind| signal(kind).map_err(|error| Failure::run(format!("signals: {error}")));
        Ok(Signals {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
        })
    }

    /// Waits for the next of either.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => (),
            _ = self.terminate.recv() => (),
        }
    }
}

/// Calls `stop` at the first signal and ends the process at the second. Runs until it is aborted.
pub async fn watch(mut signals: Signals, stop: impl Fn()) {
    signals.next().await;
    eprintln!("interrupted: finishing and saving the step; Ctrl-C again quits now");
    stop();
    signals.next().await;
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
        for signal in [Signal::INT, Signal::TERM, Signal::INT] {
            kill_process(getpid(), signal).unwrap();
            delivered.next().await;
            let at_once = std::time::Duration::ZERO;
            assert!(tokio::time::timeout(at_once, signals.next()).await.is_ok(), "{signal:?}");
        }
    }
}
