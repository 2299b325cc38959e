//! How two ends of a new connection prove to one another that they belong to one formation.
//!
//! Both know the formation's secret and never send it: each answers with a keyed hash over everything that was said, the other
//! side's fresh nonce included, so that a recording of an earlier handshake proves nothing. Knows sockets only as something to
//! read from and write to.

use std::io::{self, Read, Write};

use super::wire::VERSION;
use crate::random::from_system;
use crate::topology::{FormationId, Generation, JobId, Rank};

/// What connects the two processes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Bytes through the socket.
    Socket,
    /// Large payloads through memory that both have mapped.
    SharedMemory,
}

/// **Units**: bytes of a nonce, and of a proof.
pub const HASH_BYTES: usize = 32;
/// **Units**: bytes of a hello.
pub const HELLO_BYTES: usize = 60;
/// Where the nonce begins in it.
const NONCE_AT: usize = HELLO_BYTES - HASH_BYTES;
/// **Units**: bytes of the longest refusal.
const MAX_REASON: usize = 512;

const MAGIC: [u8; 4] = *b"cfHi";
const CHALLENGE: u8 = 1;
const WELCOME: u8 = 2;
const REFUSAL: u8 = 3;

/// What the end that connects says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Of the fabric.
    pub version: u8,
    /// How payloads are to travel.
    pub carrier: Carrier,
    /// Which formation it belongs to.
    pub formation: FormationId,
    /// Lowest rank of the process that connects.
    pub from: Rank,
    /// Lowest rank of the process that it means to reach.
    pub to: Rank,
    /// Never used before.
    pub nonce: [u8; HASH_BYTES],
}

impl Hello {
    /// As it is sent.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.version;
        bytes[6] = self.carrier as u8;
        let FormationId { job, generation } = self.formation;
        bytes[8..16].copy_from_slice(&job.bits().to_le_bytes());
        for (field, at) in
            [generation.number(), self.from.number(), self.to.number()].iter().zip([16, 20, 24])
        {
            bytes[at..at + 4].copy_from_slice(&field.to_le_bytes());
        }
        bytes[NONCE_AT..].copy_from_slice(&self.nonce);
        bytes
    }

    /// From what came.
    ///
    /// **Errors**: if it is no hello of this version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, String> {
        if bytes[..4] != MAGIC {
            return Err("not a hello of a rank".into());
        }
        let version = bytes[4];
        if version != VERSION || bytes[5] != 0 {
            return Err(format!("expected version {VERSION} of the fabric, got version {version}"));
        }
        let carrier = match bytes[6..8] {
            [0, 0] => Carrier::Socket,
            [1, 0] => Carrier::SharedMemory,
            _ => return Err(format!("no carrier has number {}", bytes[6])),
        };
        let mut job = [0; 8];
        job.copy_from_slice(&bytes[8..16]);
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut nonce = [0; HASH_BYTES];
        nonce.copy_from_slice(&bytes[NONCE_AT..]);
        let formation = FormationId::new(JobId::of(u64::from_le_bytes(job)), Generation::new(field(16)));
        let (from, to) = (Rank::new(field(20)), Rank::new(field(24)));
        Ok(Hello { version, carrier, formation, from, to, nonce })
    }
}

/// Which end proves itself: a proof of one end is worth nothing from the other.
#[derive(Clone, Copy)]
enum Role {
    Connects,
    Accepts,
}

fn proof(secret: &[u8; 32], role: Role, hello: &Hello, nonce: &[u8; HASH_BYTES]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(match role {
        Role::Connects => b"contraflow fabric: connects",
        Role::Accepts => b"contraflow fabric: accepts.",
    });
    hasher.update(&hello.encode()).update(nonce);
    hasher.finalize()
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// One end does not want the other.
    #[error("{0}")]
    Refused(String),
}

fn refused<T>(reason: impl Into<String>) -> Result<T, HandshakeError> {
    Err(HandshakeError::Refused(reason.into()))
}

/// The part of the end that connects. Returns once it has been let in.
///
/// **Errors**: [`HandshakeError::Refused`] with the message of the end that refused.
pub fn connect(
    stream: &mut (impl Read + Write),
    hello: &Hello,
    secret: &[u8; 32],
) -> Result<(), HandshakeError> {
    stream.write_all(&hello.encode())?;
    let Reply::Challenge { nonce, answer } = read_reply(stream)? else {
        return refused("expected a challenge, got none");
    };
    if proof(secret, Role::Accepts, hello, &nonce) != answer {
        return refused("the other end does not know the secret of this formation");
    }
    stream.write_all(proof(secret, Role::Connects, hello, &nonce).as_bytes())?;
    match read_reply(stream)? {
        Reply::Welcome => Ok(()),
        Reply::Challenge { .. } => refused("challenged twice"),
    }
}

/// The first part of the end that accepts: who is there?
///
/// **Errors**: [`HandshakeError::Refused`] with a message that has not been sent to the peer yet.
pub fn read_hello(stream: &mut impl Read) -> Result<Hello, HandshakeError> {
    let mut bytes = [0; HELLO_BYTES];
    // Magic and version first: another version may send less, and is refused rather than waited for.
    stream.read_exact(&mut bytes[..8])?;
    let known = bytes[..4] == MAGIC && bytes[4..6] == [VERSION, 0];
    if known {
        stream.read_exact(&mut bytes[8..])?;
    }
    Hello::decode(&bytes).map_err(HandshakeError::Refused)
}

/// The second part of the end that accepts: asks for a proof, and proves itself with it.
///
/// **Errors**: [`HandshakeError::Refused`] if the proof is wrong; the peer has not been notified yet.
pub fn challenge(
    stream: &mut (impl Read + Write),
    hello: &Hello,
    secret: &[u8; 32],
) -> Result<(), HandshakeError> {
    let nonce = from_system()?;
    let mut reply = vec![CHALLENGE];
    reply.extend(nonce);
    reply.extend(proof(secret, Role::Accepts, hello, &nonce).as_bytes());
    stream.write_all(&reply)?;
    let mut answer = [0; HASH_BYTES];
    stream.read_exact(&mut answer)?;
    // Compared in constant time by blake3's own type.
    if proof(secret, Role::Connects, hello, &nonce) != answer {
        return refused(format!("rank {} does not know the secret of this formation", hello.from));
    }
    Ok(())
}

/// Lets the other end in.
///
/// **Errors**: those of the connection.
pub fn welcome(stream: &mut impl Write) -> io::Result<()> {
    stream.write_all(&[WELCOME])
}

/// Sends the reason of a refusal.
///
/// **Errors**: those of the connection.
pub fn refuse(stream: &mut impl Write, reason: &str) -> io::Result<()> {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut reply = vec![REFUSAL];
    // At most MAX_REASON.
    reply.extend(u16::try_from(end).unwrap_or(u16::MAX).to_le_bytes());
    reply.extend(&reason.as_bytes()[..end]);
    stream.write_all(&reply)
}

enum Reply {
    Challenge { nonce: [u8; HASH_BYTES], answer: [u8; HASH_BYTES] },
    Welcome,
}

fn read_reply(stream: &mut impl Read) -> Result<Reply, HandshakeError> {
    let mut what = [0];
    stream.read_exact(&mut what)?;
    match what[0] {
        CHALLENGE => {
            let (mut nonce, mut answer) = ([0; HASH_BYTES], [0; HASH_BYTES]);
            stream.read_exact(&mut nonce)?;
            stream.read_exact(&mut answer)?;
            Ok(Reply::Challenge { nonce, answer })
        }
        WELCOME => Ok(Reply::Welcome),
        REFUSAL => {
            let mut len = [0; 2];
            stream.read_exact(&mut len)?;
            let mut reason = [0; MAX_REASON];
            let len = usize::from(u16::from_le_bytes(len)).min(MAX_REASON);
            stream.read_exact(&mut reason[..len])?;
            refused(format!("the other end refused: {}", String::from_utf8_lossy(&reason[..len])))
        }
        other => refused(format!("not a reply to a hello (it begins with {other})")),
    }
}
