//! A model whose head is its embedding: it is kept once, and the run goes on with the same bits, also where the two stand on
//! different ranks.

use std::collections::BTreeSet;

use safetensors::SafeTensors;

use crate::workplace::{Workplace, stderr};

/// Names of the weights in the model that a run has left.
fn names(place: &Workplace, run: &str) -> BTreeSet<String> {
    let files = place.files(&format!("{run}/model"));
    let weights =
        files.iter().filter(|(path, _)| path.extension().is_some_and(|ending| ending == "safetensors"));
    weights
        .flat_map(|(_, bytes)| {
            let tensors = SafeTensors::deserialize(bytes).unwrap();
            tensors.names().into_iter().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

/// A run of a recipe whose model is tied, with further arguments.
fn start(place: &Workplace, name: &str, schedule: &str, more: &[&str]) {
    let schedule = format!("parallel.schedule={schedule}");
    let arguments = ["train", "recipe.toml", "--name", name, "--set", &schedule];
    let tied = ["--set", "model.tie_word_embeddings=true", "--set", "checkpoint.save_model=true"];
    place.succeed(&[&arguments[..], &tied, more].concat());
}

fn assert_resumes(place: &Workplace, schedule: &str) {
    let [whole, cut] = ["whole", "cut"].map(|name| format!("{schedule}-{name}"));
    start(place, &whole, schedule, &[]);
    start(place, &cut, schedule, &["--set", "training.steps=8"]);
    let [whole, cut] = [whole, cut].map(|name| format!("runs/{name}"));
    place.succeed(&["train", "--resume", &cut, "--set", "training.steps=12"]);
    assert_eq!(place.curve(&whole), place.curve(&cut));

    let names = names(place, &cut);
    assert!(!names.contains("lm_head.weight"), "{names:?}");
    for name in ["model.embed_tokens.weight", "model.layers.2.shared_head.head.weight"] {
        assert!(names.contains(name), "{names:?}");
    }
    let one =
        ["--set", "training.steps=16", "--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b"];
    place.succeed(&[&["train", "--resume", &cut][..], &one].concat());
    assert_eq!(place.curve(&cut).last().unwrap().0, 16);
    place.succeed(&["eval", &cut, "--data", "text.txt"]);
    // Two tables cannot be made of one.
    let apart = place.run(&["train", "--resume", &cut, "--set", "model.tie_word_embeddings=false"]);
    assert_eq!(apart.status.code(), Some(2), "{}", stderr(&apart));
}

#[test]
fn a_tied_model_resumes_with_the_same_bits_and_in_another_layout() {
    let place = Workplace::new();
    assert_resumes(&place, "1f1b");
    assert_resumes(&place, "dualpipe");
}
