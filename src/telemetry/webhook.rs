//! Notices of a run in one process: what of it is told to the user's address, and how long that is waited for when it ends. How a notice
//! goes there is the orchestrator's business, which tells the same of its jobs.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_orchestrator::webhook::{Happened, Notice, Notices, Webhook};
use contraflow_runtime::files;
use parking_lot::Mutex;

use crate::failure::{Failure, INTERRUPTED};

/// How long notices that have not been taken are waited for when the run ends.
const FAREWELL: Duration = Duration::from_secs(10);

/// What the command line says of an address that is told.
#[derive(clap::Args, Clone, Debug)]
pub struct WebhookArgs {
    /// An address that is told what happens, by POST: that a job or run has ended, lost ranks or been sent back
    #[arg(long, value_name = "URL")]
    pub webhook: Option<String>,
    /// File with the secret by which notices are signed, as Standard Webhooks have it
    #[arg(long, value_name = "FILE", requires = "webhook")]
    pub webhook_secret: Option<PathBuf>,
}

impl WebhookArgs {
    /// None where nobody is to be told.
    ///
    /// **Errors**: code 2; the address is none, or the secret cannot be read or used.
    pub fn open(&self) -> Result<Option<Webhook>, Failure> {
        let Some(url) = &self.webhook else { return Ok(None) };
        let secret = self.webhook_secret.as_ref().map(|path| {
            let unreadable = |error| Failure::input(format!("--webhook-secret {}: {error}", path.display()));
            files::read_to_string(path).map_err(unreadable)
        });
        let refused = |why| Failure::input(format!("--webhook: {why}"));
        Webhook::new(url, secret.transpose()?.as_deref()).map(Some).map_err(refused)
    }
}

/// Tells of one run. When it is dropped, what has not been taken is waited for.
pub struct Telling {
    /// None once it ends.
    notices: Mutex<Option<Notices>>,
    run: String,
    steps: u64,
    /// Its own: a run has one for each of its formations.
    /// There until this is dropped.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Telling {
    /// Of a run by its name, and the steps of its recipe.
    ///
    /// **Errors**: code 1; the system gives no thread.
    pub fn start(webhook: Webhook, run: &str, steps: u64) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| Failure::run(format!("--webhook: {error}")))?;
        let notices = {
            let _entered = runtime.enter();
            webhook.start()
        };
        Ok(Telling { notices: Mutex::new(Some(notices)), run: run.to_owned(), steps, runtime: Some(runtime) })
    }

    /// Hands a notice over; nothing waits for it here.
    pub fn tell(&self, happened: Happened, step: u64, words: &str) {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let notice = Notice {
            happened,
            unix_ms: since_1970.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            job: self.run.clone(),
            name: self.run.clone(),
            step,
            steps: self.steps,
            words: words.to_owned(),
        };
        self.notices.lock().iter_mut().for_each(|notices| notices.send(notice.clone()));
    }

    /// Tells of the warnings of a step, if it has some.
    pub fn warned(&self, record: &StepRecord) {
        if !record.warnings.is_empty() {
            self.tell(Happened::Warning, record.step, &record.warnings.join("; "));
        }
    }

    /// Tells how the run has ended, after a step; `outcome`: in words, where it is done.
    pub fn ended(&self, result: &Result<(), Failure>, step: u64, outcome: &str) {
        match result {
            Ok(()) => self.tell(Happened::Done, step, outcome),
            Err(Failure { code: INTERRUPTED, message }) => self.tell(Happened::Cancelled, step, message),
            Err(Failure { message, .. }) => self.tell(Happened::Failed, step, message),
        }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        let (Some(notices), Some(runtime)) = (self.notices.lock().take(), self.runtime.take()) else {
            return;
        };
        let left = runtime.block_on(notices.end(FAREWELL));
        // A name that is still being looked up is not waited for.
        runtime.shutdown_background();
        match left {
            0 => {}
            left => tracing::warn!(
                "the webhook has not taken {left} of the run's notices within {} s of its end",
                FAREWELL.as_secs()
            ),
        }
    }
}
