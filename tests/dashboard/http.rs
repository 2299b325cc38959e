//! As much of an HTTP client as the tests need: one request, one answer, every header under the test's control.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// Sends a request whose head has exactly these headers.
pub fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> TcpStream {
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    if !body.is_empty() {
        head += &format!("content-length: {}\r\n", body.len());
    }
    tcp.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
    tcp
}

/// Reads the head of an answer.
pub fn head(reader: &mut impl BufRead) -> (u16, BTreeMap<String, String>) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {line:?}")).parse().unwrap();
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
            None => return (status, headers),
        };
    }
}

/// A request and its whole answer.
pub fn ask(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let headers: Vec<_> = headers.iter().copied().chain([("connection", "close")]).collect();
    let mut reader = BufReader::new(send(address, method, path, &headers, body));
    let (status, headers) = head(&mut reader);
    let mut body = String::new();
    if headers.get("transfer-encoding").is_some_and(|encoding| encoding == "chunked") {
        while piece(&mut reader, &mut body) > 0 {}
    } else {
        reader.read_to_string(&mut body).unwrap();
    }
    Answer { status, headers, body }
}

/// Reads a piece of a body that comes in pieces, with its length before it; returns that, which is 0 of the last one.
fn piece(reader: &mut impl BufRead, body: &mut String) -> usize {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let length = usize::from_str_radix(line.trim_end(), 16).unwrap();
    let mut bytes = vec![0; length + 2];
    reader.read_exact(&mut bytes).unwrap();
    body.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
    length
}

/// The same of a page on this machine.
pub fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, "GET", path, &[("host", &address.to_string())], "")
}
