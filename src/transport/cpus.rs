//! The CPUs of this machine: those that the kernel has a queue for, those that this process may
//! use, and which of them have a cache in common.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity};

const FOLDER: &str = "/sys/devices/system/cpu";

/// Whether a quota of CPU time (`cpu.max` of a cgroup) allows this process fewer CPUs at a time than
/// it may run on. Where that cannot be told there is none.
pub fn under_quota() -> bool {
    let here = sched_getaffinity(None).map_or(0, |set| set.count() as usize);
    std::thread::available_parallelism().is_ok_and(|allowed| allowed.get() < here)
}

/// Taken down once, before the serving threads start. CPUs that come or go later change where
/// requests are served, not whether they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// How many the machine may ever have, which is how many queues FUSE over io_uring has
    /// (`num_possible_cpus()`).
    pub possible: usize,
    /// Those that are online and allowed, in order.
    pub usable: Vec<usize>,
    /// For each of [`Cpus::usable`]: all that share its last-level cache.
    cache: Vec<Vec<usize>>,
}

impl Cpus {
    /// Those of this machine, for this process.
    pub fn here() -> io::Result<Cpus> {
        let read = |name: &str| std::fs::read_to_string(format!("{FOLDER}/{name}"));
        let text = read("possible")?;
        let possible = parse_list(text.trim());
        let possible = possible.ok_or_else(|| io::Error::other(format!("not a list: {text}")))?;
        // The kernel leaves those out that are offline.
        let allowed = sched_getaffinity(None)?;
        let is_allowed = |cpu: usize| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu);
        let usable: Vec<_> = possible.iter().copied().filter(|&cpu| is_allowed(cpu)).collect();
        let cache = usable.iter().map(|cpu| {
            // Unified caches come last, in the order of their levels.
            let caches =
                (0..).map_while(|i| read(&format!("cpu{cpu}/cache/index{i}/shared_cpu_list")).ok());
            // Some virtual machines show no caches.
            caches.last().and_then(|list| parse_list(list.trim())).unwrap_or_else(|| usable.clone())
        });
        Ok(Cpus { possible: possible.len(), cache: cache.collect(), usable })
    }

    /// `possible` ones, of which the first `usable` can be used and share one cache.
    #[cfg(test)]
    pub fn simulated(possible: usize, usable: usize) -> Cpus {
        let usable: Vec<_> = (0..usable).collect();
        Cpus { possible, cache: vec![usable.clone(); usable.len()], usable }
    }

    /// The others of [`Cpus::usable`], as indices, that have a cache in common with the one of
    /// index `here`; those that follow it first, so that neighbours have different ones.
    pub fn sharing_cache_with(&self, here: usize) -> impl Iterator<Item = usize> {
        let count = self.usable.len();
        let others = (1..count).map(move |step| (here + step) % count);
        others.filter(move |&there| self.cache[here].contains(&self.usable[there]))
    }
}

/// The numbers of a list such as `0-3,8`.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(parse_list("0"), Some(vec![0]));
        assert_eq!(parse_list("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
        for wrong in ["", "3-1", "a", "0-", "1,,2"] {
            assert_eq!(parse_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn this_machine_has_some() {
        let cpus = Cpus::here().unwrap();
        assert!(!cpus.usable.is_empty() && cpus.usable.len() <= cpus.possible);
        assert!(cpus.sharing_cache_with(0).all(|there| there != 0));
    }

    #[test]
    fn neighbours_share_a_cache() {
        let halves = |cpu: usize| if cpu < 2 { vec![0, 1] } else { vec![2, 3] };
        let cpus = Cpus { possible: 4, usable: vec![0, 1, 3], cache: [0, 1, 3].map(halves).into() };
        assert_eq!(cpus.sharing_cache_with(0).collect::<Vec<_>>(), [1]);
        assert_eq!(cpus.sharing_cache_with(2).count(), 0);
    }
}
