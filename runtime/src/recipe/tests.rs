//! Faulty recipes as users write them, and the resulting messages.

use proptest::prelude::*;

use super::*;

/// A valid recipe that the faulty ones are made from.
const GOOD: &str = r#"
[model]
config = "tiny"
[parallel]
pipeline = 2
expert = 2
schedule = "dualpipe"
[training]
steps = 10
sequence_length = 256
global_batch_size = 16
micro_batch_size = 2
[lr]
peak = 1e-3
"#;

fn read(text: &str, overrides: &[&str]) -> Result<Recipe, Faults> {
    let overrides: Vec<String> = overrides.iter().map(|entry| entry.to_string()).collect();
    Recipe::from_toml(text, "test.toml", Path::new(""), &overrides)
}

fn good(overrides: &[&str]) -> Recipe {
    read(GOOD, overrides).unwrap()
}

/// What is said about the good recipe after some overrides.
fn error_text(overrides: &[&str]) -> String {
    read(GOOD, overrides).map_or_else(|faults| faults.to_string(), |_| "nothing".to_string())
}

#[test]
fn defaults_are_filled_in() {
    let recipe = good(&[]);
    assert_eq!(recipe.parallel.data, 1);
    assert_eq!(recipe.optimizer.beta2, 0.95);
    assert_eq!(recipe.optimizer.decay, Decay::Matrices);
    assert_eq!(recipe.training.init_std, recipe.model_config.initializer_range);
    assert_eq!(recipe.lr.floor, StepTable::constant(recipe.lr.peak));
    assert_eq!(recipe.mtp_weight_at(0), 0.3);
    assert!(recipe.checkpoint.save_model);
    assert_eq!(recipe.topology().world(), 4);
    assert_eq!((recipe.batch_unit(), recipe.micro_batches(16), recipe.stages()), (8, 4, 2));
    assert_eq!(good(&["model.config=small"]).mtp_weight_at(0), 0.0);
}

#[test]
fn overrides_are_toml_or_bare_words() {
    let overrides =
        ["parallel.schedule = 1f1b", "lr.peak=2e-3", "checkpoint.save_model=false", "log.level=\"warn\""];
    let recipe = good(&overrides);
    assert_eq!(recipe.parallel.schedule, ScheduleKind::OneFOneB);
    assert_eq!(recipe.lr.peak, 2e-3);
    assert!(!recipe.checkpoint.save_model);
    assert_eq!(recipe.log.level, LogLevel::Warn);
    let table = "balance.bias_speed=[{from_tokens=0, value=0.001}, {from_tokens=100, value=0}]";
    assert_eq!(good(&[table]).bias_speed_at(100), 0.0);
    let paths = ["a b/c".to_string(), "d\"e".to_string()];
    assert!(good(&[&paths_override(&paths)]).data.paths[1].ends_with("/d\"e"));
    // An override also fixes what is wrong in the file.
    assert!(read(&GOOD.replace("steps = 10", "steps = \"ten\""), &["training.steps=5"]).is_ok());
}

#[test]
fn values_of_the_wrong_type_or_range() {
    let cases: &[(&str, &str)] = &[
        (
            "parallel.pipeline=two",
            "parallel.pipeline: expected a whole number from 1 to 4096, got \"two\" (--set)",
        ),
        ("training.steps=0", "training.steps: expected a whole number from 1 to 8388608, got 0 (--set)"),
        ("training.seed=-1", "training.seed: expected a whole number, 0 or more, got -1 (--set)"),
        ("training.steps=1.5", "training.steps: expected a whole number from 1 to 8388608, got 1.5 (--set)"),
        ("optimizer.beta1=1.0", "optimizer.beta1: expected a number from 0 to below 1, got 1.0 (--set)"),
        ("optimizer.epsilon=0", "optimizer.epsilon: expected a number above 0, got 0 (--set)"),
        ("optimizer.clip_norm=inf", "optimizer.clip_norm: expected a number above 0, got inf (--set)"),
        ("lr.peak=nan", "lr.peak: expected a number above 0, got nan (--set)"),
        (
            "optimizer.decay=some",
            "optimizer.decay: expected one of \"all\", \"matrices\", got \"some\" (--set)",
        ),
        (
            "parallel.schedule=zbv",
            "parallel.schedule: expected one of \"dualpipe\", \"dualpipev\", \"1f1b\", \"zb1p\", \"interleaved\", got \"zbv\" (--set)",
        ),
        ("tokenizer.path=5", "tokenizer.path: expected a text, got 5 (--set)"),
        (
            "data.weights=[0]",
            "data.weights: expected a list of whole numbers from 1 to 1000, got [0] (--set)",
        ),
        ("data.fim_rate=1.5", "data.fim_rate: expected a number from 0 to 1, got 1.5 (--set)"),
        ("data.weights=[1]", "data.weights: expected one for each of the 0 paths, or none, got 1"),
        ("checkpoint.save_model=1", "checkpoint.save_model: expected true or false, got 1 (--set)"),
        ("data.paths=src", "data.paths: expected a list of texts, got \"src\" (--set)"),
        ("model.config=3", "model.config: expected a text, got 3 (--set)"),
        (
            "mtp.weight=[{from_tokens=5, value=0.3}]",
            "mtp.weight: expected a number, 0 or more, or a list of { from_tokens, value } that starts at \
             0 and rises, got [{ from_tokens = 5, value = 0.3 }] (--set)",
        ),
        (
            "balance.bias_speed=-0.1",
            "balance.bias_speed: expected a number, 0 or more, or a list of { from_tokens, value } that \
             starts at 0 and rises, got -0.1 (--set)",
        ),
    ];
    for (entry, message) in cases {
        assert_eq!(error_text(&[entry]), *message);
    }
}

#[test]
fn tables_over_tokens_start_at_zero_and_rise() {
    let step = |from: i64| format!("{{from_tokens={from}, value=0.5}}");
    let table = |steps: &[String]| format!("mtp.weight=[{}]", steps.join(", "));
    assert!(read(GOOD, &[&table(&[step(0), step(1)])]).is_ok());
    let wrong = [
        vec![],
        vec![step(1)],
        vec![step(0), step(7), step(7)],
        vec![step(0), step(7), step(3)],
        vec!["{from_tokens=0, value=-0.5}".to_string()],
        vec!["{from_tokens=0}".to_string()],
        vec!["{from_tokens=0, value=1, until=3}".to_string()],
        vec!["0.5".to_string()],
    ];
    for steps in wrong {
        assert!(
            error_text(&[&table(&steps)]).starts_with("mtp.weight: expected a number, 0 or more, or a list")
        );
    }
}

#[test]
fn unknown_keys_get_the_name_that_was_meant() {
    let cases: &[(&str, &str)] = &[
        ("parallel.pipelines", "; did you mean `parallel.pipeline`?"),
        ("trainning.steps", "; did you mean `training.steps`?"),
        ("optimizer.steps", "; did you mean `training.steps`?"),
        ("parallelism.pipeline_parallel_degree", "; did you mean `parallel.pipeline`?"),
        ("parallelism.expert_parallel_degree", "; did you mean `parallel.expert`?"),
        ("parallel.expert-model-parallel-size", "; did you mean `parallel.expert`?"),
        ("parallelism.pipeline_parallel_schedule", "; did you mean `parallel.schedule`?"),
        ("training.seq_len", "; did you mean `training.sequence_length`?"),
        ("training.seq-length", "; did you mean `training.sequence_length`?"),
        ("training.global-batch-size", "; did you mean `training.global_batch_size`?"),
        ("training.micro-batch-size", "; did you mean `training.micro_batch_size`?"),
        ("training.local_batch_size", "; did you mean `training.micro_batch_size`?"),
        ("training.train-iters", "; did you mean `training.steps`?"),
        ("optimizer.lr", "; did you mean `lr.peak`?"),
        ("optimizer.min-lr", "; did you mean `lr.floor`?"),
        ("optimizer.clip-grad", "; did you mean `optimizer.clip_norm`?"),
        (
            "training.num_microbatches",
            "; the number of micro-batches follows: global_batch_size / (micro_batch_size x expert x data)",
        ),
        (
            "parallelism.tensor_parallel_degree",
            "; layers are not split across ranks: the axes are parallel.pipeline, expert and data",
        ),
        ("model.layers", "; the architecture is in the model: model.<key> sets a key of its config.json"),
        ("training.hidden_size", "; did you mean `model.hidden_size`?"),
        ("model.hiden_size", "; did you mean `model.hidden_size`?"),
        ("profiling.xyzzy", ""),
    ];
    for (path, hint) in cases {
        assert_eq!(error_text(&[&format!("{path}=1")]), format!("{path}: unknown key (--set){hint}"));
    }
    let top_level = format!("global-batch-size = 8\n{GOOD}");
    let message = "global-batch-size: unknown key (line 1); did you mean `training.global_batch_size`?";
    assert_eq!(read(&top_level, &[]).unwrap_err().to_string(), message);
    for (entry, message) in [
        ("steps=3", "--set: expected section.key=value, got `steps=3`; did you mean `training.steps`?"),
        ("training.steps", "--set: expected section.key=value, got `training.steps`"),
    ] {
        assert_eq!(error_text(&[entry]), message);
    }
}

#[test]
fn relations_between_values() {
    let cases: &[(&[&str], &str)] = &[
        (
            &["parallel.expert=3", "training.global_batch_size=12"],
            "parallel.expert: expected a divisor of the model's 8 routed experts, got 3",
        ),
        (
            &["parallel.pipeline=6"],
            "parallel.pipeline: expected at most one stage for each of the 4 layers of the model, \
             got 6 stages (dualpipe over 6 ranks)",
        ),
        (
            &["parallel.pipeline=3", "parallel.schedule=dualpipev"],
            "parallel.pipeline: expected at most one stage for each of the 4 layers of the model, \
             got 6 stages (dualpipev over 3 ranks)",
        ),
        (
            &["training.global_batch_size=12"],
            "training.global_batch_size: expected a multiple of 8 (micro_batch_size 2 x expert 2 x data 1 \
             x 2 directions), got 12",
        ),
        (
            &["training.global_batch_size=10", "parallel.schedule=dualpipev"],
            "training.global_batch_size: expected a multiple of 4 (micro_batch_size 2 x expert 2 x data 1), \
             got 10",
        ),
        (
            &["training.sequence_length=2048"],
            "training.sequence_length: expected at most the model's max_position_embeddings (1024), got 2048",
        ),
        (
            &["training.ramp_start_batch_size=8"],
            "training.ramp_tokens: expected above 0 where ramp_start_batch_size is set, got 0",
        ),
        (
            &["training.ramp_tokens=100"],
            "training.ramp_start_batch_size: expected from 8 (micro_batch_size 2 x expert 2 x data 1 x 2 \
             directions) to global_batch_size, got 0",
        ),
        (
            &["training.ramp_tokens=100", "training.ramp_start_batch_size=24"],
            "training.ramp_start_batch_size: expected from 8 (micro_batch_size 2 x expert 2 x data 1 x 2 \
             directions) to global_batch_size, got 24",
        ),
        (&["lr.floor=0.1"], "lr.floor: expected at most lr.peak (0.001), got 0.1"),
        (
            &["lr.cosine_tokens=100"],
            "lr.floor: expected a rate to end on where lr.cosine_tokens is set, got nothing",
        ),
        (
            &["model.config=small", "mtp.weight=0.3"],
            "mtp.weight: expected 0, as the model has no multi-token prediction, got a weight above 0",
        ),
    ];
    for (overrides, message) in cases {
        assert_eq!(error_text(overrides), *message);
    }
    let odd = error_text(&["parallel.pipeline=3"]);
    assert!(odd.starts_with("parallel.pipeline: ") && odd.contains("even"), "{odd}");
}

#[test]
fn all_faults_come_at_once_and_none_twice() {
    let text = r#"
[model]
config = "tiny"
[parallel]
pipeline = 3
expert = "many"
schedule = "dualpipe"
[training]
sequence_length = 4096
global_batch_size = 16
micro_batch_size = 2
seq_len = 4
[lr]
peak = 0
"#;
    let expected = "\
training.seq_len: unknown key (line 12); did you mean `training.sequence_length`?
parallel.expert: expected a whole number from 1 to 4096, got \"many\" (line 6)
training.steps: expected a whole number from 1 to 8388608, got nothing
lr.peak: expected a number above 0, got 0 (line 14)
parallel.pipeline: dualpipe pairs rank r with rank P-1-r and so needs an even number of pipeline ranks, \
got 3; use an even pipeline, or dualpipev or 1f1b
training.sequence_length: expected at most the model's max_position_embeddings (1024), got 4096";
    let faults = read(text, &[]).unwrap_err();
    assert_eq!(faults.to_string(), expected);
    assert_eq!(faults.kind(), crate::faults::ErrorKind::Config);
}

/// As many as a text of half a megabyte has room for: 100 are listed, and the time does not grow with the square of their number.
#[test]
fn many_faults_are_counted_and_take_linear_time() {
    const KEYS: usize = 60_000;
    let text: String = (0..KEYS).map(|number| format!("k{number}=1\n")).collect();
    let (text, began) = (format!("[training]\nsteps=1\n[a]\n{text}"), std::time::Instant::now());
    let faults = read(&text, &[]).unwrap_err();
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(faults.list.len(), crate::faults::MAX_FAULTS);
    let required = KEYS_REQUIRED - 1;
    assert_eq!(faults.more, KEYS + required - crate::faults::MAX_FAULTS);
    let shown = faults.to_string();
    assert!(
        shown.starts_with("a.k0: unknown key (line 4)\n") && shown.ends_with("\nand 59905 more"),
        "{shown}"
    );
    // A name of half a megabyte is compared with none of ours.
    let (long, began) = ("n".repeat(500_000), std::time::Instant::now());
    assert!(read(&format!("[a]\n{long}=1"), &[]).is_err());
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Keys that every recipe has to set.
const KEYS_REQUIRED: usize = 6;

#[test]
fn broken_toml_and_missing_files() {
    let broken = read("[model\n", &[]).unwrap_err().to_string();
    assert!(broken.starts_with("test.toml: expected valid TOML, got an error in line 1: "), "{broken}");
    let section = read("training = 3\n", &[]).unwrap_err().to_string();
    assert!(section.starts_with("training: expected a section, [training], got 3 (line 1)\n"), "{section}");

    let load = |text: &str| Recipe::load(&RecipeSource::parse(text), &[]).unwrap_err().to_string();
    let missing = load("tinny");
    assert!(missing.starts_with(
        "tinny: expected a built-in recipe (tiny, small, base, deepseek-v3) or a TOML file, got "
    ));
    assert!(missing.ends_with("; did you mean `tiny`?"), "{missing}");

    assert!(error_text(&["model.config=tinny"]).ends_with("/tinny; did you mean `tiny`?"));
    let model = error_text(&["model.config=\"no/such.json\""]);
    let expected = "model.config: expected a built-in model (tiny, small, base, deepseek-v3, deepseek-v2-lite, moonlight) or an HF config.json, got ";
    assert!(model.starts_with(expected) && model.ends_with("no/such.json"), "{model}");
}

#[test]
fn model_files_are_found_from_the_recipe_and_their_faults_join_in() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/qlora_grouped");
    let load = |config: &str| {
        let text = GOOD.replace("config = \"tiny\"", &format!("config = \"{config}\"\nlayers = 3"));
        Recipe::from_toml(&text, "test.toml", &fixture, &[]).unwrap_err().to_string()
    };
    let unknown = "model.layers: unknown key (line 4); \
        the architecture is in the model: model.<key> sets a key of its config.json\n";
    let small_vocabulary = "\
training.sequence_length: expected at most the model's max_position_embeddings (128), got 256
model.config.vocab_size: expected at least 257 for the byte tokenizer, got 192";
    assert_eq!(load("config.json"), format!("{unknown}{small_vocabulary}"));
    let no_config = load("meta.json");
    assert!(
        no_config.contains("\nmodel.config.model_type: expected \"deepseek_v3\", \"deepseek_v2\" or \"kimi_k2\", got nothing\n"),
        "{no_config}"
    );
    assert!(
        no_config
            .contains("\nmodel.config.hidden_size: expected a whole number from 1 to 131072, got nothing\n")
    );
    let no_json = load("model.safetensors");
    assert!(no_json.starts_with(&format!("{unknown}model.config: expected ")), "{no_json}");
}

#[test]
fn built_in_recipes_and_models_are_valid() {
    for name in builtin::recipe_names() {
        let source = RecipeSource::parse(name);
        assert_eq!(
            (source.clone(), source.name()),
            (RecipeSource::Builtin(name.to_string()), name.to_string())
        );
        Recipe::load(&source, &[]).unwrap_or_else(|faults| panic!("{name}: {faults}"));
        assert!(builtin::recipe_summary(name).is_some_and(|summary| summary.len() > 20), "{name}");
    }
    for name in models::model_names() {
        assert!(models::model(name).is_some(), "{name}");
    }
    assert!(
        good(&["model.config=deepseek-v3", "training.sequence_length=4096"]).model_config.yarn().is_some()
    );
}

#[test]
fn resolved_recipes_load_back_to_the_same() {
    let table = "mtp.weight=[{from_tokens=0, value=0.3}, {from_tokens=10_000_000_000_000, value=0.1}]";
    let tricky = "data.paths=['a \"b\"', \"c\\nd\"]";
    let mut recipes = vec![good(&[]), good(&[table, tricky, "lr.peak=0.1"])];
    recipes.extend(
        builtin::recipe_names()
            .into_iter()
            .map(|name| Recipe::load(&RecipeSource::parse(name), &[]).unwrap()),
    );
    for recipe in recipes {
        let resolved = recipe.resolved_toml();
        assert_eq!(read(&resolved, &[]).unwrap(), recipe, "{resolved}");
        assert!(
            resolved.contains("\n# Added to the root of the second moment.\nepsilon = 1e-8\n"),
            "{resolved}"
        );
    }
}

#[test]
fn paths_start_from_the_recipe_or_from_here() {
    let text = format!("{GOOD}[data]\npaths = [\"corpus\"]\n");
    let folder = std::path::absolute("recipes").unwrap();
    let recipe = Recipe::from_toml(&text, "test.toml", &folder, &[]).unwrap();
    assert_eq!(recipe.data.paths, [folder.join("corpus").to_string_lossy()]);
    assert_eq!(recipe.model.config, "tiny");
    let entry = ["data.paths=[\"corpus\"]".to_string()];
    let here = std::path::absolute("corpus").unwrap();
    let recipe = Recipe::from_toml(&text, "test.toml", &folder, &entry).unwrap();
    assert_eq!(recipe.data.paths, [here.to_string_lossy()]);

    assert_eq!(recipe.model.init_dir(), None);
    let text = GOOD.replace("config = \"tiny\"", "config = \"tiny\"\ninit = \"weights\"");
    let recipe = Recipe::from_toml(&text, "test.toml", &folder, &[]).unwrap();
    assert_eq!(recipe.model.init_dir(), Some(folder.join("weights").as_path()));
    let here = path_override("model.init", Path::new("fresh/../weights"));
    let recipe = Recipe::from_toml(&text, "test.toml", &folder, &[here]).unwrap();
    assert_eq!(recipe.model.init_dir(), Some(std::path::absolute("fresh/../weights").unwrap().as_path()));
}

/// The table of keys, the sections and their docs say the same.
#[test]
fn keys_are_the_fields_of_the_sections() {
    let values = Value::try_from(good(&[])).unwrap();
    let fields = values.as_table().unwrap().iter().flat_map(|(section, fields)| {
        fields.as_table().unwrap().keys().map(move |key| format!("{section}.{key}"))
    });
    let mut fields: Vec<_> = fields.collect();
    let mut keys: Vec<_> = KEYS.iter().map(|key| key.path.to_string()).collect();
    fields.sort();
    keys.sort();
    assert_eq!(fields, keys);

    let source = include_str!("sections.rs");
    for key in KEYS {
        let (_, name) = key.parts();
        let documented = format!("    /// {}\n    pub {name}: ", key.doc);
        assert!(source.contains(&documented), "{}: the field has another doc", key.path);
    }
}

#[test]
fn defaults_are_of_their_own_kind() {
    for key in KEYS {
        if let KeyDefault::Value(text) = key.default {
            let value: Value = text.parse().unwrap();
            assert!(key.kind.admits(&value), "{}: {text}", key.path);
        }
    }
    let reference = reference();
    assert!(reference.contains("[parallel]\n# Pipeline ranks.\npipeline = 1\n"), "{reference}");
    assert!(reference.contains("# steps = (required: a whole number from 1 to 8388608)\n"));
    assert!(reference.contains("# floor = (lr.peak: no decay)\n"));
    reference.parse::<toml::Table>().unwrap();
}

fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|value| value.to_string()),
        (-3i64..20).prop_map(|value| value.to_string()),
        any::<f64>().prop_map(|value| Value::Float(value).to_string()),
        "[a-z0-9 \\]\\[{}=\"',.#]{0,12}",
        prop_oneof![
            Just("\"dualpipe\""),
            Just("true"),
            Just("[]"),
            Just("\"deepseek-v3\""),
            Just("1979-05-27")
        ]
        .prop_map(str::to_string),
        (any::<i64>(), -1.0f64..1.0)
            .prop_map(|(from, value)| format!("[{{ from_tokens = {from}, value = {value:?} }}]")),
    ]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = read(&text, &[]);
    }

    #[test]
    fn no_mutation_makes_it_panic(changes in prop::collection::vec((0..KEYS.len(), any_value()), 1..6)) {
        let entry = |(key, value): &(usize, String)| format!("{}={value}", KEYS[*key].path);
        let entries: Vec<_> = changes.iter().map(entry).collect();
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        if let Ok(recipe) = read(GOOD, &entries) {
            prop_assert_eq!(read(&recipe.resolved_toml(), &[]).unwrap(), recipe.clone());
            let batch = recipe.batch_size_at(recipe.training.ramp_tokens / 2);
            prop_assert!(batch > 0 && batch % recipe.batch_unit() == 0);
        }
        let file: String = changes.iter().map(|(key, value)| {
            let (section, name) = KEYS[*key].parts();
            format!("{section}.{name} = {value}\n")
        }).collect();
        let _ = read(&file, &[]);
    }
}
