//! The stream to the orchestrator, from the worker's side. Knows messages, not what they mean.

use std::error::Error;
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use v1::control_service_client::ControlServiceClient;
use v1::from_worker::Message;

use super::Input;

/// How long reaching the orchestrator may take.
const CONNECT: Duration = Duration::from_secs(2);

/// How long a worker that ends waits for its last words to go out.
const FAREWELL: Duration = Duration::from_secs(1);

/// A silent connection is asked for a sign of life this often, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Largest message that is taken from the orchestrator: a recipe, a model and the addresses of thousands of ranks.
const MAX_MESSAGE: usize = 16 << 20;

/// Where the orchestrator is, and what it is shown.
pub(super) struct LinkTarget {
    pub(super) endpoint: Endpoint,
    pub(super) token: Option<MetadataValue<Ascii>>,
}

/// A stream that is open or being opened.
pub(super) struct Link {
    /// Counts the streams of this process.
    pub(super) number: u64,
    up: mpsc::UnboundedSender<v1::FromWorker>,
    beats: Duration,
    beat_at: Instant,
    is_member: bool,
    task: JoinHandle<()>,
}

impl Link {
    /// Begins to open a stream; the result goes to `inputs`.
    pub(super) fn open(
        number: u64,
        target: LinkTarget,
        hello: v1::Hello,
        inputs: mpsc::UnboundedSender<Input>,
    ) -> Self {
        let (up, words) = mpsc::unbounded_channel();
        // The receiver is in this function.
        drop(up.send(v1::FromWorker { message: Some(Message::Hello(hello)) }));
        let task = tokio::spawn(async move {
            let why = match attach(number, target, words, &inputs).await {
                Ok(()) => "the stream has ended".to_owned(),
                Err(error) => error,
            };
            drop(inputs.send(Input::Broken { link: number, why }));
        });
        let beat_at = Instant::now();
        Link { number, up, beats: Duration::from_millis(500), beat_at, is_member: false, task }
    }

    /// The orchestrator has taken the worker in.
    pub(super) fn welcomed(&mut self, beat_ms: u64) {
        self.is_member = true;
        self.beats = Duration::from_millis(beat_ms);
    }

    /// Whether the orchestrator has taken the worker in.
    pub(super) fn is_member(&self) -> bool {
        self.is_member
    }

    /// Says something, once the orchestrator has taken the worker in; before, it is said again anyway.
    pub(super) fn send(&mut self, message: Message) {
        if self.is_member {
            // The end of the stream is reported elsewhere.
            drop(self.up.send(v1::FromWorker { message: Some(message) }));
        }
    }

    /// Says nothing more, and waits until what was said has gone out, for a while at most.
    pub(super) async fn close(mut self) {
        let (none, _) = mpsc::unbounded_channel();
        self.up = none;
        // The orchestrator ends its side of a stream that has ended; one that is away is not waited for.
        drop(tokio::time::timeout(FAREWELL, &mut self.task).await);
    }

    /// Says that the worker is alive, if it is time to.
    pub(super) fn beat(&mut self, progress: Vec<v1::Progress>) {
        if self.beat_at <= Instant::now() {
            self.beat_at = Instant::now() + self.beats.mul_f64(0.9);
            self.send(Message::Beat(v1::Beat { progress }));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn attach(
    number: u64,
    LinkTarget { endpoint, token }: LinkTarget,
    words: mpsc::UnboundedReceiver<v1::FromWorker>,
    inputs: &mpsc::UnboundedSender<Input>,
) -> Result<(), String> {
    let has_tls = endpoint.uri().scheme_str() == Some("https");
    let broken = |status: &Status| match status.source() {
        Some(cause) => closed(cause, has_tls),
        None => status.message().to_owned(),
    };
    let endpoint = endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    let channel = endpoint.connect().await.map_err(|error| describe(&error))?;
    let mut client = ControlServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let mut request = Request::new(UnboundedReceiverStream::new(words));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token);
    }
    let attached = client.attach(request).await;
    let mut down = match attached {
        Ok(response) => response.into_inner(),
        Err(status) => {
            let refusals = [
                tonic::Code::InvalidArgument,
                tonic::Code::FailedPrecondition,
                tonic::Code::Unauthenticated,
                tonic::Code::PermissionDenied,
            ];
            if refusals.contains(&status.code()) {
                let message = v1::to_worker::Message::Refused(status.message().to_owned());
                drop(inputs.send(Input::Down(number, v1::ToWorker { message: Some(message), facts: 0 })));
            }
            return Err(broken(&status));
        }
    };
    while let Some(message) = down.next().await {
        let message = message.map_err(|status| broken(&status))?;
        if inputs.send(Input::Down(number, message)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// An error with its causes: that of the transport alone says nothing. A cause that only says the same again is left out.
pub fn describe(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut words: Vec<String> = causes.map(ToString::to_string).collect();
    words.dedup();
    words.join(": ")
}

/// Of a connection that was closed, with what that may mean: who speaks no TLS is told nothing, and TLS 1.3 lets a client begin
/// before its certificate is judged, so that a refusal may be seen as a mere end.
pub fn closed(cause: &dyn Error, has_tls: bool) -> String {
    let hint = match has_tls {
        true => "the orchestrator logs the certificates that it refuses",
        false => "an orchestrator with --tls closes those of clients and workers without",
    };
    format!("the connection was closed: {}; {hint}", describe(cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Cause(&'static str, #[source] Option<Box<Cause>>);

    #[test]
    fn causes_are_named_once_each() {
        let cause = |words, source: Option<Cause>| Cause(words, source.map(Box::new));
        let error = cause("transport error", Some(cause("reset", Some(cause("reset", None)))));
        assert_eq!(describe(&error), "transport error: reset");
        assert!(closed(&error, false).contains("closed: transport error: reset; an orchestrator with --tls"));
        assert!(closed(&error, true).ends_with("the certificates that it refuses"));
    }
}
