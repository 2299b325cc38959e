//! The failures of a job as stories, from the lines that the orchestrator has written into the job's log: what was seen first, what was decided,
//! until when. Pure.

use contraflow_orchestrator::core::FLIGHT_LINE;
use contraflow_proto::v1::LogsResponse;
use serde::Serialize;

/// Lines of one story are at most this far apart. **Units**: milliseconds.
const SAME: u64 = 60_000;

/// A line of a story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// **Units**: milliseconds since 1970.
    pub unix_ms: u64,
    /// INFO, WARN and so on.
    pub level: String,
    /// What it says.
    pub message: String,
}

/// A failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Incident {
    /// The first sign.
    pub began_unix_ms: u64,
    /// When the job went on, or had ended; none if it has not.
    pub over_unix_ms: Option<u64>,
    /// The first sign, in words.
    pub sign: String,
    /// All lines, in order.
    pub lines: Vec<Line>,
}

/// Whether a line says that something is wrong.
fn is_bad(line: &LogsResponse) -> bool {
    line.ranks.is_empty() && matches!(line.level.as_str(), "WARN" | "ERROR")
}

/// The incidents in a log, the latest first. A story begins with a warning of the orchestrator's, takes in the lines of the orchestrator that
/// follow, and is over with the one that says that the job trains, or has ended. What the flight recorders of its ranks tell may come later.
pub fn incidents(log: &[LogsResponse]) -> Vec<Incident> {
    let mut found: Vec<Incident> = Vec::new();
    let mut open = false;
    for line in log.iter().filter(|line| line.ranks.is_empty()) {
        let last = found.last().and_then(|incident| incident.lines.last()).map_or(0, |last| last.unix_ms);
        let is_near = line.unix_ms.saturating_sub(last) <= SAME;
        let is_told_late = line.message.starts_with(FLIGHT_LINE) && !found.is_empty() && is_near;
        if is_bad(line) && !is_told_late && !(open && is_near) {
            let sign = line.message.clone();
            found.push(Incident { began_unix_ms: line.unix_ms, over_unix_ms: None, sign, lines: Vec::new() });
            open = true;
        }
        if !open && !is_told_late {
            continue;
        }
        if let Some(incident) = found.last_mut() {
            let LogsResponse { unix_ms, level, message, .. } = line.clone();
            incident.lines.push(Line { unix_ms, level, message });
            if goes_on(&line.message) {
                incident.over_unix_ms = Some(line.unix_ms);
                open = false;
            }
        }
    }
    found.reverse();
    found
}

/// Whether a line of the orchestrator's says that the job has its ranks again, or has come to an end.
fn goes_on(message: &str) -> bool {
    let is_formed = message.starts_with("generation ") && message.contains(" formed");
    is_formed || ["done:", "failed:", "cancelled:"].iter().any(|end| message.starts_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(unix_ms: u64, level: &str, ranks: &[u32], message: &str) -> LogsResponse {
        LogsResponse { unix_ms, level: level.into(), ranks: ranks.into(), message: message.into(), number: 0 }
    }

    #[test]
    fn a_story_goes_from_its_first_sign_to_the_formation_that_goes_on() {
        let log = [
            line(1_000, "INFO", &[], "generation 1: 4 ranks formed"),
            line(5_000, "WARN", &[], "rank 2 is lost: its worker is silent"),
            line(5_100, "WARN", &[2], "a rank's own words"),
            line(5_200, "INFO", &[], "step 7 is complete in memory"),
            line(7_500, "INFO", &[], "generation 2: 4 ranks formed from step 7"),
            line(8_000, "INFO", &[], "note: something else"),
            line(900_000, "ERROR", &[], "failed: the loss is not finite"),
        ];
        let found = incidents(&log);
        assert_eq!(found.len(), 2);
        let [failed, lost] = [&found[0], &found[1]];
        assert_eq!(
            (failed.sign.as_str(), failed.over_unix_ms),
            ("failed: the loss is not finite", Some(900_000))
        );
        assert_eq!((lost.began_unix_ms, lost.over_unix_ms, lost.lines.len()), (5_000, Some(7_500), 3));
        assert!(lost.lines.iter().all(|line| line.message != "a rank's own words"));
    }

    #[test]
    fn warnings_that_are_far_apart_are_two_stories_and_one_that_has_no_end_is_open() {
        let log =
            [line(0, "WARN", &[], "a"), line(10, "WARN", &[], "b"), line(10 + SAME + 1, "WARN", &[], "c")];
        let found = incidents(&log);
        assert_eq!(found.iter().map(|incident| incident.lines.len()).collect::<Vec<_>>(), [1, 2]);
        assert!(found.iter().all(|incident| incident.over_unix_ms.is_none()));
        assert_eq!(incidents(&[]), []);
    }

    #[test]
    fn what_the_recorders_tell_belongs_to_the_story_before_also_when_that_is_over() {
        let told = "the ranks of generation 1: rank 2 had been in forward when it was lost";
        let story = |at| {
            let log = [
                line(5_000, "WARN", &[], "rank 2 lost"),
                line(5_600, "INFO", &[], "generation 2: 4 ranks formed from step 7"),
                line(at, "WARN", &[], told),
                line(at + 1, "INFO", &[], "step 9 is complete"),
            ];
            incidents(&log)
        };
        let found = story(5_700);
        assert_eq!(
            (found.len(), found[0].sign.as_str(), found[0].over_unix_ms),
            (1, "rank 2 lost", Some(5_600))
        );
        assert_eq!(found[0].lines.last().unwrap().message, told);
        // Of whatever it is, it is not of that one.
        assert_eq!(story(5_601 + SAME).len(), 2);
    }
}
