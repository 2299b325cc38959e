//! `contraflow certs`: the cluster's own certificate authority, and what it issues: certificates and tokens.
//!
//! A folder appears whole under its name or not at all, and nothing is ever overwritten.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contraflow_orchestrator::server::access::{Revoked, Role, Token, fingerprint, parse_tokens};
use contraflow_orchestrator::server::{files, fingerprint_of};
use contraflow_runtime::random::from_system;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::failure::Failure;
use crate::output::{print, say};

/// How long the authority and the orchestrator's certificate hold.
const YEARS_10: Duration = Duration::from_secs(3652 * 86_400);

/// What the authority calls itself; its certificates say so too.
const CA_NAME: &str = "contraflow cluster";

/// Arguments of `contraflow certs`.
#[derive(clap::Args, Debug)]
pub struct CertsArgs {
    #[command(subcommand)]
    command: CertsCommand,
}

#[derive(clap::Subcommand, Debug)]
enum CertsCommand {
    /// Create a CA, the orchestrator's certificate, and an empty list of tokens
    Init(Init),
    /// Issue a certificate for a client or worker, and print its token
    Issue(Issue),
    /// Revoke a certificate and its token: calls are refused at once, open streams end within seconds
    Revoke(Revoke),
}

#[derive(clap::Args, Debug)]
struct Init {
    /// The new folder
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Host name or address of the orchestrator, besides localhost; may be repeated
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct Issue {
    /// Folder of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the client or worker; the certificate goes into DIR/NAME
    #[arg(long)]
    name: String,
    /// Role of the token: view, submit, admin or worker
    #[arg(long)]
    role: Role,
    /// Validity of certificate and token in days
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=3650))]
    expires: u64,
}

#[derive(clap::Args, Debug)]
struct Revoke {
    /// Folder of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the client or worker
    #[arg(long)]
    name: String,
}

/// Runs the command.
///
/// **Errors**: code 2; something is there already, or the folder cannot be read or written.
pub fn run(args: &CertsArgs) -> Result<(), Failure> {
    match &args.command {
        CertsCommand::Init(args) => init(args),
        CertsCommand::Issue(args) => issue(args),
        CertsCommand::Revoke(args) => revoke(args),
    }
}

fn init(args: &Init) -> Result<(), Failure> {
    let failed = |error: rcgen::Error| Failure::input(format!("--host: {error}"));
    let (ca_key, key) = (KeyPair::generate().map_err(failed)?, KeyPair::generate().map_err(failed)?);
    let until = SystemTime::now() + YEARS_10;
    let ca = ca_params(until).self_signed(&ca_key).map_err(failed)?;
    let hosts = ["localhost", "127.0.0.1", "::1"].into_iter().map(str::to_owned);
    let names = hosts.chain(args.hosts.iter().cloned()).collect();
    let server = params(names, "orchestrator", ExtendedKeyUsagePurpose::ServerAuth, until).map_err(failed)?;
    let issuer = Issuer::new(ca_params(until), &ca_key);
    let server = server.signed_by(&key, &issuer).map_err(failed)?;
    let dir = &args.dir;
    new_folder(
        dir,
        &[
            (files::CA, 0o644, ca.pem()),
            (files::CA_KEY, 0o600, ca_key.serialize_pem()),
            (files::SERVER, 0o644, server.pem()),
            (files::SERVER_KEY, 0o600, key.serialize_pem()),
            (
                files::TOKENS,
                0o600,
                "# NAME ROLE EXPIRES HASH FINGERPRINT; removing a line revokes its token\n".into(),
            ),
        ],
    )
    .map_err(|error| is_taken(dir, "--dir", &error))?;
    let dir = dir.display();
    print(&format!(
        "{dir}: a new authority. The orchestrator: contraflow orchestrator --tls {dir} ...\n\
         Everybody else: contraflow certs issue --dir {dir} --name NAME --role view|submit|admin|worker\n"
    ))
}

fn issue(args: &Issue) -> Result<(), Failure> {
    let Issue { dir, name, role, expires } = args;
    if !Token::is_name(name) {
        return Err(Failure::input(format!(
            "--name: expected letters, digits, '-', '_' and '.', 64 at most, got {name:?}"
        )));
    }
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path)
            .map_err(|error| format!("{}: {error}; made by contraflow certs init", path.display()))
    };
    let (ca, key, tokens) = match (read(files::CA), read(files::CA_KEY), read(files::TOKENS)) {
        (Ok(ca), Ok(key), Ok(tokens)) => (ca, key, tokens),
        (ca, key, tokens) => {
            let faults: Vec<String> = [ca.err(), key.err(), tokens.err()].into_iter().flatten().collect();
            return Err(Failure::faults("--dir", &faults));
        }
    };
    let known = parse_tokens(&tokens).map_err(|faults| Failure::faults("tokens", &faults))?;
    if known.iter().any(|token| token.name == *name) {
        return Err(Failure::input(format!("--name: expected a new name, got {name:?}, which has a token")));
    }
    let until = SystemTime::now() + Duration::from_secs(expires * 86_400);
    let (own, own_key) = certificate(&key, name, until)
        .map_err(|error| Failure::input(format!("{}: {error}", dir.display())))?;
    let secret = secret().map_err(|error| Failure::run(error.to_string()))?;
    let since = until.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let certificate = Some(fingerprint(own.der()));
    let token =
        Token { name: name.clone(), role: *role, expires: since, hash: Token::hash(&secret), certificate };
    let own_dir = dir.join(name);
    new_folder(
        &own_dir,
        &[(files::CA, 0o644, ca), (files::CLIENT, 0o644, own.pem()), (files::CLIENT_KEY, 0o600, own_key)],
    )
    .map_err(|error| is_taken(&own_dir, "--name", &error))?;
    append(&dir.join(files::TOKENS), &token).map_err(|error| {
        // Without its token the certificate is good for nothing.
        drop(fs::remove_dir_all(&own_dir));
        Failure::input(format!("{}: {error}", dir.join(files::TOKENS).display()))
    })?;
    say(format_args!(
        "{}: for {name} alone, as --tls; the token, as CONTRAFLOW_TOKEN, is shown this once",
        own_dir.display()
    ));
    print(&format!("{secret}\n"))
}

/// Takes the lines of a name out of the tokens, and puts its certificate on the list of those that are not accepted.
fn revoke(args: &Revoke) -> Result<(), Failure> {
    let Revoke { dir, name } = args;
    let path = dir.join(files::TOKENS);
    let failed =
        |path: &Path, error: &dyn std::fmt::Display| Failure::input(format!("{}: {error}", path.display()));
    let text = fs::read_to_string(&path).map_err(|error| failed(&path, &error))?;
    let tokens = parse_tokens(&text).map_err(|faults| Failure::faults("tokens", &faults))?;
    let own = tokens.iter().find(|token| token.name == *name);
    let certificate = match own.and_then(|token| token.certificate) {
        Some(certificate) => certificate,
        None => fingerprint_of(&dir.join(name).join(files::CLIENT)).map_err(|error| {
            Failure::input(format!("--name: expected one that was issued, got {name:?}: {error}"))
        })?,
    };
    let revoked = dir.join(files::REVOKED);
    append(&revoked, &Revoked { name: name.clone(), certificate })
        .map_err(|error| failed(&revoked, &error))?;
    let is_other = |line: &&str| line.split_whitespace().next() != Some(name.as_str());
    let kept: String = text.lines().filter(is_other).map(|line| format!("{line}\n")).collect();
    replace(&path, &kept).map_err(|error| failed(&path, &error))?;
    print(&format!("{name}: its certificate and its token are revoked\n"))
}

/// A new certificate for `name`, and its key as PEM.
fn certificate(
    ca_key: &str,
    name: &str,
    until: SystemTime,
) -> Result<(rcgen::Certificate, String), rcgen::Error> {
    // The name and the key are all that an issuer's certificate is asked for.
    let issuer = Issuer::new(ca_params(until), KeyPair::from_pem(ca_key)?);
    let key = KeyPair::generate()?;
    let own = params(Vec::new(), name, ExtendedKeyUsagePurpose::ClientAuth, until)?;
    Ok((own.signed_by(&key, &issuer)?, key.serialize_pem()))
}

fn ca_params(until: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    named(params, CA_NAME, until)
}

fn params(
    hosts: Vec<String>,
    name: &str,
    purpose: ExtendedKeyUsagePurpose,
    until: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    params.use_authority_key_identifier_extension = true;
    Ok(named(params, name, until))
}

fn named(mut params: CertificateParams, name: &str, until: SystemTime) -> CertificateParams {
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    // A day back: clocks differ.
    params.not_before = (SystemTime::now() - Duration::from_secs(86_400)).into();
    params.not_after = until.into();
    params
}

/// 256 random bits as a token's text.
fn secret() -> io::Result<String> {
    Ok(from_system::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Makes a folder with these files, each with its mode; under its name only once it is whole.
fn new_folder(dir: &Path, contents: &[(&str, u32, String)]) -> io::Result<()> {
    let mut part = dir.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    fs::DirBuilder::new().mode(0o700).create(&part)?;
    let fill = || {
        for (name, mode, text) in contents {
            let mut file =
                fs::File::options().write(true).create_new(true).mode(*mode).open(part.join(name))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
        }
        // Takes the place of an empty folder, and of nothing else.
        fs::rename(&part, dir)
    };
    fill().inspect_err(|_| drop(fs::remove_dir_all(&part)))
}

fn is_taken(dir: &Path, flag: &str, error: &io::Error) -> Failure {
    let expected = match error.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
            "expected a new folder, got one that is there"
        }
        _ => "expected a folder that can be made",
    };
    Failure::input(format!("{flag}: {}: {expected}: {error}", dir.display()))
}

/// Adds a line to a list, which is begun if need be.
fn append(path: &Path, line: &dyn std::fmt::Display) -> io::Result<()> {
    let mut file = fs::File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
    let mut before = String::new();
    file.read_to_string(&mut before)?;
    let newline = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    file.write_all(format!("{newline}{line}\n").as_bytes())?;
    file.sync_all()
}

/// Gives a file another text, all of it or none.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&part)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.and_then(|()| fs::rename(&part, path)).inspect_err(|_| drop(fs::remove_file(&part)))
}
