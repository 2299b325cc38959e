//! The way to the orchestrator as the files of this worker have it, taken up when they change. A renewed certificate that is refused, as
//! one of somebody else's is, costs no membership: the one before it is shown again. Pure but for the task that looks at the files.

use std::sync::Arc;
use std::time::{Duration, Instant};

use contraflow_runtime::files::Reloaded;
use tokio::sync::mpsc;
use tonic::transport::Endpoint;

use super::Input;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(3);

/// After how long what did not work is tried again while the way before it works.
const RETRY: Duration = Duration::from_secs(60);

/// The ways there are.
#[derive(Debug)]
pub(super) struct Route<T = Endpoint> {
    newest: T,
    /// What worked before `newest`, until that has worked.
    earlier: Option<T>,
    is_earlier_in_use: bool,
    /// When `newest` is tried once more.
    retry_at: Option<Instant>,
}

impl<T> Route<T> {
    pub(super) fn new(only: T) -> Self {
        Route { newest: only, earlier: None, is_earlier_in_use: false, retry_at: None }
    }

    /// The way to take now.
    pub(super) fn current(&self) -> &T {
        self.earlier.as_ref().filter(|_| self.is_earlier_in_use).unwrap_or(&self.newest)
    }

    /// Takes a new way; `has_worked`: the current one, which it may come back to.
    pub(super) fn renewed(&mut self, way: T, has_worked: bool) {
        let before = std::mem::replace(&mut self.newest, way);
        if has_worked && !self.is_earlier_in_use {
            self.earlier = Some(before);
        }
        (self.is_earlier_in_use, self.retry_at) = (false, None);
    }

    /// The current way has led to the orchestrator.
    pub(super) fn worked(&mut self, now: Instant) {
        if self.is_earlier_in_use {
            self.retry_at = Some(now + RETRY);
        } else {
            self.earlier = None;
        }
    }

    /// The current way has failed; whether there is another one, which is taken.
    pub(super) fn failed(&mut self) -> bool {
        self.is_earlier_in_use = self.earlier.is_some() && !self.is_earlier_in_use;
        self.retry_at = None;
        self.is_earlier_in_use
    }

    /// Whether the newest way is to be tried once more, which is then the current one.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.retry_at.is_some_and(|at| at <= now);
        if is_due {
            (self.is_earlier_in_use, self.retry_at) = (false, None);
        }
        is_due
    }
}

/// Looks at the files for as long as the worker runs, and tells it of a new way.
pub(super) fn watch(source: Arc<Reloaded<Endpoint>>, inputs: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let mut known = source.known();
        loop {
            tokio::time::sleep(LOOK).await;
            let source = source.clone();
            let Ok(current) = tokio::task::spawn_blocking(move || source.current()).await else { return };
            if !Arc::ptr_eq(&known, &current) {
                known = current;
                if inputs.send(Input::Renewed(Box::new(known.as_ref().clone()))).is_err() {
                    return;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_way_replaces_the_one_before_once_it_has_worked() {
        let (mut route, now) = (Route::new("a"), Instant::now());
        assert!(!route.failed(), "there is no other");
        assert_eq!(*route.current(), "a");
        route.renewed("b", true);
        assert_eq!(*route.current(), "b");
        route.worked(now);
        assert!(!route.failed(), "a is past");
        assert_eq!(*route.current(), "b");
    }

    #[test]
    fn a_way_that_fails_gives_way_to_the_one_before_and_is_tried_again() {
        let (mut route, now) = (Route::new("a"), Instant::now());
        route.renewed("b", true);
        assert!(route.failed());
        assert_eq!(*route.current(), "a");
        route.worked(now);
        assert!(!route.is_due(now + RETRY / 2));
        assert!(route.is_due(now + RETRY));
        assert_eq!(*route.current(), "b");
        assert!(route.failed());
        route.worked(now);
        // The files are put right.
        route.renewed("c", true);
        assert_eq!(*route.current(), "c");
        assert!(route.failed());
        assert_eq!(*route.current(), "a", "b never worked");
        assert!(!route.failed());
        assert_eq!(*route.current(), "c", "both are tried in turn while neither works");
    }

    #[test]
    fn what_never_worked_is_nothing_to_come_back_to() {
        let mut route = Route::new("a");
        route.renewed("b", false);
        assert!(!route.failed());
        assert_eq!(*route.current(), "b");
    }
}
