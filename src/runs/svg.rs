//! Panels as a picture: a small writer of SVG. Text from outside is escaped; nothing refers to another file. Knows lines and
//! axes, no runs.

use std::fmt::Write;

use super::curves::{Line, Panel, Style, log_ticks, range, ticks};

/// Of the whole picture. **Units**: pixels, here and below.
const WIDTH: f64 = 900.0;
/// Room for the numbers beside a panel.
const LEFT: f64 = 70.0;
/// Beside the last number.
const RIGHT: f64 = 20.0;
/// Of the lines of a panel.
const HEIGHT: f64 = 220.0;
/// Room above a panel, for its title.
const ABOVE: f64 = 36.0;
/// Room below a panel, for the steps.
const BELOW: f64 = 34.0;
/// Of a line of the legend.
const LEGEND: f64 = 20.0;

/// Colours that also people see apart who do not see all of them (Okabe and Ito); further runs use them again, dashed.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// The picture: a legend of the runs, and the panels below each other.
pub fn picture(runs: &[String], panels: &[Panel]) -> String {
    let top = 10.0 + LEGEND * runs.len() as f64;
    let height = top + panels.len() as f64 * (ABOVE + HEIGHT + BELOW);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (run, name) in runs.iter().enumerate() {
        let y = 10.0 + LEGEND * (run as f64 + 0.5);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y} h30\" {}/><text x=\"{}\" y=\"{}\">{}</text>",
            stroke(run, Style::Plain),
            LEFT + 38.0,
            y + 4.0,
            escaped(name)
        );
    }
    // One scale of the steps for all panels, so that what happened at once stands one above the other.
    let steps =
        range(panels.iter().flat_map(|panel| &panel.lines).flat_map(steps_of), false).unwrap_or((0.0, 1.0));
    for (place, panel) in panels.iter().enumerate() {
        let y = top + place as f64 * (ABOVE + HEIGHT + BELOW) + ABOVE;
        svg += &drawn(panel, steps, y);
    }
    svg + "</svg>\n"
}

fn steps_of(line: &Line) -> impl Iterator<Item = f64> + '_ {
    line.points.iter().map(|(step, _)| *step)
}

/// From values to pixels.
struct Axis {
    from: f64,
    to: f64,
    is_logarithmic: bool,
    /// Where `from` and `to` are.
    pixels: (f64, f64),
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.is_logarithmic { value.log10() } else { value };
        let (from, to) = (scale(self.from), scale(self.to));
        let share = if to > from { (scale(value) - from) / (to - from) } else { 0.5 };
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }

    fn has(&self, value: f64) -> bool {
        value.is_finite() && (!self.is_logarithmic || value > 0.0)
    }
}

/// A panel whose lines begin `top` below the top of the picture.
fn drawn(panel: &Panel, steps: (f64, f64), top: f64) -> String {
    let values = panel.lines.iter().flat_map(|line| line.points.iter().map(|(_, value)| *value));
    let (low, high) = range(values, panel.is_logarithmic).unwrap_or((1.0, 1.0));
    let (bottom, right) = (top + HEIGHT, WIDTH - RIGHT);
    let x = Axis { from: steps.0, to: steps.1, is_logarithmic: false, pixels: (LEFT, right) };
    let y =
        Axis { from: low, to: high, is_logarithmic: panel.is_logarithmic, pixels: (bottom - 6.0, top + 6.0) };
    let mut svg = format!(
        "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>\n",
        top - 10.0,
        escaped(panel.title)
    );
    for tick in if panel.is_logarithmic { log_ticks((low, high)) } else { ticks((low, high)) } {
        let at = y.at(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1} H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            number(tick)
        );
    }
    for tick in ticks(steps) {
        let at = x.at(tick);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {bottom} v5\" stroke=\"#888\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 19.0,
            number(tick)
        );
    }
    let _ = writeln!(svg, "<path d=\"M{LEFT} {top} V{bottom} H{right}\" fill=\"none\" stroke=\"#888\"/>");
    for line in &panel.lines {
        let path = path(line, &x, &y);
        let _ = writeln!(svg, "<path d=\"{path}\" {}/>", stroke(line.run, line.style));
        if line.style == Style::Marked {
            for (step, value) in line.points.iter().filter(|(_, value)| y.has(*value)) {
                let (x, y, colour) = (x.at(*step), y.at(*value), colour(line.run));
                let words = format!("step {step}: {value:.4}");
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"><title>{words}</title></circle>"
                );
            }
        }
    }
    svg
}

/// The line in pixels; a value that cannot be drawn is a gap.
fn path(line: &Line, x: &Axis, y: &Axis) -> String {
    let mut path = String::new();
    let mut begins = true;
    for &(step, value) in &line.points {
        if !y.has(value) {
            begins = true;
            continue;
        }
        let verb = if begins { 'M' } else { 'L' };
        let _ = write!(path, "{verb}{:.1} {:.1}", x.at(step), y.at(value));
        begins = false;
    }
    path
}

fn colour(run: usize) -> &'static str {
    COLOURS[run % COLOURS.len()]
}

fn stroke(run: usize, style: Style) -> String {
    let dashed = if run < COLOURS.len() { "" } else { " stroke-dasharray=\"6 3\"" };
    let (width, opacity) = match style {
        Style::Faint => (1.0, 0.25),
        Style::Plain | Style::Marked => (1.6, 1.0),
    };
    format!(
        "fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" stroke-linejoin=\"round\"{dashed}",
        colour(run)
    )
}

/// A number beside an axis, without the digits that a sum has left.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        0.001..1e6 => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ => format!("{value:e}"),
    }
}

/// A text within XML.
pub fn escaped(text: &str) -> String {
    let shown = contraflow_runtime::control::text::printable(text);
    shown.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(points: &[(f64, f64)], is_logarithmic: bool) -> Panel {
        let line = Line { run: 0, points: points.to_vec(), style: Style::Plain };
        Panel { title: "loss", is_logarithmic, lines: vec![line] }
    }

    /// The pixels of the first line of a panel.
    fn pixels(panel: &Panel) -> Vec<(char, f64, f64)> {
        let svg = picture(&["run".into()], std::slice::from_ref(panel));
        let line = svg.lines().rfind(|line| line.contains("stroke-linejoin")).unwrap();
        let path = line.split('"').nth(1).unwrap();
        let mut points = Vec::new();
        for part in path.split_inclusive(['M', 'L']).collect::<Vec<_>>().windows(2) {
            let verb = part[0].chars().last().unwrap();
            let (x, y) = part[1].trim_end_matches(['M', 'L']).split_once(' ').unwrap();
            points.push((verb, x.parse().unwrap(), y.parse().unwrap()));
        }
        points
    }

    #[test]
    fn lines_run_from_edge_to_edge_and_break_where_a_value_is_none() {
        let points = [(0.0, 1.0), (1.0, 3.0), (2.0, f64::NAN), (4.0, 2.0)];
        let drawn = pixels(&panel(&points, false));
        let verbs: String = drawn.iter().map(|(verb, ..)| verb).collect();
        assert_eq!(verbs, "MLM");
        assert_eq!((drawn[0].1, drawn[2].1), (LEFT, WIDTH - RIGHT));
        // The highest is at the top, and the middle in the middle.
        assert!(drawn[1].2 < drawn[2].2 && drawn[2].2 < drawn[0].2);
        assert!((drawn[2].2 - (drawn[0].2 + drawn[1].2) / 2.0).abs() < 0.11, "{drawn:?}");
    }

    #[test]
    fn on_a_logarithmic_axis_equal_factors_are_equally_far_apart() {
        let drawn = pixels(&panel(&[(0.0, 0.1), (1.0, 1.0), (2.0, 10.0), (3.0, 0.0)], true));
        assert_eq!(drawn.len(), 3, "0 cannot be drawn");
        assert!((drawn[0].2 - 2.0 * drawn[1].2 + drawn[2].2).abs() < 0.21, "{drawn:?}");
    }

    #[test]
    fn names_of_runs_cannot_leave_the_text() {
        let svg = picture(&["a<script>\"&\n".into()], &[panel(&[(0.0, 1.0)], false)]);
        assert!(svg.contains(">a&lt;script&gt;&quot;&amp;\\n</text>"), "{svg}");
        assert!(!svg.contains("<script"));
    }

    #[test]
    fn numbers_beside_an_axis_are_short() {
        let cases =
            [(0.0, "0"), (0.25, "0.25"), (200.0, "200"), (0.30000000000000004, "0.3"), (2e-5, "2e-5")];
        for (value, words) in cases {
            assert_eq!(number(value), words);
        }
    }
}
