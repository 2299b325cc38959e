//! How much is logged of each job that this process hosts ranks of: `log.level` of its recipe. Jobs share the process, so no
//! one level is right for all of it. Knows no logger: line filters query it.

use std::collections::BTreeMap;
use std::sync::Arc;

use contraflow_runtime::recipe::LogLevel;
use contraflow_runtime::topology::JobId;
use parking_lot::RwLock;

/// The level of what is of no job, or of one whose recipe has not been read yet.
const DEFAULT: LogLevel = LogLevel::Info;

/// Levels by job. Clones are the same levels.
#[derive(Clone, Debug, Default)]
pub struct LogLevels {
    by_job: Arc<RwLock<BTreeMap<JobId, LogLevel>>>,
}

impl LogLevels {
    /// The level of a job from now on.
    pub(super) fn set(&self, job: JobId, level: LogLevel) {
        self.change(|by_job| by_job.insert(job, level));
    }

    /// A job has left.
    pub(super) fn forget(&self, job: JobId) {
        self.change(|by_job| by_job.remove(&job));
    }

    /// What is logged of a job, or of what belongs to none.
    pub fn of(&self, job: Option<JobId>) -> LogLevel {
        let by_job = self.by_job.read();
        job.and_then(|job| by_job.get(&job).copied()).unwrap_or(DEFAULT)
    }

    /// The most that is logged of anything.
    pub fn most(&self) -> LogLevel {
        let by_job = self.by_job.read();
        by_job.values().copied().fold(DEFAULT, LogLevel::max)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<JobId, LogLevel>) -> Option<LogLevel>) {
        let before = self.most();
        change(&mut self.by_job.write());
        if self.most() != before {
            // Lines that no filter wanted are not even offered to it until filters are asked again.
            tracing::callsite::rebuild_interest_cache();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_has_its_level_as_long_as_it_is_here() {
        let (levels, job) = (LogLevels::default(), |number| JobId::new(number, 0));
        levels.set(job(1), LogLevel::Error);
        levels.set(job(2), LogLevel::Debug);
        let all =
            |levels: &LogLevels| [Some(job(1)), Some(job(2)), Some(job(3)), None].map(|job| levels.of(job));
        assert_eq!(all(&levels), [LogLevel::Error, LogLevel::Debug, LogLevel::Info, LogLevel::Info]);
        assert_eq!(levels.clone().most(), LogLevel::Debug);
        levels.forget(job(2));
        assert_eq!((levels.of(Some(job(2))), levels.most()), (LogLevel::Info, LogLevel::Info));
    }
}
