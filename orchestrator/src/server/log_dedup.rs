//! Identical lines of many ranks become one: "x8 ranks". Pure: the time comes in with the lines.

use std::collections::BTreeMap;

use contraflow_runtime::topology::JobId;

use super::hub::LogRecord;

/// How long a line waits for its like.
const DEDUP_MS: u64 = 500;

/// Lines that wait.
#[derive(Debug, Default)]
pub struct LogDedup {
    /// By job, level and message: when the first came.
    waiting: BTreeMap<(JobId, String, String), (u64, LogRecord)>,
}

impl LogDedup {
    /// Takes a rank's line in.
    pub fn take(&mut self, job: JobId, line: LogRecord, now_ms: u64) {
        let key = (job, line.level.clone(), line.message.clone());
        let (_, merged) = self
            .waiting
            .entry(key)
            .or_insert_with(|| (now_ms, LogRecord { ranks: Vec::new(), ..line.clone() }));
        merged.unix_ms = merged.unix_ms.min(line.unix_ms);
        merged.ranks.extend(line.ranks);
        merged.ranks.sort_unstable();
        merged.ranks.dedup();
    }

    /// Lines that have waited long enough, in order of time.
    pub fn due(&mut self, now_ms: u64) -> Vec<(JobId, LogRecord)> {
        let due: Vec<_> = self
            .waiting
            .iter()
            .filter(|(_, (since, _))| since + DEDUP_MS <= now_ms)
            .map(|(key, _)| key.clone())
            .collect();
        let taken = due.into_iter().filter_map(|key| Some((key.0, self.waiting.remove(&key)?.1)));
        let mut lines: Vec<_> = taken.collect();
        lines.sort_by_key(|(job, line)| (line.unix_ms, *job));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(rank: u32, unix_ms: u64, message: &str) -> LogRecord {
        LogRecord { unix_ms, level: "INFO".into(), ranks: vec![rank], message: message.into() }
    }

    #[test]
    fn identical_lines_of_many_ranks_become_one() {
        let (mut folding, job) = (LogDedup::default(), |number| JobId::new(number, 0));
        (0..8).rev().for_each(|rank| folding.take(job(1), line(rank, 100 + u64::from(rank), "ready"), 100));
        folding.take(job(1), line(3, 90, "another"), 100);
        folding.take(job(2), line(0, 95, "ready"), 100);
        assert!(folding.due(100 + DEDUP_MS - 1).is_empty());
        let lines = folding.due(100 + DEDUP_MS);
        let reported: Vec<_> = lines.iter().map(|(of, line)| (*of, line.unix_ms, line.ranks.len())).collect();
        assert_eq!(reported, [(job(1), 90, 1), (job(2), 95, 1), (job(1), 100, 8)]);
        assert_eq!(lines[2].1.ranks, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(folding.due(u64::MAX).is_empty());
    }
}
