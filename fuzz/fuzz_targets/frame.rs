//! What a stranger may say to the fabric: hellos, replies, frames and signals are refused, or are what they would be written as.
#![no_main]

use std::io::{Read, Result, Write};

use contraflow_fuzz as _;
use contraflow_runtime::fabric::handshake::{self, Carrier, Hello};
use contraflow_runtime::fabric::wire;
use contraflow_runtime::topology::{FormationId, Generation, JobId, Rank};
use libfuzzer_sys::fuzz_target;

/// Says what the fuzzer wants and hears nothing.
struct Stranger<'a>(&'a [u8]);

impl Read for Stranger<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Stranger<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

const SECRET: [u8; 32] = [1; 32];

/// A checksum cannot be guessed: it is put right, so that what stands behind it is reached too.
fn frame_with_checksum(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(wire::PREFIX_BYTES), 0);
    let num_parts = usize::from(u16::from_le_bytes([bytes[6], bytes[7]])).min(wire::MAX_PARTS);
    bytes.resize(bytes.len().max(wire::PREFIX_BYTES + 32 * num_parts), 0);
    let body = wire::PREFIX_BYTES - 8;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..body]).update(&bytes[wire::PREFIX_BYTES..wire::PREFIX_BYTES + 32 * num_parts]);
    bytes[body..wire::PREFIX_BYTES].copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    bytes
}

fn signal_with_checksum(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(wire::SIGNAL_BYTES, 0);
    let body = wire::SIGNAL_BYTES - 8;
    let sum = blake3::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum.as_bytes()[..8]);
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    let own = Hello {
        version: wire::VERSION,
        carrier: Carrier::Socket,
        formation: FormationId::new(JobId::new(1, 0), Generation::new(2)),
        from: Rank::new(3),
        to: Rank::new(4),
        nonce: [5; handshake::HASH_BYTES],
    };
    assert!(handshake::connect(&mut Stranger(bytes), &own, &SECRET).is_err(), "let in without the secret");
    if let Ok(hello) = handshake::read_hello(&mut Stranger(bytes)) {
        assert_eq!(hello.encode(), bytes[..handshake::HELLO_BYTES]);
        let rest = &bytes[handshake::HELLO_BYTES..];
        assert!(
            handshake::challenge(&mut Stranger(rest), &hello, &SECRET).is_err(),
            "let in without the secret"
        );
    }
    for bytes in [bytes.to_vec(), frame_with_checksum(bytes), signal_with_checksum(bytes)] {
        if let Ok(message) = wire::read_message(&mut &bytes[..]) {
            if let wire::LinkMessage::Frame(header) = &message {
                assert!(header.payload_bytes() <= wire::MAX_FRAME_BYTES);
            }
            assert_eq!(wire::read_message(&mut &wire::encode(&message)[..]).ok(), Some(message));
        }
        if let Ok(signal) = wire::read_signal(&mut &bytes[..]) {
            assert_eq!(wire::read_signal(&mut &wire::encode_signal(&signal)[..]).ok(), Some(signal));
        }
    }
});
