//! However a link ends, the waits for its peer end at once and it is reported once; frames of others are not disturbed.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use contraflow_runtime::fabric::handshake::{self, Hello, connect as shake};
use contraflow_runtime::fabric::wire::{self, FrameHeader, LinkMessage, PartHeader, Signal};
use contraflow_runtime::fabric::{
    Address, FabricError, Formation, FrameKind, PayloadShape, Region, Tag, Transport,
};
use contraflow_runtime::topology::Rank;
use contraflow_runtime::trace::TraceContext;

use crate::lab::{
    DEADLINE, SECRET, Site, close, connect, form, formation, hello, listener, noise, silent_listener,
    site_with_a_peer_made_by_hand, tag,
};

/// A proven connection from rank 1, on which anything may be said.
fn proven(site: &Site) -> TcpStream {
    let mut stream = connect(&site.listener.address());
    shake(&mut stream, &hello(), &SECRET).unwrap();
    stream
}

/// Waits for a frame of rank 1 while `act` happens to it: returns why the wait ended, which is reported once, within a second.
fn lost(site: Site, act: impl FnOnce()) -> String {
    let (error, fault) = ended(site, act);
    let FabricError::Lost { rank: 1, reason } = error else { panic!("{error}") };
    assert_eq!(reason, fault);
    reason
}

/// What a wait of rank 0 for rank 1 ends with, and the one fault of the link, once something has been done to it.
fn ended(site: Site, act: impl FnOnce()) -> (FabricError, String) {
    let end = site.network.join(0).unwrap();
    let waiter = std::thread::spawn(move || end.receive(tag(1, 1, FrameKind::Combine)));
    let began = Instant::now();
    act();
    let error = waiter.join().unwrap().err().unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "it took {:?}", began.elapsed());
    let faults = {
        let first = site.faults.recv_timeout(DEADLINE).unwrap();
        let mut faults = vec![first];
        faults.extend(close(vec![site]));
        faults
    };
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert_eq!(faults[0].ranks, [1]);
    (error, faults[0].reason.clone())
}

fn header(tag: Tag, to: u32, len: u64) -> FrameHeader {
    FrameHeader {
        to,
        tag,
        trace: TraceContext::default(),
        block: None,
        parts: vec![PartHeader { form: PayloadShape::default(), len }],
    }
}

fn bytes_of(header: FrameHeader) -> Vec<u8> {
    wire::encode(&LinkMessage::Frame(header))
}

/// Whatever rank 1 says, then the end of what it says.
fn lost_after(bytes: &[u8]) -> String {
    after(bytes, |site, act| lost(site, act))
}

fn after<T>(bytes: &[u8], outcome: impl FnOnce(Site, &mut dyn FnMut()) -> T) -> T {
    let (own, other) = (listener(), silent_listener());
    let site = form(&own, formation(vec![own.address(), other.address()], &[0], Transport::Tcp));
    let mut stream = proven(&site);
    let outcome = outcome(site, &mut || {
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    other.stop();
    outcome
}

#[test]
fn a_peer_lost_in_the_middle_of_a_frame() {
    let mut bytes = bytes_of(header(tag(1, 1, FrameKind::Combine), 0, 1000));
    bytes.extend([1; 10]);
    assert_eq!(lost_after(&bytes), "the connection was closed");
    assert_eq!(lost_after(&bytes[..20]), "the connection was closed");
}

#[test]
fn what_is_no_frame() {
    assert_eq!(lost_after(&[0x55; 200]), "not a frame");
    let mut flipped = bytes_of(header(tag(1, 1, FrameKind::Combine), 0, 0));
    flipped[20] ^= 1;
    assert_eq!(lost_after(&flipped), "the checksum of a frame's header does not match");
}

#[test]
fn a_frame_that_does_not_belong_here() {
    let of_another = bytes_of(header(tag(1, 0, FrameKind::Combine), 0, 0));
    assert_eq!(lost_after(&of_another), "a frame of rank 0 came from the process of ranks [1]");
    let for_another = bytes_of(header(tag(1, 1, FrameKind::Combine), 1, 0));
    assert_eq!(lost_after(&for_another), "a frame for rank 1 came here");
    let in_memory = FrameHeader { block: Some(0), ..header(tag(1, 1, FrameKind::Combine), 0, 64) };
    assert_eq!(lost_after(&bytes_of(in_memory)), "a frame that claims to be in memory that is not shared");
}

#[test]
fn a_frame_larger_than_any() {
    let reason = lost_after(&bytes_of(header(tag(1, 1, FrameKind::Combine), 0, u64::MAX / 2)));
    assert!(reason.starts_with("expected at most 4294967296 bytes in a frame"), "{reason}");
}

#[test]
fn frames_that_come_without_credit() {
    let mut bytes = bytes_of(header(tag(10, 1, FrameKind::Gradient), 0, 10 << 20));
    bytes.extend(noise(10 << 20, 1));
    // The header is enough: nothing of the second is read.
    bytes.extend(bytes_of(header(tag(11, 1, FrameKind::Gradient), 0, 10 << 20)));
    let site = site_with_a_peer_made_by_hand(DEADLINE);
    let mut stream = proven(&site);
    let end = site.network.join(0).unwrap();
    stream.write_all(&bytes).unwrap();
    let fault = site.faults.recv_timeout(DEADLINE).unwrap();
    assert!(fault.reason.contains("without credit"), "{fault:?}");
    assert_eq!(end.num_waiting(), 1);
    assert_eq!(close(vec![site]), []);
}

#[test]
fn two_frames_under_one_tag() {
    let frame = bytes_of(header(tag(9, 1, FrameKind::Combine), 0, 0));
    let twice = [frame.clone(), frame].concat();
    // The peer is not lost but wrong: a waiter cannot know which frame is meant.
    let (error, reason) = after(&twice, |site, act| ended(site, act));
    assert!(matches!(error, FabricError::Duplicate { tag } if tag.kind == FrameKind::Combine), "{error}");
    assert!(reason.starts_with("a second frame came for Combine"), "{reason}");
}

#[test]
fn silence_ends_a_link_at_the_timeout() {
    let site = site_with_a_peer_made_by_hand(Duration::from_millis(50));
    let stream = proven(&site);
    let fault = site.faults.recv_timeout(DEADLINE).unwrap();
    assert_eq!(fault.reason, "nothing was received for 0.1 s");
    let error = site.network.join(0).unwrap().receive(tag(1, 1, FrameKind::Combine)).err().unwrap();
    assert!(matches!(error, FabricError::Lost { rank: 1, .. }), "{error}");
    assert_eq!(close(vec![site]), []);
    drop(stream);
}

#[test]
fn an_idle_link_sends_heartbeats() {
    let (own, peer) = (listener(), TcpListener::bind("127.0.0.1:0").unwrap());
    let far = Address { host: "far".into(), tcp: peer.local_addr().unwrap(), unix: "none".into() };
    let formation = formation(vec![own.address(), far], &[0], Transport::Auto);
    // A beat is due after a quarter of it.
    let site = form(&own, Formation { timeout: Duration::from_secs(4), ..formation });
    let end = site.network.join(0).unwrap();
    let waiter = std::thread::spawn(move || end.receive(tag(1, 1, FrameKind::Combine)));
    let (mut stream, _) = peer.accept().unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let hello = handshake::read_hello(&mut stream).unwrap();
    handshake::challenge(&mut stream, &hello, &SECRET).unwrap();
    handshake::welcome(&mut stream).unwrap();
    for _ in 0..2 {
        assert_eq!(wire::read_message(&mut stream).unwrap(), LinkMessage::Beat);
        stream.write_all(&wire::encode_signal(&Signal::Beat)).unwrap();
    }
    drop(stream);
    let error = waiter.join().unwrap().err().unwrap().to_string();
    assert!(error.starts_with("rank 1 is lost: the connection"), "{error}");
    assert_eq!(site.faults.recv_timeout(DEADLINE).unwrap().ranks, [1]);
    assert_eq!(close(vec![site]), []);
}

#[test]
fn heartbeats_are_answered() {
    let (own, other) = (listener(), silent_listener());
    let site = form(&own, formation(vec![own.address(), other.address()], &[0], Transport::Tcp));
    let mut stream = proven(&site);
    stream.write_all(&wire::encode(&LinkMessage::Beat)).unwrap();
    assert_eq!(wire::read_signal(&mut stream).unwrap(), Signal::Beat);
    stream.write_all(&wire::encode(&LinkMessage::Bye)).unwrap();
    let error = site.network.join(0).unwrap().receive(tag(1, 1, FrameKind::Combine)).err().unwrap();
    assert!(matches!(error, FabricError::Lost { rank: 1, .. }), "{error}");
    other.stop();
    assert_eq!(close(vec![site]), [], "to leave is no fault");
}

#[test]
fn a_peer_that_does_not_listen_is_lost() {
    let site = site_with_a_peer_made_by_hand(DEADLINE);
    let reason = lost(site, || {});
    assert!(reason.starts_with("cannot be reached: "), "{reason}");
}

#[test]
fn the_others_continue_when_one_is_lost() {
    let (listeners, third) = ([listener(), listener()], silent_listener());
    let ranks = vec![listeners[0].address(), listeners[1].address(), third.address()];
    let part = |rank: usize| form(&listeners[rank], formation(ranks.clone(), &[rank], Transport::Auto));
    let sites = vec![part(0), part(1)];
    let ends = [sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap()];
    for step in 0..2 {
        ends[0].send(1, tag(step, 0, FrameKind::Combine), vec![Region::new(noise(50_000, step))]).unwrap();
    }
    assert!(ends[1].receive(tag(0, 0, FrameKind::Combine)).unwrap()[0].bytes() == noise(50_000, 0));
    let mut stream = connect(&listeners[0].address());
    shake(&mut stream, &Hello { from: Rank::new(2), ..hello() }, &SECRET).unwrap();
    stream.write_all(&bytes_of(header(tag(1, 2, FrameKind::Combine), 0, 0))).unwrap();
    drop(stream);
    assert_eq!(sites[0].faults.recv_timeout(DEADLINE).unwrap().ranks, [2]);
    // What had come from the lost one can still be taken; what had not ends at once, and so does a send.
    ends[0].receive(tag(1, 2, FrameKind::Combine)).unwrap();
    let error = ends[0].receive(tag(2, 2, FrameKind::Combine)).err().unwrap();
    assert!(matches!(error, FabricError::Lost { rank: 2, .. }), "{error}");
    let error = ends[0].send(2, tag(9, 0, FrameKind::Combine), Vec::new()).err().unwrap();
    assert!(matches!(error, FabricError::Lost { rank: 2, .. }), "{error}");
    assert!(ends[1].receive(tag(1, 0, FrameKind::Combine)).unwrap()[0].bytes() == noise(50_000, 1));
    third.stop();
    assert_eq!(close(sites), []);
}
