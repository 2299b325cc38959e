//! A file system that never answers, as a network mount whose server is gone.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cluster::until;
use crate::places::{outcome, resources, with_data};

/// A mount that nobody serves: who touches it waits until it is gone.
struct HungMount {
    at: PathBuf,
    _device: File,
}

impl HungMount {
    /// `None` where this process may not mount.
    fn at(at: &Path) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let data = CString::new(data).unwrap();
        mount("hung", at, "fuse", MountFlags::empty(), data.as_c_str()).ok()?;
        Some(HungMount { at: at.to_owned(), _device: device })
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn data_that_never_comes_fails_its_job_with_the_path_and_costs_a_bounded_number_of_threads() {
    let (cluster, worker) = with_data();
    let Some(_mount) = HungMount::at(&cluster.path().join("data/hung")) else {
        return eprintln!("skipped: this process may not mount");
    };
    let [threads, ..] = resources(&worker);
    let jobs: Vec<String> = (0..3).map(|_| cluster.submit(&["data.paths=[\"hung\"]"], &[])).collect();
    until("the path that hangs", || {
        let said = cluster.run(&["logs", &jobs[0]]).1;
        (said.contains("data/hung") && said.contains("the file system has not answered")).then_some(())
    });
    for job in &jobs {
        until("the end of the job", || {
            let status = cluster.status(job)?;
            drop(cluster.run(&["cancel", job]));
            ["failed", "cancelled"].contains(&status["state"].as_str()?).then_some(())
        });
    }
    let [threads_after, ..] = resources(&worker);
    assert!(threads_after <= threads + 16, "threads: {threads}, then {threads_after}");
    let own = cluster.submit(&["training.steps=2", "data.paths=[\"text.txt\"]"], &[]);
    assert_eq!(outcome(&cluster, &own).0, "done", "other data is read as before");
}
