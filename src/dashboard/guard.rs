//! Who may ask, and what a page may load. Pure: knows headers, no socket.

use std::net::{IpAddr, SocketAddr};

/// What a page may load: itself, and nothing from elsewhere. Pictures are made on the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Headers of every answer.
pub const HEADERS: [(&str, &str); 6] = [
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("x-frame-options", "DENY"),
];

/// Name of the cookie that holds the token.
pub const COOKIE: &str = "contraflow_token";

/// Header that every request has to have that changes something: a page of another site cannot set it.
pub const ACTION: &str = "x-contraflow-action";

/// The shortest token that is taken.
const MIN_TOKEN: usize = 16;

/// A token, of which only the hash is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token(blake3::Hash);

impl Token {
    /// From its text.
    ///
    /// **Errors**: it is too short, or no text of a header.
    pub fn new(text: &str) -> Result<Self, String> {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b';' && byte != b',');
        if text.len() < MIN_TOKEN || !is_plain {
            return Err(format!(
                "expected {MIN_TOKEN} or more visible characters, without comma and semicolon"
            ));
        }
        Ok(Token(blake3::hash(text.as_bytes())))
    }

    /// Whether this is its text; takes equally long for all of one length.
    pub fn is(&self, text: &str) -> bool {
        blake3::hash(text.as_bytes()) == self.0
    }
}

/// What of a request is judged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// The host header.
    pub host: Option<&'a str>,
    /// The origin header.
    pub origin: Option<&'a str>,
    /// The authorization header.
    pub authorization: Option<&'a str>,
    /// The cookie header.
    pub cookie: Option<&'a str>,
    /// Whether it may change something.
    pub is_action: bool,
    /// Whether it has the header [`ACTION`].
    pub has_action_header: bool,
    /// Whether it asks for what everybody may see: the page itself, and to log in.
    pub is_public: bool,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It was meant for another host.
    Host,
    /// A page of another site sends it.
    Site,
    /// It needs a token.
    Token,
}

impl Refusal {
    /// HTTP status and words.
    pub fn answer(self) -> (u16, &'static str) {
        match self {
            Refusal::Host => (421, "host: expected the name of this machine's loopback, got another"),
            Refusal::Site => (403, "expected a request of this page, got one of another"),
            Refusal::Token => (401, "token: expected the dashboard's, got none or another"),
        }
    }
}

/// The token that a request shows, in a header or in its cookie.
pub fn shown_token<'a>(asked: &Asked<'a>) -> Option<&'a str> {
    let bearer = asked.authorization.and_then(|header| header.strip_prefix("Bearer "));
    let in_cookie = || {
        let pairs = asked.cookie?.split(';').filter_map(|pair| pair.trim().split_once('='));
        pairs.filter(|(name, _)| *name == COOKIE).map(|(_, value)| value).next()
    };
    bearer.or_else(in_cookie)
}

/// Judges a request to a server that listens at `address`, with the token that it asks for, if it asks for one.
///
/// **Errors**: why it is refused.
pub fn judge(asked: &Asked, address: SocketAddr, token: Option<&Token>) -> Result<(), Refusal> {
    // A name that leads here although it is not this machine's belongs to a page that wants to read what is not its own.
    if address.ip().is_loopback() && !asked.host.is_some_and(is_loopback) {
        return Err(Refusal::Host);
    }
    if asked.is_action {
        let same_site = asked.origin.is_none_or(|origin| host_of(origin) == asked.host);
        if !asked.has_action_header || !same_site {
            return Err(Refusal::Site);
        }
    }
    match token {
        Some(token) if !asked.is_public && !shown_token(asked).is_some_and(|shown| token.is(shown)) => {
            Err(Refusal::Token)
        }
        _ => Ok(()),
    }
}

fn host_of(origin: &str) -> Option<&str> {
    origin.split_once("://").map(|(_, host)| host)
}

/// Whether a host header names the loopback; its port may be that of a tunnel.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: &str = "127.0.0.1:7080";
    const OUTSIDE: &str = "0.0.0.0:7080";

    fn judged(asked: Asked, address: &str, token: Option<&str>) -> Result<(), Refusal> {
        judge(&asked, address.parse().unwrap(), token.map(|text| Token::new(text).unwrap()).as_ref())
    }

    #[test]
    fn a_name_that_is_not_this_machines_is_refused_on_loopback() {
        for host in ["127.0.0.1:7080", "localhost:1", "LOCALHOST", "[::1]:7080", "127.3.2.1"] {
            assert_eq!(judged(Asked { host: Some(host), ..Asked::default() }, LOCAL, None), Ok(()), "{host}");
        }
        let others = [
            "evil.example",
            "evil.example:7080",
            "localhost.evil.example",
            "127.0.0.1.evil.example:7080",
            "10.0.0.1",
            "",
        ];
        for host in others.map(Some).into_iter().chain([None]) {
            let refused = judged(Asked { host, ..Asked::default() }, LOCAL, None);
            assert_eq!(refused, Err(Refusal::Host), "{host:?}");
        }
    }

    #[test]
    fn what_changes_something_comes_from_the_page_itself() {
        let own = Asked { host: Some(LOCAL), is_action: true, has_action_header: true, ..Asked::default() };
        assert_eq!(judged(own, LOCAL, None), Ok(()));
        assert_eq!(judged(Asked { origin: Some("http://127.0.0.1:7080"), ..own }, LOCAL, None), Ok(()));
        for foreign in [
            Asked { has_action_header: false, ..own },
            Asked { origin: Some("http://evil.example"), ..own },
            Asked { origin: Some("http://127.0.0.1:9999"), ..own },
            Asked { origin: Some("null"), ..own },
        ] {
            assert_eq!(judged(foreign, LOCAL, None), Err(Refusal::Site), "{foreign:?}");
        }
    }

    #[test]
    fn a_token_is_asked_for_and_taken_from_header_or_cookie() {
        let secret = "0123456789abcdef";
        let cookie = format!("a=b; {COOKIE}={secret}; c=d");
        let asked = Asked { host: Some("node:7080"), ..Asked::default() };
        for good in [
            Asked { authorization: Some("Bearer 0123456789abcdef"), ..asked },
            Asked { cookie: Some(&cookie), ..asked },
            Asked { is_public: true, ..asked },
        ] {
            assert_eq!(judged(good, OUTSIDE, Some(secret)), Ok(()), "{good:?}");
        }
        for bad in [
            asked,
            Asked { authorization: Some("Bearer 0123456789abcdeg"), ..asked },
            Asked { authorization: Some(secret), ..asked },
            Asked { cookie: Some("contraflow_token="), ..asked },
            Asked { cookie: Some("xcontraflow_token=0123456789abcdef"), ..asked },
        ] {
            assert_eq!(judged(bad, OUTSIDE, Some(secret)), Err(Refusal::Token), "{bad:?}");
        }
        assert!(Token::new("short").is_err() && Token::new("0123456789abcde;f").is_err());
    }

    #[test]
    fn a_page_may_load_nothing_from_elsewhere_and_no_script_of_a_text() {
        let (_, policy) = HEADERS[0];
        assert!(
            policy.starts_with("default-src 'none'")
                && !policy.contains("unsafe")
                && !policy.contains("http")
        );
    }
}
