//! What watches need and how they fail: kinds that are defined, and a log that says so. Knows nothing of what is watched.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kube::api::ListParams;
use kube::runtime::{controller, watcher};
use kube::{Api, Client, Resource};
use tokio::time::Instant;

use crate::cluster::TrainingCluster;
use crate::context::{Fault, is_code};
use crate::job::TrainingJob;

/// Between two lines of the log about a watch that goes on failing.
const EVERY: Duration = Duration::from_secs(60);

/// Says that a watch fails, once a minute at most.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Option<Instant>>);

impl Faults {
    /// Logs what a controller could not do. What a look could not do is logged where it is tried again.
    pub fn tell(&self, error: &controller::Error<Fault, watcher::Error>) {
        match error {
            controller::Error::QueueError(_) if self.is_due(Instant::now()) => {
                tracing::warn!("a watch fails, and is tried again: {}", crate::trouble::describe(error));
            }
            error => tracing::debug!("{error}"),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.duration_since(last) >= EVERY);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// Why nothing can be looked after.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A kind is not defined.
    #[error(
        "expected the kinds TrainingJob and TrainingCluster to be defined, got no {0}: `kubectl apply --server-side -f k8s/chart/crds` defines them"
    )]
    Undefined(String),
    /// The API server does not say.
    #[error("the API server: {0}")]
    Kube(#[from] kube::Error),
}

/// Checks that both kinds are defined.
///
/// **Errors**: one of them is not, or the API server does not say.
pub async fn check(client: &Client, namespace: &str) -> Result<(), Unfit> {
    is_defined(Api::<TrainingJob>::namespaced(client.clone(), namespace)).await?;
    is_defined(Api::<TrainingCluster>::namespaced(client.clone(), namespace)).await
}

async fn is_defined<K>(objects: Api<K>) -> Result<(), Unfit>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    match objects.list_metadata(&ListParams::default().limit(1)).await {
        Ok(_) => Ok(()),
        Err(error) if is_code(&error, 404) => Err(Unfit::Undefined(K::kind(&()).into_owned())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    /// Lines of a log.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_watch_that_fails_is_a_warning_of_the_log() {
        let lines = Lines::default();
        let to = lines.clone();
        let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
        let faults = Faults::default();
        tracing::subscriber::with_default(log, || {
            let fails = || controller::Error::QueueError(watcher::Error::NoResourceVersion);
            (0..10).for_each(|_| faults.tell(&fails()));
            faults.tell(&controller::Error::ReconcilerFailed(
                Fault::Gone,
                Box::new(kube::runtime::reflector::ObjectRef::<TrainingJob>::new("tiny").erase()),
            ));
        });
        let bytes = lines.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let text = String::from_utf8(bytes).unwrap_or_default();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("WARN") && text.contains("a watch fails"), "{text}");
    }

    #[test]
    fn a_watch_that_goes_on_failing_is_said_once_a_minute() {
        let (faults, start) = (Faults::default(), Instant::now());
        let said = (0..180).filter(|second| faults.is_due(start + Duration::from_secs(*second)));
        assert_eq!(said.collect::<Vec<_>>(), [0, 60, 120]);
    }
}
