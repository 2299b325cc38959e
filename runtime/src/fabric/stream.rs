//! Connected sockets of either kind, and how the processes of a cluster are found.
//!
//! Knows addresses, deadlines and bytes; no frames.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

/// What the system may buffer of one direction of a connection.
///
/// **Units**: bytes.
const SOCKET_BUFFER: usize = 1 << 20;

/// How long what was sent may stay unanswered, or a silent connection a probe, until it counts as broken: a network that swallows
/// everything says nothing itself.
const UNANSWERED: Duration = Duration::from_millis(UNANSWERED_MS as u64);
const UNANSWERED_MS: u32 = 20_000;

/// Where the data connections of a process are accepted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address {
    /// The same for processes that can share memory: of one boot of one host, in one network namespace.
    pub host: String,
    /// For all others. A process that listens on every interface has to put in one that others can reach.
    pub tcp: SocketAddr,
    /// Name of a Unix socket without a file.
    pub unix: String,
}

/// The [`Address::host`] of this process.
pub fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// The Unix socket address with this name.
///
/// **Errors**: if the name is too long.
pub fn unix_address(name: &str) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(name)
}

/// A connected socket.
#[derive(Debug)]
pub enum Stream {
    /// To another host, or on demand.
    Tcp(TcpStream),
    /// Within a host.
    Unix(UnixStream),
}

impl Stream {
    /// Connects to a process by TCP.
    ///
    /// **Errors**: the system's, at the latest after `timeout`.
    pub fn connect_tcp(address: &Address, timeout: Duration) -> io::Result<Stream> {
        Stream::tcp(TcpStream::connect_timeout(&address.tcp, timeout)?)
    }

    /// Connects to a process of this host.
    ///
    /// **Errors**: the system's.
    pub fn connect_unix(address: &Address) -> io::Result<Stream> {
        Stream::unix(UnixStream::connect_addr(&unix_address(&address.unix)?)?)
    }

    /// Wraps an accepted connection.
    ///
    /// **Errors**: the system's.
    pub fn tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, UNANSWERED / 2)?;
        sockopt::set_tcp_keepintvl(&stream, UNANSWERED / 4)?;
        sockopt::set_tcp_keepcnt(&stream, 2)?;
        sockopt::set_tcp_user_timeout(&stream, UNANSWERED_MS)?;
        Ok(Stream::Tcp(stream))
    }

    /// Wraps an accepted connection.
    ///
    /// **Errors**: the system's.
    pub fn unix(stream: UnixStream) -> io::Result<Stream> {
        sockopt::set_socket_send_buffer_size(&stream, SOCKET_BUFFER)?;
        Ok(Stream::Unix(stream))
    }

    /// How long one read and one write may take from now on.
    ///
    /// **Errors**: the system's.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Stream::Tcp(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Stream::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }

    /// Ends one direction or both: readers at both ends see the end of the stream.
    pub fn shutdown(&self, how: Shutdown) {
        // One that is not connected any more has ended already.
        drop(match self {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
        });
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write_vectored(slices),
            Stream::Unix(stream) => (&mut &*stream).write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all slices, one after another, without putting them together first.
///
/// **Errors**: the system's; a part may have been written.
pub fn write_all_vectored(mut stream: &Stream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A stream on which everything together has to be over at a deadline, however slowly it drips.
pub struct Until<'a> {
    /// What is read from and written to.
    pub stream: &'a Stream,
    /// Its deadline.
    pub deadline: Instant,
}

impl Until<'_> {
    fn arm(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(left)
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        (&mut &*self.stream).read(buffer)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        (&mut &*self.stream).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
