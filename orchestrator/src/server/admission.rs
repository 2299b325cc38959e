//! How many jobs may be open at once, in line or running: in total, of one user, and by what their recipes take. Pure.

use std::collections::BTreeMap;

use contraflow_runtime::topology::JobId;

use crate::core::facts::JobSpec;
use crate::core::jobs::Jobs;

/// Open jobs of all users.
pub const MAX_OPEN: usize = 10_000;

/// Open jobs of one user, where users have tokens.
pub const MAX_OPEN_OF_USER: usize = 1_000;

/// What the recipes of all open jobs take. **Units**: bytes.
pub const MAX_OPEN_BYTES: u64 = 256 << 20;

/// The open jobs.
#[derive(Debug, Default)]
pub(super) struct Admission {
    /// By job, whose it is and what its recipe takes.
    open: BTreeMap<JobId, (String, u64)>,
    by_user: BTreeMap<String, usize>,
    bytes: u64,
}

impl Admission {
    /// Those of a state.
    pub(super) fn of(jobs: &Jobs) -> Self {
        let mut admission = Admission::default();
        let open = jobs.all.iter().filter(|(_, record)| !record.has_ended());
        open.for_each(|(&job, record)| admission.opened(job, &record.spec));
        admission
    }

    /// Whether one more may come.
    ///
    /// **Errors**: what is used up, and what to do.
    pub(super) fn admit(&self, spec: &JobSpec) -> Result<(), String> {
        let of_user = self.by_user.get(&spec.user).copied().unwrap_or_default();
        let what_to_do = "cancel some or wait until some have ended";
        if self.open.len() >= MAX_OPEN {
            return Err(format!(
                "jobs: expected at most {MAX_OPEN} that have not ended, got one more; {what_to_do}"
            ));
        }
        if !spec.user.is_empty() && of_user >= MAX_OPEN_OF_USER {
            return Err(format!(
                "jobs: expected at most {MAX_OPEN_OF_USER} of {} that have not ended, got one more; {what_to_do}",
                spec.user
            ));
        }
        if self.bytes + spec.bytes() > MAX_OPEN_BYTES {
            return Err(format!(
                "jobs: expected recipes of at most {MAX_OPEN_BYTES} bytes in all jobs that have not ended, got more; \
                 {what_to_do}"
            ));
        }
        Ok(())
    }

    /// A job is in line.
    pub(super) fn opened(&mut self, job: JobId, spec: &JobSpec) {
        let bytes = spec.bytes();
        if self.open.insert(job, (spec.user.clone(), bytes)).is_none() {
            self.bytes += bytes;
            *self.by_user.entry(spec.user.clone()).or_default() += 1;
        }
    }

    /// A job has ended.
    pub(super) fn ended(&mut self, job: JobId) {
        let Some((user, bytes)) = self.open.remove(&job) else { return };
        self.bytes -= bytes;
        if let Some(count) = self.by_user.get_mut(&user) {
            *count -= 1;
            if *count == 0 {
                self.by_user.remove(&user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use contraflow_runtime::recipe::{Recipe, RecipeSource};

    use super::*;

    fn spec(user: &str) -> JobSpec {
        let recipe = Recipe::load(&RecipeSource::Builtin("tiny".into()), &[]).unwrap();
        JobSpec {
            name: "job".into(),
            priority: 0,
            min_ranks: 1,
            max_ranks: 0,
            key: String::new(),
            user: user.into(),
            recipe: Arc::new(recipe),
            rank_bytes: 0,
            traceparent: String::new(),
            origin: None,
        }
    }

    fn open(admission: &mut Admission, spec: &JobSpec, from: usize, count: usize) {
        for number in from..from + count {
            assert_eq!(admission.admit(spec), Ok(()), "job {number}");
            admission.opened(JobId::new(number as u64, 0), spec);
        }
    }

    #[test]
    fn one_user_has_a_share_and_all_together_have_a_bound() {
        let (mut admission, ann) = (Admission::default(), spec("ann"));
        open(&mut admission, &ann, 0, MAX_OPEN_OF_USER);
        let refused = admission.admit(&ann).unwrap_err();
        let words = "jobs: expected at most 1000 of ann that have not ended, got one more; cancel some";
        assert!(refused.starts_with(words), "{refused}");
        // Without tokens nobody is known: only the total counts.
        open(&mut admission, &spec(""), MAX_OPEN_OF_USER, MAX_OPEN - MAX_OPEN_OF_USER);
        assert!(admission.admit(&spec("bob")).unwrap_err().starts_with("jobs: expected at most 10000 that"));
        admission.ended(JobId::new(7, 0));
        admission.ended(JobId::new(7, 0));
        open(&mut admission, &ann, 7, 1);
        assert!(admission.admit(&ann).is_err());
        (0..MAX_OPEN).for_each(|number| admission.ended(JobId::new(number as u64, 0)));
        assert_eq!((admission.bytes, admission.by_user.len()), (0, 0));
    }

    #[test]
    fn large_recipes_use_up_the_bytes() {
        let (mut admission, mut large) = (Admission::default(), spec(""));
        Arc::make_mut(&mut large.recipe).data.paths = vec!["p".repeat(4_000); 128];
        assert!(large.bytes() > 512_000);
        let fit = usize::try_from(MAX_OPEN_BYTES / large.bytes()).unwrap();
        open(&mut admission, &large, 0, fit);
        assert!(
            admission
                .admit(&large)
                .unwrap_err()
                .starts_with("jobs: expected recipes of at most 268435456 bytes")
        );
        assert_eq!(admission.admit(&spec("")), Ok(()), "a small one still fits");
    }
}
