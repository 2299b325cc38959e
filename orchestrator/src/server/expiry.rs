//! Which certificates and tokens end soon, and how often that is said. Pure: what there is and the time come in.

use std::collections::BTreeMap;

use tracing::Level;

use super::access::{Role, Token};
use super::worker_link::Shown;

const DAY: u64 = 86_400;

/// How long before the end of something it is said. **Units**: seconds.
pub const NOTICE: u64 = 30 * DAY;

/// How long before the end it is an error: somebody has to act.
const URGENT: u64 = 7 * DAY;

/// Something that ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// What it is, as a line of the log names it.
    pub(super) what: String,
    /// What to do.
    pub(super) remedy: String,
    /// **Units**: seconds since 1970.
    pub(super) expires: u64,
    /// Whether the cluster stops working with it.
    pub(super) is_vital: bool,
}

/// The tokens that have not ended at `now`, each until its last line ends.
pub(super) fn of_tokens(tokens: &[Token], now: u64) -> Vec<Ending> {
    let mut last = BTreeMap::new();
    for token in tokens {
        let (expires, is_vital) = last.entry(token.name.as_str()).or_insert((0, false));
        *expires = token.expires.max(*expires);
        *is_vital |= token.role == Role::Worker;
    }
    let ending = |(name, (expires, is_vital))| Ending {
        what: format!("the certificate of {name}"),
        remedy: format!("contraflow certs renew --name {name}"),
        expires,
        is_vital,
    };
    last.into_iter().filter(|(_, (expires, _))| *expires > now).map(ending).collect()
}

/// What workers have shown of tokens that were renewed since: they have not read their new certificate.
pub(super) fn of_links(shown: &[Shown], tokens: &[Token]) -> Vec<Ending> {
    let is_renewed =
        |shown: &&Shown| tokens.iter().any(|token| token.name == shown.user && token.expires > shown.expires);
    let ending = |Shown { worker, user, expires }: &Shown| Ending {
        what: format!("the certificate that worker {worker} shows"),
        remedy: format!("{user} is renewed; copy the folder of {user} to where the worker reads it (--tls)"),
        expires: *expires,
        is_vital: true,
    };
    shown.iter().filter(is_renewed).map(ending).collect()
}

/// What has been said.
#[derive(Debug, Default)]
pub(super) struct Notices {
    /// When a line was last written of something, and at which level.
    told: BTreeMap<String, (u64, Level)>,
}

impl Notices {
    /// The lines that are due at `now`: of each thing one a day, and one as soon as it becomes urgent.
    pub(super) fn due(&mut self, endings: &[Ending], now: u64) -> Vec<(Level, String)> {
        let mut lines = Vec::new();
        for ending in endings {
            let Some(level) = level_of(ending, now) else {
                self.told.remove(&ending.what);
                continue;
            };
            let is_known = |(at, before): &(u64, Level)| *before == level && now < at + DAY;
            if !self.told.get(&ending.what).is_some_and(is_known) {
                self.told.insert(ending.what.clone(), (now, level));
                lines.push((level, words(ending, now)));
            }
        }
        lines
    }
}

fn level_of(ending: &Ending, now: u64) -> Option<Level> {
    match ending.expires.saturating_sub(now) {
        left if left > NOTICE => None,
        left if left > URGENT || !ending.is_vital => Some(Level::WARN),
        _ => Some(Level::ERROR),
    }
}

fn words(Ending { what, remedy, expires, .. }: &Ending, now: u64) -> String {
    let end = match expires.checked_sub(now) {
        None | Some(0) => "has expired".to_owned(),
        Some(left) if left <= DAY => "expires within a day".to_owned(),
        Some(left) => format!("expires in {} days", left.div_ceil(DAY)),
    };
    format!("{what} {end}: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending(is_vital: bool) -> Ending {
        let (what, remedy) = ("the certificate".into(), "contraflow certs renew".into());
        Ending { what, remedy, expires: 100 * DAY, is_vital }
    }

    #[test]
    fn an_end_is_said_once_a_day_from_thirty_days_before_and_aloud_from_seven() {
        let mut notices = Notices::default();
        let hours = 0..=101 * 24;
        let said: Vec<(u64, Level)> = hours
            .flat_map(|hour| {
                let lines = notices.due(&[ending(true)], hour * 3_600);
                lines.into_iter().map(move |(level, _)| (hour, level)).collect::<Vec<_>>()
            })
            .collect();
        let warned = (70..93).map(|day| (24 * day, Level::WARN));
        let urgent = (93..=101).map(|day| (24 * day, Level::ERROR));
        assert_eq!(said, warned.chain(urgent).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_says_what_ends_when_and_what_to_do() {
        for (now, is_vital, expected) in [
            (90 * DAY + 1, true, (Level::WARN, "the certificate expires in 10 days: contraflow certs renew")),
            (99 * DAY, true, (Level::ERROR, "the certificate expires within a day: contraflow certs renew")),
            (99 * DAY, false, (Level::WARN, "the certificate expires within a day: contraflow certs renew")),
            (100 * DAY, true, (Level::ERROR, "the certificate has expired: contraflow certs renew")),
        ] {
            let (level, words) = expected;
            assert_eq!(Notices::default().due(&[ending(is_vital)], now), [(level, words.to_owned())]);
        }
    }

    #[test]
    fn what_was_renewed_is_said_again_when_it_ends_again() {
        let mut notices = Notices::default();
        assert_eq!(notices.due(&[ending(true)], 90 * DAY).len(), 1);
        let renewed = Ending { expires: 200 * DAY, ..ending(true) };
        assert_eq!(notices.due(std::slice::from_ref(&renewed), 90 * DAY + 60), []);
        assert_eq!(notices.due(&[ending(true)], 90 * DAY + 120).len(), 1);
    }

    #[test]
    fn a_renewed_token_ends_with_its_last_line_and_an_expired_one_is_past() {
        let token = |name: &str, role, expires| Token {
            name: name.into(),
            role,
            expires,
            hash: Token::hash(name),
            certificate: None,
        };
        let tokens = [
            token("w1", Role::Worker, 10),
            token("ann", Role::View, 50),
            token("w1", Role::Worker, 90),
            token("gone", Role::Worker, 20),
        ];
        let found = of_tokens(&tokens, 20);
        let found: Vec<_> = found.iter().map(|e| (e.remedy.as_str(), e.expires, e.is_vital)).collect();
        assert_eq!(
            found,
            [
                ("contraflow certs renew --name ann", 50, false),
                ("contraflow certs renew --name w1", 90, true)
            ]
        );
    }

    #[test]
    fn a_worker_that_has_not_read_its_renewed_certificate_is_told_of() {
        let line = |name: &str, expires| Token {
            name: name.into(),
            role: Role::Worker,
            expires,
            hash: Token::hash(name),
            certificate: None,
        };
        let shown = |user: &str| Shown { worker: format!("host-of-{user}"), user: user.into(), expires: 10 };
        let tokens = [line("w1", 10), line("w2", 10), line("w2", 90)];
        let found = of_links(&[shown("w1"), shown("w2"), shown("gone")], &tokens);
        let found: Vec<_> = found.iter().map(|ending| (ending.what.as_str(), ending.expires)).collect();
        assert_eq!(found, [("the certificate that worker host-of-w2 shows", 10)]);
    }
}
