//! `contraflow top`: runs and jobs in a terminal, asked of a dashboard's `/api/v1`. The same for a run of this machine and for a cluster.
//!
//! Its shape, from the inside out:
//!
//! - `answers` are the answers as they are read: texts in a printable form, all else numbers.
//! - `view` holds what is shown, as plain data, and what an event makes of it; `strip` and `ranks` work out what a frame needs. Pure.
//! - `look` knows what a terminal can show, `draw` makes the frame. Pure.
//! - `link` is a connection, `asking` what is asked over it, `terminal` the screen and the keys.

mod answers;
mod asking;
mod draw;
mod link;
mod look;
mod ranks;
mod strip;
mod terminal;
mod view;

use std::io::IsTerminal;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use self::asking::Asking;
use self::link::{Link, TIMEOUT, Trouble};
use self::look::{Colours, Look};
use self::view::{Event, View, update};
use crate::access::Access;
use crate::dashboard::shown::Phase;
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{line_style, print};

/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(1);

/// Rows of one frame without a terminal, besides one for each rank.
const ROWS: u16 = 40;

/// Most ranks of such a frame: it is as tall as it has ranks.
const MAX_ROWS: usize = 4_096;

/// Arguments of `contraflow top`.
#[derive(clap::Args, Debug)]
pub struct TopArgs {
    /// Job or run, by id or name [default: the run, or a list to choose from]
    #[arg(value_name = "JOB")]
    pub job: Option<String>,
    /// Address of a dashboard, as `train`, `orchestrator` and `dashboard` print it
    #[arg(long, value_name = "URL", env = "CONTRAFLOW_DASHBOARD", default_value = "127.0.0.1:7080")]
    pub url: String,
    /// Print one frame as text and end; also where stdout is no terminal
    #[arg(long)]
    pub once: bool,
    /// Token of the dashboard of a run, where it asks for one
    #[arg(long, value_name = "TOKEN", env = "CONTRAFLOW_DASHBOARD_TOKEN", hide_env_values = true)]
    pub dashboard_token: Option<String>,
    /// Client certificate and token, for the dashboard of an orchestrator with --tls
    #[command(flatten)]
    pub access: Access,
}

/// Runs the command.
///
/// **Errors**: code 2 if there is no such job, or it may not be seen; code 1 if the dashboard is out of reach from the beginning.
pub fn run(args: &TopArgs) -> Result<(), Failure> {
    let link = Link::new(&args.url, &args.access, args.dashboard_token.as_deref())?;
    let view = View::new(link.url(), args.job.as_deref());
    let asking = Asking::new(link);
    let look = Look::of(|name| std::env::var(name).ok());
    let runtime = interrupt::runtime()?;
    let outcome = if args.once || !std::io::stdout().is_terminal() {
        runtime.block_on(once(view, asking, look))
    } else {
        runtime.block_on(terminal::live(view, asking, look))
    };
    // A question that is under way is not waited for.
    runtime.shutdown_background();
    outcome
}

fn failure(url: &str, trouble: Trouble) -> Failure {
    match trouble {
        Trouble::Refused { why, .. } => Failure::input(format!("{url}: {why}")),
        Trouble::Away(why) => Failure::run(format!(
            "--url {url}: expected the dashboard of a run or an orchestrator, got: {why}"
        )),
    }
}

/// One frame on stdout.
async fn once(mut view: View, mut asking: Asking, look: Look) -> Result<(), Failure> {
    view.is_still = true;
    let begun = Instant::now();
    loop {
        let answer =
            asking.ask(view.open.as_deref()).await.map_err(|trouble| failure(&view.source, trouble))?;
        view = update(view, answer);
        // Histories are read beside the dashboard: the first answer may come before them.
        let is_whole = view.open.is_none() || view.run.as_ref().is_some_and(is_read);
        if is_whole || begun.elapsed() >= TIMEOUT {
            break;
        }
        tokio::time::sleep(PAUSE / 5).await;
    }
    let (width, _) = line_style();
    let entries = view.entries().len();
    let rows = if view.open.is_some() { view.ranks() } else { entries };
    print(&text(&view, Look { colours: Colours::None, ..look }, width, ROWS + rows.min(MAX_ROWS) as u16)?)
}

/// Whether the steps of a run have been read as far as they are known of.
fn is_read(run: &view::Run) -> bool {
    let made = run.job.as_ref().map_or(0, |job| job.step);
    run.overview.phase != Phase::Loading && run.overview.step >= made
}

/// A frame as lines of text, without what is empty at the ends.
fn text(view: &View, look: Look, width: usize, height: u16) -> Result<String, Failure> {
    let width = u16::try_from(width).unwrap_or(u16::MAX).max(1);
    let failed = |error: &dyn std::fmt::Display| Failure::run(format!("frame: {error}"));
    let mut terminal = Terminal::new(TestBackend::new(width, height)).map_err(|error| failed(&error))?;
    let frame = terminal.draw(|frame| draw::draw(view, look, frame)).map_err(|error| failed(&error))?;
    let mut lines: Vec<String> = Vec::new();
    for row in frame.buffer.content.chunks(usize::from(width)) {
        let line: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        lines.push(line.trim_end().to_owned());
    }
    Ok(format!("{}\n", lines.join("\n").trim_end()))
}

/// The time of day. **Units**: milliseconds since 1970.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What a question has come to, as an event.
fn event(asked: Result<Event, Trouble>) -> Event {
    asked.unwrap_or_else(|trouble| {
        let (Trouble::Away(why) | Trouble::Refused { why, .. }) = trouble;
        Event::Failed { why, unix_ms: unix_ms() }
    })
}

#[cfg(test)]
mod tests;
