//! What the user sees during a run: one live line on a terminal, plain lines elsewhere, and metrics.jsonl. The figures
//! of a step are those of its record, here and where a job is watched.
//!
//! Everything here goes to stderr or a file; results go to stdout elsewhere.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use contraflow_orchestrator::metrics::record::{StepRecord, mean_max_vio};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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
    /// Tokens and seconds of the latest steps.
    recent: VecDeque<(u64, f64)>,
    last_line: Option<Instant>,
}

impl Progress {
    /// Begins; adds to metrics.jsonl in the run's folder.
    ///
    /// **Errors**: what the system says about the file.
    pub fn new(run_dir: &Path, frame: Frame) -> std::io::Result<Self> {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(frame.steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:20} {pos}/{len}  {msg}") {
            bar.set_style(style);
        }
        let file = File::options().create(true).append(true).open(run_dir.join(METRICS))?;
        Ok(Progress { frame, bar, file, recent: VecDeque::new(), last_line: None })
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
        for warning in &record.warnings {
            self.bar.suspend(|| eprintln!("warning: {warning}"));
        }
        let crowded = if self.frame.oversubscribed { " (oversubscribed)" } else { "" };
        let message = format!("{}  {} left", figures(record, crowded), minutes(self.seconds_left(record)));
        self.bar.set_message(message.clone());
        self.bar.set_position(record.step);
        let now = Instant::now();
        let is_due = self.last_line.is_none_or(|last| now.duration_since(last) >= LINE_EVERY);
        if self.bar.is_hidden() && (is_due || record.step == self.frame.steps) {
            self.last_line = Some(now);
            eprintln!("step {}/{}  {message}", record.step, self.frame.steps);
        }
        if record.step == self.frame.steps {
            self.bar.finish();
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
    let mfu = record.mfu.map_or_else(String::new, |mfu| format!("  MFU {:.0}%", 100.0 * mfu));
    format!(
        "{skipped}loss {:.3}{mtp}  |g| {:.2}  lr {:.1e}  {:.1}k tok/s{mfu}  bubble {:.0}%{crowded}  MaxVio {:.2}",
        record.loss,
        record.grad_norm,
        record.learning_rate,
        record.tokens_per_second / 1e3,
        100.0 * record.bubble_share,
        mean_max_vio(record),
    )
}

/// Seconds as minutes and seconds.
pub fn minutes(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    format!("{}:{:02}", whole / 60, whole % 60)
}
