//! The values of a recipe that change during a run, as pure functions of the steps taken and the tokens seen.
//!
//! They give the same bits on every machine: a resumed run continues the very same curve.

use super::Recipe;

impl Recipe {
    /// Learning rate of step `step` (from 0), before which `tokens` tokens have been seen.
    ///
    /// **Source**: report section 4.2, training hyper-parameters. Warm-up goes by steps, all that follows by
    /// tokens.
    pub fn lr_at(&self, step: usize, tokens: u64) -> f64 {
        let lr = &self.lr;
        if step < lr.warmup_steps {
            return lr.peak * (step + 1) as f64 / lr.warmup_steps as f64;
        }
        let into_cosine = tokens.saturating_sub(lr.constant_tokens);
        if into_cosine >= lr.cosine_tokens {
            return if tokens < lr.constant_tokens { lr.peak } else { lr.floor.at(tokens) };
        }
        let floor = lr.floor.at(lr.constant_tokens.saturating_add(lr.cosine_tokens));
        floor + (lr.peak - floor) * half_cosine(into_cosine as f64 / lr.cosine_tokens as f64)
    }

    /// Sequences of a step before which `tokens` tokens have been seen: on a straight line from the start
    /// size to the full one, rounded down to what the layout divides.
    pub fn batch_size_at(&self, tokens: u64) -> usize {
        let training = &self.training;
        if tokens >= training.ramp_tokens {
            return training.global_batch_size;
        }
        let start = training.ramp_start_batch_size;
        let growth = (training.global_batch_size - start) as u128;
        let grown = (growth * u128::from(tokens) / u128::from(training.ramp_tokens)) as usize;
        let unit = self.batch_unit();
        (start + grown) / unit * unit
    }

    /// The sizes of the global batch that the recipe's steps have, in the order in which they first occur. Their number is
    /// bounded by the sizes that the layout divides, however long the recipe is.
    pub fn batch_sizes(&self) -> impl Iterator<Item = usize> + '_ {
        let mut next = Some((0, 0));
        std::iter::from_fn(move || {
            let (step, tokens) = next.take().filter(|&(step, _)| step < self.training.steps as u128)?;
            let size = self.batch_size_at(u64::try_from(tokens).unwrap_or(u64::MAX));
            next = self.tokens_of_larger_batch(size).map(|larger| {
                let per_step = (size * self.training.sequence_length) as u128;
                let steps = larger.saturating_sub(tokens).div_ceil(per_step).max(1);
                (step + steps, tokens + steps * per_step)
            });
            Some(size)
        })
    }

    /// Tokens from which on a batch is larger than `size`; `None` if that is the full one.
    fn tokens_of_larger_batch(&self, size: usize) -> Option<u128> {
        let training = &self.training;
        if size >= training.global_batch_size {
            return None;
        }
        let growth = (training.global_batch_size - training.ramp_start_batch_size) as u128;
        let needed = (size + self.batch_unit()).saturating_sub(training.ramp_start_batch_size) as u128;
        let full = u128::from(training.ramp_tokens);
        Some((needed * full).div_ceil(growth.max(1)).min(full))
    }

    /// Notes on batches that the schedule cannot run and another plan does, each with its reason.
    pub fn fallbacks(&self) -> Vec<String> {
        if self.own_plan.is_some() {
            return Vec::new();
        }
        let reason = |size| self.parallel.schedule.fallback(self.parallel.pipeline, self.micro_batches(size));
        let unfit = self.batch_sizes().filter_map(|size| Some((size, reason(size)?)));
        unfit.map(|(size, reason)| format!("batches of {size} sequences: {reason}")).collect()
    }

    /// Sequences of a round of validation, the least that it can read.
    pub fn validation_unit(&self) -> usize {
        self.training.micro_batch_size * self.topology().dp_size()
    }

    /// Why nothing is validated where the text has so many sequences to validate on; `None` if something is.
    pub fn no_validation(&self, available: usize) -> Option<String> {
        let (wanted, unit) = (self.training.validation_sequences, self.validation_unit());
        let round = format!(
            "a round of {unit} (micro_batch_size {} x expert {} x data {})",
            self.training.micro_batch_size, self.parallel.expert, self.parallel.data
        );
        let length = self.training.sequence_length;
        match () {
            () if wanted == 0 => Some("no validation: training.validation_sequences is 0".into()),
            () if wanted < unit => {
                Some(format!("no validation: training.validation_sequences is {wanted}, less than {round}"))
            }
            () if available < unit => Some(format!(
                "no validation: the text to validate on has {available} sequences of {length} tokens, less than {round}; \
                 data.validation names a text, data.validation_share holds back more"
            )),
            () => None,
        }
    }

    /// Nodes between which all-to-alls of the expert group cross in the first of two hops; 1 where they go in one.
    pub fn expert_nodes(&self) -> usize {
        self.two_hops().unwrap_or(1)
    }

    /// The nodes of the expert group, where all-to-alls go in two hops.
    ///
    /// **Errors**: why they go in one, in words.
    pub fn two_hops(&self) -> Result<usize, String> {
        let (expert, per_node) = (self.parallel.expert, self.parallel.expert_ranks_per_node);
        let groups = self.model_config.n_group;
        let reason = match expert.checked_div(per_node) {
            None | Some(0 | 1) => "its expert ranks share a node".to_owned(),
            _ if per_node == 1 => "each of its expert ranks has a node of its own".to_owned(),
            _ if !expert.is_multiple_of(per_node) => {
                format!("{expert} expert ranks do not fill nodes of {per_node}")
            }
            Some(nodes) if !groups.is_multiple_of(nodes) => {
                format!("{nodes} nodes do not divide the model's {groups} groups of experts")
            }
            Some(nodes) => return Ok(nodes),
        };
        Err(reason)
    }

    /// Whether the state after step `step` (from 1) is kept, for a run that keeps checkpoints.
    pub fn saves_after(&self, step: u64) -> bool {
        let every = self.checkpoint.every;
        let may_be_best = self.checkpoint.keep_best && self.validates_after(step);
        step == self.training.steps as u64
            || (every > 0 && step.is_multiple_of(every))
            || may_be_best
            || self.samples_after(step)
    }

    /// Whether a sample is made of the state after step `step` (from 1) while the run goes on.
    pub fn samples_after(&self, step: u64) -> bool {
        let every = self.sample.every;
        every > 0 && step > 0 && step < self.training.steps as u64 && step.is_multiple_of(every)
    }

    /// Whether the state after step `step` (from 1) is validated while the run goes on.
    pub fn validates_after(&self, step: u64) -> bool {
        let every = self.validate.every;
        every > 0 && step > 0 && step < self.training.steps as u64 && step.is_multiple_of(every)
    }

    /// Change of a gate bias in a step before which `tokens` tokens have been seen.
    pub fn bias_speed_at(&self, tokens: u64) -> f64 {
        self.balance.bias_speed.at(tokens)
    }

    /// Weight of the multi-token-prediction loss in a step before which `tokens` tokens have been seen.
    pub fn mtp_weight_at(&self, tokens: u64) -> f64 {
        self.mtp.weight.at(tokens)
    }
}

/// (1 + cos(pi x)) / 2 for x in [0, 1]: the host's C library may differ in the last bit from another's.
fn half_cosine(x: f64) -> f64 {
    (1.0 + libm::cos(std::f64::consts::PI * x)) / 2.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::recipe::{RecipeSource, StepTable};

    /// The report's pre-training values on the one-rank layout of the small recipe.
    fn report() -> Recipe {
        let entries = [
            "lr.peak=2.2e-4",
            "lr.warmup_steps=2000",
            "lr.constant_tokens=10_000_000_000_000",
            "lr.cosine_tokens=4_300_000_000_000",
            "lr.floor=[{from_tokens=0, value=2.2e-5}, {from_tokens=14_633_000_000_000, value=7.3e-6}]",
            "training.global_batch_size=15360",
            "training.ramp_start_batch_size=3072",
            "training.ramp_tokens=469_000_000_000",
            "balance.bias_speed=[{from_tokens=0, value=0.001}, {from_tokens=14_300_000_000_000, value=0}]",
            "model.config=tiny",
            "mtp.weight=[{from_tokens=0, value=0.3}, {from_tokens=10_000_000_000_000, value=0.1}]",
        ];
        Recipe::load(&RecipeSource::Builtin("small".into()), &entries.map(String::from)).unwrap()
    }

    const TRILLION: u64 = 1_000_000_000_000;

    #[test]
    fn learning_rate_is_the_reports() {
        let recipe = report();
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got:e} {expected:e}");
        close(recipe.lr_at(0, 0), 2.2e-4 / 2000.0);
        close(recipe.lr_at(999, TRILLION), 1.1e-4);
        for (step, tokens) in [(1999, 1), (2000, 1), (5000, 10 * TRILLION - 1), (5000, 10 * TRILLION)] {
            close(recipe.lr_at(step, tokens), 2.2e-4);
        }
        close(recipe.lr_at(9000, 12_150_000_000_000), (2.2e-4 + 2.2e-5) / 2.0);
        let quarter = 2.2e-5 + 1.98e-4 * (1.0 + std::f64::consts::FRAC_PI_4.cos()) / 2.0;
        close(recipe.lr_at(9000, 11_075_000_000_000), quarter);
        close(recipe.lr_at(9000, 14_300_000_000_000 - 1), 2.2e-5);
        for tokens in [14_300_000_000_000, 14_633_000_000_000 - 1] {
            assert_eq!(recipe.lr_at(9000, tokens), 2.2e-5);
        }
        for tokens in [14_633_000_000_000, 14_800_000_000_000, u64::MAX] {
            assert_eq!(recipe.lr_at(9000, tokens), 7.3e-6);
        }
    }

    #[test]
    fn without_a_cosine_the_rate_drops_to_the_floor_or_stays() {
        let load = |entries: &[&str]| {
            let mut all = vec!["lr.cosine_tokens=0".to_string(), "lr.constant_tokens=100".to_string()];
            all.extend(entries.iter().map(|entry| entry.to_string()));
            Recipe::load(&RecipeSource::Builtin("small".into()), &all).unwrap()
        };
        let dropping = load(&["lr.peak=0.5", "lr.floor=0.25"]);
        assert_eq!([99, 100, 101].map(|tokens| dropping.lr_at(50, tokens)), [0.5, 0.25, 0.25]);
        let staying = load(&["lr.peak=0.5", "lr.floor=0.5"]);
        assert_eq!([0, 100, u64::MAX].map(|tokens| staying.lr_at(50, tokens)), [0.5; 3]);
    }

    #[test]
    fn the_batch_grows_from_start_to_full() {
        let recipe = report();
        let at = |tokens| recipe.batch_size_at(tokens);
        assert_eq!(recipe.batch_unit(), 8);
        assert_eq!((at(0), at(469_000_000_000 - 1)), (3072, 15352));
        assert_eq!((at(469_000_000_000), at(u64::MAX)), (15360, 15360));
        assert_eq!(at(469_000_000_000 / 2), (3072 + 15360) / 2);
    }

    #[test]
    fn small_batches_of_a_ramp_fall_back_and_say_so_once_a_size() {
        let entries = [
            "parallel.pipeline=4",
            "parallel.expert=1",
            "training.micro_batch_size=1",
            "training.global_batch_size=12",
            "training.ramp_start_batch_size=4",
            "training.ramp_tokens=40960",
            "training.steps=8388608",
        ];
        let load = |entries: &[&str]| {
            let entries: Vec<String> = entries.iter().map(|entry| entry.to_string()).collect();
            Recipe::load(&RecipeSource::Builtin("tiny".into()), &entries).unwrap()
        };
        let recipe = load(&entries);
        assert_eq!(recipe.batch_sizes().collect::<Vec<_>>(), [4, 6, 8, 10, 12]);
        let note = |size| {
            format!(
                "batches of {size} sequences: dualpipe on 4 pipeline ranks needs at least 8 micro-batches, got {size}; \
                 a plan of the kind of 1f1b runs instead"
            )
        };
        assert_eq!(recipe.fallbacks(), [note(4), note(6)]);
        let short = load(&[&entries[..], &["training.steps=3"]].concat());
        assert_eq!(short.fallbacks(), [note(4)]);
        assert_eq!(report().fallbacks(), [""; 0]);
    }

    #[test]
    fn validations_come_between_the_first_step_and_the_last_and_checkpoints_with_them() {
        let load = |entry: &str| {
            let entries =
                ["training.steps=10", "validate.every=4", "checkpoint.every=0", entry].map(String::from);
            Recipe::load(&RecipeSource::Builtin("tiny".into()), &entries).unwrap()
        };
        let steps = |recipe: &Recipe, is_one: fn(&Recipe, u64) -> bool| {
            (0..=12).filter(|&step| is_one(recipe, step)).collect::<Vec<u64>>()
        };
        let recipe = load("checkpoint.keep_best=true");
        assert_eq!(steps(&recipe, Recipe::validates_after), [4, 8]);
        assert_eq!(steps(&recipe, Recipe::saves_after), [4, 8, 10]);
        assert_eq!(steps(&load("checkpoint.keep_best=false"), Recipe::saves_after), [10]);
        assert_eq!(steps(&load("validate.every=5"), Recipe::validates_after), [5]);
        // A sample is made from a checkpoint, so there is one, beside those of validation.
        let recipe = load("sample.every=3");
        assert_eq!(steps(&recipe, Recipe::samples_after), [3, 6, 9]);
        assert_eq!(steps(&recipe, Recipe::saves_after), [3, 4, 6, 8, 9, 10]);
    }

    #[test]
    fn tokens_take_two_hops_where_nodes_are_full_and_have_whole_groups_of_experts() {
        let hops = |expert: usize, per_node: usize| {
            let entries = [
                format!("parallel.expert={expert}"),
                format!("parallel.expert_ranks_per_node={per_node}"),
                "parallel.data=1".to_owned(),
                "training.global_batch_size=512".to_owned(),
                "training.ramp_start_batch_size=512".to_owned(),
            ];
            let recipe = Recipe::load(&RecipeSource::Builtin("deepseek-v3".into()), &entries).unwrap();
            assert_eq!(recipe.expert_nodes(), recipe.two_hops().unwrap_or(1));
            recipe.two_hops()
        };
        let one = |reason: &str| Err(reason.to_owned());
        assert_eq!(hops(64, 8), Ok(8));
        assert_eq!(hops(16, 8), Ok(2));
        assert_eq!(hops(8, 8), one("its expert ranks share a node"));
        assert_eq!(hops(64, 0), one("its expert ranks share a node"));
        assert_eq!(hops(8, 1), one("each of its expert ranks has a node of its own"));
        assert_eq!(hops(16, 6), one("16 expert ranks do not fill nodes of 6"));
        assert_eq!(hops(64, 4), one("16 nodes do not divide the model's 8 groups of experts"));
    }

    #[test]
    fn validation_that_does_not_take_place_has_a_reason() {
        // A round is of two sequences: one for each expert rank.
        let load = |sequences: usize| {
            let entries = [
                format!("training.validation_sequences={sequences}"),
                "training.micro_batch_size=1".to_owned(),
                "parallel.expert=2".to_owned(),
            ];
            Recipe::load(&RecipeSource::Builtin("tiny".into()), &entries).unwrap()
        };
        let reason = |sequences, available| load(sequences).no_validation(available).unwrap_or_default();
        assert_eq!(reason(64, 2), "");
        assert_eq!(reason(2, usize::MAX), "");
        assert_eq!(reason(0, 100), "no validation: training.validation_sequences is 0");
        let round = "less than a round of 2 (micro_batch_size 1 x expert 2 x data 1)";
        assert_eq!(reason(1, 100), format!("no validation: training.validation_sequences is 1, {round}"));
        assert!(reason(64, 1).starts_with("no validation: the text to validate on has 1 sequences"));
    }

    #[test]
    fn balance_and_mtp_change_where_the_report_says() {
        let recipe = report();
        let edge = 14_300_000_000_000;
        assert_eq!([0, edge - 1, edge].map(|tokens| recipe.bias_speed_at(tokens)), [0.001, 0.001, 0.0]);
        let edge = 10 * TRILLION;
        assert_eq!([0, edge - 1, edge].map(|tokens| recipe.mtp_weight_at(tokens)), [0.3, 0.3, 0.1]);
        assert_eq!(StepTable::constant(0.5).at(u64::MAX), 0.5);
    }

    proptest! {
        #[test]
        fn the_ramp_never_falls_and_keeps_to_the_unit(a in 0..TRILLION / 2, b in 0..TRILLION / 2) {
            let recipe = report();
            let (early, late) = (recipe.batch_size_at(a.min(b)), recipe.batch_size_at(a.max(b)));
            prop_assert!(early <= late && (3072..=15360).contains(&early));
            prop_assert!(early.is_multiple_of(recipe.batch_unit()));
        }

        #[test]
        fn batch_sizes_are_those_of_the_steps(start in 1..8_usize, ramp in 1..60_000_u64, steps in 1..300_usize) {
            let mut recipe = report();
            let training = &mut recipe.training;
            (training.global_batch_size, training.ramp_start_batch_size) = (64, 8 * start);
            (training.ramp_tokens, training.steps) = (ramp, steps);
            let (mut expected, mut tokens) = (Vec::new(), 0);
            for _ in 0..steps {
                let size = recipe.batch_size_at(tokens);
                expected.push(size);
                tokens += (size * recipe.training.sequence_length) as u64;
            }
            expected.dedup();
            prop_assert_eq!(recipe.batch_sizes().collect::<Vec<_>>(), expected);
        }
    }
}
