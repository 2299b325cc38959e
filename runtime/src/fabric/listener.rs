//! Where a process takes data connections in, for all formations that it belongs to.
//!
//! Who connects has to name a formation and prove its secret before anything it says reaches a rank. A connection that
//! cannot is refused with a message, counted and logged; a connection for a formation that is not joined yet waits a while.
//! Those that have said nothing and those that wait are bounded by peer, TCP and Unix sockets apart.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::FabricError;
use super::handshake::{self, HandshakeError, Hello};
use super::stream::{self, Address, Stream, Until};
use super::unproven::{Bounds, Peer, Place, Unproven};
use super::wired::WiredNetwork;
use crate::faults::Repeated;
use crate::random::from_system;
use crate::topology::{FormationId, Generation, JobId};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long a handshake may take, however slowly its bytes come.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Connections that have not said a whole hello, or not proven it: one takes a round trip. The oldest makes room.
const SILENT: Bounds = Bounds { of_peer: 192, in_all: 384 };

/// Connections that wait for their formation to be joined here; more are turned away.
const WAITING: Bounds = Bounds { of_peer: 128, in_all: 256 };

/// Jobs whose ended formations are told from those that are still to be joined: connections for others wait in vain.
const KNOWN_JOBS: usize = 1_024;

/// Refusals that are logged in a second, at most: a crowd must not fill the log too.
const MAX_LOGGED: usize = 16;

/// What has come in by one kind of socket and has not proven itself.
struct Entrance {
    silent: Mutex<Unproven<Arc<Stream>>>,
    waiting: Mutex<Unproven<()>>,
}

impl Default for Entrance {
    fn default() -> Self {
        Entrance { silent: Mutex::new(Unproven::new(SILENT)), waiting: Mutex::new(Unproven::new(WAITING)) }
    }
}

/// An accepted connection.
struct Caller {
    entrance: Arc<Entrance>,
    peer: Peer,
    stream: Arc<Stream>,
    /// Among the silent ones.
    place: Place,
}

#[derive(Default)]
struct ListenerState {
    formations: HashMap<FormationId, Arc<WiredNetwork>>,
    /// The newest generation that each job has had here, of the last [`KNOWN_JOBS`].
    newest: BTreeMap<JobId, Generation>,
}

impl ListenerState {
    /// A formation that is joined; nothing if it may still be.
    ///
    /// **Errors**: it has ended.
    fn find(&self, id: FormationId) -> Result<Option<Arc<WiredNetwork>>, String> {
        if let Some(network) = self.formations.get(&id) {
            return Ok(Some(network.clone()));
        }
        match self.newest.get(&id.job).filter(|&&newest| newest >= id.generation) {
            Some(newest) => Err(format!("{id} has ended, the newest here is {newest}")),
            None => Ok(None),
        }
    }
}

struct Shared {
    address: Address,
    join_wait: Duration,
    state: Mutex<ListenerState>,
    joined: Condvar,
    refused: AtomicU64,
    /// When the last ones were logged.
    logged: Mutex<VecDeque<Instant>>,
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
            logged: Mutex::default(),
            tcp,
            unix,
        });
        let (by_tcp, by_unix) = (shared.clone(), shared.clone());
        std::thread::spawn(move || accept(&by_tcp, || accept_tcp(&by_tcp.tcp)));
        std::thread::spawn(move || accept(&by_unix, || accept_unix(&by_unix.unix)));
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
        if state.newest.len() > KNOWN_JOBS {
            state.newest.pop_first();
        }
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

fn accept_tcp(listener: &TcpListener) -> io::Result<(Stream, Peer)> {
    let (stream, from) = listener.accept()?;
    Ok((Stream::tcp(stream)?, from.ip().into()))
}

fn accept_unix(listener: &UnixListener) -> io::Result<(Stream, Peer)> {
    let (stream, _) = listener.accept()?;
    let user = rustix::net::sockopt::socket_peercred(&stream)?.uid.as_raw();
    Ok((Stream::unix(stream)?, Peer::User(user)))
}

fn accept(shared: &Arc<Shared>, next: impl Fn() -> io::Result<(Stream, Peer)>) {
    let entrance = Arc::<Entrance>::default();
    let mut failures = Repeated::default();
    loop {
        let (stream, peer) = match next() {
            Ok(accepted) => accepted,
            // The listener has been stopped.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => {
                if let Some(times) = failures.again(Instant::now()) {
                    tracing::warn!(%error, times, "a data connection could not be accepted");
                }
                // Out of descriptors, most likely: some come back.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        let stream = Arc::new(stream);
        let (place, oldest) = entrance.silent.lock().enter(peer, stream.clone());
        if let Some(oldest) = oldest {
            oldest.shutdown(std::net::Shutdown::Both);
        }
        let caller = Caller { entrance: entrance.clone(), peer, stream, place };
        let its = shared.clone();
        std::thread::spawn(move || its.shake(caller));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ListenerState> {
        self.state.lock()
    }

    /// Finds out who is there and hands a proven connection to its formation, which reads it to its end.
    fn shake(&self, caller: Caller) {
        let proven = self.prove(&caller);
        let Caller { entrance, stream, place, .. } = caller;
        drop(entrance.silent.lock().leave(&place));
        // Whoever ends it for being too many still holds it for a moment.
        let Some(stream) = Arc::into_inner(stream) else { return };
        let (hello, network) = match proven {
            Ok(proven) => proven,
            // Somebody who looks whether anybody is here, and goes.
            Err(HandshakeError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return,
            Err(error) => return self.refuse(&stream, &error.to_string()),
        };
        // Refused while the connection is still at hand: it is the network's from then on.
        if let Err((stream, reason)) = network.take_in(&hello, stream) {
            self.refuse(&stream, &reason);
        }
    }

    fn prove(&self, caller: &Caller) -> Result<(Hello, Arc<WiredNetwork>), HandshakeError> {
        let stream = &*caller.stream;
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        let hello = handshake::read_hello(&mut until)?;
        let network = match self.joined(&hello).map_err(HandshakeError::Refused)? {
            Some(network) => network,
            None => self.wait_for(&hello, caller).map_err(HandshakeError::Refused)?,
        };
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        handshake::challenge(&mut until, &hello, network.secret())?;
        Ok((hello, network))
    }

    /// The formation that a connection names, if it is joined.
    fn joined(&self, hello: &Hello) -> Result<Option<Arc<WiredNetwork>>, String> {
        self.lock().find(hello.formation)
    }

    /// The formation that a connection names, as soon as it is joined. Meanwhile the connection is one of those that wait.
    fn wait_for(&self, hello: &Hello, caller: &Caller) -> Result<Arc<WiredNetwork>, String> {
        let Caller { entrance, peer, place, .. } = caller;
        let id = hello.formation;
        let waiting = entrance.waiting.lock().try_enter(*peer, ());
        let waiting =
            waiting.ok_or_else(|| format!("{id} has not been joined here, and too many others wait"))?;
        drop(entrance.silent.lock().leave(place));
        let found = self.until_joined(id);
        entrance.waiting.lock().leave(&waiting);
        found
    }

    fn until_joined(&self, id: FormationId) -> Result<Arc<WiredNetwork>, String> {
        let deadline = Instant::now() + self.join_wait;
        let mut state = self.lock();
        loop {
            if let Some(network) = state.find(id)? {
                return Ok(network);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("{id} has not been joined here"));
            }
            self.joined.wait_for(&mut state, left);
        }
    }

    fn refuse(&self, stream: &Stream, reason: &str) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let mut logged = self.logged.lock();
        while logged.front().is_some_and(|first| first.elapsed() >= Duration::from_secs(1)) {
            logged.pop_front();
        }
        if logged.len() < MAX_LOGGED {
            logged.push_back(Instant::now());
            tracing::warn!(reason, refused, "refused a data connection");
        }
        drop(logged);
        // Who does not wait for the answer does not get it.
        let mut until = Until { stream, deadline: Instant::now() + HANDSHAKE };
        drop(handshake::refuse(&mut until, reason));
        stream.shutdown(std::net::Shutdown::Both);
    }
}
