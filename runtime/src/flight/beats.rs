//! A thread that says of some recorders once a second that their process is alive. It may wait for a file system, so that nobody
//! else has to.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use super::Recorders;

/// How often the record says that the process is alive.
const BEAT: Duration = Duration::from_secs(1);

/// How long the end of the record is waited for.
const END: Duration = Duration::from_secs(2);

/// Beats as long as it lives, and once more then.
#[derive(Debug)]
pub struct Beats {
    stop: Sender<()>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Beats {
    /// Of these recorders.
    pub fn of(recorders: Recorders) -> Beats {
        let is_empty = recorders.is_empty();
        let (stop, stopped) = mpsc::channel();
        let (running, ended) = mpsc::channel();
        let beat = move || {
            let _running: Sender<()> = running;
            loop {
                recorders.beat();
                if stopped.recv_timeout(BEAT) != Err(RecvTimeoutError::Timeout) {
                    break recorders.beat();
                }
            }
        };
        // Without a thread the record says of no process that it is alive: it is as good as it can be.
        if !is_empty {
            drop(std::thread::Builder::new().name("flight".into()).spawn(beat));
        }
        Beats { stop, ended }
    }

    /// Waits for the last beat, so that all that was recorded is in the files; for so long as a file system may take at most.
    pub fn end(self) {
        drop(self.stop);
        self.ended.recv_timeout(END).ok();
    }
}
