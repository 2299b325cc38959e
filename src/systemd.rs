//! What systemd is told of a service of `Type=notify`: that it is ready, and then, as often as it asks for, that it works.
//!
//! Nothing is said where systemd, or whoever stands in for it, has not named a socket. Knows no cluster.

use sd_notify::NotifyState;

/// Says that the service is ready once `is_ready` completes, then at every third of systemd's patience that it works: each time when
/// `works` has completed, so one that hangs is silent and restarted.
pub async fn tell(is_ready: impl Future<Output = ()>, mut works: impl AsyncFnMut()) {
    is_ready.await;
    say(NotifyState::Ready).await;
    let Some(patience) = sd_notify::watchdog_enabled() else { return };
    loop {
        works().await;
        say(NotifyState::Watchdog).await;
        tokio::time::sleep(patience / 3).await;
    }
}

/// On a thread that may block: where nobody reads the socket it fills up, and the service must not wait for that.
async fn say(state: NotifyState<'static>) {
    let said = tokio::task::spawn_blocking(move || sd_notify::notify(&[state])).await;
    if let Ok(Err(error)) = said {
        tracing::warn!("systemd was not told that the service works: {error}");
    }
}
