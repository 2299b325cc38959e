//! Frames arrive as they were sent, whatever carries them and whatever else is on its way.

use std::time::{Duration, Instant};

use contraflow_runtime::fabric::{
    DelayInjection, Endpoint, FabricError, FrameKind, Memory, Phase, Region, Tag, Transport,
};

use crate::lab::{DEADLINE, WIRES, bytes_of, close, noise, sites, sites_with, tag};

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

/// Memory in two parts, as values and their scales are.
struct Halves([Vec<u8>; 2]);

impl Memory for Halves {
    fn part(&self, index: usize) -> Option<&[u8]> {
        self.0.get(index).map(Vec::as_slice)
    }

    fn num_bytes(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }
}

#[test]
fn memory_in_several_parts_arrives_in_one() {
    for wire in WIRES {
        let sites = sites(&[1, 1], wire);
        let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
        for (step, lens) in [[3, 2], [0, 5], [(2 << 20) + 1, 70_001]].into_iter().enumerate() {
            let halves = lens.map(|len| noise(len, len as u64));
            let tag = tag(step as u64, 0, FrameKind::Dispatch);
            a.send(1, tag, vec![Region::new(Halves(halves.clone())), Region::new(vec![9])]).unwrap();
            let came = b.receive(tag).unwrap();
            assert!(came[0].bytes() == halves.concat() && came[1].bytes() == [9], "{wire:?}, {lens:?}");
        }
        drop((a, b));
        assert_eq!(close(sites), []);
    }
}

#[test]
fn the_time_of_connections_counts_for_the_rank_that_sends() {
    for wire in WIRES {
        let sites = sites(&[2, 1], wire);
        let join = |site: usize, rank| sites[site].network.join(rank).unwrap();
        let (a, b, c) = (join(0, 0), join(0, 1), join(1, 2));
        let began = Instant::now();
        // Within the process, and a copy of the state.
        b.send(0, tag(1, 1, FrameKind::Dispatch), vec![Region::new(noise(1 << 20, 1))]).unwrap();
        let copy = Tag { phase: Phase::Replicate, ..tag(1, 0, FrameKind::Dispatch) };
        a.send(2, copy, vec![Region::new(noise(1 << 20, 2))]).unwrap();
        drop(c.receive(copy).unwrap());
        assert_eq!((a.link_time(), b.link_time()), (Duration::ZERO, Duration::ZERO), "{wire:?}");
        a.send(2, tag(2, 0, FrameKind::Dispatch), vec![Region::new(noise(8 << 20, 3))]).unwrap();
        drop(c.receive(tag(2, 0, FrameKind::Dispatch)).unwrap());
        // It may have come before the call that sent it has returned.
        while a.link_time() == Duration::ZERO {
            assert!(began.elapsed() < DEADLINE, "{wire:?}: nothing is counted");
            std::thread::yield_now();
        }
        assert!(a.link_time() <= began.elapsed(), "{wire:?}: {:?}", a.link_time());
        assert_eq!((b.link_time(), c.link_time()), (Duration::ZERO, Duration::ZERO), "{wire:?}");
        drop((a, b, c));
        drop(close(sites));
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
fn frames_between_processes_can_be_held_back() {
    let delay_injection = Some(DelayInjection { seed: 5, max_delay: Duration::from_millis(100) });
    for wire in WIRES {
        let sites = sites_with(&[1, 1], wire, delay_injection);
        let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
        let began = Instant::now();
        for step in 0..20 {
            a.send(1, tag(step, 0, FrameKind::Combine), vec![Region::new(noise(9000, step))]).unwrap();
        }
        for step in 0..20 {
            let parts = b.receive(tag(step, 0, FrameKind::Combine)).unwrap();
            assert!(parts[0].bytes() == noise(9000, step), "{wire:?}, frame {step}");
        }
        // The latest of twenty that are drawn from 0 to 100 ms.
        assert!(began.elapsed() > Duration::from_millis(60), "{wire:?}: {:?}", began.elapsed());
        assert_eq!(close(sites), []);
    }
}

#[test]
fn a_lane_without_a_reader_blocks_no_other() {
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
fn frames_that_are_kept_fill_the_shared_memory_and_the_others_still_come() {
    let sites = sites(&[1, 1], Transport::SharedMemory);
    let (a, b) = (sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap());
    let blocks: Vec<Region> = (0..4).map(|seed| Region::new(noise(8 << 20, seed))).collect();
    let mut kept = Vec::new();
    for step in 0..40 {
        a.send(1, tag(step, 0, FrameKind::Activation), vec![blocks[step as usize % 4].clone()]).unwrap();
        kept.push(b.receive(tag(step, 0, FrameKind::Activation)).unwrap());
    }
    let is_whole = |(step, parts): (usize, &Vec<Region>)| parts[0].bytes() == blocks[step % 4].bytes();
    assert!(kept.iter().enumerate().all(is_whole), "a frame changed while it was kept");
    // They outlive the link that brought them.
    assert_eq!(close(sites), []);
    assert!(kept.iter().enumerate().all(is_whole), "a frame changed after the link ended");
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
