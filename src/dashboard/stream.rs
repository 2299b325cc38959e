//! What is sent piece by piece: the live stream of a run, as server-sent events (`steps` with what is new, `reset` where a viewer has to
//! read anew, `state`), and all of its values.
//!
//! A viewer takes what there is when it reads, so what a slow one misses is not kept for it; one that does not read for a while is let go.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::history::Point;
use super::shown::Shown;
use super::views;

/// Most steps of one event: a viewer that is further behind reads anew.
const MAX_STEPS: usize = 500;

/// Events that wait for a viewer.
const MAX_UNREAD: usize = 2;

/// How long an event waits for its viewer before the viewer is let go.
const PATIENCE: Duration = Duration::from_secs(10);

/// At most as often there is an event: a page draws no more.
const PAUSE: Duration = Duration::from_millis(250);

/// Without news there is a comment, so that a connection that is gone is noticed.
const SILENCE: Duration = Duration::from_secs(15);

/// The stream for a viewer that has all steps up to `after`. The permit goes back when the viewer is gone.
pub fn live(shown: Arc<Shown>, after: u64, permit: OwnedSemaphorePermit) -> Body {
    live_for(shown, after, permit, PATIENCE)
}

fn live_for(shown: Arc<Shown>, after: u64, permit: OwnedSemaphorePermit, patience: Duration) -> Body {
    let (sender, events) = mpsc::channel::<Result<Bytes, Infallible>>(MAX_UNREAD);
    tokio::spawn(async move {
        let _permit = permit;
        let mut changes = shown.changes();
        let mut viewer = Viewer { after, returns: None, notes: 0 };
        loop {
            changes.mark_unchanged();
            let event = viewer.next(&shown);
            if !event.is_empty() && sender.send_timeout(Ok(event.into()), patience).await.is_err() {
                return;
            }
            tokio::time::sleep(PAUSE).await;
            match tokio::time::timeout(SILENCE, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    if sender.send_timeout(Ok(": still here\n\n".into()), patience).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    Body::from_stream(ReceiverStream::new(events))
}

/// Steps of one piece of a run's values.
const ROWS: usize = 1_000;

/// Every step with every figure, as comma-separated values. However long the run is, a viewer that is slow holds a few pieces.
pub fn csv(shown: Arc<Shown>) -> Body {
    let (sender, pieces) = mpsc::channel::<Result<Bytes, Infallible>>(MAX_UNREAD);
    tokio::spawn(async move {
        let (mut piece, mut after) = (views::csv_head(), 0);
        while sender.send_timeout(Ok(piece.into()), PATIENCE).await.is_ok() {
            match views::csv_rows(&shown, after, ROWS) {
                Some((rows, last)) => (piece, after) = (rows, last),
                None => return,
            }
        }
    });
    Body::from_stream(ReceiverStream::new(pieces))
}

/// What a viewer has.
struct Viewer {
    after: u64,
    returns: Option<u64>,
    notes: usize,
}

impl Viewer {
    /// The events that bring it up to date; empty if it is.
    fn next(&mut self, shown: &Shown) -> String {
        shown.read(|state| {
            let history = &state.history;
            let (_, returns, _) = history.counts();
            let last = history.points().last().map_or(0, |last| last.step);
            let new = history.since(self.after);
            let has_gone_back = self.returns.is_some_and(|known| known != returns) || last < self.after;
            self.returns = Some(returns);
            let mut text = String::new();
            if has_gone_back || new.len() > MAX_STEPS {
                text += &event("reset", &json!({"step": last}));
            } else if !new.is_empty() {
                text += &event("steps", &json!({"points": new.iter().map(point).collect::<Vec<_>>()}));
            }
            self.after = last;
            let notes = history.annotations().len();
            if !text.is_empty() || notes != self.notes || views::is_open(state) {
                let outcome = &state.outcome;
                text += &event(
                    "state",
                    &json!({"phase": state.phase, "outcome": outcome, "step": last, "notes": notes}),
                );
            }
            self.notes = notes;
            text
        })
    }
}

fn point(point: &Point) -> Value {
    let values: Vec<Option<f32>> =
        point.values.iter().map(|value| Some(*value).filter(|value| value.is_finite())).collect();
    json!({"step": point.step, "tokens": point.tokens, "seconds": point.seconds, "unix_ms": point.unix_ms, "values": values})
}

/// One event; JSON has no line end in it.
fn event(name: &str, data: &Value) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}

#[cfg(test)]
mod tests {
    use contraflow_orchestrator::metrics::record::StepRecord;

    use super::super::shown::Facts;
    use super::*;

    fn make(shown: &Shown, steps: std::ops::RangeInclusive<u64>) {
        steps.for_each(|step| shown.step(&StepRecord { step, loss: 1.0, ..StepRecord::default() }));
    }

    fn steps_in(events: &str) -> Vec<u64> {
        let data = events.lines().skip_while(|line| *line != "event: steps").nth(1);
        let data: Value =
            data.map_or(Value::Null, |data| serde_json::from_str(&data["data: ".len()..]).unwrap());
        let points = data["points"].as_array().cloned().unwrap_or_default();
        points.iter().map(|point| point["step"].as_u64().unwrap()).collect()
    }

    #[test]
    fn a_viewer_gets_what_it_lacks_once_and_reads_anew_after_a_roll_back_or_far_behind() {
        let shown = Shown::starting(Facts::default());
        make(&shown, 1..=5);
        let mut viewer = Viewer { after: 3, returns: None, notes: 0 };
        assert_eq!(steps_in(&viewer.next(&shown)), [4, 5]);
        assert_eq!(steps_in(&viewer.next(&shown)), [0; 0]);
        make(&shown, 4..=4);
        assert!(viewer.next(&shown).starts_with("event: reset\ndata: {\"step\":4}\n\n"));
        make(&shown, 5..=5);
        assert_eq!(steps_in(&viewer.next(&shown)), [5]);
        make(&shown, 6..=6 + MAX_STEPS as u64);
        assert!(viewer.next(&shown).starts_with("event: reset\n"));
    }

    #[tokio::test]
    async fn all_values_of_a_long_run_come_once_and_in_order() {
        let shown = Shown::starting(Facts::default());
        let steps = 2 * ROWS as u64 + 1;
        make(&shown, 1..=steps);
        let bytes = axum::body::to_bytes(csv(shown), usize::MAX).await.unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        let (head, rows) = text.split_once('\n').unwrap();
        assert!(head.starts_with("step,tokens,training_seconds,unix_ms,loss,"), "{head}");
        let of = |row: &str| row.split(',').next().and_then(|step| step.parse().ok());
        assert!(rows.lines().map(of).eq((1..=steps).map(Some)));
        assert!(rows.lines().all(|row| row.split(',').count() == head.split(',').count()));
    }

    #[tokio::test]
    async fn a_viewer_that_does_not_read_is_let_go_and_training_is_not_held_up() {
        let shown = Shown::starting(Facts::default());
        let places = Arc::new(tokio::sync::Semaphore::new(1));
        let permit = places.clone().acquire_owned().await.unwrap();
        let body = live_for(shown.clone(), 0, permit, Duration::from_millis(20));
        let mut step = 0;
        let mut steps = tokio::time::interval(Duration::from_millis(5));
        loop {
            tokio::select! {
                _ = steps.tick() => {
                    step += 1;
                    make(&shown, step..=step);
                }
                free = places.acquire() => break drop(free.unwrap()),
            }
        }
        assert!(step > 0, "it has made steps all the while");
        drop(body);
    }
}
