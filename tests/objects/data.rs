//! Text on an object store: the bits of a run on local files, one fetch, and every fault in words before the first step.

use std::process::Output;

use crate::deadline;
use crate::server::{Fault, Server};
use crate::workplace::{Workplace, stderr};

/// A workplace with a store, whose text is the one in the place.
pub struct Store {
    pub place: Workplace,
    pub server: Server,
}

impl Store {
    pub fn new() -> Self {
        let (place, server) = (Workplace::new(), Server::start());
        server.put("data/text.txt", std::fs::read(place.path("text.txt")).unwrap());
        Store { place, server }
    }

    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = self.place.command(args);
        self.server.configure(&mut command, &self.place.path("cache"));
        deadline::output(&mut command)
    }

    pub fn succeed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        stderr(&output)
    }

    /// What a command says that is refused before anything is made.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        stderr(&output)
    }

    fn train(&self, name: &str, data: &str) -> Vec<(u64, [u64; 4])> {
        self.succeed(&["train", "recipe.toml", "--name", name, "--data", data]);
        self.place.curve(&format!("runs/{name}"))
    }
}

#[test]
fn text_of_a_store_gives_the_bits_of_local_text_whatever_the_store_does_meanwhile() {
    let store = Store::new();
    let local = store.train("local", "text.txt");
    store.server.set_faults(|request, before| match (request, before) {
        ("HEAD bucket/data/text.txt", 0) => Some(Fault::Status(503)),
        ("GET bucket/data/text.txt", 0) => Some(Fault::Status(500)),
        ("GET bucket/data/text.txt", 1) => Some(Fault::CutBody),
        _ => None,
    });
    assert_eq!(store.train("remote", "s3://bucket/data/text.txt"), local);
    let requests = store.server.requests();
    assert_eq!(requests.iter().filter(|request| request.starts_with("GET")).count(), 3, "{requests:?}");
    let recipe = std::fs::read_to_string(store.place.path("runs/remote/recipe.toml")).unwrap();
    assert!(recipe.contains("s3://bucket/data/text.txt"), "a run knows where its text is: {recipe}");
    // What is in the cache is not fetched again; what has changed in the store is.
    store.server.set_faults(|_, _| None);
    assert_eq!(store.train("again", "s3://bucket/data/text.txt"), local);
    assert_eq!(store.server.requests(), ["HEAD bucket/data/text.txt"]);
    store.server.put("data/text.txt", "another text, which is as long as it has to be\n".repeat(200));
    assert_ne!(store.train("changed", "s3://bucket/data/text.txt"), local);
    let resumed = store.refused(&["train", "--resume", "runs/remote", "--set", "training.steps=14"]);
    assert!(resumed.contains("data.paths: expected data of blake3 "), "{resumed}");
}

#[test]
fn a_prefix_is_a_folder_and_a_web_server_has_files() {
    let store = Store::new();
    std::fs::create_dir_all(store.place.path("folder/deep")).unwrap();
    for (name, line) in [("b.txt", "one"), ("a.txt", "two"), ("deep/c.txt", "three"), ("deep/.hidden", "no")]
    {
        let text = format!("{line} of many lines of text\n").repeat(300);
        std::fs::write(store.place.path(&format!("folder/{name}")), &text).unwrap();
        store.server.put(&format!("folder/{name}"), text);
    }
    // A console's mark of a folder, and a neighbour whose name begins alike.
    store.server.put("folder/deep/", "");
    store.server.put("folder-2/x.txt", "not to be read ".repeat(300));
    let local = store.train("local", "folder");
    assert_eq!(store.train("remote", "s3://bucket/folder"), local);
    assert_eq!(store.train("slash", "s3://bucket/folder/"), local);
    let web = format!("{}/bucket.d/text.txt", store.server.url);
    let text = std::fs::read(store.place.path("text.txt")).unwrap();
    store.server.put_web("bucket.d/text.txt", text);
    assert_eq!(store.train("web", &web), store.train("plain", "text.txt"));
}

#[test]
fn what_is_wrong_with_a_location_is_said_before_anything_is_made() {
    let store = Store::new();
    let train = |data: &[&str]| {
        let args = [&["train", "recipe.toml", "--data"], data].concat();
        store.refused(&args)
    };
    let missing = train(&["s3://bucket/data/none.txt", "s3://bucket/no/folder"]);
    for name in ["data/none.txt", "no/folder"] {
        let words = format!("s3://bucket/{name}: expected an object, or objects below this prefix, got none");
        assert!(missing.contains(&words), "{missing}");
    }
    assert!(train(&["s3://"]).contains("expected s3://BUCKET and the name of an object"));
    store.server.put("data/broken.jsonl", "{\"text\": \"a\"}\n{\n");
    let broken = train(&["s3://bucket/data/broken.jsonl"]);
    assert!(broken.contains("data.paths: s3://bucket/data/broken.jsonl: line 2: "), "{broken}");
    store.server.set_faults(|request, _| request.starts_with("HEAD").then_some(Fault::Status(403)));
    let denied = train(&["s3://bucket/data/text.txt"]);
    let words = "s3://bucket/data/text.txt: the store denies access with AWS_ACCESS_KEY_ID and";
    assert!(denied.contains(words), "{denied}");
    assert!(!denied.contains("test-secret") && !denied.contains("test-key"), "{denied}");
    assert!(!store.place.path("runs").exists(), "nothing is made");
    // What was fetched before a fault is no entry of the cache.
    let left =
        store.place.files("cache").keys().filter(|path| path.to_string_lossy().contains(".part")).count();
    assert_eq!(left, 0);
}

#[test]
fn wrong_credentials_are_denied_in_words() {
    let store = Store::new();
    let mut command = store.place.command(&["train", "recipe.toml", "--data", "s3://bucket/data/text.txt"]);
    store.server.configure(&mut command, &store.place.path("cache"));
    let output = deadline::output(command.env("AWS_ACCESS_KEY_ID", "another"));
    assert!(
        stderr(&output).contains("the store denies access with AWS_ACCESS_KEY_ID"),
        "{}",
        stderr(&output)
    );
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn text_that_changes_while_it_is_fetched_is_refused() {
    let store = Store::new();
    let text = "a text that was written anew\n".repeat(100);
    store.server.change_before("GET bucket/data/text.txt", "data/text.txt", text);
    let reported = store.refused(&["train", "recipe.toml", "--data", "s3://bucket/data/text.txt"]);
    let words = "s3://bucket/data/text.txt: expected the object as it was listed a moment before, got \"";
    assert!(reported.contains(words), "{reported}");
}

#[test]
fn processes_that_fetch_the_same_at_once_each_have_it() {
    let store = Store::new();
    std::thread::scope(|scope| {
        let runs = ["a", "b", "c"].map(|name| {
            let store = &store;
            scope.spawn(move || store.train(name, "s3://bucket/data/text.txt"))
        });
        let [a, b, c] = runs.map(|run| run.join().unwrap());
        assert!(a == b && b == c);
    });
    assert_eq!(store.place.files("cache/objects").len(), 1);
}
