//! Rows of operations as a picture: of each its actions on top and its all-to-alls below them.
//!
//! Knows no file.

use std::fmt::{self, Write};

use super::palette::Shade;
use super::rows::{Block, Row};
use crate::schedule::Plan;

/// **Units**: pixels.
const WIDTH: f64 = 1600.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
const ROW: f64 = 30.0;
const ACTION: f64 = 18.0;
const EXCHANGE: f64 = 5.0;
/// What is narrower is left out of the row of all-to-alls, and a number on an action needs as much for each digit.
const NARROWEST: f64 = 0.4;
const DIGIT: f64 = 7.0;
/// Marks on the axis, about.
const MARKS: f64 = 10.0;

/// The picture, its time in `unit`.
pub fn svg(plan: &Plan, rows: &[Row], unit: &str) -> String {
    let mut text = String::new();
    // Writing to a text cannot fail.
    let _ = draw(&mut text, plan, rows, unit);
    text
}

fn draw(out: &mut String, plan: &Plan, rows: &[Row], unit: &str) -> fmt::Result {
    let makespan = rows.iter().flat_map(|row| row.spans).map(|span| span.end).fold(0.0, f64::max);
    let scale = (WIDTH - LEFT - 10.0) / makespan.max(f64::MIN_POSITIVE);
    let x = |time: f64| LEFT + time * scale;
    let bottom = TOP + ROW * rows.len() as f64;
    let height = bottom + 30.0;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">"
    )?;
    writeln!(
        out,
        "<title>{} on {} pipeline ranks, {} micro-batches</title>",
        plan.schedule,
        plan.ranks(),
        plan.micro_batches
    )?;
    writeln!(out, "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>")?;
    let mut rects = String::new();
    let mut seen = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let top = TOP + ROW * index as f64;
        writeln!(rects, "<text x=\"8\" y=\"{}\">{}</text>", top + 13.0, row.name)?;
        for Block { shade, span, micro_batch: number, .. } in row.blocks(plan) {
            let is_exchange = matches!(shade, Shade::Dispatch | Shade::Combine);
            let width = span.duration() * scale;
            if width < NARROWEST && is_exchange {
                continue;
            }
            seen.push(shade);
            let (y, height) = if is_exchange { (top + ACTION + 1.0, EXCHANGE) } else { (top, ACTION) };
            let (left, colour) = (x(span.start), shade.colour());
            writeln!(
                rects,
                "<rect x=\"{left:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{height}\" fill=\"{colour}\" stroke=\"#ffffff\" stroke-width=\"0.3\"/>"
            )?;
            let number = number.map(|number| number.to_string()).unwrap_or_default();
            if !number.is_empty() && width >= DIGIT * (number.len() as f64 + 0.6) {
                let (middle, ink) = (left + width / 2.0, shade.ink());
                writeln!(
                    rects,
                    "<text x=\"{middle:.2}\" y=\"{}\" text-anchor=\"middle\" fill=\"{ink}\">{number}</text>",
                    y + 13.0
                )?;
            }
        }
    }
    let mut left = LEFT;
    for shade in Shade::ALL.into_iter().filter(|shade| seen.contains(shade)) {
        writeln!(
            out,
            "<rect x=\"{left}\" y=\"12\" width=\"14\" height=\"14\" fill=\"{}\"/>",
            shade.colour()
        )?;
        let name = shade.name().replace('&', "&amp;");
        writeln!(out, "<text x=\"{}\" y=\"23\">{name}</text>", left + 19.0)?;
        left += 100.0;
    }
    out.push_str(&rects);
    let step = mark(makespan);
    let mut time = 0.0;
    while step > 0.0 && time <= makespan {
        writeln!(
            out,
            "<line x1=\"{0:.2}\" x2=\"{0:.2}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"#000000\" stroke-opacity=\"0.15\"/>",
            x(time)
        )?;
        let label = (time * 1e6).round() / 1e6;
        writeln!(out, "<text x=\"{:.2}\" y=\"{}\">{label} {unit}</text>", x(time) + 2.0, bottom + 14.0)?;
        time += step;
    }
    writeln!(out, "</svg>")
}

/// 1, 2 or 5 times a power of ten, so that about as many marks fit as are wanted.
fn mark(makespan: f64) -> f64 {
    if makespan <= 0.0 {
        return 0.0;
    }
    let least = makespan / MARKS;
    let power = 10.0_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= least).unwrap_or(least)
}
