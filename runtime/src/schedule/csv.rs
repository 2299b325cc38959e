//! The table form of a plan: a line for each rank, an action in each cell, as PyTorch's pipeline schedules are written.
//!
//! ```text
//! 0F0,0F1,,0B0,,0B1
//! ,1F0,1B0,1F1,1B1,
//! ```
//!
//! `2F3` is the forward pass of stage 2 and micro-batch 3; `B` a backward pass, `I` its input and `W` its weight part;
//! `(0F1;3B0)OVERLAP_F_B` a pair. The actions of the text form (`F2.3`, `F0.1&B3.0`) are read too. A rank holds the stages that it has
//! actions of; empty cells are time in which it waits, which a plan has no need to say.

use super::action::{Action, Chunk, Plan};
use super::text::{self, MAX_CHUNKS};

/// Reads a plan, which is called `name`. Whether it is sound is for `check` to say.
///
/// # Errors
/// Every cell that cannot be read, with its line and column.
pub fn parse(name: &str, text: &str) -> Result<Plan, Vec<String>> {
    let mut faults = Vec::new();
    let mut actions: Vec<Vec<Action>> = Vec::new();
    for (line, cells) in text.trim_end().lines().enumerate() {
        let mut row = Vec::new();
        for (column, cell) in cells.split(',').map(|cell| cell.trim().trim_matches('"')).enumerate() {
            match action(cell) {
                _ if cell.is_empty() => {}
                Some(action) => row.push(action),
                None => faults.push(format!(
                    "line {}, column {}: expected an action such as 0F3, 1B2, 0I1, 0W1 or (0F4;3B0)OVERLAP_F_B, got `{cell}`",
                    line + 1,
                    column + 1
                )),
            }
        }
        actions.push(row);
    }
    let chunks = || actions.iter().flatten().flat_map(chunks_of);
    let stages = chunks().map(|chunk| chunk.stage + 1).max().unwrap_or_default();
    let micro_batches = chunks().map(|chunk| chunk.micro_batch + 1).max().unwrap_or_default();
    if stages.checked_mul(micro_batches).is_none_or(|chunks| chunks > MAX_CHUNKS) {
        faults.push(format!(
            "expected at most {MAX_CHUNKS} chunks, got {stages} stages of {micro_batches} micro-batches"
        ));
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let held = |row: &Vec<Action>| {
        let mut held: Vec<usize> = Vec::new();
        for stage in row.iter().flat_map(chunks_of).map(|chunk| chunk.stage) {
            if !held.contains(&stage) {
                held.push(stage);
            }
        }
        held
    };
    let placement = actions.iter().map(held).collect();
    Ok(Plan { schedule: name.to_owned(), stages, micro_batches, placement, actions })
}

fn chunks_of(action: &Action) -> impl Iterator<Item = Chunk> + use<> {
    action.forwards().chain(action.backward_input()).chain(action.backward_weight())
}

fn action(cell: &str) -> Option<Action> {
    let pair = cell.strip_prefix('(').and_then(|cell| cell.strip_suffix(")OVERLAP_F_B"));
    if let Some((first, second)) = pair.and_then(|pair| pair.split_once(';')) {
        return match (single(first.trim())?, single(second.trim())?) {
            (Action::Forward(forward), Action::Backward(backward)) => {
                Some(Action::ForwardBackward { forward, backward })
            }
            _ => None,
        };
    }
    single(cell).or_else(|| text::action(cell).ok())
}

/// `2F3`.
fn single(cell: &str) -> Option<Action> {
    let (stage, rest) = cell.split_at_checked(cell.find(|c: char| !c.is_ascii_digit())?)?;
    let (letter, micro_batch) = rest.split_at_checked(1)?;
    let chunk = Chunk { stage: stage.parse().ok()?, micro_batch: micro_batch.parse().ok()? };
    match letter {
        "F" => Some(Action::Forward(chunk)),
        "B" => Some(Action::Backward(chunk)),
        "I" => Some(Action::BackwardInput(chunk)),
        "W" => Some(Action::BackwardWeight(chunk)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Mode, ScheduleKind, check, lower};

    #[test]
    fn a_table_is_read_with_its_gaps_and_its_pairs() {
        let one_f_one_b = parse("mine", "0F0,0F1,,,0B0,0B1\n,1F0,1B0,1F1,1B1,\n").unwrap();
        let (expected, _) = ScheduleKind::OneFOneB.plan(2, 2, Mode::Train).unwrap();
        assert_eq!(one_f_one_b.placement, expected.placement);
        assert_eq!(one_f_one_b.actions[1], expected.actions[1]);
        check(&one_f_one_b, &lower(&one_f_one_b, None, 1)).unwrap();
        let (dualpipe, _) = ScheduleKind::Dualpipe.plan(2, 4, Mode::Train).unwrap();
        let row = &parse("mine", "0F0,1F2,\"0F1\",1B2,(1F3;0B0)OVERLAP_F_B").unwrap().actions[0];
        let words: Vec<String> = row.iter().map(ToString::to_string).collect();
        assert_eq!(words, ["F0.0", "F1.2", "F0.1", "B1.2", "F1.3&B0.0"]);
        let ours = |list: &Vec<Action>| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let table = dualpipe.actions.iter().map(ours).collect::<Vec<_>>().join("\n");
        let read = parse("dualpipe", &table).unwrap();
        assert_eq!(read.actions, dualpipe.actions);
        // In the order of their first actions.
        assert_eq!(read.placement, [[0, 1], [0, 1]]);
    }

    #[test]
    fn every_bad_cell_is_named() {
        let faults = parse("mine", "0F0,F,0X1\n(0B0;0F1)OVERLAP_F_B,0F").unwrap_err();
        let begins: Vec<&str> = faults.iter().map(|fault| fault.split(": ").next().unwrap()).collect();
        assert_eq!(begins, ["line 1, column 2", "line 1, column 3", "line 2, column 1", "line 2, column 2"]);
        assert!(parse("mine", "999999999F999999999").unwrap_err()[0].contains("at most 262144 chunks"));
        assert_eq!(parse("mine", "").unwrap().actions.len(), 0);
    }
}
