//! The text form of a plan: a short header and one line of actions per rank, to be read, diffed and written by hand.
//!
//! ```text
//! # Two ranks, both hold both stages.
//! schedule dualpipe
//! stages 2
//! micro-batches 4
//! placement 0: 0 1
//! placement 1: 1 0
//! rank 0: F0.0 F1.2 F0.1 B1.2 F1.3&B0.0 B1.3 I0.1 W0.1
//! rank 1: F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3
//! ```
//!
//! A line that starts with `#` is a comment. A rank's actions may be spread over several lines.

use std::fmt::Write as _;

use super::action::{Action, Chunk, Plan};

/// Far beyond any plan; the check reports each chunk that is missing.
pub const MAX_CHUNKS: usize = 1 << 18;

/// Writes a plan down. A name of several lines is written as one.
pub fn write(plan: &Plan) -> String {
    let name: Vec<&str> = plan.schedule.split_whitespace().collect();
    let mut text = format!("schedule {}\n", name.join(" "));
    // Writing into a string cannot fail.
    let _ = writeln!(text, "stages {}\nmicro-batches {}", plan.stages, plan.micro_batches);
    for (rank, held) in plan.placement.iter().enumerate() {
        let _ = writeln!(text, "placement {rank}: {}", join_words(held));
    }
    for (rank, actions) in plan.actions.iter().enumerate() {
        let _ = writeln!(text, "rank {rank}: {}", join_words(actions));
    }
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn join_words<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

/// Reads a plan. Whether the plan is sound is for `check` to say.
///
/// # Errors
/// Every line that cannot be read, with its number; every header line that is missing.
pub fn parse(text: &str) -> Result<Plan, Vec<String>> {
    let mut reader = PlanReader::default();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            reader.line(index + 1, line);
        }
    }
    reader.finish()
}

#[derive(Default)]
struct PlanReader {
    schedule: Option<String>,
    stages: Option<usize>,
    micro_batches: Option<usize>,
    placement: Vec<Vec<usize>>,
    actions: Vec<Vec<Action>>,
    faults: Vec<String>,
}

impl PlanReader {
    fn line(&mut self, number: usize, line: &str) {
        let (key, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let outcome = match key {
            "schedule" if rest.is_empty() => Err("expected a name after `schedule`".to_string()),
            "schedule" => set(&mut self.schedule, rest.to_string(), key),
            "stages" => count(rest).and_then(|stages| set(&mut self.stages, stages, key)),
            "micro-batches" => count(rest).and_then(|count| set(&mut self.micro_batches, count, key)),
            "placement" => row(rest, &mut self.placement, count),
            "rank" => row(rest, &mut self.actions, action),
            _ => Err(format!(
                "expected a line that begins with schedule, stages, micro-batches, placement or rank, got `{key}`"
            )),
        };
        if let Err(fault) = outcome {
            self.faults.push(format!("line {number}: {fault}"));
        }
    }

    fn finish(mut self) -> Result<Plan, Vec<String>> {
        for (key, missing) in [
            ("schedule", self.schedule.is_none()),
            ("stages", self.stages.is_none()),
            ("micro-batches", self.micro_batches.is_none()),
        ] {
            if missing {
                self.faults.push(format!("expected a line `{key} ...`, got none"));
            }
        }
        if let (Some(stages), Some(micro_batches)) = (self.stages, self.micro_batches)
            && stages.checked_mul(micro_batches).is_none_or(|chunks| chunks > MAX_CHUNKS)
        {
            self.faults.push(format!(
                "expected at most {MAX_CHUNKS} chunks, got {stages} stages of {micro_batches} micro-batches"
            ));
        }
        match (self.schedule, self.stages, self.micro_batches) {
            (Some(schedule), Some(stages), Some(micro_batches)) if self.faults.is_empty() => {
                Ok(Plan { schedule, stages, micro_batches, placement: self.placement, actions: self.actions })
            }
            _ => Err(self.faults),
        }
    }
}

fn set<T>(slot: &mut Option<T>, value: T, key: &str) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{key}` is given twice")),
    }
}

fn count(word: &str) -> Result<usize, String> {
    word.parse().map_err(|_| format!("expected a number, got `{word}`"))
}

/// `3: word word word`, appended to row 3; rows begin in order.
fn row<T>(
    text: &str,
    rows: &mut Vec<Vec<T>>,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<(), String> {
    let (rank, join_words) = text.split_once(':').ok_or("expected `RANK: ...`, got no colon")?;
    let rank = count(rank.trim())?;
    if rank > rows.len() {
        return Err(format!("expected rank {} or an earlier one, got {rank}", rows.len()));
    }
    let items: Vec<T> = join_words.split_whitespace().map(read).collect::<Result<_, _>>()?;
    if rank == rows.len() {
        rows.push(items);
    } else {
        rows[rank].extend(items);
    }
    Ok(())
}

/// An action as [`Action`] writes itself.
pub(super) fn action(word: &str) -> Result<Action, String> {
    let read = || {
        let Some((first, second)) = word.split_once('&') else { return lone(word) };
        Action::pair(lone(first)?, lone(second)?)
    };
    read().ok_or_else(|| {
        format!("expected an action such as F0.3, B1.2, I0.1, W0.1 or F0.4&B3.0, got `{word}`")
    })
}

/// An action that is no pair.
fn lone(word: &str) -> Option<Action> {
    let mut letters = word.chars();
    let make = match letters.next()? {
        'F' => Action::Forward,
        'B' => Action::Backward,
        'I' => Action::BackwardInput,
        'W' => Action::BackwardWeight,
        _ => return None,
    };
    chunk(letters.as_str()).map(make)
}

/// `STAGE.MICRO_BATCH`.
fn chunk(text: &str) -> Option<Chunk> {
    let (stage, micro_batch) = text.split_once('.')?;
    Some(Chunk { stage: stage.parse().ok()?, micro_batch: micro_batch.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Mode, ScheduleKind};

    #[test]
    fn a_plan_reads_as_it_is_written() {
        let (plan, _) = ScheduleKind::Dualpipe.plan(2, 4, Mode::Train).unwrap();
        let expected = "\
schedule dualpipe
stages 2
micro-batches 4
placement 0: 0 1
placement 1: 1 0
rank 0: F0.0 F1.2 F0.1 B1.2 F1.3&B0.0 B1.3 I0.1 W0.1
rank 1: F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3
";
        assert_eq!(write(&plan), expected);
        assert_eq!(parse(expected), Ok(plan.clone()));
        let loose = "# a comment\n\nstages 2\n micro-batches  4\nschedule dualpipe\nplacement 0: 0 1\nplacement 1: 1 0\n\
                     rank 0: F0.0 F1.2 F0.1 B1.2\nrank 1:F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3\n\
                     rank 0: F1.3&B0.0 B1.3 I0.1 W0.1";
        assert_eq!(parse(loose), Ok(plan));
    }

    #[test]
    fn every_pair_reads_as_it_is_written() {
        for word in ["F0.4&B3.0", "F0.1&F2.3", "I1.2&W1.0"] {
            assert_eq!(action(word).map(|action| action.to_string()), Ok(word.to_owned()));
        }
        for word in ["B3.0&F0.4", "B0.1&B0.2", "W1.0&I1.2", "F0.1&", "F0.1&B0.2&B0.3"] {
            assert!(action(word).is_err(), "{word}");
        }
    }

    #[test]
    fn every_bad_line_is_named() {
        let text = "schedule mine\nstages two\nstages 2\nstages 3\nrank 1: F0.0\nrank 0: F0.0 X1.2\nfoo\nrank 0 F0.0";
        let expected = [
            "line 2: expected a number, got `two`",
            "line 4: `stages` is given twice",
            "line 5: expected rank 0 or an earlier one, got 1",
            "line 6: expected an action such as F0.3, B1.2, I0.1, W0.1 or F0.4&B3.0, got `X1.2`",
            "line 7: expected a line that begins with schedule, stages, micro-batches, placement or rank, got `foo`",
            "line 8: expected `RANK: ...`, got no colon",
            "expected a line `micro-batches ...`, got none",
        ];
        assert_eq!(parse(text).unwrap_err(), expected);
        let huge = parse("schedule mine\nstages 2\nmicro-batches 18446744073709551615");
        let expected = "expected at most 262144 chunks, got 2 stages of 18446744073709551615 micro-batches";
        assert_eq!(huge.unwrap_err(), [expected]);
    }
}
