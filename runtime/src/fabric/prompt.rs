//! What threads that move frames ask of the system's scheduler. Knows no frames and no lanes.
//!
//! Where every core computes, a thread that has been woken waits until the computing one has used up its time slice, a
//! millisecond or more: as long as many an exchange takes. A thread that asks for shorter slices runs at once.
#![allow(unsafe_code)]

/// Slices of a thread that moves frames, the shortest that the system grants. **Units**: ns.
const SLICE_NS: u64 = 100_000;

/// Has the system run the calling thread soon after it has been woken, also where every core computes. How much of the cores it
/// gets stays the same. Linux 6.12 and later do so; earlier ones, and sandboxes that forbid it, change nothing.
pub fn wake_promptly() {
    // The one is asked for together with the other.
    let Ok(nice) = rustix::process::getpriority_process(None) else { return };
    let Ok(size) = u32::try_from(size_of::<libc::sched_attr>()) else { return };
    let attributes = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: libc::SCHED_FLAG_KEEP_POLICY as u64,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the system reads a structure that is as large as it says, and changes nothing but how this thread is scheduled.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the calling thread, as the system tells it: policy, nice and slice.
    fn seen() -> (u32, i32, u64) {
        // SAFETY: all of it are numbers, for which 0 is one.
        let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
        let size = u32::try_from(size_of::<libc::sched_attr>()).unwrap();
        // SAFETY: the system writes no more than the size that it is told.
        let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
        assert_eq!(result, 0);
        (attributes.sched_policy, attributes.sched_nice, attributes.sched_runtime)
    }

    #[test]
    fn only_the_slice_of_the_calling_thread_changes() {
        let before = seen();
        let nicer = (before.1 + 1).min(19);
        std::thread::spawn(move || {
            rustix::process::setpriority_process(None, nicer).unwrap();
            wake_promptly();
            let (policy, nice, slice) = seen();
            assert_eq!((policy, nice), (before.0, nicer));
            // Systems without slices of one's own say 0.
            assert!(slice == SLICE_NS || slice == 0, "{slice}");
        })
        .join()
        .unwrap();
        assert_eq!(seen(), before);
    }
}
