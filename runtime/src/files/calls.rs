//! Which file-system calls of this process are under way, and since when.
//!
//! A call into a file system that hangs (a hard NFS mount whose server is gone) cannot be interrupted: its thread is lost
//! until the mount comes back. So every call is noted with its path; whoever waits for the result can give up and name the
//! path, and a second call on a path that hangs is refused before it costs another thread. Knows paths, no contents.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

thread_local! {
    static TASK: Cell<u64> = const { Cell::new(0) };
}

/// A single call that takes longer than this hangs: each moves a few MiB at most.
pub const STUCK: Duration = Duration::from_secs(30);

static CALLS: Calls = Calls { next: AtomicUsize::new(0), under_way: Mutex::new(Vec::new()) };

#[derive(Debug)]
struct Calls {
    next: AtomicUsize,
    under_way: Mutex<Vec<Noted>>,
}

#[derive(Debug)]
struct Noted {
    number: usize,
    task: u64,
    path: PathBuf,
    since: Instant,
}

/// A call that hangs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StuckCall {
    /// For which task, see [`in_task`].
    pub task: u64,
    /// On which path.
    pub path: PathBuf,
    /// For how long.
    pub waits: Duration,
}

impl std::fmt::Display for StuckCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (path, waits_s) = (self.path.display(), self.waits.as_secs());
        write!(f, "{path}: the file system has not answered for {waits_s} s")
    }
}

/// A call that is under way until this is dropped.
#[derive(Debug)]
pub struct FileCall {
    calls: &'static Calls,
    number: usize,
}

impl Calls {
    fn begin(&'static self, path: &Path, since: Instant) -> io::Result<FileCall> {
        let mut under_way = self.under_way.lock();
        if let Some(earlier) = under_way.iter().find(|noted| noted.path == path && noted.hangs_at(since)) {
            let waits_s = (since - earlier.since).as_secs();
            let message = format!("the file system has not answered an earlier call for {waits_s} s");
            return Err(io::Error::new(io::ErrorKind::TimedOut, message));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        under_way.push(Noted { number, task: TASK.get(), path: path.to_owned(), since });
        Ok(FileCall { calls: self, number })
    }

    fn stuck(&self, now: Instant) -> Vec<StuckCall> {
        let under_way = self.under_way.lock();
        let hanging = under_way.iter().filter(|noted| noted.hangs_at(now));
        hanging
            .map(|Noted { task, path, since, .. }| StuckCall {
                task: *task,
                path: path.clone(),
                waits: now - *since,
            })
            .collect()
    }
}

impl Noted {
    fn hangs_at(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= STUCK
    }
}

impl Drop for FileCall {
    fn drop(&mut self) {
        self.calls.under_way.lock().retain(|noted| noted.number != self.number);
    }
}

/// Notes that a call on a path begins.
///
/// **Errors**: `TimedOut` if an earlier call on this path hangs.
pub fn call(path: &Path) -> io::Result<FileCall> {
    CALLS.begin(path, Instant::now())
}

/// A number for [`in_task`] that no other task of this process has.
pub fn new_task() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs `work`, whose calls are noted as those of this task.
pub fn in_task<T>(task: u64, work: impl FnOnce() -> T) -> T {
    let before = TASK.replace(task);
    let done = work();
    TASK.set(before);
    done
}

/// The calls that hang.
pub fn stuck() -> Vec<StuckCall> {
    CALLS.stuck(Instant::now())
}

/// Results of `work` on each item, in order, on as many threads as there are cores. Threads of its own: one that hangs in a
/// file system is missed by nobody else.
pub fn map_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let (next, task) = (AtomicUsize::new(0), TASK.get());
    let run = || {
        TASK.set(task);
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            match items.get(index) {
                Some(item) => done.push((index, work(item))),
                None => return done,
            }
        }
    };
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results.flat_map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_call_on_a_path_that_hangs_is_refused_and_one_on_another_path_is_not() {
        let calls: &'static Calls =
            Box::leak(Box::new(Calls { next: 0.into(), under_way: Mutex::default() }));
        let begin = Instant::now();
        let (path, other) = (Path::new("/mnt/hangs/a"), Path::new("/mnt/hangs/b"));
        let hanging = calls.begin(path, begin).unwrap();
        assert!(calls.begin(path, begin + STUCK / 2).is_ok(), "a call that takes its time does not hang");
        let late = begin + STUCK + Duration::from_secs(2);
        let refused = calls.begin(path, late).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        assert!(refused.to_string().ends_with("has not answered an earlier call for 32 s"), "{refused}");
        assert!(calls.begin(other, late).is_ok());
        let stuck: Vec<String> = calls.stuck(late).iter().map(ToString::to_string).collect();
        assert_eq!(stuck, ["/mnt/hangs/a: the file system has not answered for 32 s"]);
        drop(hanging);
        assert!(calls.begin(path, late).is_ok(), "it came back");
        assert_eq!(calls.under_way.lock().len(), 0);
    }

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let items: Vec<u64> = (0..100).collect();
        let squares = map_parallel(&items, |&item| {
            std::thread::sleep(Duration::from_micros(item % 7));
            item * item
        });
        assert_eq!(squares, items.iter().map(|item| item * item).collect::<Vec<_>>());
        assert!(map_parallel(&[0_u8; 0], |_| ()).is_empty());
        let tasks = in_task(7, || map_parallel(&items, |_| TASK.get()));
        assert!(tasks.iter().all(|task| *task == 7), "threads belong to the task that they work for");
        assert_eq!(TASK.get(), 0);
    }
}
