//! Certificates and tokens of clients and workers: issued, renewed, revoked.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use contraflow_orchestrator::server::access::{Revoked, Token, fingerprint, parse_revoked, parse_tokens};
use contraflow_orchestrator::server::{files, fingerprint_of};
use contraflow_runtime::random::from_system;

use super::authority::{Authority, Issued};
use super::{DAY, Issue, Revoke, date, folder};
use crate::failure::Failure;
use crate::output::{print, say};

/// What is needed to issue something.
struct Office {
    ca: String,
    authority: Authority,
    /// The file as it is, comments included.
    text: String,
    tokens: Vec<Token>,
}

impl Office {
    fn open(dir: &Path) -> Result<Self, Failure> {
        let [ca, key, text] = folder::read(dir, [files::CA, files::CA_KEY, files::TOKENS])?;
        let tokens = parse_tokens(&text).map_err(|faults| Failure::faults("tokens", &faults))?;
        let authority = Authority::of(&key).map_err(|error| failed(&dir.join(files::CA_KEY), &error))?;
        Ok(Office { ca, authority, text, tokens })
    }

    fn is_known(&self, name: &str) -> bool {
        self.tokens.iter().any(|token| token.name == name)
    }

    /// A certificate for `name`, the files that its folder gets, and its fingerprint.
    fn certificate(&self, name: &str, until: SystemTime) -> Result<(Files, blake3::Hash), Failure> {
        let issued = self.authority.member(name, until);
        let Issued { certificate, key } = issued.map_err(|error| Failure::run(error.to_string()))?;
        let contents = [
            (files::CA, 0o644, self.ca.clone()),
            (files::CLIENT, 0o644, certificate.pem()),
            (files::CLIENT_KEY, 0o600, key),
        ];
        Ok((contents, fingerprint(certificate.der())))
    }
}

type Files = [(&'static str, u32, String); 3];

fn failed(path: &Path, error: &dyn Display) -> Failure {
    Failure::input(format!("{}: {error}", path.display()))
}

/// Runs `contraflow certs issue`.
///
/// **Errors**: code 2; the name is taken, or the folder is none of an authority.
pub(super) fn issue(args: &Issue) -> Result<(), Failure> {
    let Issue { dir, name, role, expires, replace } = args;
    if !Token::is_name(name) {
        return Err(Failure::input(format!(
            "--name: expected letters, digits, '-', '_' and '.', 64 at most, got {name:?}"
        )));
    }
    let _lock = folder::lock(dir)?;
    let office = Office::open(dir)?;
    if office.is_known(name) && !replace {
        return Err(Failure::input(format!(
            "--name: expected a new name, got {name:?}, which has a token; --replace revokes that"
        )));
    }
    let until = SystemTime::now() + DAY * u32::try_from(*expires).unwrap_or(u32::MAX);
    let (contents, certificate) = office.certificate(name, until)?;
    let secret = secret().map_err(|error| Failure::run(error.to_string()))?;
    let token = Token {
        name: name.clone(),
        role: *role,
        expires: seconds(until),
        hash: Token::hash(&secret),
        certificate: Some(certificate),
    };
    let own_dir = dir.join(name);
    if *replace {
        is_members(&own_dir)?;
        let _ = withdraw(dir, name, &office.tokens)?;
        write_tokens(dir, without(&office.text, name), &token)?;
        folder::exchange(&own_dir, &contents)?;
    } else {
        folder::create(&own_dir, &contents).map_err(|error| folder::is_taken(&own_dir, "--name", &error))?;
        let tokens = dir.join(files::TOKENS);
        // Without its token the certificate is good for nothing.
        folder::append(&tokens, &token).map_err(|error| {
            drop(fs::remove_dir_all(&own_dir));
            failed(&tokens, &error)
        })?;
    }
    say(format_args!(
        "{}: for {name} alone, as --tls; the token, as CONTRAFLOW_TOKEN, is shown this once",
        own_dir.display()
    ));
    print(&format!("{secret}\n"))
}

/// Runs `contraflow certs renew --name NAME`: another certificate for the same token, which is good with the one before, too, until that
/// ends.
///
/// **Errors**: code 2; the name has no token, or the folder is none of an authority.
pub(super) fn renew(dir: &Path, name: &str, days: u64) -> Result<(), Failure> {
    let _lock = folder::lock(dir)?;
    let office = Office::open(dir)?;
    let own = office.tokens.iter().filter(|token| token.name == name).max_by_key(|token| token.expires);
    let Some(own) = own else {
        return Err(Failure::input(format!("--name: expected one that has a token, got {name:?}")));
    };
    let until = SystemTime::now() + DAY * u32::try_from(days).unwrap_or(u32::MAX);
    let (contents, certificate) = office.certificate(name, until)?;
    let renewed = Token { expires: seconds(until), certificate: Some(certificate), ..own.clone() };
    let own_dir = dir.join(name);
    is_members(&own_dir)?;
    // The orchestrator knows the certificate before anybody can show it.
    write_tokens(dir, without_expired(&office.text, name, seconds(SystemTime::now())), &renewed)?;
    folder::exchange(&own_dir, &contents)?;
    print(&format!(
        "{}: renewed until {}, for the same token; copy it to where {name} reads it (--tls): running workers take it up\n",
        own_dir.display(),
        date(until)
    ))
}

/// Runs `contraflow certs revoke`: takes the lines of a name out of the tokens, and puts its certificates on the list of those that
/// are not accepted.
///
/// **Errors**: code 2; nothing was issued under the name.
pub(super) fn revoke(Revoke { dir, name }: &Revoke) -> Result<(), Failure> {
    let _lock = folder::lock(dir)?;
    let [text] = folder::read(dir, [files::TOKENS])?;
    let tokens = parse_tokens(&text).map_err(|faults| Failure::faults("tokens", &faults))?;
    let certificates = withdraw(dir, name, &tokens)?;
    if certificates == 0 && !tokens.iter().any(|token| token.name == *name) {
        return Err(Failure::input(format!("--name: expected one that was issued, got {name:?}")));
    }
    let path = dir.join(files::TOKENS);
    folder::replace(&path, 0o600, &without(&text, name)).map_err(|error| failed(&path, &error))?;
    print(&format!("{name}: its certificate and its token are revoked\n"))
}

/// Puts every certificate of a name on the list of those that are not accepted: those of its tokens, and that of its folder. How many
/// they are.
fn withdraw(dir: &Path, name: &str, tokens: &[Token]) -> Result<usize, Failure> {
    let path = dir.join(files::REVOKED);
    let text = if path.exists() { folder::read(dir, [files::REVOKED])?.concat() } else { String::new() };
    let mut listed = parse_revoked(&text).map_err(|faults| Failure::faults("revoked", &faults))?;
    let of_tokens = tokens.iter().filter(|token| token.name == name).filter_map(|token| token.certificate);
    let of_folder = fingerprint_of(&dir.join(name).join(files::CLIENT)).ok();
    let all: Vec<blake3::Hash> = of_tokens.chain(of_folder).collect();
    for &certificate in &all {
        if listed.iter().all(|revoked| revoked.certificate != certificate) {
            let revoked = Revoked { name: name.to_owned(), certificate };
            folder::append(&path, &revoked).map_err(|error| failed(&path, &error))?;
            listed.push(revoked);
        }
    }
    Ok(all.len())
}

/// Refuses to write into a folder that is not a client's or worker's.
fn is_members(dir: &Path) -> Result<(), Failure> {
    if dir.exists() && !dir.join(files::CLIENT).exists() {
        return Err(Failure::input(format!(
            "--name: {}: expected a folder with {}",
            dir.display(),
            files::CLIENT
        )));
    }
    Ok(())
}

fn write_tokens(dir: &Path, before: String, token: &Token) -> Result<(), Failure> {
    let path: PathBuf = dir.join(files::TOKENS);
    folder::replace(&path, 0o600, &format!("{before}{token}\n")).map_err(|error| failed(&path, &error))
}

/// The lines that are not of this name.
fn without(text: &str, name: &str) -> String {
    let is_other = |line: &&str| line.split_whitespace().next() != Some(name);
    text.lines().filter(is_other).map(|line| format!("{line}\n")).collect()
}

/// The same, but only of those that have ended at `now` (**units**: seconds since 1970).
fn without_expired(text: &str, name: &str, now: u64) -> String {
    let has_ended = |line: &str| {
        let mut fields = line.split_whitespace();
        let is_of_name = fields.next() == Some(name);
        is_of_name && fields.nth(1).and_then(|end| end.parse().ok()).is_some_and(|end: u64| end <= now)
    };
    text.lines().filter(|line| !has_ended(line)).map(|line| format!("{line}\n")).collect()
}

/// **Units**: since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// 256 random bits as a token's text.
fn secret() -> io::Result<String> {
    Ok(from_system::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_one_name_go_and_others_stay_as_they_are() {
        let text = "# NAME\nann view 5 a b\nanna view 5 a b\n\n ann view 9 a c\nbob worker 5 x";
        assert_eq!(without(text, "ann"), "# NAME\nanna view 5 a b\n\nbob worker 5 x\n");
        assert_eq!(
            without_expired(text, "ann", 5),
            "# NAME\nanna view 5 a b\n\n ann view 9 a c\nbob worker 5 x\n"
        );
        assert_eq!(without_expired(text, "ann", 4).lines().count(), 6);
    }
}
