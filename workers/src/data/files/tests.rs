//! Tests of reading the files and folders that a user names.

use super::*;

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
    let found = read(&[folder.path().into()]).unwrap();
    let texts: Vec<&[u8]> = found.documents.iter().map(|document| document.text.as_slice()).collect();
    // a/copy.rs comes before b.txt, so it is the one that is kept.
    assert_eq!(texts, [b"c", b"b", b"z"]);
    assert_eq!((found.num_hidden, found.num_not_text), (2, 2));
}

#[test]
fn files_come_in_the_order_named_and_once() {
    let folder = folder_with(&[("a", b"first"), (".b", b"second")]);
    let (a, b) = (folder.path().join("a"), folder.path().join(".b"));
    let found = read(&[b.clone(), a.clone(), folder.path().into()]).unwrap();
    let names: Vec<_> = found.documents.iter().map(|document| document.name.clone()).collect();
    assert_eq!(names, [b.display().to_string(), a.display().to_string()]);
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
    let error_text: Vec<String> = read(&paths).unwrap_err().iter().map(ToString::to_string).collect();
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
    assert_eq!(read(&[folder.path().into()]).unwrap().documents.len(), 1);
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
    assert_eq!(texts(read(&named).unwrap_err()), expected);
    assert_eq!(texts(list(&named).unwrap_err()), expected);
    std::fs::remove_file(at("walked/b/pipe")).unwrap();
    assert_eq!(read(&[at("walked")]).unwrap().documents.len(), 2);
}
