//! Tests of reading the files and folders that a user names.

use super::*;
use crate::data::input::tests::{bzip2, gzip};

fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn folders_are_read_recursively_in_sorted_order_and_the_rest_is_counted() {
    let folder = folder_with(&[
        ("b.txt", b"b"),
        ("a/z.md", b"z"),
        ("a/c.rs", b"c"),
        ("a/copy.rs", b"b"),
        ("empty.txt", b""),
        (".hidden/x", b"x"),
        (".dot", b"x"),
        ("nul.bin", b"ab\0"),
        ("latin1.txt", b"caf\xe9"),
    ]);
    let found = read(&[folder.path().into()], "text").unwrap();
    let texts: Vec<&[u8]> = found.documents.iter().map(|document| document.text.as_slice()).collect();
    // A text that comes twice is read twice: how often something is learnt from is the user's choice.
    assert_eq!(texts, [b"c", b"b", b"z", b"b"]);
    assert_eq!(found.skipped, Skipped { hidden: 2, not_text: 2, json_as_text: 0 });
    assert_eq!(
        found.skipped.warnings(),
        ["skipped in the folders of --data: binary files 2, hidden entries 2"]
    );
}

#[test]
fn files_come_in_the_order_named_and_as_often() {
    let folder = folder_with(&[("a", b"first"), (".b", b"second")]);
    let (a, b) = (folder.path().join("a"), folder.path().join(".b"));
    let found = read(&[b.clone(), a.clone(), folder.path().into()], "text").unwrap();
    let names: Vec<_> = found.documents.iter().map(|document| document.name.clone()).collect();
    assert_eq!(names, [&b, &a, &a].map(|path| path.display().to_string()));
}

#[test]
fn all_faults_are_reported_at_once_each_with_its_path() {
    let folder = folder_with(&[
        ("empty", b""),
        ("nul", b"ab\0c"),
        ("bad", b"abc\xff"),
        ("bin/x", b"\0"),
        ("ok", b"ok"),
    ]);
    let paths: Vec<PathBuf> =
        ["missing", "empty", "ok", "nul", "bad", "bin"].iter().map(|name| folder.path().join(name)).collect();
    let error_text: Vec<String> = read(&paths, "text").unwrap_err().iter().map(ToString::to_string).collect();
    let root = folder.path().display();
    assert_eq!(
        error_text,
        [
            format!("{root}/missing: no such file or folder"),
            format!("{root}/empty: expected text, the file is empty"),
            format!("{root}/nul: expected UTF-8 text, found a NUL byte at byte 2"),
            format!("{root}/bad: expected UTF-8 text, found invalid UTF-8 at byte 3"),
            format!(
                "{root}/bin: expected at least one text file, found none (binary files 1, hidden entries 0)"
            ),
        ]
    );
}

#[cfg(unix)]
#[test]
fn a_link_back_to_the_folder_does_not_loop() {
    let folder = folder_with(&[("a", b"text")]);
    std::os::unix::fs::symlink(folder.path(), folder.path().join("loop")).unwrap();
    assert_eq!(read(&[folder.path().into()], "text").unwrap().documents.len(), 1);
}

#[test]
fn what_is_no_regular_file_is_refused_with_its_path_and_nobody_waits_for_it() {
    use rustix::fs::{CWD, Mode, mkfifoat};
    let folder = folder_with(&[("walked/a.txt", b"text"), ("walked/b/c.txt", b"more")]);
    let at = |name: &str| folder.path().join(name);
    for pipe in ["pipe", "rows.jsonl", "rows.parquet", "walked/b/pipe"] {
        mkfifoat(CWD, at(pipe), Mode::RUSR | Mode::WUSR).unwrap();
    }
    std::os::unix::fs::symlink("pipe", at("link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let named = [at("pipe"), at("link"), at("rows.jsonl"), at("rows.parquet"), at("socket"), at("walked")];
    let named = [named.as_slice(), &[PathBuf::from("/dev/zero")]].concat();
    let expected: Vec<String> = [
        ("pipe", "a named pipe"),
        ("link", "a named pipe"),
        ("rows.jsonl", "a named pipe"),
        ("rows.parquet", "a named pipe"),
        ("socket", "a socket"),
        ("walked/b/pipe", "a named pipe"),
        ("/dev/zero", "a character device"),
    ]
    .map(|(name, got)| {
        format!("{}: expected a file or a folder, got {got}, which is no regular file", at(name).display())
    })
    .to_vec();
    let texts = |faults: Vec<DataFault>| faults.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(read(&named, "text").unwrap_err()), expected);
    assert_eq!(texts(list(&named, "text").unwrap_err()), expected);
    std::fs::remove_file(at("walked/b/pipe")).unwrap();
    assert_eq!(read(&[at("walked")], "text").unwrap().documents.len(), 2);
}

/// The same two texts in every form that is read.
fn forms() -> Vec<(&'static str, Vec<u8>)> {
    let lines = b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n".to_vec();
    let array = b"[{\"text\": \"one\"}, {\"text\": \"two\"}]".to_vec();
    let marked = [b"\xef\xbb\xbf".to_vec(), lines.clone()].concat();
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    vec![
        ("a.jsonl", lines.clone()),
        ("a.ndjson", lines.clone()),
        ("A.JSONL", lines.clone()),
        ("a.json", lines.clone()),
        ("b.json", array.clone()),
        ("marked.jsonl", marked.clone()),
        ("marked.json", marked),
        ("a.jsonl.gz", gzip(&lines)),
        ("a.jsonl.zst", zstd(&lines)),
        ("a.jsonl.bz2", bzip2(&lines)),
        ("a.json.gz", gzip(&array)),
        // The first bytes say it too.
        ("b.jsonl", gzip(&lines)),
    ]
}

#[test]
fn rows_are_read_in_every_form_named_or_in_a_folder() {
    for (name, bytes) in forms() {
        let folder = folder_with(&[(name, &bytes)]);
        for path in [folder.path().to_path_buf(), folder.path().join(name)] {
            let found = read(&[path], "text").unwrap();
            let texts: Vec<&[u8]> = found.documents.iter().map(|document| document.text.as_slice()).collect();
            assert_eq!(texts, [b"one", b"two"], "{name}");
        }
    }
}

#[test]
fn texts_are_read_compressed_and_archives_are_named_or_counted() {
    let mut tar = vec![b'a'; 600];
    tar[257..262].copy_from_slice(b"ustar");
    let (text, packed) = (gzip(b"one"), gzip(&tar));
    let folder = folder_with(&[("a.txt.gz", &text), ("b.tar.gz", &packed), ("c.xz", b"\xfd7zXZ\0")]);
    let found = read(&[folder.path().into()], "text").unwrap();
    assert_eq!((found.documents.len(), found.skipped.not_text), (1, 2));
    assert_eq!(found.documents[0].text, b"one");
    let named = ["b.tar.gz", "c.xz"].map(|name| folder.path().join(name));
    let error_text: Vec<String> = read(&named, "text").unwrap_err().iter().map(ToString::to_string).collect();
    assert!(error_text[0].ends_with("got a tar archive: unpack it"), "{error_text:?}");
    assert!(error_text[1].ends_with("got a file compressed with xz"), "{error_text:?}");
    // A file that is cut short is not passed by.
    let cut = folder_with(&[("a.txt.gz", &text[..text.len() - 3])]);
    let fault = read(&[cut.path().into()], "text").unwrap_err();
    assert!(matches!(fault[..], [DataFault::Compressed { form: "gzip", .. }]), "{fault:?}");
}

#[test]
fn a_json_without_the_field_is_refused_if_named_and_a_text_with_a_word_in_a_folder() {
    let folder = folder_with(&[
        ("package.json", b"{\n  \"name\": \"a package\"\n}\n"),
        ("rows.json", b"[{\"content\": \"one\"}, {\"content\": \"two\"}]"),
    ]);
    let found = read(&[folder.path().into()], "text").unwrap();
    assert_eq!((found.documents.len(), found.skipped.json_as_text), (2, 1));
    assert!(found.skipped.warnings()[0].starts_with("1 .json file(s) in the folders of --data hold rows"));
    let at = |name: &str| folder.path().join(name);
    assert_eq!(read(&[at("package.json")], "text").unwrap().documents.len(), 1);
    let error_text = read(&[at("rows.json")], "text").unwrap_err()[0].to_string();
    assert!(
        error_text.contains(
            "text 1: expected a JSON object with a text in the field `text`, got the fields content;"
        )
    );
    assert_eq!(read(&[at("rows.json")], "content").unwrap().documents.len(), 2);
}

/// The faults of a folder, without its own name.
fn faults_in(folder: &tempfile::TempDir) -> Vec<String> {
    let faults = read(&[folder.path().into()], "text").unwrap_err();
    let root = format!("{}/", folder.path().display());
    faults.iter().map(|fault| fault.to_string().replace(&root, "")).collect()
}

#[test]
fn a_broken_row_hides_neither_the_next_one_nor_the_next_file() {
    let text = gzip(&b"some text".repeat(1000));
    let folder = folder_with(&[
        ("a.jsonl", b"{\"text\": \"one\"}\nnope\n{\"text\": \"two\"}\n\n7\n"),
        ("b.json", b"[{\"text\": \"one\"}, 5, {\"text\": \"two\"}, {\"content\": \"three\"}]"),
        ("c/one.txt.gz", &text[..text.len() - 3]),
        ("c/two.txt.gz", &text[..text.len() - 3]),
        ("d.jsonl", b"[]"),
    ]);
    let faults = faults_in(&folder);
    let expected = [
        "c/one.txt.gz: expected a whole gzip file",
        "c/two.txt.gz: expected a whole gzip file",
        "a.jsonl: line 2: expected a JSON object",
        "a.jsonl: line 5: expected a JSON object",
        "b.json: text 2: expected a JSON object",
        "b.json: text 4: expected a JSON object",
        "d.jsonl: line 1: expected a JSON object",
    ];
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    for (fault, expected) in faults.iter().zip(expected) {
        assert!(fault.starts_with(expected), "{expected}: {faults:#?}");
    }
    let paths = [folder.path().join("a.jsonl"), folder.path().join("missing")];
    let listed = crate::data::hf_tokenizer::train(&paths[..1], "text", 300).unwrap_err();
    assert!(listed.len() == 2 && listed[1].contains("line 5"), "{listed:?}");
    let listed = crate::data::hf_tokenizer::train(&paths, "text", 300).unwrap_err();
    assert!(listed.len() == 3 && listed[2].ends_with("missing: no such file or folder"), "{listed:?}");
}

#[test]
fn of_a_file_whose_rows_are_all_broken_the_first_ones_are_listed() {
    let rows = "{\"content\": \"some text\"}\n".repeat(1000);
    let folder = folder_with(&[("a.jsonl", rows.as_bytes()), ("b.jsonl", b"nope")]);
    let faults = faults_in(&folder);
    assert_eq!(faults.len(), MAX_BROKEN + 2, "{faults:#?}");
    assert!(faults[MAX_BROKEN - 1].starts_with("a.jsonl: line 10: "), "{faults:#?}");
    assert_eq!(faults[MAX_BROKEN], "a.jsonl: after 10 broken rows the rest of the file was not read");
    assert!(faults[MAX_BROKEN + 1].starts_with("b.jsonl: line 1: "), "{faults:#?}");
    // As many as are listed, and nothing behind them.
    let rows = rows.lines().take(MAX_BROKEN).collect::<Vec<_>>().join("\n");
    assert_eq!(faults_in(&folder_with(&[("a.jsonl", rows.as_bytes())])).len(), MAX_BROKEN + 1);
}
