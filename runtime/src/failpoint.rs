//! Named places at which a test kills the process or holds a thread: crash tests of the real binary.
//!
//! Without the feature `failpoints`, which only tests turn on, a failpoint is nothing. With it the environment says where
//! to die: `FAILPOINTS="checkpoint.committed=return"`, or `2*off->return` for the third time; `pause` there hangs the thread.
//! Knows no caller.

/// Kills this process with SIGKILL if the environment names this place, or holds the thread.
pub fn failpoint(name: &str) {
    #[cfg(feature = "failpoints")]
    if let Some(()) = fail::eval(name, |_| ()) {
        let own = rustix::process::getpid();
        // Nothing may run after it: no destructor, no flush.
        rustix::process::kill_process(own, rustix::process::Signal::KILL).expect("a process may end itself");
        loop {
            std::thread::park();
        }
    }
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
}

/// Reads the environment, once, at the start of the process.
pub fn set_up() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}
