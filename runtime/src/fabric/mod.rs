//! The data plane: tagged frames of memory regions between ranks. Control never goes this way, tensors never any other.
//!
//! Knows ranks and bytes, no tensors and no schedule.
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod activity;
mod arrived;
mod blocks;
mod delays;
mod endpoint;
mod formation;
pub mod handshake;
mod inbox;
mod incoming;
mod links;
mod listener;
mod local;
mod observer;
mod outgoing;
mod prompt;
mod region;
mod segment;
mod shm_memory;
mod stream;
mod tag;
mod unproven;
mod window;
pub mod wire;
mod wired;

pub use activity::{Activity, AtWork, Progress, StorageUse};
pub use arrived::ArrivedPart;
pub use delays::DelayInjection;
pub use endpoint::Endpoint;
pub use formation::{Formation, PeerLost, Transport};
pub use links::{LinkSpeed, Links};
pub use listener::Listener;
pub use local::{LocalNetwork, LocalOptions, SentFrame};
pub use observer::{Observer, Traffic};
pub use prompt::wake_promptly;
pub use region::{Memory, PayloadShape, Region};
pub use stream::Address;
pub use tag::{FrameKind, Phase, Tag};
pub use wired::WiredNetwork;

/// What can go wrong between two ranks.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// The deadline of a wait passed.
    #[error("waited {waited_s:.0} s for {tag}, which never came")]
    Timeout {
        /// What was waited for.
        tag: Tag,
        /// **Units**: seconds.
        waited_s: f64,
    },
    /// The rank gave up.
    #[error("aborted: {reason}")]
    Aborted {
        /// What ended it.
        reason: String,
    },
    /// Two frames with one tag.
    #[error("a second frame came for {tag}")]
    Duplicate {
        /// The tag.
        tag: Tag,
    },
    /// The destination is not on this network.
    #[error("there is no rank {to} on this network")]
    NoSuchRank {
        /// The destination.
        to: usize,
    },
    /// The peer's process is gone.
    #[error("rank {rank} is lost: {reason}")]
    Lost {
        /// The peer.
        rank: usize,
        /// What was seen.
        reason: String,
    },
    /// A formation cannot be joined.
    #[error("{message}")]
    Formation {
        /// What is wrong with it.
        message: String,
    },
    /// A frame does not hold what its tag promises.
    #[error("{tag}: expected {expected}, got {got}")]
    Content {
        /// The tag.
        tag: Tag,
        /// What the receiver needs.
        expected: String,
        /// What was in the frame.
        got: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{FormationId, Generation, JobId};
    use std::time::{Duration, Instant};

    fn tag(step: u64, generation: u32) -> Tag {
        Tag {
            formation: FormationId::new(JobId::new(1, 0), Generation::new(generation)),
            phase: Phase::Train,
            step,
            kind: FrameKind::Activation,
            stage: 0,
            micro_batch: 0,
            layer: 0,
            hop: 0,
            source: 0,
        }
    }

    fn bytes(value: u8) -> Vec<Region> {
        vec![Region::new(vec![value])]
    }

    #[test]
    fn frames_are_handed_over_without_a_copy_whatever_their_order() {
        let network = LocalNetwork::new(LocalOptions::default());
        let (a, b) = (network.join(0), network.join(1));
        let payload = vec![7_u8; 16];
        let address = payload.as_ptr();
        a.send(1, tag(2, 0), bytes(2)).unwrap();
        a.send(1, tag(1, 0), vec![Region::new(payload)]).unwrap();
        let got = b.receive(tag(1, 0)).unwrap().remove(0).downcast::<Vec<u8>>().unwrap();
        assert_eq!(got.as_ptr(), address);
        assert_eq!(b.receive(tag(2, 0)).unwrap()[0].bytes(), [2]);
        a.send(1, Tag { phase: Phase::Replicate, ..tag(1, 0) }, bytes(3)).unwrap();
        assert_eq!(a.sent_bytes(), 17, "a copy of the state is not of the step");
        assert_eq!(b.num_waiting(), 1);
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_names_what_it_waited_for() {
        let options = LocalOptions { timeout: Duration::from_millis(20), ..LocalOptions::default() };
        let endpoint = LocalNetwork::new(options).join(0);
        let error = endpoint.receive(tag(3, 0)).err().unwrap().to_string();
        assert!(error.contains("step 3") && error.contains("Activation"), "{error}");
    }

    #[test]
    fn an_abort_ends_a_wait_at_once() {
        let endpoint = LocalNetwork::new(LocalOptions::default()).join(0);
        let waiter = endpoint.clone();
        let started = Instant::now();
        let thread = std::thread::spawn(move || waiter.receive(tag(1, 0)).err().unwrap().to_string());
        endpoint.abort("rank 3 is gone");
        assert_eq!(thread.join().unwrap(), "aborted: rank 3 is gone");
        assert!(started.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn a_rank_whose_threads_all_wait_for_frames_is_not_working() {
        let endpoint = LocalNetwork::new(LocalOptions::default()).join(0);
        let progress = || endpoint.activity().progress();
        let until = |is_at_work: bool| {
            let began = Instant::now();
            while progress().is_at_work != is_at_work {
                assert!(began.elapsed() < Duration::from_secs(100), "{:?}", progress());
                std::thread::yield_now();
            }
        };
        endpoint.activity().begin_step(4);
        let waiter = endpoint.clone();
        let thread = std::thread::spawn(move || {
            let _at_work = waiter.work();
            waiter.receive(tag(4, 0)).map(drop)
        });
        let computes = endpoint.work();
        assert!(progress().is_at_work, "one waits, one does not");
        drop(computes);
        until(false);
        endpoint.send(0, tag(4, 0), bytes(1)).unwrap();
        thread.join().unwrap().unwrap();
        // The computation, the wait and the work around it.
        let idle = Progress { step: 4, operations: 3, is_at_work: false, uses_storage: false };
        assert_eq!(progress(), idle);
        let storage = endpoint.use_storage();
        assert!(progress().uses_storage && !progress().is_at_work);
        drop(storage);
        assert_eq!(progress(), Progress { operations: 4, ..idle });
    }

    #[test]
    fn frames_of_an_earlier_generation_are_dropped() {
        let network = LocalNetwork::new(LocalOptions::default());
        let endpoint = network.join(0);
        endpoint.send(0, tag(1, 0), bytes(1)).unwrap();
        endpoint.abort("lost");
        endpoint.enter_generation(Generation::new(1));
        endpoint.send(0, tag(2, 0), bytes(2)).unwrap();
        assert_eq!(endpoint.num_waiting(), 0);
        endpoint.send(0, tag(2, 1), bytes(3)).unwrap();
        assert_eq!(endpoint.receive(tag(2, 1)).unwrap()[0].bytes(), [3]);
    }

    #[test]
    fn a_second_frame_under_one_tag_is_an_error() {
        let network = LocalNetwork::new(LocalOptions::default());
        let endpoint = network.join(0);
        endpoint.send(0, tag(1, 0), bytes(1)).unwrap();
        assert!(matches!(endpoint.send(0, tag(1, 0), bytes(1)), Err(FabricError::Duplicate { .. })));
        // It is unknown which of the two was meant: the receiver gets neither, and waits for no other frame either.
        for step in [1, 2] {
            assert!(
                matches!(endpoint.receive(tag(step, 0)), Err(FabricError::Duplicate { tag }) if tag.step == 1)
            );
        }
    }

    #[test]
    fn a_frame_is_not_there_before_its_link_has_carried_it() {
        let links = Links::even(LinkSpeed { bytes_per_s: 1e3, latency: Duration::from_millis(5) });
        let network = LocalNetwork::new(LocalOptions { links: Some(links), ..LocalOptions::default() });
        let (a, b) = (network.join(0), network.join(1));
        let began = Instant::now();
        for step in 0..3 {
            a.send(1, tag(step, 0), vec![Region::new(vec![1_u8; 10])]).unwrap();
        }
        for step in 0..3 {
            b.receive(tag(step, 0)).unwrap();
            let least = Duration::from_millis(10 * (step + 1) + 5);
            assert!(began.elapsed() >= least, "frame {step} after {:?}", began.elapsed());
        }
    }

    #[test]
    fn delayed_frames_all_arrive() {
        let delay_injection = Some(DelayInjection { seed: 5, max_delay: Duration::from_millis(3) });
        let network = LocalNetwork::new(LocalOptions { delay_injection, ..LocalOptions::default() });
        let endpoint = network.join(0);
        for step in 0..50 {
            endpoint.send(0, tag(step, 0), bytes(step as u8)).unwrap();
        }
        for step in 0..50 {
            assert_eq!(endpoint.receive(tag(step, 0)).unwrap()[0].bytes(), [step as u8]);
        }
    }
}
