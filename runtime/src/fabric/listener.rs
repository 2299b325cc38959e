//! Where a process takes data connections in, for all formations that it belongs to.
//!
//! Who connects has to name a formation and prove its secret before anything it says reaches a rank. A connection that
//! cannot is refused with a message, counted and logged; a connection for a formation that is not joined yet waits a while.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::FabricError;
use super::handshake::{self, HandshakeError, Hello};
use super::stream::{self, Address, Stream, Until};
use super::wired::WiredNetwork;
use crate::random::from_system;
use crate::topology::{FormationId, Generation, JobId};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long a handshake may take, however slowly its bytes come.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Connections that have not proven themselves yet; more are turned away.
const MAX_UNPROVEN: usize = 1024;

#[derive(Default)]
struct ListenerState {
    formations: HashMap<FormationId, Arc<WiredNetwork>>,
    /// The newest generation that each job has had here.
    newest: HashMap<JobId, Generation>,
}

struct Shared {
    address: Address,
    join_wait: Duration,
    state: Mutex<ListenerState>,
    joined: Condvar,
    refused: AtomicU64,
    unproven: AtomicUsize,
    tcp: TcpListener,
    unix: UnixListener,
}

/// Takes data connections in. Clones are the same listener; it stops with [`Listener::stop`].
#[derive(Clone)]
pub struct Listener {
    shared: Arc<Shared>,
}

impl Listener {
    /// Listens at `tcp` (port 0 for any) and at a Unix socket of its own. A connection for a formation that is not joined waits
    /// for at most `join_wait`.
    ///
    /// **Errors**: the system's.
    pub fn bind(tcp: SocketAddr, join_wait: Duration) -> io::Result<Listener> {
        let name: String = from_system::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("contraflow-{}-{name}", std::process::id());
        let unix = UnixListener::bind_addr(&stream::unix_address(&name)?)?;
        let tcp = TcpListener::bind(tcp)?;
        let address = Address { host: stream::host(), tcp: tcp.local_addr()?, unix: name };
        let shared = Arc::new(Shared {
            address,
            join_wait,
            state: Mutex::default(),
            joined: Condvar::new(),
            refused: AtomicU64::new(0),
            unproven: AtomicUsize::new(0),
            tcp,
            unix,
        });
        let (by_tcp, by_unix) = (shared.clone(), shared.clone());
        std::thread::spawn(move || {
            accept(&by_tcp, || Ok(by_tcp.tcp.accept()?.0), Stream::tcp);
        });
        std::thread::spawn(move || {
            accept(&by_unix, || Ok(by_unix.unix.accept()?.0), Stream::unix);
        });
        Ok(Listener { shared })
    }

    /// What peers need to connect.
    pub fn address(&self) -> Address {
        self.shared.address.clone()
    }

    /// Connections that were refused.
    pub fn num_refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Takes nothing in any more. Formations that were joined stay.
    pub fn stop(&self) {
        // On this system a listening socket that is shut down ends its `accept`.
        let _ = rustix::net::shutdown(&self.shared.tcp, rustix::net::Shutdown::Both);
        let _ = rustix::net::shutdown(&self.shared.unix, rustix::net::Shutdown::Both);
    }

    /// Lets the connections of a formation in.
    pub(super) fn admit(&self, network: &Arc<WiredNetwork>) -> Result<(), FabricError> {
        let id @ FormationId { job, generation } = network.id();
        let mut state = self.shared.lock();
        if state.formations.contains_key(&id) {
            let message = format!("{id} has been joined already");
            return Err(FabricError::Formation { message });
        }
        state.formations.insert(id, network.clone());
        let newest = state.newest.entry(job).or_default();
        *newest = generation.max(*newest);
        drop(state);
        self.shared.joined.notify_all();
        Ok(())
    }

    /// Lets no further connection of a formation in.
    pub(super) fn dismiss(&self, formation: FormationId) {
        let network = self.shared.lock().formations.remove(&formation);
        drop(network);
    }
}

fn accept<S>(
    shared: &Arc<Shared>,
    mut next: impl FnMut() -> io::Result<S>,
    wrap: impl Fn(S) -> io::Result<Stream>,
) {
    loop {
        let stream = match next().and_then(&wrap) {
            Ok(stream) => stream,
            // The listener has been stopped.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => {
                tracing::warn!(%error, "a data connection could not be accepted");
                // Out of descriptors, most likely: some come back.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if shared.unproven.fetch_add(1, Ordering::Relaxed) >= MAX_UNPROVEN {
            shared.unproven.fetch_sub(1, Ordering::Relaxed);
            shared.refuse(&stream, &format!("{MAX_UNPROVEN} others have not authenticated yet"));
            continue;
        }
        let its = shared.clone();
        std::thread::spawn(move || its.shake(stream));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ListenerState> {
        self.state.lock()
    }

    /// Finds out who is there and hands a proven connection to its formation, which reads it to its end.
    fn shake(&self, stream: Stream) {
        let proven = self.prove(&stream);
        self.unproven.fetch_sub(1, Ordering::Relaxed);
        let (hello, network) = match proven {
            Ok(proven) => proven,
            Err(error) => return self.refuse(&stream, &error.to_string()),
        };
        // Refused while the connection is still at hand: it is the network's from then on.
        if let Err((stream, reason)) = network.take_in(&hello, stream) {
            self.refuse(&stream, &reason);
        }
    }

    fn prove(&self, stream: &Stream) -> Result<(Hello, Arc<WiredNetwork>), HandshakeError> {
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        let hello = handshake::read_hello(&mut until)?;
        let network = self.find(&hello).map_err(HandshakeError::Refused)?;
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        handshake::challenge(&mut until, &hello, network.secret())?;
        Ok((hello, network))
    }

    /// The formation that a connection names, as soon as it is joined.
    fn find(&self, hello: &Hello) -> Result<Arc<WiredNetwork>, String> {
        let id @ FormationId { job, generation } = hello.formation;
        let deadline = Instant::now() + self.join_wait;
        let mut state = self.lock();
        loop {
            if let Some(network) = state.formations.get(&id) {
                return Ok(network.clone());
            }
            if let Some(newest) = state.newest.get(&job).filter(|&&newest| newest >= generation) {
                return Err(format!("{id} has ended, the newest here is {newest}"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("{id} has not been joined here"));
            }
            self.joined.wait_for(&mut state, left);
        }
    }

    fn refuse(&self, stream: &Stream, reason: &str) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(reason, "refused a data connection");
        // Who does not wait for the answer does not get it.
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        drop(handshake::refuse(&mut until, reason));
        stream.shutdown(std::net::Shutdown::Both);
    }
}
