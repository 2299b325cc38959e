//! What is shown, as plain data, and what an event makes of it. Pure: knows no terminal, no network and no clock.

use super::answers::{About, Entry, Experts, Incident, Job, Overview, Pipeline, Series, Text};

/// Everything that is shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Where it is from: an address.
    pub source: String,
    /// What there is; none before the first answer.
    pub about: Option<About>,
    /// The chosen entry of the list.
    pub chosen: Text,
    /// The run or job that is open, if one is: an id, or a name before the first answer.
    pub open: Option<Text>,
    /// What is known of the open one.
    pub run: Option<Run>,
    /// The first rank of those that are shown.
    pub first_rank: usize,
    /// Whether what comes is left out.
    pub is_paused: bool,
    /// Whether the keys are explained.
    pub shows_help: bool,
    /// Whether there is nobody to press a key: one frame, and the end.
    pub is_still: bool,
    /// Whether it is over.
    pub has_ended: bool,
    /// The other side, if it does not answer.
    pub away: Option<Away>,
}

/// A run or a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// Its figures.
    pub overview: Overview,
    /// Its loss.
    pub loss: Series,
    /// The latest step of its pipeline, or the plan of it.
    pub pipeline: Option<Pipeline>,
    /// Loads of its experts.
    pub experts: Experts,
    /// What an orchestrator knows of it; none of a run in one process.
    pub job: Option<Job>,
    /// The failures of a job, the latest first.
    pub incidents: Vec<Incident>,
}

/// The other side does not answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Away {
    /// Since when. **Units**: milliseconds since 1970.
    pub since: u64,
    /// When it was tried last. **Units**: milliseconds since 1970.
    pub tried: u64,
    /// Why, in words.
    pub why: Text,
}

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A key.
    Key(Key),
    /// The other side has answered.
    Answered {
        /// What there is.
        about: About,
        /// What was open when it was asked for.
        run: Option<Box<Run>>,
    },
    /// The other side has not.
    Failed {
        /// Why.
        why: Text,
        /// When. **Units**: milliseconds since 1970.
        unix_ms: u64,
    },
}

/// A key that does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// To the entry, or the rank, above.
    Up,
    /// To the one below.
    Down,
    /// Opens the chosen entry.
    Open,
    /// Back to the list.
    Back,
    /// Explains the keys.
    Help,
    /// What is shown stays, or goes on.
    Pause,
    /// Ends.
    Quit,
}

impl View {
    /// Before the first answer, of `job` or of whatever there is.
    pub fn new(source: String, job: Option<&str>) -> Self {
        View { source, open: job.map(Text::from), ..View::default() }
    }

    /// The entries of the list.
    pub fn entries(&self) -> &[Entry] {
        self.about.as_ref().map_or(&[], |about| &about.runs)
    }

    /// Place of the chosen entry.
    pub fn chosen_place(&self) -> usize {
        self.entries().iter().position(|entry| entry.id == self.chosen).unwrap_or(0)
    }

    /// Number of ranks that are known of.
    pub fn ranks(&self) -> usize {
        let Some(run) = &self.run else { return 0 };
        let placed = run.job.as_ref().map_or(0, |job| job.ranks.len());
        let planned =
            run.overview.layout.as_ref().map_or(0, |layout| {
                layout.pipeline.saturating_mul(layout.expert).saturating_mul(layout.data)
            });
        placed.max(planned)
    }
}

/// The view after an event.
pub fn update(mut view: View, event: Event) -> View {
    match event {
        Event::Key(key) => pressed(view, key),
        Event::Failed { why, unix_ms } => {
            let since = view.away.as_ref().map_or(unix_ms, |away| away.since);
            view.away = Some(Away { since, tried: unix_ms, why });
            view
        }
        Event::Answered { about, run } => {
            view.away = None;
            if view.is_paused { view } else { answered(view, about, run) }
        }
    }
}

fn answered(mut view: View, about: About, run: Option<Box<Run>>) -> View {
    let is_first = view.about.is_none();
    view.about = Some(about);
    if is_first
        && view.open.is_none()
        && let [only] = view.entries()
    {
        // There is nothing to choose.
        view.open = Some(only.id.clone());
    }
    if let Some(run) = run {
        let asked = |open: &Text| {
            let entry = view.entries().iter().find(|entry| entry.id == *open || entry.name == *open);
            *open == run.overview.id || entry.is_some_and(|entry| entry.id == run.overview.id)
        };
        // Another one may have been opened meanwhile.
        if view.open.as_ref().is_some_and(asked) {
            view.open = Some(run.overview.id.clone());
            view.chosen = run.overview.id.clone();
            view.run = Some(*run);
        }
    }
    if !view.entries().iter().any(|entry| entry.id == view.chosen) {
        view.chosen = view.entries().first().map(|first| first.id.clone()).unwrap_or_default();
    }
    view.first_rank = view.first_rank.min(view.ranks().saturating_sub(1));
    view
}

fn pressed(mut view: View, key: Key) -> View {
    if view.shows_help && key != Key::Quit {
        // Any key leads back.
        view.shows_help = false;
        return view;
    }
    let is_open = view.open.is_some();
    match key {
        Key::Quit => view.has_ended = true,
        Key::Help => view.shows_help = true,
        Key::Pause => view.is_paused = !view.is_paused,
        Key::Back => (view.open, view.run, view.first_rank) = (None, None, 0),
        Key::Open if !is_open && !view.entries().is_empty() => {
            // What is opened is shown, also in a pause.
            (view.open, view.is_paused) = (Some(view.chosen.clone()), false);
        }
        Key::Open => {}
        Key::Up if is_open => view.first_rank = view.first_rank.saturating_sub(1),
        Key::Down if is_open => view.first_rank = (view.first_rank + 1).min(view.ranks().saturating_sub(1)),
        Key::Up | Key::Down => {
            let place = view.chosen_place();
            let place = if key == Key::Up { place.saturating_sub(1) } else { place + 1 };
            if let Some(entry) = view.entries().get(place) {
                view.chosen = entry.id.clone();
            }
        }
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(ids: &[&str]) -> About {
        let entry =
            |id: &&str| Entry { id: (*id).into(), name: format!("name of {id}").into(), ..Entry::default() };
        About { kind: "cluster".into(), runs: ids.iter().map(entry).collect() }
    }

    fn answer(ids: &[&str], run: Option<&str>) -> Event {
        let run = run.map(|id| {
            Box::new(Run { overview: Overview { id: id.into(), ..Overview::default() }, ..Run::default() })
        });
        Event::Answered { about: about(ids), run }
    }

    fn after(view: View, events: impl IntoIterator<Item = Event>) -> View {
        events.into_iter().fold(view, update)
    }

    fn keys(keys: &[Key]) -> impl Iterator<Item = Event> {
        keys.iter().map(|key| Event::Key(*key))
    }

    #[test]
    fn the_chosen_job_stays_chosen_whatever_comes_and_goes_and_the_ends_of_the_list_hold() {
        let view = after(View::default(), [answer(&["job-3", "job-2", "job-1"], None)]);
        assert_eq!(&*view.chosen, "job-3");
        let view = after(view, keys(&[Key::Up, Key::Down]));
        assert_eq!(&*view.chosen, "job-2");
        let view = after(view, [answer(&["job-4", "job-3", "job-2"], None)]);
        assert_eq!((&*view.chosen, view.chosen_place()), ("job-2", 2));
        let view = after(view, keys(&[Key::Down, Key::Down]));
        assert_eq!(&*view.chosen, "job-2");
        let view = after(view, [answer(&["job-4"], None)]);
        assert_eq!(&*view.chosen, "job-4");
    }

    #[test]
    fn a_job_is_opened_and_left_and_an_answer_about_another_one_is_not_shown() {
        let view = after(View::default(), [answer(&["job-2", "job-1"], None)]);
        let view = after(view, keys(&[Key::Down, Key::Open]));
        assert_eq!(view.open.as_deref(), Some("job-1"));
        let view = after(view, [answer(&["job-2", "job-1"], Some("job-2"))]);
        assert_eq!(view.run, None);
        let view = after(view, [answer(&["job-2", "job-1"], Some("job-1"))]);
        assert_eq!(&*view.run.as_ref().unwrap().overview.id, "job-1");
        let view = after(view, keys(&[Key::Back]));
        assert_eq!((view.open, view.run, &*view.chosen), (None, None, "job-1"));
    }

    #[test]
    fn a_run_that_is_alone_is_opened_once_and_one_that_is_named_has_its_id_from_the_answer() {
        let view = after(View::default(), [answer(&["tiny"], None)]);
        assert_eq!(view.open.as_deref(), Some("tiny"));
        let view = after(view, keys(&[Key::Back]).chain([answer(&["tiny"], None)]));
        assert_eq!(view.open, None);
        let named = View::new(String::new(), Some("name of job-1"));
        let named = after(named, [answer(&["job-2", "job-1"], Some("job-1"))]);
        assert_eq!((named.open.as_deref(), &*named.chosen), (Some("job-1"), "job-1"));
    }

    #[test]
    fn in_a_pause_nothing_changes_but_what_is_opened_is_shown() {
        let view = after(View::default(), [answer(&["job-2", "job-1"], None)]);
        let paused = after(view, keys(&[Key::Pause]).chain([answer(&["job-9", "job-8"], None)]));
        assert_eq!(paused.about, Some(about(&["job-2", "job-1"])));
        let opened = after(paused.clone(), keys(&[Key::Open]));
        assert_eq!((opened.is_paused, opened.open.as_deref()), (false, Some("job-2")));
        assert!(!after(paused, keys(&[Key::Pause])).is_paused);
    }

    #[test]
    fn an_absence_begins_with_the_first_failure_and_ends_with_an_answer_also_in_a_pause() {
        let failed = |unix_ms| Event::Failed { why: "refused".into(), unix_ms };
        let view = after(View::default(), [failed(1_000), failed(3_000)]);
        assert_eq!(view.away, Some(Away { since: 1_000, tried: 3_000, why: "refused".into() }));
        let view = after(view, keys(&[Key::Pause]).chain([answer(&[], None)]));
        assert_eq!(view.away, None);
    }

    #[test]
    fn help_goes_with_any_key_and_quitting_ends_it_from_everywhere() {
        let view = after(View::default(), [answer(&["job-2", "job-1"], None)]);
        let helped = after(view.clone(), keys(&[Key::Help]));
        assert!(helped.shows_help);
        assert_eq!(after(helped.clone(), keys(&[Key::Down])), view);
        assert!(after(helped, keys(&[Key::Quit])).has_ended && after(view, keys(&[Key::Quit])).has_ended);
    }

    #[test]
    fn ranks_are_scrolled_within_their_number() {
        let mut view = after(View::default(), [answer(&["job-1"], None), answer(&["job-1"], Some("job-1"))]);
        let ranks = vec![crate::dashboard::top::answers::Place::default(); 3];
        view.run.as_mut().unwrap().job = Some(Job { ranks, ..Job::default() });
        let view = after(view, keys(&[Key::Down; 9]));
        assert_eq!(view.first_rank, 2);
        assert_eq!(after(view, keys(&[Key::Up; 9])).first_rank, 0);
    }
}
