//! The door: takes connections in, proves them where TLS is on, and turns away what is no client. Knows no call.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::auth::AuthLayer;

/// Connections at once.
const MAX_CONNECTIONS: usize = 8_192;

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

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that was taken in; its place is free again when it is dropped.
pub(super) struct Connection {
    io: Box<dyn Io>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

/// Who is at the other end; found among a request's extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Accepts connections until the receiver is dropped.
pub(super) fn open(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    auth: AuthLayer,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, connections) = mpsc::channel(MAX_WAITING);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (tcp, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                auth.reject_connection(peer, &format!("{MAX_CONNECTIONS} others are connected"));
                continue;
            };
            let (tls, auth, sender) = (tls.clone(), auth.clone(), sender.clone());
            tokio::spawn(async move {
                let admitted = tokio::time::timeout(HANDSHAKE, admit(tcp, tls)).await;
                match admitted.unwrap_or_else(|_| Err(format!("no handshake within {HANDSHAKE:?}"))) {
                    // A closed receiver means that the orchestrator is ending.
                    Ok(io) => drop(sender.send(Ok(Connection { io, peer, _place: place })).await),
                    Err(why) => auth.reject_connection(peer, &why),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

/// **Errors**: the peer is not a client of this cluster.
async fn admit(tcp: TcpStream, tls: Option<TlsAcceptor>) -> Result<Box<dyn Io>, String> {
    tcp.set_nodelay(true).map_err(|error| error.to_string())?;
    let mut first = [0; PREFACE.len()];
    let length = tcp.peek(&mut first).await.map_err(|error| error.to_string())?;
    let is_tls = first[0] == TLS_HANDSHAKE;
    match tls {
        _ if length == 0 => Err("it sent nothing".into()),
        Some(tls) if is_tls => match tls.accept(tcp).into_fallible().await {
            Ok(stream) => Ok(Box::new(stream)),
            Err((error, tcp)) => {
                take_leave(tcp).await;
                Err(format!("TLS: {error}"))
            }
        },
        Some(_) => Err("expected TLS, got something else: clients and workers need --tls".into()),
        None if is_tls => {
            Err("expected plain HTTP/2, got TLS: the orchestrator was started without --tls".into())
        }
        // Of what comes in pieces, the rest is checked where HTTP/2 is spoken.
        None if PREFACE.starts_with(&first[..length]) => Ok(Box::new(tcp)),
        None => Err("expected HTTP/2, got something else".into()),
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
        Peer(self.peer)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
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
