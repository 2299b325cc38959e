//! Runs as things: what their list, their curves and their hints say, and what happens to those that have ended or failed.

use std::process::Output;

use crate::workplace::{Workplace, stderr, wait_for};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Ends at once, as its numbers are not finite, and leaves no checkpoint.
const FAILS: [&str; 6] = ["train", "recipe.toml", "--set", "lr.peak=1e30", "--set", "checkpoint.every=0"];

/// Makes its steps and writes its model.
const WHOLE: [&str; 4] = ["train", "recipe.toml", "--set", "checkpoint.save_model=true"];

#[test]
fn a_finished_run_has_nothing_to_do_until_it_is_given_more_steps() {
    let place = Workplace::new();
    place.succeed(&WHOLE);
    let before = place.files("runs");
    let words = "nothing to do: runs/recipe has made its 12 steps; --set training.steps=N goes on\n";
    for layout in [&[][..], &["--set", "parallel.pipeline=1", "--set", "parallel.schedule=1f1b"]] {
        let output = place.run(&[&["train", "--resume", "runs/recipe"][..], layout].concat());
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), words), "{}", stderr(&output));
        assert!(place.files("runs") == before, "nothing has changed");
    }
    let output = place.run(&["train", "--resume", "runs/recipe", "--set", "training.steps=14"]);
    assert!(stdout(&output).starts_with("14 steps, "), "{}", stderr(&output));
    // A run that was killed before it had its model writes it.
    std::fs::remove_dir_all(place.path("runs/recipe/model")).unwrap();
    place.succeed(&["train", "--resume", "runs/recipe"]);
    assert!(place.path("runs/recipe/model/config.json").is_file());
}

#[test]
fn a_run_that_failed_does_not_stand_in_the_way_of_the_one_before() {
    let place = Workplace::new();
    place.succeed(&WHOLE);
    assert_eq!(place.run(&FAILS).status.code(), Some(1));
    assert!(std::fs::read_link(place.path("runs/latest")).unwrap().ends_with("recipe-2"));
    let output = place.run(&["generate", "--tokens", "4"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let note = "note: the latest run, recipe-2, has no model and no checkpoint; taking runs/recipe\n";
    assert_eq!(stderr(&output), note);
    let output = place.run(&["train", "--resume", "--set", "training.steps=13"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let note = "note: the latest run, recipe-2, has no checkpoint; taking runs/recipe\n";
    assert!(stderr(&output).contains(note), "{}", stderr(&output));
    assert_eq!(place.curve("runs/recipe").len(), 13);
    // Who names the run means that one.
    let output = place.run(&["train", "--resume", "runs/recipe-2"]);
    assert!(
        stderr(&output).contains("expected a committed checkpoint to resume from, got none"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn names_of_runs_are_refused_by_words_and_quoted_where_they_need_it() {
    let place = Workplace::new();
    for name in ["a/b", "..", "latest"] {
        let output = place.run(&["train", "recipe.toml", "--name", name]);
        let expected = format!(
            "error: --name: expected the name of a folder in runs/, which does not begin with a dot and is not \"latest\", \
             got {name:?}\n"
        );
        assert_eq!((output.status.code(), stderr(&output)), (Some(2), expected));
    }
    assert!(!place.path("runs").exists());
    let output = place.run(&[&WHOLE[..], &["--name", "x y"]].concat());
    assert!(
        stdout(&output).contains("next: contraflow generate 'runs/x y' --prompt '"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn runs_are_listed_compared_measured_and_removed() {
    let place = Workplace::new();
    let empty = place.run(&["runs"]);
    assert_eq!(stdout(&empty), "no runs in runs/; contraflow train makes the first\n");
    place.succeed(&WHOLE);
    place.succeed(&[
        "train",
        "recipe.toml",
        "--name",
        "other",
        "--set",
        "lr.peak=2e-2",
        "--set",
        "training.steps=8",
    ]);
    assert_eq!(place.run(&FAILS).status.code(), Some(1));

    let list = stdout(&place.run(&["runs"]));
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["RUN", "STATE", "STEP", "LOSS", "VALIDATION", "SIZE", "AGE"]);
    let row = |name: &str| rows.iter().find(|row| row[0] == name).unwrap_or_else(|| panic!("{list}"));
    assert_eq!(row("recipe")[1..3], ["done", "12/12"]);
    assert_eq!(row("other")[1..3], ["done", "8/8"]);
    assert_eq!(row("recipe-2")[1..3], ["failed", "1/12"]);
    let loss = f64::from_bits(place.curve("runs/recipe").last().unwrap().1[0]);
    assert_eq!(row("recipe")[3], format!("{loss:.4}"));

    let compared = stdout(&place.run(&["runs", "compare", "recipe", "runs/other"]));
    let peak = compared.lines().find(|line| line.trim_start().starts_with("lr.peak")).unwrap();
    assert_eq!(peak.split_whitespace().collect::<Vec<_>>(), ["lr.peak", "0.01", "0.02"]);
    assert!(!compared.contains("training.seed"), "what is the same is left out: {compared}");

    let du: serde_json::Value =
        serde_json::from_slice(&place.run(&["runs", "du", "--format", "json"]).stdout).unwrap();
    let bytes = |run: &str| place.files(&format!("runs/{run}")).values().map(Vec::len).sum::<usize>() as u64;
    let of_recipe = du["runs"].as_array().unwrap().iter().find(|run| run["run"] == "recipe").unwrap();
    let parts = ["checkpoints", "model", "rest"].map(|part| of_recipe["bytes"][part].as_u64().unwrap());
    // The lock beside them holds a number of a process.
    let counted = parts.iter().sum::<u64>();
    assert!((bytes("recipe")..bytes("recipe") + 20).contains(&counted), "{du}");

    let output = place.run(&["runs", "rm", "recipe-2", "nothere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("nothere: expected a run; looked in nothere, runs/nothere"),
        "{}",
        stderr(&output)
    );
    assert!(place.path("runs/recipe-2").exists(), "nothing is removed where something is wrong");
    // The user's own folder has a recipe in it too.
    let output = place.run(&["runs", "rm", "recipe-2", "."]);
    let refusal = "runs: .: expected a run's folder, with recipe.toml and plan.txt, got another one";
    assert!(output.status.code() == Some(2) && stderr(&output).contains(refusal), "{}", stderr(&output));
    std::fs::write(place.path("plan.txt"), "").unwrap();
    let output = place.run(&["runs", "rm", "."]);
    assert!(stderr(&output).contains("got the current one or one around it"), "{}", stderr(&output));
    std::fs::remove_file(place.path("plan.txt")).unwrap();
    assert!(place.path("runs/recipe-2").exists() && place.path("recipe.toml").exists());
    place.succeed(&["runs", "rm", "recipe-2"]);
    assert!(!place.path("runs/recipe-2").exists());
    assert!(std::fs::read_link(place.path("runs/latest")).unwrap().ends_with("other"));
}

#[test]
fn a_run_in_use_is_listed_as_training_and_not_removed() {
    let place = Workplace::new();
    let mut child = place.start(&["train", "recipe.toml", "--set", "training.steps=1000000"], "");
    let run = place.path("runs/recipe");
    let _rest = wait_for(&mut child, "step 1/");
    let list = stdout(&place.run(&["runs"]));
    let output = place.run(&["runs", "rm", "recipe"]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(list.contains("training"), "{list}");
    assert_eq!(output.status.code(), Some(2));
    let refusal =
        format!("expected a run that is not in use, got one that process {} is training", child.id());
    assert!(stderr(&output).contains(&refusal), "{}", stderr(&output));
    assert!(run.exists());
}

#[test]
fn the_curves_of_runs_are_drawn_over_one_another() {
    let place = Workplace::new();
    let validates = ["--set", "validate.every=4"];
    place.succeed(&[&WHOLE[..], &validates].concat());
    place.succeed(&[&WHOLE[..], &validates, &["--name", "other", "--set", "lr.peak=2e-2"]].concat());
    for file in ["curves.svg", "curves.html", "curves.csv"] {
        let output = place.run(&["plot", "recipe", "other", "--to", file]);
        assert_eq!(stdout(&output), format!("{file}: 24 steps of 2 runs\n"), "{}", stderr(&output));
    }
    let read = |file: &str| std::fs::read_to_string(place.path(file)).unwrap();
    let svg = read("curves.svg");
    for words in [
        "recipe",
        "other",
        "loss, nats per token",
        "validation loss, nats per token",
        "gradient norm before clipping",
    ] {
        assert!(svg.contains(&format!(">{words}</text>")), "{words}");
    }
    // A line for loss, validation and norm of each run, and in the legend.
    assert_eq!(svg.matches("stroke=\"#0072b2\"").count(), 4);
    assert_eq!(svg.matches("stroke=\"#d55e00\"").count(), 4);
    // Two validations while it trains and one at the end.
    assert_eq!(svg.matches("<circle").count(), 6);
    assert!(read("curves.html").contains(&svg));
    let csv = read("curves.csv");
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 25);
    let losses: Vec<u64> = rows[1..13].iter().map(|row| row[4].parse::<f64>().unwrap().to_bits()).collect();
    let expected: Vec<u64> = place.curve("runs/recipe").iter().map(|(_, bits)| bits[0]).collect();
    assert_eq!(losses, expected);
    // Time stamps of this century, in order.
    let times: Vec<u64> = rows[1..13].iter().map(|row| row[2].parse().unwrap()).collect();
    assert!(times.is_sorted() && times[0] > 1_600_000_000_000, "{times:?}");

    let output = place.run(&["plot"]);
    assert_eq!(stdout(&output), "runs/other/plot.svg: 12 steps of 1 run\n");
    let output = place.run(&["plot", "nothere", "--to", "curves.png"]);
    assert_eq!(output.status.code(), Some(2));
    for words in [
        "plot: 2 faults",
        "expected a name that ends in .svg, .html or .csv, got curves.png",
        "nothere: expected a run",
    ] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn the_end_of_a_run_says_what_it_does_and_samples_the_text_that_it_was_given() {
    let place = Workplace::new();
    let output = place.run(&WHOLE);
    let (said, figures) = (stderr(&output), stdout(&output));
    let order = [
        "step 12/12",
        "validating on 4 sequences, writing the weights",
        "measuring what n-grams and zstd make",
        "writing a sample",
    ];
    let places: Vec<usize> =
        order.iter().map(|words| said.find(words).unwrap_or_else(|| panic!("{words}: {said}"))).collect();
    assert!(places.is_sorted(), "{said}");
    let loss = f64::from_bits(place.curve("runs/recipe").last().unwrap().1[0]);
    assert!(figures.contains(&format!(", last loss {loss:.3}\n")), "{figures}");
    // Held out are the last lines of the text, whose sequences begin anywhere.
    let prompt = figures.lines().find_map(|line| line.strip_prefix("a sample, after \"")).unwrap();
    let prompt = prompt.trim_end_matches("\":");
    let text = std::fs::read_to_string(place.path("text.txt")).unwrap();
    assert!(!prompt.is_empty() && text.contains(prompt), "{prompt:?}");
    assert!(figures.contains(&format!("--prompt '{prompt}'")), "{figures}");
    let generated = place.run(&["generate", "--tokens", "1", "--temperature", "0"]);
    assert!(stdout(&generated).starts_with(prompt), "{}", stdout(&generated));
    assert!(figures.contains("MFLOP per token: causal, with MTP)"), "{figures}");
}

#[test]
fn a_run_writes_samples_while_it_trains_with_the_prompt_that_it_was_given() {
    let place = Workplace::new();
    // Long enough for a checkpoint to be there before the run ends.
    let samples =
        ["--set", "training.steps=300", "--set", "sample.every=50", "--set", "sample.prompt=the 3 "];
    let output = place.run(&[&WHOLE[..], &samples].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = std::fs::read_to_string(place.path("runs/recipe/samples.jsonl")).unwrap();
    let made: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(
        !made.is_empty() && made.iter().all(|sample| sample["step"].as_u64().unwrap() % 50 == 0),
        "{lines}"
    );
    assert!(made.iter().all(|sample| sample["text"].as_str().unwrap().starts_with("the 3 ")), "{lines}");
    assert!(stdout(&output).contains("a sample, after \"the 3\":"), "{}", stdout(&output));
    place.succeed(&["train", "recipe.toml", "--name", "plain", "--set", "training.steps=300"]);
    assert_eq!(place.curve("runs/recipe"), place.curve("runs/plain"), "the same bits");
}

#[test]
fn weight_files_are_numbered_as_those_that_there_are() {
    let place = Workplace::new();
    // Of the four ranks of two copies, two hold weights that they answer for.
    place.succeed(&[&WHOLE[..], &["--set", "parallel.data=2"]].concat());
    let mut files: Vec<String> = std::fs::read_dir(place.path("runs/recipe/model"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    files.sort();
    let expected: Vec<String> = (1..=files.len())
        .map(|number| format!("model-{number:05}-of-{:05}.safetensors", files.len()))
        .collect();
    assert!(files.len() < 4, "{files:?}");
    assert_eq!(files, expected);
    place.succeed(&["generate", "--tokens", "2"]);
}

#[test]
fn a_recipe_of_ones_own_says_its_model_also_where_weights_are_given() {
    let place = Workplace::new();
    place.succeed(&WHOLE);
    let other = std::fs::read_to_string(place.path("model.json")).unwrap();
    let other: serde_json::Value = serde_json::from_str(&other).unwrap();
    let wider = other["intermediate_size"].as_u64().unwrap() + 8;
    let set = format!("model.intermediate_size={wider}");
    let output = place.run(&["train", "recipe.toml", "--init", "recipe", "--set", &set]);
    assert_eq!(output.status.code(), Some(2));
    let words = stderr(&output);
    assert!(words.contains("mlp.gate_proj.weight"), "{words}");
    assert!(words.contains("the recipe's own model counts ("), "{words}");
    assert!(words.contains("/runs/recipe/model/config.json takes that of the weights"), "{words}");
    place.succeed(&["train", "recipe.toml", "--init", "recipe", "--set", "training.steps=1"]);
}

#[test]
fn single_keys_of_the_model_come_from_the_command_line() {
    let place = Workplace::new();
    let set = ["--set", "model.vocab_size=300", "--set", "model.num_nextn_predict_layers=0"];
    let output = place.run(&[&WHOLE[..], &set].concat());
    assert!(stdout(&output).contains("MFLOP per token: causal)"), "{} {}", stdout(&output), stderr(&output));
    let config = std::fs::read_to_string(place.path("runs/recipe/model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((&config["vocab_size"], &config["num_nextn_predict_layers"]), (&300.into(), &0.into()));
    // The run's own recipe says them, so that it resumes as the same model.
    let recipe = std::fs::read_to_string(place.path("runs/recipe/recipe.toml")).unwrap();
    assert!(recipe.contains("vocab_size = 300\n"), "{recipe}");
    place.succeed(&["train", "--resume", "--set", "training.steps=13"]);

    let printed = place.run(&["recipes", "--model", "tiny"]);
    std::fs::write(place.path("mine.json"), &printed.stdout).unwrap();
    let output = place.run(&["plan", "recipe.toml", "--set", "model.config=mine.json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output =
        place.run(&["plan", "recipe.toml", "--set", "model.hiden_size=64", "--set", "model.v_head_dim=x"]);
    assert_eq!(output.status.code(), Some(2));
    for words in [
        "model.hiden_size: unknown key (--set); did you mean `model.hidden_size`?",
        "model.v_head_dim: expected a whole number",
    ] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}
