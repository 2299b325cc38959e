//! Threads that get what the training leaves of the cores. Knows the system's priorities and nothing else.

/// In the system's count, in which 0 is what a process begins with.
#[cfg(target_os = "linux")]
const LOWEST_PRIORITY: i32 = 19;

/// From now on this thread gets what the training leaves of the cores; there is no way back.
pub fn yield_to_training() {
    // On Linux the priority is the thread's; elsewhere it would be that of the whole process. Without it what the thread does
    // is only less polite.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, LOWEST_PRIORITY);
}
