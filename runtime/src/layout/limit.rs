//! How much memory this process may use: the least of what its cgroup, its limit of address space and the machine have for it. And how
//! much it uses.
//!
//! Knows no job. What ranks need is in [`super::memory`].

use std::fmt;
use std::path::{Path, PathBuf};

/// What sets the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitedBy {
    /// `RLIMIT_AS`, as by `ulimit -v`.
    AddressSpace,
    /// A control group: a container, a service.
    Cgroup,
    /// What the machine has.
    Machine,
}

/// The least of all limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// **Units**: bytes.
    pub bytes: u64,
    /// What sets it.
    pub by: LimitedBy,
}

impl fmt::Display for LimitedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LimitedBy::AddressSpace => "RLIMIT_AS",
            LimitedBy::Cgroup => "its cgroup",
            LimitedBy::Machine => "the machine's memory",
        })
    }
}

impl MemoryLimit {
    /// Of this process; nothing where the system does not say.
    pub fn of_process() -> Option<Self> {
        let address_space = rustix::process::getrlimit(rustix::process::Resource::As).current;
        Self::least(Path::new("/"), address_space)
    }

    /// The least of an address space and of what the files below `root` say, which stands for the system's own.
    fn least(root: &Path, address_space: Option<u64>) -> Option<Self> {
        let limits = [
            (address_space, LimitedBy::AddressSpace),
            (of_cgroups(root), LimitedBy::Cgroup),
            (of_machine(root), LimitedBy::Machine),
        ];
        let limits = limits.into_iter().filter_map(|(bytes, by)| Some(MemoryLimit { bytes: bytes?, by }));
        limits.min_by_key(|limit| limit.bytes)
    }
}

/// What this process has in memory, where the system says so. **Units**: bytes.
pub fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// **Units**: bytes.
fn of_machine(root: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least of the limits of the process's control group and of all groups around it, of either version of the interface.
fn of_cgroups(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let files = groups.lines().filter_map(|line| limit_files(root, line)).flatten();
    // What a group does not limit is `max`, and the file of a group outside the container is not there.
    let limits = files.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.min()
}

/// The files that may hold a limit of the group that a line `number:controllers:path` names; nothing if it has no memory's.
fn limit_files(root: &Path, line: &str) -> Option<Vec<PathBuf>> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let mounted = root.join("sys/fs/cgroup");
    let (mounted, file) = match controllers {
        "" => (mounted, "memory.max"),
        some if some.split(',').any(|controller| controller == "memory") => {
            (mounted.join("memory"), "memory.limit_in_bytes")
        }
        _ => return None,
    };
    let path = Path::new(path.trim_start_matches('/'));
    Some(path.ancestors().map(|group| mounted.join(group).join(file)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MACHINE: (&str, &str) = ("proc/meminfo", "MemTotal:       16000000 kB\nMemFree:         1000 kB\n");

    fn limit(files: &[(&str, &str)], address_space: Option<u64>) -> Option<(u64, LimitedBy)> {
        MemoryLimit::least(system(files).path(), address_space).map(|limit| (limit.bytes, limit.by))
    }

    #[test]
    fn the_least_of_all_limits_counts() {
        assert_eq!(limit(&[], None), None);
        assert_eq!(limit(&[], Some(7)), Some((7, LimitedBy::AddressSpace)));
        assert_eq!(limit(&[MACHINE], None), Some((16_384_000_000, LimitedBy::Machine)));
        assert_eq!(limit(&[MACHINE], Some(2_200_000_000)), Some((2_200_000_000, LimitedBy::AddressSpace)));
        assert_eq!(limit(&[MACHINE], Some(u64::MAX)), Some((16_384_000_000, LimitedBy::Machine)));
    }

    #[test]
    fn a_control_group_is_limited_by_those_around_it() {
        let group = ("proc/self/cgroup", "0::/pods/worker\n");
        let around = ("sys/fs/cgroup/pods/memory.max", "3000000000\n");
        let own = ("sys/fs/cgroup/pods/worker/memory.max", "max\n");
        assert_eq!(limit(&[MACHINE, group, around, own], None), Some((3_000_000_000, LimitedBy::Cgroup)));
        let own = ("sys/fs/cgroup/pods/worker/memory.max", "1000000000\n");
        assert_eq!(limit(&[MACHINE, group, around, own], None), Some((1_000_000_000, LimitedBy::Cgroup)));
        assert_eq!(limit(&[MACHINE, group], None), Some((16_384_000_000, LimitedBy::Machine)));
    }

    #[test]
    fn the_first_version_of_control_groups_has_its_files_elsewhere() {
        let group = ("proc/self/cgroup", "5:cpu,cpuacct:/other\n4:hugetlb,memory:/docker/abc\n");
        let inside = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000\n");
        assert_eq!(limit(&[MACHINE, group, inside], None), Some((2_000_000_000, LimitedBy::Cgroup)));
        let unlimited = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit(&[MACHINE, group, unlimited], None), Some((16_384_000_000, LimitedBy::Machine)));
    }

    #[test]
    fn this_process_has_a_limit() {
        assert!(MemoryLimit::of_process().unwrap().bytes > 1 << 20);
    }
}
