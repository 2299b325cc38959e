//! The picture of runs as a page of its own: figures above it, and nothing that is loaded from anywhere.

use super::survey::Survey;
use super::svg::escaped;

/// The page around a picture.
pub fn page(runs: &[Survey], picture: &str) -> String {
    let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.4}"));
    let row = |run: &Survey| {
        let cells = [
            escaped(&run.name),
            run.state.to_string(),
            run.steps_text(),
            number(run.loss),
            number(run.best_validation().map(|(loss, _)| loss)),
            number(run.summary["validation_bits_per_byte"].as_f64()),
        ];
        format!("<tr>{}</tr>\n", cells.map(|cell| format!("<td>{cell}</td>")).concat())
    };
    let names: Vec<String> = runs.iter().map(|run| escaped(&run.name)).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>contraflow: {}</title>\n<style>\n\
         body {{ font: 14px sans-serif; margin: 2em auto; max-width: 920px; }}\n\
         table {{ border-collapse: collapse; margin-bottom: 1em; }}\n\
         td, th {{ padding: 0.2em 1em 0.2em 0; text-align: left; }}\nsvg {{ max-width: 100%; height: auto; }}\n\
         </style>\n</head>\n<body>\n<table>\n<tr><th>run</th><th>state</th><th>step</th><th>loss</th>\
         <th>lowest validation loss</th><th>bits per byte</th></tr>\n{}</table>\n{picture}</body>\n</html>\n",
        names.join(", "),
        runs.iter().map(row).collect::<String>(),
    )
}
