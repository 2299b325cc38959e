//! What the user sees during a run: one live line on a terminal, plain lines elsewhere, and metrics.jsonl. The figures
//! of a step are those of its record, here and where a job is watched.
//!
//! Everything here goes to stderr or a file; results go to stdout elsewhere.

pub mod loads;
pub mod samples;
pub mod tensorboard;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::samples::{Sample, Samples};
use self::tensorboard::EventFile;
use crate::output::{escaped, say};
use crate::run_dir::METRICS;

/// Without a terminal a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Steps over which the rate for the remaining time is averaged.
const WINDOW_STEPS: usize = 20;

/// Figures the line needs and the records do not hold.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Steps of the whole run.
    pub steps: u64,
    /// Training FLOPs per token.
    pub flops_per_token: f64,
    /// Measured peak of the cores in use, FLOP/s.
    pub peak_flops: f64,
    /// More ranks than cores: the bubble includes time in which a sender had no core.
    pub oversubscribed: bool,
}

/// Receives every step of a run.
pub struct Progress {
    frame: Frame,
    bar: ProgressBar,
    file: File,
    /// See [`loads`].
    loads: File,
    /// See [`tensorboard`].
    events: Option<EventFile>,
    /// Tokens and seconds of the latest steps.
    recent: VecDeque<(u64, f64)>,
    last_line: Option<Instant>,
    /// What is done once the last step is made.
    afterwards: String,
    samples: Option<Samples>,
}

impl Progress {
    /// Begins; adds to metrics.jsonl in the run's folder. Says `afterwards` after the last step: what follows takes its time.
    ///
    /// **Errors**: what the system says about the file.
    pub fn new(
        run_dir: &Path,
        frame: Frame,
        afterwards: String,
        samples: Option<Samples>,
        events: Option<EventFile>,
    ) -> std::io::Result<Self> {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(frame.steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:20} {pos}/{len}  {msg}") {
            bar.set_style(style);
        }
        let append = |name| File::options().create(true).append(true).open(run_dir.join(name));
        let (file, loads) = (append(METRICS)?, append(loads::FILE)?);
        Ok(Progress {
            frame,
            bar,
            file,
            loads,
            events,
            recent: VecDeque::new(),
            last_line: None,
            afterwards,
            samples,
        })
    }

    /// Takes note of a step.
    pub fn step(&mut self, record: &StepRecord) {
        self.recent.push_back((record.tokens, record.seconds));
        if self.recent.len() > WINDOW_STEPS {
            self.recent.pop_front();
        }
        if let Ok(line) = serde_json::to_string(record) {
            // A full disk does not stop training; the summary at the end says what could not be written.
            let _ = writeln!(self.file, "{line}");
        }
        if let Some(events) = &mut self.events {
            let _ = serde_json::to_value(record).map(|line| events.step(&line));
        }
        loads::write(&mut self.loads, record, self.frame.steps);
        for warning in &record.warnings {
            self.bar.suspend(|| say(format_args!("warning: {warning}")));
        }
        let crowded = if self.frame.oversubscribed { " (oversubscribed)" } else { "" };
        let message = format!("{}  {} left", figures(record, crowded), hms(self.seconds_left(record)));
        self.bar.set_message(message.clone());
        self.bar.set_position(record.step);
        let now = Instant::now();
        let is_due = self.last_line.is_none_or(|last| now.duration_since(last) >= LINE_EVERY);
        match self.samples.as_mut().and_then(|samples| samples.after(record.step)) {
            Some(Ok(Sample { step, text })) => self.bar.suspend(|| {
                let lines: String = escaped(&text).lines().map(|line| format!("\n  | {line}")).collect();
                say(format_args!("a sample after step {step}:{lines}"));
            }),
            Some(Err(why)) => self.bar.suspend(|| say(format_args!("warning: {why}"))),
            None => {}
        }
        let is_last = record.step == self.frame.steps || record.ends_early;
        if is_last {
            self.bar.finish_and_clear();
        }
        if is_last || (self.bar.is_hidden() && (is_due || record.validation_loss.is_some())) {
            self.last_line = Some(now);
            say(format_args!("step {}/{}  {message}", record.step, self.frame.steps));
        }
        if is_last && !self.afterwards.is_empty() {
            say(&self.afterwards);
        }
    }

    fn seconds_left(&self, record: &StepRecord) -> f64 {
        let tokens: u64 = self.recent.iter().map(|(tokens, _)| tokens).sum();
        let seconds: f64 = self.recent.iter().map(|(_, seconds)| seconds).sum();
        let left = self.frame.steps.saturating_sub(record.step) * record.tokens;
        left as f64 * seconds / tokens.max(1) as f64
    }
}

/// What a step was like, in one line; `crowded` follows the bubble.
pub fn figures(record: &StepRecord, crowded: &str) -> String {
    let skipped = if record.skipped { "skipped  " } else { "" };
    let mtp = record.mtp_loss.map_or_else(String::new, |loss| format!("  mtp {loss:.3}"));
    let validation =
        record.validation_loss.map_or_else(String::new, |loss| format!("  validation {loss:.3}"));
    let mfu = record.mfu.map_or_else(String::new, |mfu| format!("  MFU {:.0}%", 100.0 * mfu));
    format!(
        "{skipped}loss {:.3}{mtp}{validation}  |g| {:.2}  lr {:.1e}  {}{mfu}  bubble {:.0}%{crowded}  MaxVio {:.2}",
        record.loss,
        record.grad_norm,
        record.learning_rate,
        rate(record.tokens_per_second),
        100.0 * record.bubble_share,
        mean_max_vio(record),
    )
}

/// Tokens per second, with two or more digits that count: `12.3k tok/s`, `48 tok/s`, `0.7 tok/s`.
pub fn rate(tokens_per_second: f64) -> String {
    match tokens_per_second {
        1e3.. => format!("{:.1}k tok/s", tokens_per_second / 1e3),
        10.0.. => format!("{tokens_per_second:.0} tok/s"),
        _ => format!("{tokens_per_second:.1} tok/s"),
    }
}

/// A line of progress at most every few seconds, where no bar shows it.
pub struct Lines {
    began: Instant,
    last: Option<Instant>,
    is_hidden: bool,
}

impl Lines {
    /// From now on; none where stderr is a terminal, which has the bar.
    pub fn new() -> Self {
        Lines { began: Instant::now(), last: None, is_hidden: std::io::stderr().is_terminal() }
    }

    /// Says how far `what` is, with `figure` and the time that is left, if a line is due.
    pub fn show(&mut self, what: &str, (done, all): (u64, u64), figure: &str) {
        let now = Instant::now();
        let since = now.duration_since(self.last.unwrap_or(self.began));
        if self.is_hidden || since < LINE_EVERY || done == 0 {
            return;
        }
        self.last = Some(now);
        let left = self.began.elapsed().as_secs_f64() * (all - done) as f64 / done as f64;
        say(format_args!("{what} {done}/{all}  {figure}  {} left", hms(left)));
    }
}

impl Default for Lines {
    fn default() -> Self {
        Lines::new()
    }
}

/// Seconds as minutes and seconds, with hours and days where there are some: `3:20`, `2:05:30`, `1d 02:05:30`.
pub fn hms(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    let (hours, minutes, seconds) = (whole / 3_600, whole / 60 % 60, whole % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        1..24 => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{}d {:02}:{minutes:02}:{seconds:02}", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_the_parts_that_it_needs() {
        for (seconds, words) in [
            (0.4, "0:00"),
            (59.6, "1:00"),
            (3_599.0, "59:59"),
            (7_530.0, "2:05:30"),
            (93_930.0, "1d 02:05:30"),
        ] {
            assert_eq!(hms(seconds), words);
        }
    }

    #[test]
    fn a_rate_has_digits_that_count_however_slow_it_is() {
        let cases =
            [(12_345.0, "12.3k tok/s"), (1_000.0, "1.0k tok/s"), (48.3, "48 tok/s"), (0.69, "0.7 tok/s")];
        for (tokens_per_second, words) in cases {
            assert_eq!(rate(tokens_per_second), words);
        }
    }

    #[test]
    fn a_step_that_was_validated_shows_it() {
        let record = StepRecord {
            loss: 2.0,
            validation_loss: Some(2.25),
            tokens_per_second: 5.0,
            ..StepRecord::default()
        };
        assert_eq!(
            figures(&record, ""),
            "loss 2.000  validation 2.250  |g| 0.00  lr 0.0e0  5.0 tok/s  bubble 0%  MaxVio 0.00"
        );
    }
}
