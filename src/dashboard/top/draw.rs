//! The frame that a view makes: header, loss, ranks with their strips, experts, incidents, keys. Pure; of any size, also of one cell.
//!
//! What has no room is left out from the bottom up: the loss and the ranks are what one looks for.

use std::borrow::Cow;

use contraflow_runtime::schedule::size;
use contraflow_runtime::simulator::Shade;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Sparkline, Widget};

use super::answers::{Row, Text};
use super::look::Look;
use super::ranks::{Columns, Rank, ranks};
use super::strip::{columns, ends, heights, strip};
use super::view::{Away, Run, View};
use crate::client::clock;
use crate::dashboard::shown::Phase;
use crate::output::count;
use crate::progress::{hms, rate};

/// Levels of a bar in one row.
const LEVELS: u64 = 8;

/// Draws the whole frame.
pub fn draw(view: &View, look: Look, frame: &mut Frame) {
    let area = frame.area();
    let mut page = Page { area, next: 0, look, buffer: frame.buffer_mut() };
    let footer = u16::from(!view.is_still && area.height > 1);
    page.area.height -= footer;
    match (&view.open, view.shows_help) {
        (_, true) => help(&mut page),
        (Some(open), _) => opened(view, open, &mut page),
        (None, _) => list(view, &mut page),
    }
    if footer == 1 {
        page.area = area;
        page.next = area.height - 1;
        page.line(keys(view, look));
    }
}

/// Lines from the top down; one that has no room is left out.
struct Page<'a> {
    area: Rect,
    next: u16,
    look: Look,
    buffer: &'a mut Buffer,
}

impl Page<'_> {
    fn line<'l>(&mut self, line: impl Into<Line<'l>>) {
        if self.next < self.area.height {
            self.buffer.set_line(self.area.x, self.area.y + self.next, &line.into(), self.area.width);
            self.next += 1;
        }
    }

    fn left(&self) -> u16 {
        self.area.height - self.next
    }

    fn take(&mut self, rows: u16) -> Rect {
        let rows = rows.min(self.left());
        let taken = Rect { y: self.area.y + self.next, height: rows, ..self.area };
        self.next += rows;
        taken
    }
}

/// A text in exactly so many columns.
pub fn fit(text: &str, width: usize) -> String {
    let mut fitted = String::new();
    let mut used = 0;
    for c in text.chars() {
        let columns = Span::raw(c.to_string()).width();
        if used + columns > width {
            break;
        }
        fitted.push(c);
        used += columns;
    }
    fitted.extend(std::iter::repeat_n(' ', width - used));
    fitted
}

/// A phase in one word.
pub fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Loading => "loading",
        Phase::Queued => "queued",
        Phase::Starting => "starting",
        Phase::Training => "training",
        Phase::Done => "done",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
    }
}

fn of_phase(look: Look, phase: Phase) -> Style {
    if phase == Phase::Failed { look.warning() } else { look.strong() }
}

fn step_of(step: u64, steps: Option<u64>) -> String {
    steps.map_or_else(|| step.to_string(), |steps| format!("{step}/{steps}"))
}

fn absence(page: &mut Page, away: &Away) {
    let seconds = (away.tried - away.since.min(away.tried)) / 1000;
    let words = format!("no answer since {} UTC ({seconds} s): {}", clock(away.since), away.why);
    page.line(Line::styled(words, page.look.warning()));
}

fn keys(view: &View, look: Look) -> Line<'static> {
    let mut spans = Vec::new();
    if view.is_paused {
        spans.push(Span::styled("paused  ", look.warning()));
    }
    let known: &[(&str, &str)] = match (view.shows_help, view.open.is_some()) {
        (true, _) => &[("any key", "back"), ("q", "quit")],
        (_, true) => &[("q", "quit"), ("esc", "list"), ("j/k", "ranks"), ("p", "pause"), ("?", "help")],
        _ => &[("q", "quit"), ("j/k", "select"), ("enter", "open"), ("p", "pause"), ("?", "help")],
    };
    for (key, does) in known {
        spans.push(Span::styled(*key, look.strong()));
        spans.push(Span::styled(format!(" {does}  "), look.dim()));
    }
    spans.into()
}

fn help(page: &mut Page) {
    let look = page.look;
    let lines = [
        ("q, Ctrl-C", "quit"),
        ("j, k, arrows", "select a job; in a job, scroll its ranks"),
        ("enter", "open the selected job"),
        ("esc", "back to the jobs"),
        ("p", "pause: what is shown stays"),
        ("?", "this"),
    ];
    page.line(Line::styled("Keys", look.strong()));
    for (key, does) in lines {
        page.line(format!("  {}{does}", fit(key, 15)));
    }
    page.line("");
    page.line(Line::styled("What a rank did in its latest step, or does by the plan", look.strong()));
    let words = [
        "forward",
        "backward",
        "backward: inputs",
        "backward: weights",
        "forward and backward of two micro-batches",
        "tokens to their experts",
        "tokens back from their experts",
        "the update",
        "between pipeline ranks",
    ];
    for (shade, words) in Shade::ALL.into_iter().zip(words) {
        let (glyph, style) = look.cell(Some(shade));
        page.line(vec![
            Span::raw("  "),
            Span::styled(glyph, style),
            Span::raw(format!(" {:<10}{words}", shade.name())),
        ]);
    }
}

fn list(view: &View, page: &mut Page) {
    let look = page.look;
    let entries = view.entries();
    let kind = if view.about.as_ref().is_some_and(|about| about.is_cluster()) { "job" } else { "run" };
    let known = if view.about.is_some() { count(entries.len(), kind) } else { "asking".to_owned() };
    page.line(vec![
        Span::styled(known, look.strong()),
        Span::styled(format!("  {}", view.source), look.dim()),
    ]);
    view.away.iter().for_each(|away| absence(page, away));
    let row = |[id, name, phase, step, loss]: [&str; 5]| {
        format!("{} {} {} {step:>15} {loss:>8}", fit(id, 12), fit(name, 24), fit(phase, 9))
    };
    page.line(Line::styled(row([kind.to_uppercase().as_str(), "NAME", "STATE", "STEP", "LOSS"]), look.dim()));
    // The chosen one is in sight, in the middle where the list is long.
    let (room, chosen) = (usize::from(page.left()), view.chosen_place());
    let first = chosen.saturating_sub(room / 2).min(entries.len().saturating_sub(room));
    for (place, entry) in entries.iter().enumerate().skip(first).take(room) {
        let loss = entry.loss.map_or_else(String::new, |loss| format!("{loss:.3}"));
        let text =
            row([&*entry.id, &*entry.name, word(entry.phase), &step_of(entry.step, entry.steps), &loss]);
        let is_chosen = place == chosen && !view.is_still;
        let style = if is_chosen { look.strong().reversed() } else { Style::new() };
        page.line(Line::styled(text, style));
    }
}

fn opened(view: &View, open: &Text, page: &mut Page) {
    let look = page.look;
    let Some(run) = &view.run else {
        page.line(vec![Span::styled(open.to_string(), look.strong()), Span::raw("  asking")]);
        view.away.iter().for_each(|away| absence(page, away));
        return;
    };
    header(view, run, page);
    let height = page.area.height;
    let gaps = if height >= 22 { 1 } else { 0 };
    let rows_of_loss = match height {
        34.. => 6,
        20.. => 3,
        12.. => 1,
        _ => 0,
    };
    let told = told(run);
    let rows_of_experts = if height >= 14 { 1 + gaps } else { 0 };
    let most_told = if height >= 34 { 8 } else { 3 };
    let shown_told = told.len().min(most_told);
    let rows_told = if height >= 16 { 1 + shown_told as u16 + gaps } else { 0 };
    loss(run, rows_of_loss, gaps, page);
    let below = rows_of_experts + rows_told;
    let rows = page.left().saturating_sub(below + gaps);
    page.take(gaps);
    table(view, run, rows, page);
    if rows_of_experts > 0 {
        page.take(gaps);
        experts(run, page);
    }
    if rows_told > 0 {
        page.take(gaps);
        let title = if told.is_empty() { "Incidents: none" } else { "Incidents" };
        page.line(Line::styled(title, look.strong()));
        told.into_iter().take(shown_told).for_each(|line| page.line(format!("  {line}")));
    }
}

fn header(view: &View, run: &Run, page: &mut Page) {
    let (look, overview) = (page.look, &run.overview);
    let state = run.job.as_ref().map_or(word(overview.phase), |job| &*job.state);
    let mut line = vec![
        Span::styled(overview.name.to_string(), look.strong()),
        Span::raw("  "),
        Span::styled(state.to_owned(), of_phase(look, overview.phase)),
        Span::raw(format!("  step {}", step_of(overview.step, overview.steps))),
    ];
    if let Some(steps) = overview.steps.filter(|steps| *steps > 0) {
        line.push(Span::raw(format!("  {:.0}%", 100.0 * overview.step as f64 / steps as f64)));
    }
    if let Some(left) = overview.seconds_left.filter(|_| overview.phase == Phase::Training) {
        line.push(Span::raw(format!("  {} left", hms(left))));
    }
    if let Some(job) = run.job.as_ref().filter(|job| job.generation > 1) {
        line.push(Span::raw(format!("  generation {}", job.generation)));
    }
    line.push(Span::styled(format!("  {}", view.source), look.dim()));
    page.line(line);
    view.away.iter().for_each(|away| absence(page, away));
    let share = |key| overview.last(key).map(|share| 100.0 * share);
    let memory = |bytes: f64| {
        let planned = overview
            .planned_memory
            .map_or_else(String::new, |planned| format!(", planned {}", size(planned)));
        format!("memory {}{planned}", size(bytes as u64))
    };
    let figures = [
        overview.last("tokens_per_second").map(rate),
        share("mfu").map(|mfu| format!("MFU {mfu:.0}%")),
        share("bubble_share").map(|bubble| format!("bubble {bubble:.0}%")),
        overview.last("grad_norm").map(|norm| format!("|g| {norm:.2}")),
        overview.last("learning_rate").map(|rate| format!("lr {rate:.1e}")),
        overview.last("memory_bytes").map(memory),
    ];
    let figures: Vec<String> = figures.into_iter().flatten().collect();
    if !figures.is_empty() {
        page.line(figures.join("  "));
    }
    let notices = run.job.as_ref().map_or([None, None], |job| [Some(&job.warning), Some(&job.waiting_for)]);
    let notices = notices.into_iter().flatten().chain([&overview.outcome]);
    let notices = [("warning", look.warning()), ("waits for", look.strong()), ("outcome", Style::new())]
        .into_iter()
        .skip(if run.job.is_some() { 0 } else { 2 })
        .zip(notices);
    // An outcome that is what the job waits for is said once.
    let mut said: Option<&Text> = None;
    for ((what, style), text) in notices {
        if !text.is_empty() && said != Some(text) {
            page.line(Line::styled(format!("{what}: {text}"), style));
            said = Some(text);
        }
    }
}

fn loss(run: &Run, rows: u16, gaps: u16, page: &mut Page) {
    let look = page.look;
    page.take(gaps);
    let mut title = vec![Span::styled("Loss", look.strong())];
    match ends(&run.loss, "loss") {
        Some((first, last)) => {
            title.push(Span::raw(format!("  {first:.3} {} {last:.3} nats/token", look.arrow())));
        }
        None => title.push(Span::styled("  no step yet", look.dim())),
    }
    if let Some(validation) = run.overview.last("validation_loss") {
        title.push(Span::raw(format!("  validation {validation:.3}")));
    }
    page.line(title);
    let values = columns(&run.loss, "loss", usize::from(page.area.width));
    let area = page.take(if values.is_empty() { 0 } else { rows });
    let heights = heights(&values, LEVELS * u64::from(area.height));
    Sparkline::default()
        .data(heights)
        .max(LEVELS * u64::from(area.height))
        .bar_set(look.bars())
        .absent_value_symbol(" ")
        .style(look.curve())
        .render(area, page.buffer);
}

fn table(view: &View, run: &Run, rows: u16, page: &mut Page) {
    let look = page.look;
    let known = ranks(run);
    let has_memory = known.iter().any(|rank| rank.memory.is_some());
    let bottom = page.next + rows.min(page.left());
    let mut title = vec![Span::styled("Ranks", look.strong())];
    if let Some(layout) = &run.overview.layout {
        let (pipeline, expert, data) = (layout.pipeline, layout.expert, layout.data);
        title.push(Span::raw(format!(
            "  pipeline {pipeline} x expert {expert} x data {data}, {}",
            layout.schedule
        )));
    }
    if let Some(slowest) = known.iter().find(|rank| rank.is_slowest) {
        title.push(Span::raw(format!("  rank {} works longest", slowest.number)));
    }
    let mut lines = vec![Line::from(title)];
    let width = usize::from(page.area.width);
    let columns = Columns::fitting(width, run.job.is_some(), has_memory);
    let mut head = vec![Span::styled(columns_of(HEAD.map(Cow::Borrowed), columns), look.dim())];
    if let Some(pipeline) = run.pipeline.as_ref().filter(|_| columns.strip > 0) {
        head.push(Span::styled(pipeline.source.to_string(), look.dim()));
        head.extend(legend(&pipeline.ranks, look));
    }
    lines.push(head.into());
    let room = usize::from(rows).saturating_sub(lines.len());
    // The last ones fill the room: nothing is scrolled away for nothing.
    let first = view.first_rank.min(known.len().saturating_sub(room));
    lines.extend(known.iter().skip(first).take(room).map(|rank| row(rank, run, look, columns)));
    if known.is_empty() {
        lines.push(Line::styled("no places yet", look.dim()));
    }
    for line in lines {
        if page.next < bottom {
            page.line(line);
        }
    }
}

const HEAD: [&str; 8] = ["rank", "stages", "expert", "node", "busy", "waits", "memory, planned", "state"];

/// The text columns of a rank; narrow terminals have fewer.
fn columns_of(cells: [Cow<str>; 8], columns: Columns) -> String {
    let [rank, stages, expert, node, busy, waits, memory, state] = cells;
    let mut line = format!("{rank:>4} ");
    if columns.is_wide {
        line += &format!("{} {expert:>6} ", fit(&stages, 7));
    }
    if columns.has_nodes {
        line += &format!("{} ", fit(&node, 10));
    }
    line += &format!("{busy:>8} ");
    if columns.is_wide {
        line += &format!("{waits:>8} ");
    }
    if columns.has_memory {
        line += &format!("{memory:>23} ");
    }
    line + &fit(&state, 8) + " "
}

fn row(rank: &Rank, run: &Run, look: Look, columns: Columns) -> Line<'static> {
    let seconds = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2} s"));
    let stages = rank.row.and_then(|row| row.stages.as_ref());
    let stages = stages
        .map_or_else(String::new, |stages| stages.iter().map(u64::to_string).collect::<Vec<_>>().join(","));
    let (state, style) = match rank {
        Rank { is_slow: true, .. } => ("slow", look.warning()),
        Rank { is_slowest: true, .. } => ("slowest", look.strong()),
        _ => (word(run.overview.phase), Style::new()),
    };
    let cells = [
        rank.number.to_string(),
        stages,
        rank.expert.map_or_else(String::new, |expert| expert.to_string()),
        rank.node.clone(),
        seconds(rank.busy),
        seconds(rank.waits),
        [rank.memory, rank.planned].map(|bytes| bytes.map_or_else(|| "?".to_owned(), size)).join(", "),
        state.to_owned(),
    ];
    let mut spans = vec![Span::styled(columns_of(cells.map(Cow::Owned), columns), style)];
    if let (Some(row), Some(pipeline)) = (rank.row, &run.pipeline) {
        let cells = strip(row, pipeline.makespan, columns.strip);
        spans.extend(cells.into_iter().map(|shade| {
            let (glyph, style) = look.cell(shade);
            Span::styled(glyph, style)
        }));
    }
    spans.into()
}

/// The shades that are there, with their names.
fn legend(rows: &[Row], look: Look) -> Vec<Span<'static>> {
    let is_there = |place: usize| rows.iter().flat_map(Row::computed).any(|op| op.c == Some(place));
    let there = Shade::ALL.into_iter().enumerate().filter(|(place, _)| is_there(*place));
    let named = there.flat_map(|(_, shade)| {
        let (glyph, style) = look.cell(Some(shade));
        // A letter that is the name says it once.
        let name = if glyph == shade.name() { String::new() } else { format!(" {}", shade.name()) };
        [Span::raw("  "), Span::styled(glyph, style), Span::styled(name, look.dim())]
    });
    named.collect()
}

/// MaxVio of every layer: a bar of one character each, the worst one in words.
fn experts(run: &Run, page: &mut Page) {
    let look = page.look;
    let layers = run.experts.latest();
    let mut line = vec![Span::styled("Experts", look.strong())];
    match layers.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((worst, most)) => {
            let mean = layers.iter().map(|(_, vio)| vio).sum::<f64>() / layers.len() as f64;
            line.push(Span::raw(format!("  MaxVio {mean:.2}, most in layer {worst}: {most:.2}  ")));
            // Full bars are never of a good balance: a bar is full at 1, or at the most that there is.
            let full = most.max(1.0);
            let bars: String = layers.iter().map(|(_, vio)| look.bar(vio / full)).collect();
            line.push(Span::styled(bars, look.curve()));
        }
        None => line.push(Span::styled("  no loads yet", look.dim())),
    }
    page.line(line);
}

/// What has gone wrong, the latest first.
fn told(run: &Run) -> Vec<String> {
    let of_job = run.incidents.iter().map(|incident| {
        let end = incident.over_unix_ms.map_or_else(
            || "open".to_owned(),
            |over| format!("over after {:.1} s", over.saturating_sub(incident.began_unix_ms) as f64 / 1e3),
        );
        format!("{}  {} ({end})", clock(incident.began_unix_ms), incident.sign)
    });
    let is_bad = |kind: &str| !matches!(kind, "checkpoint" | "end");
    let noted = run.overview.annotations.iter().rev().filter(|noted| is_bad(&noted.kind));
    let noted = noted.map(|noted| format!("step {}  {}: {}", noted.step, noted.kind, noted.text));
    of_job.chain(noted).collect()
}
