//! Pictures of timelines as files: the options that ask for them, and the writing.
//!
//! What is drawn is in `runtime`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use contraflow_runtime::schedule::{Plan, RecordedStep};
use contraflow_runtime::simulator::{Row, recorded_rows, rows, svg, write_trace};

use crate::failure::Failure;

/// Where pictures go, if anywhere.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Pictures {
    /// Draw the step: of `plan` as simulated, without a cluster in units of a forward pass; of `train` the last one, as it was and
    /// as its plan makes it
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Write the same as a trace for Perfetto
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

impl Pictures {
    /// Whether there is nothing to draw.
    pub fn is_none(&self) -> bool {
        self.svg.is_none() && self.trace.is_none()
    }

    /// What is found before a run that is to be drawn at its end.
    ///
    /// **Errors**: code 2; a folder that is not there, or a path that is one.
    pub fn check(&self) -> Result<(), Failure> {
        for path in self.svg.iter().chain(&self.trace) {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
                let path = path.display();
                return Err(Failure::input(format!("{path}: expected a file in a folder that exists")));
            }
        }
        Ok(())
    }

    /// Draws a step of a run, and below it what its plan makes of it.
    ///
    /// **Errors**: a file that cannot be written.
    pub fn draw_recorded(&self, step: &RecordedStep) -> Result<(), Failure> {
        let (programs, timeline) = step.planned().map_err(|deadlock| Failure::run(deadlock.to_string()))?;
        let mut all = recorded_rows(step);
        all.extend(rows("plan", &programs, &timeline));
        self.draw(&step.plan, &all, ("s", 1e6))
    }

    /// Draws the rows, their time in `unit`, of which each has so many microseconds.
    ///
    /// **Errors**: a file that cannot be written.
    pub fn draw(&self, plan: &Plan, rows: &[Row], (unit, microseconds): (&str, f64)) -> Result<(), Failure> {
        if let Some(path) = &self.svg {
            write(path, |out| out.write_all(svg(plan, rows, unit).as_bytes()))?;
        }
        if let Some(path) = &self.trace {
            write(path, |out| write_trace(out, plan, rows, microseconds))?;
        }
        Ok(())
    }
}

fn write(path: &Path, with: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<(), Failure> {
    let written = File::create(path).and_then(|file| {
        let mut out = BufWriter::new(file);
        with(&mut out)?;
        out.flush()
    });
    written.map_err(|error| Failure::input(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_no_file_can_have_is_refused_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: PathBuf| Pictures { trace: Some(path), ..Pictures::default() }.check().is_ok();
        assert!(check(dir.path().join("run.json")) && check("run.json".into()));
        assert!(!check(dir.path().to_owned()) && !check(dir.path().join("no/run.json")));
    }
}
