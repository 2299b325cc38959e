//! `contraflow plot`: the curves of runs over one another, as a picture, a page or numbers.

use std::path::{Path, PathBuf};

use contraflow_runtime::control::text::printable;
use contraflow_runtime::files::UNFINISHED_SUFFIX;

use super::curves::panels;
use super::page::page;
use super::survey::{Record, Survey};
use super::svg::picture;
use crate::failure::Failure;
use crate::output::{count, print, quoted};
use crate::run_dir;

/// Arguments of `contraflow plot`.
#[derive(clap::Args, Debug)]
pub struct PlotArgs {
    /// Runs, by folder or name, or files of the lines that contraflow watch --format json prints
    #[arg(default_value = "runs/latest", value_name = "RUN")]
    pub runs: Vec<String>,
    /// The file to write: .svg, .html (a page of its own) or .csv [default: plot.svg in the first run's folder]
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Svg,
    Html,
    Csv,
}

impl Form {
    /// By the ending of a file's name.
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "svg" => Some(Form::Svg),
            "html" => Some(Form::Html),
            "csv" => Some(Form::Csv),
            _ => None,
        }
    }
}

/// Runs the command.
///
/// **Errors**: code 2 with every run that is not there or has no steps, and a file that cannot be written or is of no known kind.
pub fn run(args: &PlotArgs) -> Result<(), Failure> {
    let mut faults = Vec::new();
    let form = args.to.as_deref().map_or(Some(Form::Svg), Form::of);
    if let (None, Some(to)) = (form, &args.to) {
        faults.push(format!("--to: expected a name that ends in .svg, .html or .csv, got {}", to.display()));
    }
    let found: Vec<(PathBuf, Survey)> =
        args.runs.iter().filter_map(|name| read(name).map_err(|fault| faults.push(fault)).ok()).collect();
    let (Some(form), [(first, _), ..], true) = (form, &found[..], faults.is_empty()) else {
        return Err(Failure::faults("plot", &faults));
    };
    let to = args.to.clone().unwrap_or_else(|| folder_of(first).join("plot.svg"));
    let runs: Vec<Survey> = found.into_iter().map(|(_, survey)| survey).collect();
    let text = match form {
        Form::Csv => csv(&runs),
        Form::Svg => drawn(&runs),
        Form::Html => page(&runs, &drawn(&runs)),
    };
    write(&to, &text).map_err(|error| Failure::input(format!("{}: {error}", to.display())))?;
    let steps = runs.iter().map(|run| run.records.len()).sum::<usize>();
    print(&format!("{}: {} of {}\n", quoted(to.display()), count(steps, "step"), count(runs.len(), "run")))
}

/// A run's folder, or a file of records.
///
/// **Errors**: what was expected, and where it was looked for.
fn read(name: &str) -> Result<(PathBuf, Survey), String> {
    let path = Path::new(name);
    let (path, survey) = if path.is_file() {
        let records = run_dir::records(path)
            .map_err(|error| format!("{name}: expected lines of records, got: {error}"))?;
        (path.to_owned(), Survey::of_records(run_dir::name_of(path), records))
    } else {
        let run = run_dir::without_link(&run_dir::find_run(name)?);
        let survey = Survey::of(&run);
        (run, survey)
    };
    if survey.records.is_empty() {
        return Err(format!("{name}: expected a run with steps on record, got none"));
    }
    Ok((path, survey))
}

/// Where a picture goes by default: into the run, or beside the file.
fn folder_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.to_owned() } else { path.parent().unwrap_or(Path::new("")).to_owned() }
}

fn drawn(runs: &[Survey]) -> String {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    picture(&names, &panels(runs))
}

/// A line a step. A validation loss stands in the step that began with the weights it was measured on.
fn csv(runs: &[Survey]) -> String {
    let mut text = "run,step,unix_ms,tokens,loss,mtp_loss,validation_loss,grad_norm,learning_rate,seconds,\
                    tokens_per_second\n"
        .to_owned();
    let finite = |number: f64| if number.is_finite() { number.to_string() } else { String::new() };
    let optional = |number: Option<f64>| number.map_or_else(String::new, finite);
    for run in runs {
        let name = csv_text(&run.name);
        for record in &run.records {
            let Record { step, unix_ms, tokens, .. } = record;
            let numbers = [
                finite(record.loss),
                optional(record.mtp_loss),
                optional(record.validation_loss),
                finite(record.grad_norm),
                finite(record.learning_rate),
                finite(record.seconds),
                finite(record.tokens_per_second),
            ];
            text += &format!("{name},{step},{unix_ms},{tokens},{}\n", numbers.join(","));
        }
    }
    text
}

/// A text in a cell: in quotes where it has to be, and never a formula.
fn csv_text(text: &str) -> String {
    let shown = printable(text);
    let acts = shown.starts_with(['=', '+', '-', '@']);
    let shown = if acts { format!("'{shown}") } else { shown.into_owned() };
    if shown.contains(['"', ',']) { format!("\"{}\"", shown.replace('"', "\"\"")) } else { shown }
}

/// Under another name first: what has the name is whole.
fn write(to: &Path, text: &str) -> std::io::Result<()> {
    let mut part = to.as_os_str().to_owned();
    part.push(UNFINISHED_SUFFIX);
    std::fs::write(&part, text)?;
    std::fs::rename(&part, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of three steps, the second not finite, validated before the third.
    fn runs(root: &Path) -> Vec<Survey> {
        let run = root.join("a b,c");
        std::fs::create_dir(&run).unwrap();
        let record = |step, loss, validation_loss| Record {
            step,
            loss,
            validation_loss,
            tokens: 512,
            unix_ms: 1_700_000_000_000 + step,
            grad_norm: 0.5,
            ..Record::default()
        };
        let records = [record(1, 5.5, None), record(2, f64::NAN, None), record(3, 4.25, Some(4.5))];
        let lines: String = records.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect();
        std::fs::write(run.join(run_dir::METRICS), lines).unwrap();
        vec![Survey::of(&run)]
    }

    #[test]
    fn numbers_are_those_of_the_records_and_what_is_not_finite_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let text = csv(&runs(root.path()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[1], "\"a b,c\",1,1700000000001,512,5.5,,,0.5,0,0,0");
        assert_eq!(lines[2], "\"a b,c\",2,1700000000002,512,,,,0.5,0,0,0");
        assert_eq!(lines[3], "\"a b,c\",3,1700000000003,512,4.25,,4.5,0.5,0,0,0");
        assert_eq!(csv_text("=1+2"), "'=1+2");
    }

    #[test]
    fn a_page_stands_alone_and_shows_the_panels_that_there_are() {
        let root = tempfile::tempdir().unwrap();
        let runs = runs(root.path());
        let html = page(&runs, &drawn(&runs));
        for title in
            ["loss, nats per token", "validation loss, nats per token", "gradient norm before clipping"]
        {
            assert!(html.contains(&format!(">{title}</text>")), "{title}");
        }
        for loads in ["src=", "href=", "url(", "@import", "<script"] {
            assert!(!html.contains(loads), "{loads}");
        }
        assert!(
            html.contains("<td>a b,c</td><td>failed</td><td></td><td>4.2500</td><td>4.5000</td>"),
            "{html}"
        );
        // The value stands where it was measured: after two updates.
        assert!(html.contains("<title>step 2: 4.5000</title>"), "{html}");
    }
}
