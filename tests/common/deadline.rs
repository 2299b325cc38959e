//! Children that a test waits for and that end in time, whatever happens. Knows nothing of what they are.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Far beyond what any of them takes, on a machine that builds something else meanwhile.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Starts a child. One that is still there at the deadline is aborted: its readers and waiters continue, and find
/// an end by a signal that no test asks for.
pub fn spawn(command: &mut Command) -> Child {
    let child = command.spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    let what = format!("{command:?}");
    std::thread::spawn(move || {
        let deadline = Timespec::try_from(DEADLINE).unwrap();
        // Readable once it has ended.
        if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&deadline)).unwrap() == 0 {
            eprintln!("aborted, as it had not ended after {DEADLINE:?}: {what}");
            // It may end just now.
            let _has_ended = pidfd_send_signal(&process, Signal::ABORT);
        }
    });
    child
}

/// Runs a child to its end.
pub fn output(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command).wait_with_output().unwrap()
}
