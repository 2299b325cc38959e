//! Formations for the tests beside it: processes as far as the fabric can tell, all of them in this one.

use std::io::Read;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use contraflow_runtime::fabric::handshake::{Carrier, Hello};
use contraflow_runtime::fabric::wire::VERSION;
use contraflow_runtime::fabric::{
    Address, DelayInjection, Formation, FrameKind, Listener, PeerLost, Phase, Region, Tag, Transport,
    WiredNetwork,
};
use contraflow_runtime::random::from_system;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};

/// Nothing here takes longer unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub const SECRET: [u8; 32] = [7; 32];

/// A formation of the one job.
pub fn generation(number: u32) -> FormationId {
    FormationId::new(JobId::new(1, 0), Generation::new(number))
}

pub fn tag(step: u64, source: u32, kind: FrameKind) -> Tag {
    Tag {
        formation: generation(3),
        phase: Phase::Train,
        step,
        kind,
        stage: 1,
        micro_batch: 2,
        layer: 3,
        hop: 4,
        source,
    }
}

/// One process of a formation, as far as the fabric can tell.
pub struct Site {
    pub network: Arc<WiredNetwork>,
    pub listener: Listener,
    pub faults: Receiver<PeerLost>,
}

pub fn listener() -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), Duration::from_millis(200)).unwrap()
}

/// Listens where a peer made by hand is said to be: a connection to it waits as long as any test.
pub fn silent_listener() -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), DEADLINE).unwrap()
}

pub fn formation(ranks: Vec<Address>, local: &[usize], transport: Transport) -> Formation {
    let (id, local) = (generation(3), local.to_vec());
    let (secret, timeout, delay_injection) = (SECRET, DEADLINE, None);
    Formation { id, secret, ranks, local, timeout, transport, delay_injection, links: None }
}

pub fn form(listener: &Listener, formation: Formation) -> Site {
    let (tell, faults) = channel();
    let tell = Mutex::new(tell);
    let on_fault = move |fault| drop(tell.lock().unwrap().send(fault));
    let network = WiredNetwork::form(listener, formation, Arc::new(on_fault)).unwrap();
    Site { network, listener: listener.clone(), faults }
}

/// Processes that host this many ranks each.
pub fn sites(num_ranks: &[usize], transport: Transport) -> Vec<Site> {
    sites_with(num_ranks, transport, None)
}

/// The same, with delays of what goes between them.
pub fn sites_with(
    num_ranks: &[usize],
    transport: Transport,
    delay_injection: Option<DelayInjection>,
) -> Vec<Site> {
    let listeners: Vec<Listener> = num_ranks.iter().map(|_| listener()).collect();
    let repeated = |(listener, &num): (&Listener, &usize)| vec![listener.address(); num];
    let ranks: Vec<Address> = listeners.iter().zip(num_ranks).flat_map(repeated).collect();
    let mut first = 0;
    let site = |(listener, &num): (&Listener, &usize)| {
        let local: Vec<usize> = (first..first + num).collect();
        first += num;
        form(listener, Formation { delay_injection, ..formation(ranks.clone(), &local, transport) })
    };
    listeners.iter().zip(num_ranks).map(site).collect()
}

pub fn close(sites: Vec<Site>) -> Vec<PeerLost> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for site in &sites {
            let network = &site.network;
            scope.spawn(|| network.close());
        }
    });
    // A network waits five seconds for a peer that does not answer its goodbye.
    assert!(began.elapsed() < Duration::from_secs(4), "closing took {:?}", began.elapsed());
    sites.iter().for_each(|site| site.listener.stop());
    sites.iter().flat_map(|site| site.faults.try_iter()).collect()
}

pub const WIRES: [Transport; 3] = [Transport::Tcp, Transport::Socket, Transport::SharedMemory];

/// Bytes that depend on nothing but their number and a seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn bytes_of(parts: &[Region]) -> Vec<Vec<u8>> {
    parts.iter().map(|part| part.bytes().to_vec()).collect()
}

/// A connection made by hand, to say what no network would say.
pub fn connect(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.tcp).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// What the process of rank 1 says to that of rank 0.
pub fn hello() -> Hello {
    let (from, to, nonce) = (Rank::new(1), Rank::ZERO, from_system().unwrap());
    Hello { version: VERSION, carrier: Carrier::Socket, formation: generation(3), from, to, nonce }
}

/// Everything the other end still has to say.
pub fn rest_of(stream: &mut impl Read) -> String {
    let mut reply = Vec::new();
    // A connection that is reset has said all that it had to say.
    drop(stream.read_to_end(&mut reply));
    String::from_utf8_lossy(&reply).into_owned()
}

/// The process of rank 0 in a formation whose rank 1 is any process that connects.
pub fn site_with_a_peer_made_by_hand(timeout: Duration) -> Site {
    let (own, other) = (listener(), listener());
    let formation = formation(vec![own.address(), other.address()], &[0], Transport::Tcp);
    other.stop();
    form(&own, Formation { timeout, ..formation })
}
