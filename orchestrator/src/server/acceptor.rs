//! The door: takes connections in, proves them where TLS is on, and turns away what is no client. Knows no call.
//!
//! A connection has one clock from its acceptance until its first HTTP/2 frame, SETTINGS, is whole: before TLS, within it and
//! after it. After that HTTP/2's own pings find out whether anybody is still there.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use contraflow_runtime::faults::Repeated;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::access::fingerprint;
use super::auth::AuthLayer;
use super::places::{Limits, Place, Places};

/// Connections that wait to be served.
const MAX_WAITING: usize = 64;

/// How long a connection may take to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a refused connection may take to read why, and how many bytes it may still say.
const LEAVE: Duration = Duration::from_secs(1);
const MAX_UNREAD: u64 = 1 << 20;

/// Pause after the system could not give a connection, for want of files for instance.
const PAUSE: Duration = Duration::from_millis(100);

/// What every HTTP/2 client says first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of a TLS client (RFC 8446, 5.1: a handshake record).
const TLS_HANDSHAKE: u8 = 22;

/// A connection of whatever kind.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that was taken in; its place is free again when it is dropped.
pub(super) struct Connection {
    io: Box<dyn Io>,
    peer: Peer,
    auth: AuthLayer,
    /// Until it has said enough.
    clock: Option<Clock>,
}

/// Who is at the other end; found among a request's extensions.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// Fingerprint of its certificate; none without TLS.
    pub(super) certificate: Option<blake3::Hash>,
    pub(super) place: Arc<Place>,
}

/// The time that a connection has, and how far it has come.
struct Clock {
    end: Pin<Box<Sleep>>,
    opening: Opening,
}

/// What a client says first: the preface and a frame, which is SETTINGS (RFC 9113, 3.4).
#[derive(Debug, Default)]
struct Opening {
    said: usize,
    /// Length of the frame's payload (RFC 9113, 4.1: three bytes).
    length: usize,
}

impl Opening {
    const LENGTH: Range<usize> = PREFACE.len()..PREFACE.len() + 3;
    const HEADER_END: usize = PREFACE.len() + 9;

    /// Takes note of what comes next. Whether it means anything is checked where HTTP/2 is spoken.
    fn take(&mut self, bytes: &[u8]) {
        for (at, &byte) in (self.said..Self::HEADER_END).zip(bytes) {
            if Self::LENGTH.contains(&at) {
                self.length = self.length << 8 | usize::from(byte);
            }
        }
        self.said = self.said.saturating_add(bytes.len());
    }

    fn is_whole(&self) -> bool {
        self.said >= Self::HEADER_END + self.length
    }
}

/// Accepts connections until the receiver is dropped.
pub(super) fn open(
    listener: TcpListener,
    auth: AuthLayer,
    limits: Limits,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, connections) = mpsc::channel(MAX_WAITING);
    let places = Places::new(limits);
    let mut failures = Repeated::default();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if let Some(times) = failures.again(Instant::now().into_std()) {
                        tracing::warn!(times, "a connection could not be accepted: {error}");
                    }
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let place = match places.take(address.ip()) {
                Ok(place) => Arc::new(place),
                Err(why) => {
                    auth.reject_connection(address, &why);
                    continue;
                }
            };
            let peer = Peer { address, certificate: None, place };
            let (auth, sender) = (auth.clone(), sender.clone());
            tokio::spawn(async move {
                let end = Instant::now() + HANDSHAKE;
                let admitted = tokio::time::timeout_at(end, admit(tcp, &auth)).await;
                match admitted.unwrap_or_else(|_| Err(too_late())) {
                    Ok((io, certificate)) => {
                        let clock = Clock {
                            end: Box::pin(tokio::time::sleep_until(end)),
                            opening: Opening::default(),
                        };
                        let peer = Peer { certificate, ..peer };
                        // A closed receiver means that the orchestrator is ending.
                        drop(sender.send(Ok(Connection { io, peer, auth, clock: Some(clock) })).await);
                    }
                    Err(why) => auth.reject_connection(address, &why),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

fn too_late() -> String {
    format!("no handshake within {HANDSHAKE:?}")
}

/// The connection as it is read from now on, and the fingerprint of its certificate.
///
/// **Errors**: the peer is not a client of this cluster.
async fn admit(tcp: TcpStream, auth: &AuthLayer) -> Result<(Box<dyn Io>, Option<blake3::Hash>), String> {
    tcp.set_nodelay(true).map_err(|error| error.to_string())?;
    let mut first = [0; PREFACE.len()];
    let length = tcp.peek(&mut first).await.map_err(|error| error.to_string())?;
    let is_tls = first[0] == TLS_HANDSHAKE;
    match auth.acceptor() {
        _ if length == 0 => Err("it sent nothing".into()),
        Some(tls) if is_tls => secure(tls, tcp, auth).await,
        Some(_) => Err("expected TLS, got something else: clients and workers need --tls".into()),
        None if is_tls => {
            Err("expected plain HTTP/2, got TLS: the orchestrator was started without --tls".into())
        }
        // Of what comes in pieces, the rest is checked where HTTP/2 is spoken.
        None if PREFACE.starts_with(&first[..length]) => Ok((Box::new(tcp), None)),
        None => Err("expected HTTP/2, got something else".into()),
    }
}

/// The same of a client that speaks TLS.
///
/// **Errors**: it has no certificate of this cluster, or one that was revoked.
pub(super) async fn secure(
    tls: TlsAcceptor,
    tcp: TcpStream,
    auth: &AuthLayer,
) -> Result<(Box<dyn Io>, Option<blake3::Hash>), String> {
    match tls.accept(tcp).into_fallible().await {
        Ok(stream) => {
            let certificates = stream.get_ref().1.peer_certificates();
            let certificate = certificates.and_then(|chain| chain.first()).map(|der| fingerprint(der));
            auth.check_certificate(certificate)?;
            Ok((Box::new(stream), certificate))
        }
        Err((error, tcp)) => {
            take_leave(tcp).await;
            Err(format!("TLS: {error}"))
        }
    }
}

/// Lets the other end read why it is refused: closed at once, what it still says would come back as a reset and the alert be
/// lost.
async fn take_leave(mut tcp: TcpStream) {
    let leave = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut tcp.take(MAX_UNREAD), &mut tokio::io::sink()).await
    };
    // Who does not read does not get it.
    drop(tokio::time::timeout(LEAVE, leave).await);
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connection {
    /// **Errors**: its time is over, and it has not said what a client says first, or has a place that is kept for workers and
    /// has not attached as one.
    fn check_clock(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(clock) = &mut self.clock else { return Ok(()) };
        if clock.opening.is_whole() && !self.peer.place.is_for_workers() {
            self.clock = None;
        } else if clock.end.as_mut().poll(context).is_ready() {
            let is_open = clock.opening.is_whole();
            let why = if is_open { "no place left but for workers".to_owned() } else { too_late() };
            self.auth.reject_connection(self.peer.address, &why);
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_clock(context)?;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(context, buffer);
        if let Some(clock) = &mut self.clock {
            clock.opening.take(&buffer.filled()[before..]);
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_is_whole_with_its_settings_however_it_comes_in_pieces() {
        // Two settings of six bytes each, in a frame of type 4.
        let said = [PREFACE, &[0, 0, 12, 4, 0, 0, 0, 0, 0], &[7; 12]].concat();
        for piece in [1, 2, 5, 24, 33, said.len()] {
            let mut opening = Opening::default();
            for (index, bytes) in said.chunks(piece).enumerate() {
                assert!(!opening.is_whole(), "{} of {} bytes", index * piece, said.len());
                opening.take(bytes);
            }
            assert!(opening.is_whole());
        }
        let mut empty = Opening::default();
        empty.take(&[PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0]].concat());
        assert!(!empty.is_whole());
        empty.take(&[0]);
        assert!(empty.is_whole());
    }
}
