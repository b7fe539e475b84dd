//! How much memory a process can have: what the machine has free, within the limits of its control groups.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that this process can hold, where the system tells: what it has and what is free.
pub fn host_memory() -> Option<usize> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let free = field(&read("/proc/meminfo"), "MemAvailable:")? << 10;
    let held = field(&read("/proc/self/status"), "VmRSS:")? << 10;
    let groups = groups(&read("/proc/self/cgroup"));
    let left = groups.iter().filter_map(left).min();
    Some(left.map_or(free, |left| left.min(free)) + held)
}

/// Largest resident memory of this process so far, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some((field(&status, "VmHWM:")? << 10) as u64)
}

/// A number behind a name in a system file.
fn field(text: &str, name: &str) -> Option<usize> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Where a group's files are, and how they are called in this version.
#[derive(Debug, Clone, PartialEq)]
struct Group {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
    /// Pages of files that can be dropped at any time; they count as used.
    dropped: &'static str,
}

/// The groups of a process and those they are in, from its `/proc/self/cgroup`.
fn groups(text: &str) -> Vec<Group> {
    let mut all = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, limit, usage, dropped) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ")
        } else if controllers.split(',').any(|name| name == "memory") {
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            )
        } else {
            continue;
        };
        let path = Path::new(path.trim_start_matches('/'));
        let dirs = path.ancestors().map(|part| Path::new(root).join(part));
        all.extend(dirs.map(|dir| Group { dir, limit, usage, dropped }));
    }
    all
}

/// What a group may still take; nothing where it has no limit.
fn left(group: &Group) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(group.dir.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
    let (limit, used) = (number(group.limit)?, number(group.usage)?);
    let dropped = field(&read("memory.stat").unwrap_or_default(), group.dropped).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(dropped)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_and_their_parents_are_looked_at() {
        let dirs = |text: &str| groups(text).into_iter().map(|group| group.dir).collect::<Vec<_>>();
        let two = ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup/"].map(PathBuf::from);
        assert_eq!(dirs("0::/a/b\n"), two);
        let one = ["/sys/fs/cgroup/memory/x", "/sys/fs/cgroup/memory/"].map(PathBuf::from);
        assert_eq!(dirs("5:cpu,cpuacct:/x\n4:memory:/x\n"), one);
        assert_eq!(groups("junk"), []);
    }

    #[test]
    fn cached_files_do_not_count_as_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("written");
        let mut group = groups("0::/").remove(0);
        group.dir = dir.path().to_path_buf();
        write("memory.max", "max\n");
        write("memory.current", "900\n");
        write("memory.stat", "anon 100\ninactive_file 300\n");
        assert_eq!(left(&group), None);
        write("memory.max", "1000\n");
        assert_eq!(left(&group), Some(400));
        assert_eq!(field("MemAvailable:    77 kB\n", "MemAvailable:"), Some(77));
    }
}
