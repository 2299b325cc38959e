//! The fabric between processes, as its users see it: frames arrive as they were sent whatever carries them, a lost peer ends
//! the waits for it, and who does not belong to a formation is refused.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use contraflow_runtime::fabric::{
    Address, Endpoint, FabricError, Fault, Formation, FrameKind, Listener, Phase, Region, Tag, Transport,
    WiredNetwork,
};

/// Nothing here takes longer unless it hangs.
const DEADLINE: Duration = Duration::from_secs(30);

const SECRET: [u8; 32] = [7; 32];

fn tag(step: u64, source: u32, kind: FrameKind) -> Tag {
    Tag {
        job: 1,
        generation: 3,
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
struct Site {
    network: Arc<WiredNetwork>,
    listener: Listener,
    faults: Receiver<Fault>,
}

fn listener() -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), Duration::from_millis(200)).unwrap()
}

fn formation(ranks: Vec<Address>, local: &[usize], transport: Transport) -> Formation {
    let local = local.to_vec();
    Formation { job: 1, generation: 3, secret: SECRET, ranks, local, patience: DEADLINE, transport }
}

fn form(listener: &Listener, formation: Formation) -> Site {
    let (tell, faults) = channel();
    let tell = Mutex::new(tell);
    let on_fault = move |fault| drop(tell.lock().unwrap().send(fault));
    let network = WiredNetwork::form(listener, formation, Arc::new(on_fault)).unwrap();
    Site { network, listener: listener.clone(), faults }
}

/// Processes that host so many ranks each.
fn sites(num_ranks: &[usize], transport: Transport) -> Vec<Site> {
    let listeners: Vec<Listener> = num_ranks.iter().map(|_| listener()).collect();
    let repeated = |(listener, &num): (&Listener, &usize)| vec![listener.address(); num];
    let ranks: Vec<Address> = listeners.iter().zip(num_ranks).flat_map(repeated).collect();
    let mut first = 0;
    let site = |(listener, &num): (&Listener, &usize)| {
        let local: Vec<usize> = (first..first + num).collect();
        first += num;
        form(listener, formation(ranks.clone(), &local, transport))
    };
    listeners.iter().zip(num_ranks).map(site).collect()
}

fn close(sites: Vec<Site>) -> Vec<Fault> {
    std::thread::scope(|scope| {
        for site in &sites {
            let network = &site.network;
            scope.spawn(|| network.close());
        }
    });
    sites.iter().for_each(|site| site.listener.stop());
    sites.iter().flat_map(|site| site.faults.try_iter()).collect()
}

const WIRES: [Transport; 3] = [Transport::Tcp, Transport::Socket, Transport::SharedMemory];

/// Bytes that depend on nothing but their number and a seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn bytes_of(parts: &[Region]) -> Vec<Vec<u8>> {
    parts.iter().map(|part| part.bytes().to_vec()).collect()
}

#[test]
fn frames_arrive_as_they_were_sent() {
    let sizes: [&[usize]; 6] = [&[], &[0], &[1], &[7, 0, 9000], &[1 << 20, 3, 70_000], &[40 << 20]];
    for wire in WIRES {
        let sites = sites(&[1, 1], wire);
        let ends: Vec<Endpoint> = (0..2).map(|rank| sites[rank].network.join(rank).unwrap()).collect();
        let payload = |step: usize, rank: u64| -> Vec<Vec<u8>> {
            sizes[step].iter().map(|&len| noise(len, 10 * step as u64 + rank)).collect()
        };
        for (rank, end) in ends.iter().enumerate() {
            for step in 0..sizes.len() {
                let parts = payload(step, rank as u64).into_iter().map(Region::new).collect();
                end.send(1 - rank, tag(step as u64, rank as u32, FrameKind::Dispatch), parts).unwrap();
            }
        }
        // Last first: the order of taking is the receiver's.
        for (rank, end) in ends.iter().enumerate() {
            for step in [4, 0, 1, 2, 3, 5] {
                let from = 1 - rank as u32;
                let parts = end.receive(tag(step as u64, from, FrameKind::Dispatch)).unwrap();
                assert!(bytes_of(&parts) == payload(step, u64::from(from)), "{wire:?}, frame {step}");
            }
        }
        assert_eq!(ends[0].num_waiting() + ends[1].num_waiting(), 0);
        drop(ends);
        assert_eq!(close(sites), []);
    }
}

#[test]
fn ranks_of_one_process_hand_the_value_itself_over() {
    let sites = sites(&[2, 1], Transport::Tcp);
    let (a, b) = (sites[0].network.join(0).unwrap(), sites[0].network.join(1).unwrap());
    let payload = noise(100, 1);
    let address = payload.as_ptr();
    a.send(1, tag(1, 0, FrameKind::Gradient), vec![Region::new(payload)]).unwrap();
    let got = b.receive(tag(1, 0, FrameKind::Gradient)).unwrap().remove(0);
    assert_eq!(got.bytes().as_ptr(), address);
    assert!(matches!(sites[0].network.join(2), Err(FabricError::NoSuchRank { to: 2 })));
    assert_eq!(close(sites), []);
}

#[test]
fn a_lane_that_nobody_reads_holds_up_no_other() {
    for wire in WIRES {
        let sites = sites(&[1, 1], wire);
        let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
        // Far more than window, sockets and shared memory hold together; by handle, so it costs no memory here.
        let block = Region::new(noise(8 << 20, 1));
        for step in 0..64 {
            a.send(1, tag(step, 0, FrameKind::AllGather), vec![block.clone()]).unwrap();
        }
        for step in 0..20 {
            a.send(1, tag(step, 0, FrameKind::Combine), vec![Region::new(noise(1 << 20, step))]).unwrap();
            let parts = b.receive(tag(step, 0, FrameKind::Combine)).unwrap();
            assert!(parts[0].bytes() == noise(1 << 20, step));
        }
        assert!(b.num_waiting() <= 2, "the receiver holds more than a window: {} frames", b.num_waiting());
        for step in 0..64 {
            let parts = b.receive(tag(step, 0, FrameKind::AllGather)).unwrap();
            assert_eq!(parts[0].len(), 8 << 20);
        }
        assert_eq!(close(sites), []);
    }
}

#[test]
fn frames_larger_than_the_window_arrive() {
    for wire in WIRES {
        let sites = sites(&[1, 1], wire);
        let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
        let large = noise(100 << 20, 5);
        for step in 0..3 {
            a.send(1, tag(step, 0, FrameKind::ReduceScatter), vec![Region::new(large.clone())]).unwrap();
        }
        for step in 0..3 {
            let parts = b.receive(tag(step, 0, FrameKind::ReduceScatter)).unwrap();
            assert!(parts[0].bytes() == large, "{wire:?}");
        }
        assert_eq!(close(sites), []);
    }
}

#[test]
fn an_abort_ends_a_wait_and_a_close_is_no_fault() {
    let sites = sites(&[1, 1], Transport::Socket);
    let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
    a.send(1, tag(1, 0, FrameKind::Combine), vec![Region::new(vec![1])]).unwrap();
    b.receive(tag(1, 0, FrameKind::Combine)).unwrap();
    let waiter = b.clone();
    let thread = std::thread::spawn(move || waiter.receive(tag(2, 0, FrameKind::Combine)));
    b.abort("enough");
    assert_eq!(thread.join().unwrap().err().unwrap().to_string(), "aborted: enough");
    let began = Instant::now();
    assert_eq!(close(sites), []);
    assert!(began.elapsed() < Duration::from_secs(3), "closing took {:?}", began.elapsed());
}

#[test]
fn what_was_sent_before_a_close_still_arrives_and_then_the_peer_has_left() {
    let mut sites = sites(&[1, 1], Transport::Tcp);
    let b = sites[1].network.join(1).unwrap();
    let a = sites[0].network.join(0).unwrap();
    let large = noise(30 << 20, 1);
    a.send(1, tag(1, 0, FrameKind::AllReduce), vec![Region::new(large.clone())]).unwrap();
    let first = sites.remove(0);
    first.network.close();
    assert!(b.receive(tag(1, 0, FrameKind::AllReduce)).unwrap()[0].bytes() == large);
    let began = Instant::now();
    let error = b.receive(tag(2, 0, FrameKind::AllReduce)).err().unwrap();
    assert!(matches!(error, FabricError::Lost { rank: 0, .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(close(sites), []);
    assert_eq!(close(vec![first]), []);
}
