//! The screen and the keys. It is given back as it was, however this ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::{mpsc, watch};

use super::asking::Asking;
use super::draw::draw;
use super::link::Trouble;
use super::look::Look;
use super::view::{Event, Key, View, update};
use super::{PAUSE, event as event_of, failure};
use crate::failure::Failure;
use crate::interrupt::Signals;

/// How long the thread of the keys waits before it looks whether it is over.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Keys and answers that wait to be shown.
const MAX_WAITING: usize = 64;

/// What a key does; none of it is nothing.
fn key_of(key: KeyEvent) -> Option<Key> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        // Of a terminal in raw mode these come as keys.
        return matches!(key.code, KeyCode::Char('c' | 'd')).then_some(Key::Quit);
    }
    Some(match key.code {
        KeyCode::Char('q') => Key::Quit,
        KeyCode::Char('?' | 'h') => Key::Help,
        KeyCode::Char('p') => Key::Pause,
        KeyCode::Char('k') | KeyCode::Up => Key::Up,
        KeyCode::Char('j') | KeyCode::Down => Key::Down,
        KeyCode::Enter | KeyCode::Right => Key::Open,
        KeyCode::Esc | KeyCode::Left | KeyCode::Backspace => Key::Back,
        _ => return None,
    })
}

/// What the thread of the keys has to say.
enum Input {
    Key(Key),
    /// The terminal has another size.
    Resized,
    /// There is nothing to read any more.
    Lost(io::Error),
}

/// Gives the screen back; a panic does so by the hook that the library has set.
struct Screen {
    is_over: Arc<AtomicBool>,
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        ratatui::restore();
    }
}

/// Shows the view until a key or a signal ends it.
///
/// **Errors**: code 2 or 1 if the first question is refused or has no answer, before the screen is taken; code 1 if the terminal is lost.
pub async fn live(mut view: View, mut asking: Asking, look: Look) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let first = tokio::select! {
        first = asking.ask(view.open.as_deref()) => first,
        _ = signals.next() => return Ok(()),
    };
    view = update(view.clone(), first.map_err(|trouble| failure(&view.source, trouble))?);
    let lost = |error: io::Error| Failure::run(format!("terminal: {error}"));
    let (wanted, mut wishes) = watch::channel(view.open.as_deref().map(str::to_owned));
    // What the first answer has opened is asked for at once.
    wishes.mark_changed();
    let (answers, mut answered) = mpsc::channel(MAX_WAITING);
    let mut asker = tokio::spawn(ask(asking, wishes, answers));
    let is_over = Arc::new(AtomicBool::new(false));
    let screen = Screen { is_over: is_over.clone() };
    let mut terminal = ratatui::try_init().map_err(lost)?;
    let (keys, mut pressed) = mpsc::channel(MAX_WAITING);
    std::thread::Builder::new()
        .name("keys".into())
        .spawn(move || read_keys(&keys, &is_over))
        .map_err(lost)?;
    let ended = loop {
        if view.has_ended {
            break Ok(());
        }
        if let Err(error) = terminal.draw(|frame| draw(&view, look, frame)) {
            break Err(lost(error));
        }
        let happened = tokio::select! {
            Some(input) = pressed.recv() => match input {
                Input::Key(key) => Event::Key(key),
                Input::Resized => continue,
                Input::Lost(error) => break Err(lost(error)),
            },
            Some(answer) = answered.recv() => event_of(answer),
            _ = signals.next() => break Ok(()),
            // It asks for as long as it is listened to: it has ended for a fault of its own, which has been said.
            _ = &mut asker => break Err(Failure::run("top: no more questions are asked")),
        };
        view = update(view, happened);
        let open = view.open.as_deref().map(str::to_owned);
        wanted.send_if_modified(|wanted| {
            let is_other = *wanted != open;
            *wanted = open;
            is_other
        });
    };
    drop(screen);
    asker.abort();
    ended
}

/// Asks once a second, and at once when something else is opened.
async fn ask(
    mut asking: Asking,
    mut wishes: watch::Receiver<Option<String>>,
    answers: mpsc::Sender<Result<Event, Trouble>>,
) {
    loop {
        let pause = tokio::time::timeout(PAUSE, wishes.changed()).await;
        if matches!(pause, Ok(Err(_))) {
            return;
        }
        let open = wishes.borrow_and_update().clone();
        let answer = asking.ask(open.as_deref()).await;
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

fn read_keys(keys: &mpsc::Sender<Input>, is_over: &AtomicBool) {
    while !is_over.load(Ordering::Relaxed) {
        let read = event::poll(LOOK_AGAIN).and_then(|is_there| is_there.then(event::read).transpose());
        let input = match read {
            Ok(Some(event::Event::Key(key))) => key_of(key).map(Input::Key),
            Ok(Some(event::Event::Resize(..))) => Some(Input::Resized),
            Ok(_) => None,
            Err(error) => Some(Input::Lost(error)),
        };
        let is_last = matches!(input, Some(Input::Lost(_)));
        let Some(input) = input else { continue };
        if keys.blocking_send(input).is_err() || is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_what_the_help_says_and_a_key_that_is_let_go_does_nothing() {
        let plain = |code| key_of(KeyEvent::new(code, KeyModifiers::NONE));
        let control = |c| key_of(KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL));
        for (code, key) in [
            (KeyCode::Char('q'), Key::Quit),
            (KeyCode::Char('j'), Key::Down),
            (KeyCode::Down, Key::Down),
            (KeyCode::Char('k'), Key::Up),
            (KeyCode::Up, Key::Up),
            (KeyCode::Enter, Key::Open),
            (KeyCode::Esc, Key::Back),
            (KeyCode::Char('?'), Key::Help),
            (KeyCode::Char('p'), Key::Pause),
        ] {
            assert_eq!(plain(code), Some(key), "{code:?}");
        }
        assert_eq!((control('c'), control('q'), plain(KeyCode::Char('x'))), (Some(Key::Quit), None, None));
        let released = KeyEvent::new_with_kind(KeyCode::Char('q'), KeyModifiers::NONE, KeyEventKind::Release);
        assert_eq!(key_of(released), None);
    }
}
