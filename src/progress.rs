//! What the user sees while a run goes on: one live line on a terminal, plain lines elsewhere, and metrics.jsonl.
//!
//! Everything here goes to stderr or a file; results go to stdout elsewhere.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use contraflow_orchestrator::metrics::StepSummary;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::run_dir::METRICS;

/// Without a terminal a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How a rate is measured: over the latest steps.
const WINDOW_STEPS: usize = 20;

/// Figures the line needs and the summaries do not hold.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Steps of the whole run.
    pub steps: u64,
    /// Training FLOPs per token.
    pub flops_per_token: f64,
    /// Measured peak of the cores in use, FLOP/s.
    pub peak_flops: f64,
    /// More ranks than cores: the bubble holds time in which other ranks used the core.
    pub oversubscribed: bool,
}

/// Hears every step of a run.
pub struct Progress {
    frame: Frame,
    bar: ProgressBar,
    file: File,
    /// When the latest steps ended, and their tokens.
    recent: std::collections::VecDeque<(Instant, u64)>,
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
        let recent = [(Instant::now(), 0)].into();
        Ok(Progress { frame, bar, file, recent, last_line: None })
    }

    /// Takes note of a step.
    pub fn step(&mut self, summary: &StepSummary) {
        let now = Instant::now();
        self.recent.push_back((now, summary.tokens));
        if self.recent.len() > WINDOW_STEPS + 1 {
            self.recent.pop_front();
        }
        let rate = self.tokens_per_second();
        if let Ok(mut line) = serde_json::to_value(summary) {
            line["tokens_per_second"] = rate.into();
            line["mfu"] = self.mfu(rate).into();
            // A full disk does not stop training; the summary at the end says what could not be written.
            let _ = writeln!(self.file, "{line}");
        }
        for warning in &summary.warnings {
            self.bar.suspend(|| eprintln!("warning: {warning}"));
        }
        let message = self.line(summary, rate);
        self.bar.set_message(message.clone());
        self.bar.set_position(summary.step);
        let is_due = self.last_line.is_none_or(|last| now.duration_since(last) >= LINE_EVERY);
        if self.bar.is_hidden() && (is_due || summary.step == self.frame.steps) {
            self.last_line = Some(now);
            eprintln!("step {}/{}  {message}", summary.step, self.frame.steps);
        }
        if summary.step == self.frame.steps {
            self.bar.finish();
        }
    }

    fn tokens_per_second(&self) -> f64 {
        let (Some((first, _)), Some((last, _))) = (self.recent.front(), self.recent.back()) else {
            return 0.0;
        };
        let tokens: u64 = self.recent.iter().skip(1).map(|(_, tokens)| tokens).sum();
        tokens as f64 / last.duration_since(*first).as_secs_f64().max(1e-9)
    }

    fn mfu(&self, rate: f64) -> f64 {
        rate * self.frame.flops_per_token / self.frame.peak_flops
    }

    fn line(&self, summary: &StepSummary, rate: f64) -> String {
        let mtp = summary.mtp_loss.map_or_else(String::new, |loss| format!("  mtp {loss:.3}"));
        let skipped = if summary.skipped { "skipped  " } else { "" };
        let crowded = if self.frame.oversubscribed { " (oversubscribed)" } else { "" };
        let left = (self.frame.steps - summary.step) as f64 * summary.tokens as f64 / rate.max(1e-9);
        format!(
            "{skipped}loss {:.3}{mtp}  |g| {:.2}  lr {:.1e}  {:.1}k tok/s  MFU {:.0}%  bubble {:.0}%{crowded}  MaxVio {:.2}  {} left",
            summary.loss,
            summary.grad_norm,
            summary.learning_rate,
            rate / 1e3,
            100.0 * self.mfu(rate),
            100.0 * summary.bubble_share,
            summary.mean_max_vio(),
            minutes(left)
        )
    }
}

/// Seconds as minutes and seconds.
pub fn minutes(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    format!("{}:{:02}", whole / 60, whole % 60)
}
