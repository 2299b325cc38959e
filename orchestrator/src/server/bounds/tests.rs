//! The table of bounds against the protocol files: every text and list that can come in has a row, and the row is applied,
//! wherever in a message the field is.

use std::collections::{BTreeMap, BTreeSet};

use contraflow_proto::Message as _;

use super::*;

const ALL: [Bound; 65] = [
    RECIPE,
    OVERRIDES,
    MODEL_CONFIG,
    NAME,
    KEY,
    RESUME_JOB,
    RESUME_FOLDER,
    GET,
    BEFORE,
    WATCH,
    LOGS,
    CANCEL,
    RETRY,
    REMOVE,
    SCALE,
    REASON,
    DRAIN,
    PATHS,
    VALIDATION,
    FIELD,
    WEIGHTS,
    TOKENIZER,
    END_OF_DOCUMENT,
    INIT,
    MODEL,
    VERSION,
    WORKER,
    NODE,
    BLOCK,
    STORAGE,
    MEMORY_LIMIT,
    SOURCES,
    HOSTED,
    LEFT,
    HOST,
    TCP,
    UNIX,
    HOSTED_RANKS,
    REPLICAS,
    PROGRESS,
    LINES,
    LEVEL,
    LINE,
    ERROR,
    DISCARDED,
    FLIGHT,
    LOADS,
    WARNING,
    COUNTS,
    NORMS,
    LOSSES,
    GRAD_NORMS,
    SHARD,
    BLAKE3,
    EXPORTED,
    TENSORS,
    WHY,
    LOSS,
    GRAD_NORM,
    EVIDENCE,
    TENSOR,
    ACTION,
    CAUSE,
    FAILURE,
    SAVE,
];

/// A field of a protocol file.
#[derive(Clone, Debug)]
struct Field {
    of: String,
    name: String,
    number: u64,
    kind: String,
    is_repeated: bool,
}

impl Field {
    fn full_name(&self) -> String {
        format!("{}.{}", self.of, self.name)
    }

    /// The field with this payload.
    fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = varint(self.number << 3 | 2);
        bytes.extend(varint(payload.len() as u64));
        bytes.extend(payload);
        bytes
    }
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 127 {
        bytes.push(number as u8 & 127 | 128);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// By message, its fields; and the messages that clients and workers send.
fn protocol() -> (BTreeMap<String, Vec<Field>>, BTreeSet<String>) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/contraflow/v1");
    let (mut messages, mut requests, mut current) = (BTreeMap::new(), BTreeSet::new(), String::new());
    for file in std::fs::read_dir(dir).unwrap() {
        for line in std::fs::read_to_string(file.unwrap().path()).unwrap().lines() {
            let words: Vec<&str> = line.trim().trim_end_matches(';').split([' ', '(', ')']).collect();
            match words[..] {
                ["message", name, ..] => {
                    current = name.to_owned();
                    messages.insert(current.clone(), Vec::new());
                }
                ["rpc", _, "stream", request, ..] | ["rpc", _, request, ..] => {
                    requests.insert(request.to_owned());
                }
                [.., kind, name, "=", number] if number.parse::<u64>().is_ok() => {
                    let is_repeated = words.contains(&"repeated");
                    let (of, name, kind) = (current.clone(), name.to_owned(), kind.to_owned());
                    let number = number.parse().unwrap();
                    messages.entry(current.clone()).or_default().push(Field {
                        of,
                        name,
                        number,
                        kind,
                        is_repeated,
                    });
                }
                _ => {}
            }
        }
    }
    (messages, requests)
}

/// Every way from a message that comes in to a text or list.
fn ways() -> Vec<(String, Vec<Field>)> {
    let (messages, requests) = protocol();
    let mut open: Vec<(String, Vec<Field>)> =
        requests.iter().map(|root| (root.clone(), Vec::new())).collect();
    let mut found = Vec::new();
    while let Some((root, way)) = open.pop() {
        let message = way.last().map_or(&root, |field: &Field| &field.kind);
        for field in messages.get(message).into_iter().flatten() {
            let longer = (root.clone(), [&way[..], std::slice::from_ref(field)].concat());
            if field.is_repeated || ["string", "bytes"].contains(&field.kind.as_str()) {
                found.push(longer.clone());
            }
            if messages.contains_key(&field.kind) {
                open.push(longer);
            }
        }
    }
    found
}

fn row(field: &Field) -> Bound {
    let name = field.full_name();
    *ALL.iter().find(|bound| bound.field == name).unwrap_or_else(|| panic!("{name} has no bound"))
}

/// A message in which the last field of the way is `bytes`.
fn message(way: &[Field], bytes: Vec<u8>) -> Vec<u8> {
    way[..way.len() - 1].iter().rev().fold(bytes, |bytes, field| field.encode(&bytes))
}

/// What is left of a message, or the refusal.
fn pass(root: &str, bytes: &[u8]) -> Result<Vec<u8>, String> {
    fn refused<M: contraflow_proto::Message + Default>(
        bytes: &[u8],
        check: fn(&M) -> Result<(), Faults>,
    ) -> Result<Vec<u8>, String> {
        let message = M::decode(bytes).unwrap();
        check(&message).map(|()| message.encode_to_vec()).map_err(|faults| faults.to_string())
    }
    match root {
        "SubmitRequest" => refused(bytes, submit),
        "GetRequest" => refused(bytes, get),
        "ListRequest" => refused(bytes, list_of),
        "WatchRequest" => refused(bytes, watch),
        "CancelRequest" => refused(bytes, cancel),
        "RetryRequest" => refused(bytes, retry),
        "ScaleRequest" => refused(bytes, scale),
        "RemoveRequest" => refused(bytes, remove),
        "LogsRequest" => refused(bytes, logs),
        "DrainRequest" => refused(bytes, drain),
        "FromWorker" => {
            let mut message = v1::FromWorker::decode(bytes).unwrap();
            from_worker(&mut message).map(|()| message.encode_to_vec())
        }
        _ => panic!("no check for {root}"),
    }
}

#[test]
fn every_text_and_list_that_comes_in_is_bounded() {
    let ways = ways();
    let found: BTreeSet<String> = ways.iter().filter_map(|(_, way)| Some(way.last()?.full_name())).collect();
    let of_messages = ALL.iter().filter(|bound| bound.field.starts_with(char::is_uppercase));
    assert_eq!(
        found,
        of_messages.map(|bound| bound.field.to_owned()).collect(),
        "rows, and fields that come in"
    );
    for (root, way) in ways {
        let field = way.last().unwrap();
        let bound = row(field);
        if field.is_repeated {
            let entries = |count| match field.kind.as_str() {
                "uint64" | "uint32" | "double" => {
                    field.encode(&vec![0; if field.kind == "double" { 8 * count } else { count }])
                }
                _ => field.encode(&[]).repeat(count),
            };
            assert!(pass(&root, &message(&way, entries(bound.entries))).is_ok(), "{}", bound.field);
            let refused = pass(&root, &message(&way, entries(bound.entries + 1))).unwrap_err();
            let words = format!("{}: expected at most {} entries, got", bound.path(), bound.entries);
            assert!(refused.starts_with(&words), "{refused}");
        }
        if field.kind == "string" {
            let text = |text: &[u8]| pass(&root, &message(&way, field.encode(text)));
            assert!(text(&vec![b'x'; bound.bytes]).is_ok(), "{}", bound.field);
            match (bound.kind, text(&vec![b'x'; bound.bytes + 1])) {
                (Kind::Prose, left) => assert!(left.unwrap().len() <= bound.bytes + 64, "{}", bound.field),
                (_, refused) => {
                    let words = format!("{}: expected at most {} bytes, got", bound.path(), bound.bytes);
                    assert!(refused.as_ref().unwrap_err().starts_with(&words), "{refused:?}");
                }
            }
            match (bound.kind, text(b"a\x1b[31m")) {
                (Kind::Prose, left) => assert!(!left.unwrap().contains(&0x1b), "{}", bound.field),
                (_, refused) => {
                    assert!(refused.unwrap_err().contains("no control characters"), "{}", bound.field)
                }
            }
            assert_eq!(text(b"a\nb\tc").is_err(), bound.kind == Kind::Text, "{}", bound.field);
        }
    }
}

#[test]
fn the_texts_of_a_recipe_are_bounded() {
    let load = |change: String| {
        let changes = ["model.config=tiny".to_owned(), change];
        let text = contraflow_runtime::recipe::builtin::recipe("tiny").unwrap();
        super::recipe(&Recipe::submitted(text, "tiny", &changes, None).unwrap())
    };
    let long = "p".repeat(4_097);
    let keys = [
        "data.paths",
        "data.validation",
        "data.field",
        "tokenizer.path",
        "model.init",
        "tokenizer.end_of_document",
    ];
    for key in keys {
        let value = |text: &str| {
            if ["data.paths", "data.validation"].contains(&key) {
                format!("{key}=[{text}]")
            } else {
                format!("{key}={text}")
            }
        };
        assert_eq!(load(value("\"data.txt\"")), Ok(()), "{key}");
        let refused = load(value(&format!("{long:?}"))).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("{key}: expected at most")), "{refused}");
        let refused = load(value("\"a\\u001b[2J\"")).unwrap_err().to_string();
        assert_eq!(refused, format!("{key}: expected no control characters, got \\u{{1b}}"));
    }
    let many = format!("data.paths={:?}", vec!["a"; 4_097]);
    assert_eq!(load(many).unwrap_err().to_string(), "data.paths: expected at most 4096 entries, got 4097");
}

#[test]
fn the_security_page_has_a_row_for_each_bound() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/security.md");
    let page = std::fs::read_to_string(page).unwrap();
    for Bound { field, kind, entries, bytes } in ALL {
        let most = match (kind, entries) {
            (Kind::List, _) => format!("{entries} entries"),
            (_, 1) => format!("{bytes} bytes"),
            _ => format!("{entries} entries of {bytes} bytes"),
        };
        let excess = if kind == Kind::Prose { "made printable and cut" } else { "refused" };
        let row = format!("| `{field}` | {most} | {excess} |");
        assert!(page.lines().any(|line| line == row), "docs/security.md has no row {row}");
    }
}
