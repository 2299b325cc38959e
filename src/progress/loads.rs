//! Tokens per expert of some steps of a run, a line a step: metrics.jsonl would grow by many times with those of all steps.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use contraflow_orchestrator::metrics::record::StepRecord;
use contraflow_proto::LayerLoad;
use contraflow_runtime::files;
use serde::{Deserialize, Serialize};

/// File in the folder of a run.
pub const FILE: &str = "experts.jsonl";

/// About how many lines a run makes.
const LINES: u64 = 256;

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Which step.
    pub step: u64,
    /// Layer by layer.
    pub loads: Vec<LayerLoad>,
}

/// Whether a step of a run of so many is one of those that have a line: evenly spread, the first and the last among them.
pub fn has_line(step: u64, steps: u64) -> bool {
    step == 1 || step == steps || step.is_multiple_of(steps.div_ceil(LINES).max(1))
}

/// Adds a line, if the step has one. What cannot be written is left out, as a line of metrics is.
pub fn write(file: &mut File, record: &StepRecord, steps: u64) {
    if record.loads.is_empty() || !has_line(record.step, steps) {
        return;
    }
    let line = Line { step: record.step, loads: record.loads.clone() };
    if let Ok(text) = serde_json::to_string(&line) {
        let _ = writeln!(file, "{text}");
    }
}

/// All lines of a run; of a step that was made again there are two, of which the later one counts.
pub fn read(run: &Path) -> Vec<Line> {
    let text = files::read_to_string(&run.join(FILE)).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_any_length_has_about_as_many_lines_and_they_read_back() {
        for (steps, lines) in [(5, 5), (256, 256), (720, 241), (1_000_000, 257)] {
            assert_eq!((1..=steps).filter(|&step| has_line(step, steps)).count(), lines, "{steps}");
        }
        let run = tempfile::tempdir().unwrap();
        let mut file = File::create(run.path().join(FILE)).unwrap();
        let loads = vec![LayerLoad { layer: 3, counts: vec![7, 0] }];
        (1..=600).for_each(|step| {
            write(&mut file, &StepRecord { step, loads: loads.clone(), ..StepRecord::default() }, 600)
        });
        write(&mut file, &StepRecord { step: 600, ..StepRecord::default() }, 600);
        let lines = read(run.path());
        assert_eq!((lines.len(), lines.last()), (201, Some(&Line { step: 600, loads })));
    }
}
