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

async fn signal() -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| Failure::run(format!("signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::select! {
        heard = tokio::signal::ctrl_c() => heard.map_err(failed),
        _ = terminate.recv() => Ok(()),
    }
}
