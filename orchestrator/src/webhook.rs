//! Tells an address of the user what happens to jobs: that they have ended, lost ranks or been sent back. Signed as Standard Webhooks
//! are, so that the receiver may check it with a library; repeated until it is taken, one after the other.
//!
//! Knows no job: what is told, others say. What has not been taken when the process ends is lost, unless it waits for that.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use contraflow_runtime::files::objects::post;
use contraflow_runtime::random::from_system;
use ring::hmac;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::transport::Uri;

/// Before a secret that is written in base64.
const SECRET_PREFIX: &str = "whsec_";

/// How often a notice is sent at most, each time after twice as long a pause.
const ATTEMPTS: u32 = 8;

/// The first pause.
const PAUSE: Duration = Duration::from_secs(1);

/// Notices that wait for a receiver which does not answer.
const WAITING: usize = 1_024;

/// Of one job this long apart, where the same might be said at every step.
const WARNINGS_APART: Duration = Duration::from_secs(60);

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Happened {
    /// The job has done what it was asked.
    #[serde(rename = "job.done")]
    Done,
    /// It could not go on.
    #[serde(rename = "job.failed")]
    Failed,
    /// It was cancelled.
    #[serde(rename = "job.cancelled")]
    Cancelled,
    /// It has lost ranks, and goes on.
    #[serde(rename = "job.lost_ranks")]
    LostRanks,
    /// Its numbers were out of bounds: it goes on from a checkpoint.
    #[serde(rename = "job.rolled_back")]
    RolledBack,
    /// A watch warns of a step. At most once a minute.
    #[serde(rename = "job.warning")]
    Warning,
}

/// One thing that has happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Notice {
    /// What.
    #[serde(rename = "type")]
    pub happened: Happened,
    /// When. **Units**: milliseconds since 1970.
    pub unix_ms: u64,
    /// The job's id.
    pub job: String,
    /// Its name.
    pub name: String,
    /// Its latest step.
    pub step: u64,
    /// Steps of its recipe.
    pub steps: u64,
    /// The outcome, or why.
    pub words: String,
}

/// Where notices go, and how they are signed.
pub struct Webhook {
    url: String,
    key: Option<hmac::Key>,
}

impl Webhook {
    /// `secret`: as it stands, or in base64 behind `whsec_`.
    ///
    /// **Errors**: the address is none of HTTP, or the secret is empty or no base64.
    pub fn new(url: &str, secret: Option<&str>) -> Result<Self, String> {
        let address = url.parse::<Uri>().ok().filter(|address| address.host().is_some());
        let scheme = address.as_ref().and_then(Uri::scheme_str);
        if !scheme.is_some_and(|scheme| ["http", "https"].contains(&scheme)) {
            return Err("expected an address that begins with http:// or https://".into());
        }
        let key = secret.map(|secret| key_of(secret.trim())).transpose()?;
        Ok(Webhook { url: url.to_owned(), key })
    }

    /// Sends what comes, one after the other, until the sender is gone. Pauses are short once that is about to be.
    pub fn start(self) -> Notices {
        let (sender, mut waiting) = mpsc::channel::<Notice>(WAITING);
        let left = Arc::<AtomicUsize>::default();
        let counted = left.clone();
        let (hurry, mut hurried) = watch::channel(false);
        let delivery = tokio::spawn(async move {
            while let Some(notice) = waiting.recv().await {
                self.deliver(&notice, &mut hurried).await;
                counted.fetch_sub(1, Ordering::Relaxed);
            }
        });
        Notices {
            sender: Some(sender),
            warned: HashMap::new(),
            left,
            hurry: Some(hurry),
            delivery: Some(delivery),
        }
    }

    async fn deliver(&self, notice: &Notice, hurried: &mut watch::Receiver<bool>) {
        // A notice is numbers and texts.
        let body = serde_json::to_string(notice).unwrap_or_default();
        let id = format!("msg_{:032x}", u128::from_le_bytes(from_system().unwrap_or_default()));
        let mut pause = PAUSE;
        let mut why = String::new();
        for attempt in 1..=ATTEMPTS {
            let timestamp = unix_seconds();
            let mut headers = vec![
                ("content-type", "application/json".to_owned()),
                ("webhook-id", id.clone()),
                ("webhook-timestamp", timestamp.to_string()),
            ];
            let signature = self.key.as_ref().map(|key| sign(key, &id, timestamp, &body));
            headers.extend(signature.map(|signature| ("webhook-signature", signature)));
            match post(&self.url, &headers, body.clone()).await {
                Ok(status) if (200..300).contains(&status) => return,
                Ok(status) => why = format!("answered with status {status}"),
                Err(error) => why = error,
            }
            if attempt < ATTEMPTS {
                if tokio::time::timeout(pause, hurried.wait_for(|is| *is)).await.is_ok() {
                    // What refused the last attempt may be over, and others wait behind this notice.
                    tokio::time::sleep(PAUSE).await;
                }
                pause *= 2;
            }
        }
        let Notice { job, happened, .. } = notice;
        tracing::warn!(%job, "the webhook has not taken {happened:?} in {ATTEMPTS} attempts: {why}");
    }
}

/// The way to the webhook, if there is one.
#[derive(Default)]
pub struct Notices {
    sender: Option<mpsc::Sender<Notice>>,
    /// By job, when it was last warned of.
    warned: HashMap<String, Instant>,
    /// Notices that are neither taken nor given up.
    left: Arc<AtomicUsize>,
    /// Tells what sends them that it ends.
    hurry: Option<watch::Sender<bool>>,
    /// What sends them.
    delivery: Option<JoinHandle<()>>,
}

impl Notices {
    /// Hands a notice over; one that finds too many waiting is left out.
    pub fn send(&mut self, notice: Notice) {
        let Some(sender) = &self.sender else { return };
        if notice.happened == Happened::Warning {
            // Here, so that a receiver that does not answer leaves room for what counts.
            self.warned.retain(|_, at| at.elapsed() < WARNINGS_APART);
            if self.warned.contains_key(&notice.job) {
                return;
            }
            self.warned.insert(notice.job.clone(), Instant::now());
        }
        self.left.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = sender.try_send(notice) {
            self.left.fetch_sub(1, Ordering::Relaxed);
            let notice = error.into_inner();
            let (job, happened) = (notice.job, notice.happened);
            tracing::warn!(%job, "{happened:?} is not told to the webhook: {WAITING} notices wait for it");
        }
    }

    /// Waits until all are taken or given up, and no longer than that; how many are left.
    pub async fn end(self, patience: Duration) -> usize {
        let Notices { sender, left, hurry, delivery, .. } = self;
        if let Some(hurry) = &hurry {
            hurry.send_replace(true);
        }
        drop(sender);
        if let Some(mut delivery) = delivery
            && tokio::time::timeout(patience, &mut delivery).await.is_err()
        {
            delivery.abort();
        }
        left.load(Ordering::Relaxed)
    }

    /// Whether anybody is told.
    pub fn is_some(&self) -> bool {
        self.sender.is_some()
    }
}

fn key_of(secret: &str) -> Result<hmac::Key, String> {
    let bytes = match secret.strip_prefix(SECRET_PREFIX) {
        Some(text) => {
            BASE64.decode(text).map_err(|error| format!("expected base64 behind {SECRET_PREFIX}: {error}"))?
        }
        None => secret.as_bytes().to_vec(),
    };
    if bytes.is_empty() {
        return Err("expected a secret, got nothing".into());
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
}

/// Of version 1 of the Standard Webhooks.
fn sign(key: &hmac::Key, id: &str, timestamp: u64, body: &str) -> String {
    let tag = hmac::sign(key, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", BASE64.encode(tag))
}

fn unix_seconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// The example of the libraries of Standard Webhooks.
    #[test]
    fn a_signature_is_that_of_the_published_example() {
        let key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signed = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        let plain = key_of("a secret").unwrap();
        assert_ne!(
            sign(&plain, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#),
            signed
        );
    }

    fn notice(happened: Happened, job: &str) -> Notice {
        Notice {
            happened,
            unix_ms: 0,
            job: job.into(),
            name: String::new(),
            step: 0,
            steps: 0,
            words: String::new(),
        }
    }

    #[test]
    fn warnings_of_a_job_at_every_step_leave_room_for_its_end() {
        let (sender, mut waiting) = mpsc::channel(3);
        let mut notices = Notices { sender: Some(sender), ..Notices::default() };
        for job in ["job-1", "job-1", "job-2", "job-1"] {
            notices.send(notice(Happened::Warning, job));
        }
        notices.send(notice(Happened::Failed, "job-1"));
        let told: Vec<_> = std::iter::from_fn(|| waiting.try_recv().ok()).collect();
        let expected =
            [(Happened::Warning, "job-1"), (Happened::Warning, "job-2"), (Happened::Failed, "job-1")];
        assert_eq!(told, expected.map(|(happened, job)| notice(happened, job)));
    }

    /// A receiver that refuses so many requests and takes the next one.
    fn refusing(times: usize) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for number in 0..=times {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    let mut part = [0; 4096];
                    let len = stream.read(&mut part).unwrap();
                    request.extend_from_slice(&part[..len]);
                }
                let status = if number < times { "503 Busy" } else { "204 Taken" };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        url
    }

    #[tokio::test]
    async fn the_end_is_told_soon_though_the_pauses_have_become_long() {
        // The attempts at 0, 1 and 3 s are refused; the next one would be at 7 s.
        let mut notices = Webhook::new(&refusing(3), None).unwrap().start();
        notices.send(notice(Happened::Done, "job-1"));
        assert_eq!(notices.end(Duration::from_secs(6)).await, 0);
    }

    #[test]
    fn addresses_and_secrets_that_cannot_be_are_refused() {
        let refused = |url: &str, secret| Webhook::new(url, secret).err().unwrap_or_default();
        assert!(refused("ftp://example.org", None).contains("http://"));
        assert!(refused("https://", None).contains("http://"));
        assert!(refused("http://a host/hook", None).contains("http://"));
        assert!(refused("https://example.org/hook", Some(" \n")).contains("got nothing"));
        assert!(refused("https://example.org/hook", Some("whsec_!")).contains("base64"));
        assert_eq!(refused("https://example.org/hook", Some("whsec_MfKQ\n")), "");
    }
}
