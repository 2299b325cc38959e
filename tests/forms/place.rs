//! A folder with a model, a recipe and a text, and the binary at work in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A recipe of one step.
pub const RECIPE: &str = r#"
[model]
config = "config.json"
[training]
steps = 1
sequence_length = 32
global_batch_size = 4
micro_batch_size = 1
validation_sequences = 2
[lr]
peak = 1e-2
"#;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A folder with a model of bytes (257 rows, a context of 512), a recipe that trains one like it, and 468 bytes of text.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        place.copy("hf/bytes.json", "config.json");
        place.copy("hf/bytes.safetensors", "model.safetensors");
        place.copy("hf/text.txt", "text.txt");
        place.write("recipe.toml", RECIPE);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), contents).unwrap();
    }

    pub fn copy(&self, from: &str, name: &str) {
        self.write(name, std::fs::read(fixture(from)).unwrap());
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Output {
        crate::deadline::output(
            Command::new(env!("CARGO_BIN_EXE_contraflow")).args(args).current_dir(self.0.path()),
        )
    }

    /// What a command that succeeds says, on stdout and on stderr.
    pub fn done(&self, args: &[&str]) -> (String, String) {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    /// The message of a command that the user has to fix, which leaves nothing behind.
    pub fn refused(&self, args: &[&str]) -> String {
        let before = self.entries();
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(self.entries(), before, "{args:?}");
        text(&output.stderr)
    }

    pub fn entries(&self) -> Vec<PathBuf> {
        let folders = [self.path("."), self.path("runs")];
        let entries = folders.iter().flat_map(|folder| folder.read_dir().into_iter().flatten());
        let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names
    }

    pub fn eval(&self, args: &[&str]) -> Value {
        let args = [&["eval"], args, &["--format", "json"]].concat();
        serde_json::from_str(&self.done(&args).0).unwrap()
    }
}

pub fn assert_contains(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "expected {words:?} in {text}");
}

/// Tokens and documents of a line of figures, `training` or `validation`.
pub fn figures(stdout: &str, side: &str) -> (u64, u64) {
    let line = stdout.lines().find(|line| line.trim_start().starts_with(side)).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |unit: &str| {
        let at =
            words.iter().position(|word| word.trim_end_matches(',').trim_end_matches('s') == unit).unwrap();
        words[at - 1].parse().unwrap()
    };
    (number("token"), number("document"))
}

/// All that was prepared, in order, shard by shard.
pub fn shards(dir: &Path) -> Vec<Vec<u8>> {
    let entries = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|ending| ending == "tokens")).collect();
    paths.sort();
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}
