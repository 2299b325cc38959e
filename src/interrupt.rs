//! What Ctrl-C and SIGTERM do to a run: the first lets it finish its step and keep it, the second ends the process.

use crate::failure::Failure;

/// Exit code of an interrupted command, as shells have it: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Calls `stop` at the first signal and ends the process at the second. Runs until it is aborted.
///
/// **Errors**: the system gives no signals.
pub async fn watch(stop: impl Fn()) -> Result<(), Failure> {
    signal().await?;
    eprintln!("interrupted: finishing the step and keeping it; once more to end at once");
    stop();
    signal().await?;
    // The last committed checkpoint stands, whatever is cut off now.
    std::process::exit(INTERRUPTED.into())
}

/// Waits for Ctrl-C or SIGTERM.
///
/// **Errors**: the system gives no signals.
pub async fn signal() -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| Failure::run(format!("signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::select! {
        heard = tokio::signal::ctrl_c() => heard.map_err(failed),
        _ = terminate.recv() => Ok(()),
    }
}

/// What commands that wait for the network run on.
///
/// **Errors**: the system gives no threads.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|error| Failure::run(error.to_string()))
}
