//! The gates' watch: warns once of a layer whose gate leaves experts without tokens.
//!
//! Judges counts of the global batch, step by step. Knows no rank and no bias; a warning changes nothing.

use std::collections::{BTreeMap, BTreeSet};

/// An expert starves in a step in which it gets less than this share of the mean.
const STARVING_SHARE: f64 = 0.01;

/// Experts named in a warning; of the others, only the number.
const NAMED: usize = 8;

/// What is remembered of the steps so far.
#[derive(Clone, Debug, Default)]
pub struct GateWatch {
    /// Per layer and expert: steps in a row in which it starved.
    starved: BTreeMap<u32, Vec<u64>>,
    /// Layers that have been warned of.
    warned: BTreeSet<u32>,
}

impl GateWatch {
    /// Takes note of a layer's tokens per expert in one step, each step once. Warns, once per layer, when an expert has
    /// starved for `starve_steps` steps in a row; never, if that is 0.
    pub fn see(&mut self, layer: u32, counts: &[u64], starve_steps: u64) -> Option<String> {
        let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
        let starved = self.starved.entry(layer).or_insert_with(|| vec![0; counts.len()]);
        for (starved, &count) in starved.iter_mut().zip(counts) {
            *starved = if (count as f64) < STARVING_SHARE * mean { *starved + 1 } else { 0 };
        }
        let collapsed: Vec<usize> =
            (0..counts.len()).filter(|&expert| starved[expert] >= starve_steps && starve_steps > 0).collect();
        if collapsed.is_empty() || !self.warned.insert(layer) {
            return None;
        }
        let names: Vec<String> = collapsed.iter().take(NAMED).map(usize::to_string).collect();
        let more = if collapsed.len() > NAMED { ", ..." } else { "" };
        Some(format!(
            "layer {layer}: its gate collapses: for {starve_steps} steps {} of {} experts ({}{more}) have had less than \
             {}% of an even share of the tokens",
            collapsed.len(),
            counts.len(),
            names.join(", "),
            100.0 * STARVING_SHARE
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(steps: &[[u64; 4]], starve_steps: u64) -> Vec<Option<String>> {
        let mut watch = GateWatch::default();
        steps.iter().map(|counts| watch.see(3, counts, starve_steps)).collect()
    }

    #[test]
    fn a_collapsed_gate_is_reported_once_after_the_configured_steps() {
        let reported = warnings(&[[100, 100, 0, 0]; 5], 3);
        let words = "layer 3: its gate collapses: for 3 steps 2 of 4 experts (2, 3) have had less than 1% of an even \
                     share of the tokens";
        assert_eq!(reported, [None, None, Some(words.to_owned()), None, None]);
    }

    #[test]
    fn a_token_in_time_is_enough() {
        // A hundredth of the mean is 1: two tokens are no starvation, and one token is.
        assert!(
            warnings(&[[198, 200, 0, 2], [198, 200, 2, 0], [198, 200, 0, 2]], 2).iter().all(Option::is_none)
        );
        assert!(warnings(&[[200, 200, 3, 0]; 2], 2)[1].is_some());
        assert!(warnings(&[[200, 196, 2, 2]; 9], 1).iter().all(Option::is_none));
    }

    #[test]
    fn it_can_be_switched_off_and_an_empty_step_gives_no_warning() {
        assert!(warnings(&[[9, 0, 0, 0]; 3], 0).iter().all(Option::is_none));
        assert!(warnings(&[[0, 0, 0, 0]; 3], 1).iter().all(Option::is_none));
    }

    #[test]
    fn layers_are_watched_apart() {
        let mut watch = GateWatch::default();
        assert_eq!(watch.see(1, &[4, 0], 2), None);
        assert_eq!(watch.see(2, &[4, 0], 2), None);
        assert!(watch.see(1, &[4, 0], 2).is_some());
        assert!(watch.see(2, &[4, 0], 2).is_some());
    }
}
