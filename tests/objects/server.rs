//! An S3-compatible server on loopback for tests: objects in memory, conditional puts, ranges, listings, parts; and faults on
//! request. Independent of the client: it speaks HTTP by itself.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// What is done to a request in place of an orderly answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused before it takes effect.
    Status(u16),
    /// It takes effect, and the connection ends without an answer.
    LoseAnswer,
    /// Half of the body is sent, then the connection ends.
    CutBody,
}

/// Says of a request (`PUT key`) and how many like it came before what is wrong with it.
pub type Faults = Box<dyn Fn(&str, usize) -> Option<Fault> + Send>;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    requests: Vec<String>,
    faults: Option<Faults>,
    /// Before a request like this an object becomes another one.
    change: Option<(String, String, Vec<u8>)>,
    ignores_conditions: bool,
}

/// The server; it ends with the process.
pub struct Server {
    pub url: String,
    state: Arc<Mutex<State>>,
}

const KEY: &str = "test-key";

struct Request {
    method: String,
    key: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Answer { status, headers: Vec::new(), body: body.into() }
    }

    fn error(status: u16, code: &str) -> Self {
        Answer::new(status, format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>"))
    }
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), shared.clone());
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Server { url, state }
    }

    /// Lets a command find the server, with the credentials that it accepts, and a cache of its own.
    pub fn configure(&self, command: &mut Command, cache: &std::path::Path) {
        command.envs(self.environment(cache));
    }

    pub fn environment(&self, cache: &std::path::Path) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", self.url.clone()),
            ("AWS_ACCESS_KEY_ID", KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", "test-secret".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("CONTRAFLOW_CACHE", cache.display().to_string()),
        ]
    }

    pub fn put(&self, key: &str, bytes: impl Into<Vec<u8>>) {
        self.state.lock().unwrap().objects.insert(format!("bucket/{key}"), bytes.into());
    }

    /// A file of the web server that it is too.
    pub fn put_web(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.state.lock().unwrap().objects.insert(path.to_owned(), bytes.into());
    }

    /// Before the first request like this one an object becomes another one.
    pub fn change_before(&self, request: &str, key: &str, bytes: impl Into<Vec<u8>>) {
        let change = (request.to_owned(), format!("bucket/{key}"), bytes.into());
        self.state.lock().unwrap().change = Some(change);
    }

    /// From now on it is like stores that know no conditional put.
    pub fn ignore_conditions(&self) {
        self.state.lock().unwrap().ignores_conditions = true;
    }

    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.state.lock().unwrap().objects.get(&format!("bucket/{key}")).cloned()
    }

    pub fn remove(&self, key: &str) {
        self.state.lock().unwrap().objects.remove(&format!("bucket/{key}"));
    }

    /// Every key below a prefix, without it.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let prefix = format!("bucket/{prefix}");
        let state = self.state.lock().unwrap();
        state.objects.keys().filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned())).collect()
    }

    pub fn set_faults(&self, faults: impl Fn(&str, usize) -> Option<Fault> + Send + 'static) {
        let mut state = self.state.lock().unwrap();
        state.faults = Some(Box::new(faults));
        state.requests.clear();
    }

    /// Requests that came, as `PUT bucket/key`, since faults were last set.
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }

    /// Uploads in parts that nobody has finished or given up.
    pub fn open_uploads(&self) -> usize {
        self.state.lock().unwrap().uploads.len()
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    while let Some(request) = read(&mut reader) {
        let line = format!("{} {}", request.method, request.key);
        let (answer, fault) = {
            let mut state = state.lock().unwrap();
            if let Some((_, key, bytes)) = state.change.take_if(|(when, ..)| *when == line) {
                state.objects.insert(key, bytes);
            }
            let before = state.requests.iter().filter(|known| **known == line).count();
            state.requests.push(line.clone());
            let fault = state.faults.as_ref().and_then(|faults| faults(&line, before));
            match fault {
                Some(Fault::Status(status)) => (Answer::error(status, "Injected"), fault),
                _ => (state.answer(&request), fault),
            }
        };
        if fault == Some(Fault::LoseAnswer) || write(&mut stream, &request, &answer, fault).is_err() {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let query = query.map(|(name, value)| (name.to_owned(), decoded(value))).collect();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let len = headers.get("content-length").map_or(0, |len| len.parse().unwrap());
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, key: decoded(path.trim_start_matches('/')), query, headers, body })
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, ..]) => {
                let hex = [*high, *low];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap());
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn write(
    stream: &mut TcpStream,
    request: &Request,
    answer: &Answer,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} x\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
    head.extend(answer.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let body = if request.method == "HEAD" { &[][..] } else { &answer.body };
    if fault == Some(Fault::CutBody) {
        stream.write_all(&body[..body.len() / 2])?;
        return Err(std::io::ErrorKind::ConnectionAborted.into());
    }
    stream.write_all(body)
}

fn etag(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("\"{hash:016x}\"")
}

impl State {
    fn answer(&mut self, request: &Request) -> Answer {
        // What is not below the bucket is a web server's.
        if request.key != "bucket" && !request.key.starts_with("bucket/") {
            return self.read(request);
        }
        let signed = request.headers.get("authorization").map_or("", String::as_str);
        if !signed.contains(&format!("Credential={KEY}/")) {
            return Answer::error(403, "AccessDenied");
        }
        let has = |name: &str| request.query.contains_key(name);
        match request.method.as_str() {
            "GET" if has("list-type") => self.list(&request.query["prefix"], &request.query),
            "GET" | "HEAD" => self.read(request),
            "POST" if has("uploads") => {
                let id = format!("upload-{}", self.uploads.len() + self.requests.len());
                self.uploads.insert(id.clone(), BTreeMap::new());
                Answer::new(
                    200,
                    format!(
                        "<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>k</Key><UploadId>{id}</UploadId>\
                     </InitiateMultipartUploadResult>"
                    ),
                )
            }
            "POST" if has("delete") => self.delete(std::str::from_utf8(&request.body).unwrap()),
            "POST" => {
                let Some(parts) = self.uploads.remove(&request.query["uploadId"]) else {
                    return Answer::error(404, "NoSuchUpload");
                };
                let bytes = parts.into_values().flatten().collect();
                self.store(request, bytes)
            }
            "PUT" if has("partNumber") => {
                let number = request.query["partNumber"].parse().unwrap();
                let upload = self.uploads.get_mut(&request.query["uploadId"]).unwrap();
                upload.insert(number, request.body.clone());
                Answer { headers: vec![("etag", etag(&request.body))], ..Answer::new(200, "") }
            }
            "PUT" => self.store(request, request.body.clone()),
            "DELETE" if has("uploadId") => {
                self.uploads.remove(&request.query["uploadId"]);
                Answer::new(204, "")
            }
            _ => Answer::error(405, "MethodNotAllowed"),
        }
    }

    /// Removes the keys that a list names.
    fn delete(&mut self, list: &str) -> Answer {
        let keys = list.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap());
        let removed = |key: &str| {
            self.objects.remove(&format!("bucket/{key}"));
            format!("<Deleted><Key>{key}</Key></Deleted>")
        };
        Answer::new(200, format!("<DeleteResult>{}</DeleteResult>", keys.map(removed).collect::<String>()))
    }

    /// A put, which `if-none-match: *` makes conditional.
    fn store(&mut self, request: &Request, bytes: Vec<u8>) -> Answer {
        if request.headers.get("if-none-match").is_some_and(|value| value == "*")
            && self.objects.contains_key(&request.key)
            && !self.ignores_conditions
        {
            return Answer::error(412, "PreconditionFailed");
        }
        let tag = etag(&bytes);
        self.objects.insert(request.key.clone(), bytes);
        let body = if request.method == "POST" {
            format!("<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>")
        } else {
            String::new()
        };
        Answer { headers: vec![("etag", tag)], ..Answer::new(200, body) }
    }

    fn read(&self, request: &Request) -> Answer {
        let Some(bytes) = self.objects.get(&request.key) else { return Answer::error(404, "NoSuchKey") };
        let mut headers =
            vec![("etag", etag(bytes)), ("last-modified", "Wed, 21 Oct 2026 07:28:00 GMT".to_owned())];
        let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
        let Some((first, last)) = range.and_then(|range| range.split_once('-')) else {
            return Answer { headers, ..Answer::new(200, bytes.clone()) };
        };
        let first: usize = first.parse().unwrap();
        let last = last.parse().map_or(bytes.len(), |last: usize| (last + 1).min(bytes.len()));
        headers.push(("content-range", format!("bytes {first}-{}/{}", last - 1, bytes.len())));
        Answer { headers, ..Answer::new(206, &bytes[first..last]) }
    }

    /// A page of a listing: two keys, so that there are several.
    fn list(&self, prefix: &str, query: &BTreeMap<String, String>) -> Answer {
        let prefix = format!("bucket/{prefix}");
        let after = query.get("continuation-token").cloned().unwrap_or_default();
        let all: Vec<(&String, &Vec<u8>)> =
            self.objects.iter().filter(|(key, _)| key.starts_with(&prefix) && **key > after).collect();
        let entry = |(key, bytes): &(&String, &Vec<u8>)| {
            let key = key.strip_prefix("bucket/").unwrap();
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-10-21T07:28:00.000Z</LastModified><ETag>{}</ETag>\
                 <Size>{}</Size></Contents>",
                etag(bytes).replace('"', "&quot;"),
                bytes.len()
            )
        };
        let entries: String = all.iter().take(2).map(entry).collect();
        let next = if all.len() > 2 {
            format!("<NextContinuationToken>{}</NextContinuationToken>", all[1].0)
        } else {
            String::new()
        };
        let truncated = all.len() > 2;
        Answer::new(
            200,
            format!(
                "<ListBucketResult><Name>bucket</Name><IsTruncated>{truncated}</IsTruncated>{next}{entries}</ListBucketResult>"
            ),
        )
    }
}
