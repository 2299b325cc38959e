//! Who may call what: roles, the one table of methods, and the lines of the files of tokens and of revoked certificates. Knows no
//! connection and no clock.
//!
//! A token is 256 random bits and is handed out once; what is kept of it is its hash, so that the file reveals no token. It is
//! good only with the certificate that it was issued with; where that was renewed it has a line for each of them.

use std::fmt;
use std::str::FromStr;

use tonic::Status;

/// What the holder of a token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Look: jobs, steps, logs, nodes.
    View,
    /// Also submit and cancel jobs.
    Submit,
    /// Also take nodes out of use, and remove jobs with their files.
    Admin,
    /// Host ranks, and nothing else.
    Worker,
}

impl Role {
    /// Every role there is.
    pub const ALL: [Role; 4] = [Role::View, Role::Submit, Role::Admin, Role::Worker];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Role::View => "view",
            Role::Submit => "submit",
            Role::Admin => "admin",
            Role::Worker => "worker",
        }
    }

    /// Whether it is enough where `needed` is asked for.
    pub fn covers(self, needed: Role) -> bool {
        match (self, needed) {
            (Role::Worker, needed) => needed == Role::Worker,
            (_, Role::Worker) => false,
            (own, needed) => own as u8 >= needed as u8,
        }
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected view, submit, admin or worker, got {text:?}");
        Role::ALL.into_iter().find(|role| role.name() == text).ok_or_else(expected)
    }
}

/// The method that is limited in how often it may be called.
pub const SUBMIT: &str = "/contraflow.v1.JobService/Submit";

/// The role that a method needs; none: any client with a certificate. What is not in the table is for admins, so that a new
/// method is never open by mistake.
pub fn needed(method: &str) -> Option<Role> {
    Some(match method {
        "/contraflow.v1.JobService/Get"
        | "/contraflow.v1.JobService/List"
        | "/contraflow.v1.JobService/Watch"
        | "/contraflow.v1.JobService/Logs"
        | "/contraflow.v1.ClusterService/Nodes"
        | "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo" => Role::View,
        SUBMIT
        | "/contraflow.v1.JobService/Cancel"
        | "/contraflow.v1.JobService/Retry"
        | "/contraflow.v1.JobService/Scale" => Role::Submit,
        "/contraflow.v1.ClusterService/Drain" | "/contraflow.v1.JobService/Remove" => Role::Admin,
        "/contraflow.v1.ControlService/Attach" => Role::Worker,
        "/grpc.health.v1.Health/Check" | "/grpc.health.v1.Health/Watch" => return None,
        _ => Role::Admin,
    })
}

/// A token as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Whom it was issued to.
    pub name: String,
    /// What it is good for.
    pub role: Role,
    /// **Units**: seconds since 1970.
    pub expires: u64,
    /// Of the token's text; its comparison takes the same time whatever is compared.
    pub hash: blake3::Hash,
    /// [`fingerprint`] of the certificate it was issued with; none: any certificate of the authority will do.
    pub certificate: Option<blake3::Hash>,
}

/// Identifies a certificate: of its DER form.
pub fn fingerprint(der: &[u8]) -> blake3::Hash {
    blake3::hash(der)
}

/// A certificate that is not accepted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Whom it was issued to.
    pub name: String,
    /// Its [`fingerprint`].
    pub certificate: blake3::Hash,
}

impl Revoked {
    fn parse(line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, certificate] = fields[..] else {
            return Err(format!("expected NAME FINGERPRINT, got {} fields", fields.len()));
        };
        if !Token::is_name(name) {
            return Err(BAD_NAME.into());
        }
        let certificate = hash(certificate).map_err(|reason| format!("fingerprint: {reason}"))?;
        Ok(Revoked { name: name.to_owned(), certificate })
    }
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.certificate.to_hex())
    }
}

const BAD_NAME: &str = "name: expected letters, digits, '-', '_' and '.', 64 at most";

/// The text is not repeated: it may be the token itself.
fn hash(text: &str) -> Result<blake3::Hash, &'static str> {
    blake3::Hash::from_hex(text).map_err(|_| "expected 64 hexadecimal digits")
}

impl Token {
    /// What is kept of `secret`.
    pub fn hash(secret: &str) -> blake3::Hash {
        blake3::hash(secret.as_bytes())
    }

    /// Whether one can be issued under this name: it becomes the name of a folder and a field of a line.
    pub fn is_name(name: &str) -> bool {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(is_plain)
    }

    fn parse(line: &str) -> Result<Token, String> {
        let reason: Vec<&str> = line.split_whitespace().collect();
        let (name, role, expires, own, certificate) = match reason[..] {
            [name, role, expires, own] => (name, role, expires, own, None),
            [name, role, expires, own, certificate] => (name, role, expires, own, Some(certificate)),
            _ => {
                let expected = "expected NAME ROLE EXPIRES HASH FINGERPRINT";
                return Err(format!("{expected}, got {} fields", reason.len()));
            }
        };
        if !Token::is_name(name) {
            return Err(BAD_NAME.into());
        }
        let certificate = certificate.map(hash).transpose();
        Ok(Token {
            name: name.to_owned(),
            role: role.parse().map_err(|error| format!("role: {error}"))?,
            expires: expires
                .parse()
                .map_err(|_| format!("expires: expected seconds since 1970, got {expires:?}"))?,
            hash: hash(own).map_err(|reason| format!("hash: {reason}"))?,
            certificate: certificate.map_err(|reason| format!("fingerprint: {reason}"))?,
        })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.name, self.role.name(), self.expires, self.hash.to_hex())?;
        self.certificate.iter().try_for_each(|certificate| write!(f, " {}", certificate.to_hex()))
    }
}

/// Reads a tokens file: a token a line, empty lines and those that begin with `#` count for nothing.
///
/// **Errors**: every line that makes no sense.
pub fn parse_tokens(text: &str) -> Result<Vec<Token>, Vec<String>> {
    parse_lines(text, Token::parse)
}

/// Reads a list of revoked certificates, one a line, as [`parse_tokens`] does.
///
/// **Errors**: every line that makes no sense.
pub fn parse_revoked(text: &str) -> Result<Vec<Revoked>, Vec<String>> {
    parse_lines(text, Revoked::parse)
}

fn parse_lines<T>(text: &str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Vec<String>> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        match parse(line) {
            Ok(entry) => found.push(entry),
            Err(fault) => faults.push(format!("line {number}: {fault}")),
        }
    }
    if faults.is_empty() { Ok(found) } else { Err(faults) }
}

/// What a caller shows.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The `authorization` header.
    pub authorization: Option<String>,
    /// [`fingerprint`] of its certificate.
    pub certificate: Option<blake3::Hash>,
}

/// **Errors**: `UNAUTHENTICATED`; the certificate is revoked.
pub fn judge_certificate(revoked: &[Revoked], certificate: Option<blake3::Hash>) -> Result<(), Status> {
    match revoked.iter().find(|revoked| Some(revoked.certificate) == certificate) {
        Some(Revoked { name, .. }) => {
            Err(Status::unauthenticated(format!("certificate: that of {name} is revoked")))
        }
        None => Ok(()),
    }
}

/// Whether somebody with these credentials may call `method` at `now` (**units**: seconds since 1970): the token that gives the
/// right, `None` where none is needed. One that is shown has to be good all the same.
///
/// **Errors**: `UNAUTHENTICATED` or `PERMISSION_DENIED`, with a message that never contains the token.
pub fn judge<'a>(
    tokens: &'a [Token],
    credentials: &Credentials,
    method: &str,
    now: u64,
) -> Result<Option<&'a Token>, Status> {
    let needed = needed(method);
    if needed.is_none() && credentials.authorization.is_none() {
        return Ok(None);
    }
    let unknown = |why: &str| Status::unauthenticated(format!("token: {why}"));
    let Some(authorization) = &credentials.authorization else {
        return Err(unknown("expected one (--token, CONTRAFLOW_TOKEN), got none"));
    };
    let Some(secret) = authorization.strip_prefix("Bearer ") else {
        return Err(unknown("expected the header \"authorization: Bearer TOKEN\", got something else"));
    };
    let hash = Token::hash(secret);
    // All are compared, so that timing reveals nothing.
    let lines: Vec<&Token> = tokens.iter().filter(|token| token.hash == hash).collect();
    let Some(first) = lines.first() else {
        return Err(unknown("expected one issued by this cluster, got another"));
    };
    let is_bound_to =
        |token: &&&Token| token.certificate.is_none() || token.certificate == credentials.certificate;
    let Some(token) = lines.iter().filter(is_bound_to).max_by_key(|token| token.expires) else {
        return Err(unknown(&format!("that of {} is good with its own certificate only", first.name)));
    };
    if token.expires <= now {
        let ago = now - token.expires;
        return Err(unknown(&format!("that of {} has expired {ago} s ago", token.name)));
    }
    if let Some(needed) = needed.filter(|needed| !token.role.covers(*needed)) {
        let method = method.rsplit(['/', '.']).take(2).collect::<Vec<_>>();
        let method = method.into_iter().rev().collect::<Vec<_>>().join("/");
        return Err(Status::permission_denied(format!(
            "token: {method} needs the role {}, that of {} has {}",
            needed.name(),
            token.name,
            token.role.name()
        )));
    }
    Ok(Some(token))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic::Code;

    use super::*;

    /// What the table has to say, written the other way round: by role.
    const RIGHTS: [(Role, &[&str]); 4] = [
        (
            Role::View,
            &[
                "JobService/Get",
                "JobService/List",
                "JobService/Watch",
                "JobService/Logs",
                "ClusterService/Nodes",
            ],
        ),
        (Role::Submit, &["JobService/Submit", "JobService/Cancel", "JobService/Retry", "JobService/Scale"]),
        (Role::Admin, &["ClusterService/Drain", "JobService/Remove"]),
        (Role::Worker, &["ControlService/Attach"]),
    ];

    fn token(role: Role, secret: &str) -> Token {
        Token { name: role.name().into(), role, expires: 100, hash: Token::hash(secret), certificate: None }
    }

    fn header(text: &str) -> Credentials {
        Credentials { authorization: Some(text.into()), certificate: None }
    }

    fn code(tokens: &[Token], secret: &str, method: &str, now: u64) -> Option<Code> {
        judge(tokens, &header(&format!("Bearer {secret}")), method, now).err().map(|status| status.code())
    }

    #[test]
    fn a_token_is_good_with_the_certificate_it_was_issued_with() {
        let [own, other] = [b"own", b"not"].map(|der| fingerprint(der));
        let tokens = [Token { certificate: Some(own), ..token(Role::Admin, "secret") }];
        let with = |certificate| {
            let credentials = Credentials { certificate, ..header("Bearer secret") };
            judge(&tokens, &credentials, SUBMIT, 0).map(|token| token.map(|token| token.name.as_str()))
        };
        assert_eq!(with(Some(own)).unwrap(), Some("admin"));
        for certificate in [Some(other), None] {
            let refused = with(certificate).unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated);
            assert_eq!(refused.message(), "token: that of admin is good with its own certificate only");
        }
    }

    #[test]
    fn a_token_is_good_with_each_of_its_certificates_for_as_long_as_that_is() {
        let [old, new, other] = [b"old", b"new", b"not"].map(|der| fingerprint(der));
        let line = |certificate, expires| Token {
            certificate: Some(certificate),
            expires,
            ..token(Role::Worker, "secret")
        };
        for tokens in [[line(old, 100), line(new, 200)], [line(new, 200), line(old, 100)]] {
            let expires = |certificate, now| {
                let credentials = Credentials { certificate: Some(certificate), ..header("Bearer secret") };
                let judged = judge(&tokens, &credentials, "/contraflow.v1.ControlService/Attach", now);
                judged.map(|token| token.unwrap().expires).map_err(|refused| refused.message().to_owned())
            };
            assert_eq!((expires(old, 99), expires(new, 99)), (Ok(100), Ok(200)));
            assert_eq!(expires(old, 103), Err("token: that of worker has expired 3 s ago".into()));
            assert_eq!(expires(new, 103), Ok(200));
            let refused = "token: that of worker is good with its own certificate only";
            assert_eq!(expires(other, 99), Err(refused.into()));
        }
    }

    #[test]
    fn a_revoked_certificate_is_good_for_nothing() {
        let [own, other] = [b"own", b"not"].map(|der| fingerprint(der));
        let revoked = Revoked { name: "ann".into(), certificate: own };
        let list = parse_revoked(&format!("# comment\n{revoked}\n")).unwrap();
        assert_eq!(list, std::slice::from_ref(&revoked));
        let refused = judge_certificate(&list, Some(own)).unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::Unauthenticated, "certificate: that of ann is revoked")
        );
        assert!(judge_certificate(&list, Some(other)).is_ok() && judge_certificate(&list, None).is_ok());
        let faults = parse_revoked("ann\n../b 00\nann 00").unwrap_err();
        assert_eq!(faults[0], "line 1: expected NAME FINGERPRINT, got 1 fields");
        assert_eq!(faults[2], "line 3: fingerprint: expected 64 hexadecimal digits");
    }

    #[test]
    fn roles_may_call_what_they_are_for_and_nothing_else() {
        let tokens = Role::ALL.map(|role| token(role, role.name()));
        for (index, own) in Role::ALL.into_iter().enumerate() {
            for (other, (_, methods)) in RIGHTS.iter().enumerate() {
                let may = if own == Role::Worker { other == index } else { other <= index };
                for method in *methods {
                    let method = format!("/contraflow.v1.{method}");
                    let denied = (!may).then_some(Code::PermissionDenied);
                    assert_eq!(code(&tokens, own.name(), &method, 99), denied, "{own:?} {method}");
                }
            }
        }
    }

    #[test]
    fn every_method_of_the_protocol_has_a_row_and_others_are_for_admins() {
        let rows: Vec<String> =
            RIGHTS.iter().flat_map(|(_, methods)| *methods).map(|m| (*m).to_owned()).collect();
        let protocol = include_str!("../../../proto/contraflow/v1/jobs.proto").to_owned()
            + include_str!("../../../proto/contraflow/v1/cluster.proto")
            + include_str!("../../../proto/contraflow/v1/control.proto");
        let mut service = "";
        for line in protocol.lines().map(str::trim) {
            let mut reason = line.split([' ', '(']);
            match reason.next() {
                Some("service") => service = line.split(' ').nth(1).unwrap(),
                Some("rpc") => {
                    let method = format!("{service}/{}", reason.next().unwrap());
                    assert!(rows.contains(&method), "{method} is in no row");
                }
                _ => {}
            }
        }
        assert_eq!(needed("/contraflow.v1.JobService/Later"), Some(Role::Admin));
    }

    #[test]
    fn a_call_without_a_valid_token_is_refused_with_the_reason() {
        let tokens = [token(Role::View, "right"), token(Role::Admin, "other")];
        let method = "/contraflow.v1.JobService/Get";
        for (header, now, reason) in [
            (None, 0, "got none"),
            (Some("Basic right"), 0, "authorization: Bearer TOKEN"),
            (Some("Bearer wrong"), 0, "issued by this cluster"),
            (Some("Bearer "), 0, "issued by this cluster"),
            (Some("Bearer right"), 103, "that of view has expired 3 s ago"),
        ] {
            let credentials = Credentials { authorization: header.map(str::to_owned), certificate: None };
            let refused = judge(&tokens, &credentials, method, now).unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated);
            assert!(refused.message().contains(reason), "{refused:?}");
        }
        assert!(judge(&tokens, &header("Bearer right"), method, 99).is_ok());
        assert_eq!(code(&tokens, "right", method, 100), Some(Code::Unauthenticated));
        let refused = judge(&tokens, &header("Bearer right"), SUBMIT, 0).unwrap_err();
        assert_eq!(
            refused.message(),
            "token: JobService/Submit needs the role submit, that of view has view"
        );
        const CHECK: &str = "/grpc.health.v1.Health/Check";
        assert!(judge(&[], &Credentials::default(), CHECK, 0).is_ok());
        let tokens = [token(Role::Worker, "secret")];
        assert_eq!(code(&tokens, "secret", CHECK, 99), None, "whatever its role");
        assert_eq!(code(&tokens, "secret", CHECK, 100), Some(Code::Unauthenticated));
        assert_eq!(code(&tokens, "another", CHECK, 0), Some(Code::Unauthenticated));
    }

    #[test]
    fn every_line_that_makes_no_sense_is_named() {
        let good = token(Role::Worker, "secret");
        let text = format!("# comment\n\n{good}\n");
        assert_eq!(parse_tokens(&text).unwrap(), std::slice::from_ref(&good));
        let hash = good.hash.to_hex();
        let text = format!(
            "a view\nb boss 1 {hash}\n{good}\n../c view 1 {hash}\nd view soon {hash}\ne view 1 secret"
        );
        let faults = parse_tokens(&text).unwrap_err();
        assert_eq!(faults.len(), 5);
        for (fault, reason) in faults.iter().zip([
            "line 1: expected NAME ROLE EXPIRES HASH FINGERPRINT, got 2 fields",
            "line 2: role: expected view, submit, admin or worker, got \"boss\"",
            "line 4: name: expected letters",
            "line 5: expires: expected seconds since 1970, got \"soon\"",
            "line 6: hash: expected 64 hexadecimal digits",
        ]) {
            assert!(fault.starts_with(reason), "{fault}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_no_token(text in "\\PC{0,200}", header in "\\PC{0,80}") {
            let tokens = parse_tokens(&text).unwrap_or_default();
            let credentials = Credentials { authorization: Some(header), certificate: None };
            prop_assert!(judge(&tokens, &credentials, SUBMIT, 0).is_err());
        }

        #[test]
        fn a_line_round_trips(name in "[a-z][a-z0-9._-]{0,20}", role in 0..4usize, expires: u64, secret: u64, is_bound: bool) {
            let hash = Token::hash(&secret.to_string());
            let certificate = is_bound.then(|| fingerprint(&secret.to_le_bytes()));
            let token = Token { name, role: Role::ALL[role], expires, hash, certificate };
            prop_assert_eq!(parse_tokens(&token.to_string()).unwrap(), [token]);
        }
    }
}
