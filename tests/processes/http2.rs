//! As much HTTP/2 as it takes to misbehave with: frames by hand, headers without compression.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::cluster::DEADLINE;

/// What every client says first (RFC 9113, 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames (RFC 9113, 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;

/// The last frame of headers, and of a stream.
pub const END_HEADERS: u8 = 4;
pub const END_STREAM: u8 = 1;

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header field as a literal that is not indexed (RFC 7541, 6.2.2); both texts are short.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&length(text.len())[..], text.as_bytes()].concat();
    [&[0][..], &text(name), &text(value)].concat()
}

/// An integer with a prefix of seven bits (RFC 7541, 5.1).
fn length(number: usize) -> Vec<u8> {
    let Some(mut rest) = number.checked_sub(127) else { return vec![u8::try_from(number).unwrap()] };
    let mut bytes = vec![127];
    while rest >= 128 {
        bytes.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    bytes.push(rest as u8);
    bytes
}

/// The headers of a gRPC call, and one more.
pub fn call(path: &str, (name, value): (&str, &str)) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "orchestrator"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        (name, value),
    ];
    fields.map(|(name, value)| literal(name, value)).concat()
}

/// A gRPC message that is not compressed.
pub fn message(bytes: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// A connection that has said `beginning`.
pub fn connect(address: &str, beginning: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(beginning).unwrap();
    stream
}

/// The beginning of a client that takes no more than `window` bytes of a stream before it asks for more.
pub fn opening(window: u32) -> Vec<u8> {
    let settings = [&[0, 4][..], &window.to_be_bytes()].concat();
    [PREFACE, &frame(SETTINGS, 0, 0, &settings)].concat()
}

/// Reads until the other end closes, with or without a reset: what it has said.
pub fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    let ended = stream.read_to_end(&mut said);
    let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(
        ended.as_ref().err().is_none_or(is_reset),
        "waited {DEADLINE:?} for the end of a connection: {ended:?}"
    );
    said
}

/// Whether the other end has closed within a moment.
pub fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => {
                return !matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                );
            }
        }
    }
}
