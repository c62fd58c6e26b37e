//! Default memory of a worker for experts.

use std::path::Path;

/// Share of the free memory at the start that experts get, in percent.
pub const PART_FOR_EXPERTS: u64 = 80;

/// Bytes for experts: [`PART_FOR_EXPERTS`] percent of what the system, or this process's control group, has free now.
#[must_use]
pub fn memory_for_experts() -> u64 {
    let system = read("/proc/meminfo").and_then(|text| available(&text));
    // Control groups of version 2, then of version 1.
    let limit = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .or_else(|| {
            let base = Path::new("/sys/fs/cgroup/memory");
            let file = |name| number(base.join(name));
            file("memory.limit_in_bytes").zip(file("memory.usage_in_bytes"))
        })
        .map(|(limit, used)| limit.saturating_sub(used));
    let free = system.into_iter().chain(limit).min().unwrap_or(u64::MAX);
    free / 100 * PART_FOR_EXPERTS
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// Reads a file with one number; for a group without a limit it has a word, or a number larger than any memory.
fn number(path: impl AsRef<Path>) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

/// Bytes of `MemAvailable`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_own_words_are_understood() {
        let text = "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available(text), Some(20_480_000 << 10));
        assert_eq!(available("MemTotal: 5 kB"), None);
        assert_eq!(available("MemAvailable: lots"), None);
        assert!(memory_for_experts() > 0);
    }
}
