//! Answers that end when the right to them does. For services that come from elsewhere and know no rights; our own look at them
//! themselves.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http_body_util::{BodyExt, BodyStream, StreamBody};
use parking_lot::Mutex;
use tokio_stream::Stream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

/// How the methods of such services begin: health checks and reflection.
const FOREIGN: &str = "/grpc.";

/// Whether a method is one of such a service.
pub(super) fn is_foreign(method: &str) -> bool {
    method.starts_with(FOREIGN)
}

/// The answer, until `withdrawn` completes: then it ends with that status.
pub(super) fn until_withdrawn(
    answer: http::Response<Body>,
    withdrawn: impl Future<Output = Status> + Send + 'static,
) -> http::Response<Body> {
    let refused = Arc::new(Mutex::new(None));
    let trailers = {
        let refused = refused.clone();
        async move {
            let status: Status = refused.lock().take()?;
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers).ok()?;
            Some(Ok(trailers))
        }
    };
    answer.map(|body| {
        let frames =
            UntilWithdrawn { frames: BodyStream::new(body), withdrawn: Box::pin(withdrawn), refused };
        Body::new(StreamBody::new(frames).with_trailers(trailers))
    })
}

/// The parts of an answer, as long as its caller has the right to it.
struct UntilWithdrawn {
    frames: BodyStream<Body>,
    withdrawn: Pin<Box<dyn Future<Output = Status> + Send>>,
    /// Why no more come.
    refused: Arc<Mutex<Option<Status>>>,
}

impl Stream for UntilWithdrawn {
    type Item = <BodyStream<Body> as Stream>::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(refused) = self.withdrawn.as_mut().poll(context) {
            *self.refused.lock() = Some(refused);
            return Poll::Ready(None);
        }
        Pin::new(&mut self.frames).poll_next(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio_stream::StreamExt;

    use super::*;

    fn status_of(trailers: &http::HeaderMap) -> Option<Status> {
        Status::from_header_map(trailers)
    }

    #[tokio::test]
    async fn an_answer_without_an_end_ends_with_the_refusal() {
        let (withdraw, withdrawn) = oneshot::channel();
        let endless = tokio_stream::pending::<<BodyStream<Body> as Stream>::Item>();
        let answer = http::Response::new(Body::new(StreamBody::new(endless)));
        let mut answer = until_withdrawn(answer, async move { withdrawn.await.unwrap() }).into_body();
        let next = tokio::time::timeout(std::time::Duration::from_millis(20), answer.frame()).await;
        assert!(next.is_err(), "nothing has ended it");
        withdraw.send(Status::unauthenticated("token: it is withdrawn")).unwrap();
        let trailers = answer.frame().await.unwrap().unwrap().into_trailers().unwrap();
        let status = status_of(&trailers).unwrap();
        assert_eq!(
            (status.code(), status.message()),
            (tonic::Code::Unauthenticated, "token: it is withdrawn")
        );
        assert!(answer.frame().await.is_none());
    }

    #[tokio::test]
    async fn an_answer_that_ends_by_itself_is_as_it_was() {
        let mut trailers = http::HeaderMap::new();
        Status::ok("").add_header(&mut trailers).unwrap();
        let body = http_body_util::Full::from("message").with_trailers(async { Some(Ok(trailers)) });
        let body = body.map_err(|never| match never {});
        let answer = until_withdrawn(http::Response::new(Body::new(body)), std::future::pending());
        let parts: Vec<_> = BodyStream::new(answer.into_body()).map(Result::unwrap).collect().await;
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].data_ref().unwrap().as_ref(), b"message");
        assert_eq!(status_of(parts[1].trailers_ref().unwrap()).unwrap().code(), tonic::Code::Ok);
    }
}
