//! From a `TrainingJob` to what is submitted: the same of the same object, whoever asks and however often. Pure.

use contraflow_proto::v1;
use kube::ResourceExt;

use crate::job::{RecipeSource, TrainingJob, built_in};
use crate::trouble::Trouble;

/// A recipe, and the model where it is none of those that are built in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recipe {
    /// TOML.
    pub text: String,
    /// The model's config.json; empty if the recipe names a model that is built in.
    pub model_config: String,
}

/// The recipe of an object. `data` is that of the ConfigMap that it names.
///
/// **Errors**: there is no such recipe.
pub fn recipe(
    source: &RecipeSource,
    data: Option<&std::collections::BTreeMap<String, String>>,
) -> Result<Recipe, Trouble> {
    let model_config = source.model_config.clone().unwrap_or_default();
    let lacks = |words: String| Trouble::recipe(words);
    match source {
        RecipeSource { inline: Some(text), .. } => Ok(Recipe { text: text.clone(), model_config }),
        RecipeSource { built_in: Some(name), .. } => {
            let known = built_in();
            let text = known.get(name.as_str()).ok_or_else(|| {
                let names: Vec<&str> = known.keys().copied().collect();
                lacks(format!("recipe.builtIn: expected one of {}, got {name:?}", names.join(", ")))
            })?;
            Ok(Recipe { text: (*text).to_owned(), model_config })
        }
        RecipeSource { config_map: Some(map), .. } => {
            let data =
                data.ok_or_else(|| lacks(format!("recipe.configMap: there is no ConfigMap {}", map.name)))?;
            let read = |key: &str| {
                let words =
                    || lacks(format!("recipe.configMap: the ConfigMap {} has no key {key}", map.name));
                data.get(key).cloned().ok_or_else(words)
            };
            let text = read(map.key.as_deref().unwrap_or("recipe.toml"))?;
            let model = map.model_config_key.as_deref().map(read).transpose()?;
            Ok(Recipe { text, model_config: model.unwrap_or(model_config) })
        }
        _ => Err(lacks("recipe: expected one of builtIn, inline and configMap, got none".into())),
    }
}

/// What of a job is the orchestrator's to tell from that of another object: its name there. It has the object's place and a part of its
/// UID, so that an object that is made anew under a name has another.
pub fn name(job: &TrainingJob) -> String {
    let uid = job.uid().unwrap_or_default();
    let part = uid.get(..8).unwrap_or(&uid);
    format!("{}/{}.{part}", job.namespace().unwrap_or_default(), job.name_any())
}

/// What is submitted. Its key is that of the object: submitting it again answers with the same job.
pub fn submission(job: &TrainingJob, recipe: &Recipe) -> v1::SubmitRequest {
    let ranks = |ranks: Option<i32>| ranks.and_then(|ranks| u32::try_from(ranks).ok()).unwrap_or(0);
    v1::SubmitRequest {
        recipe: recipe.text.clone(),
        overrides: job.spec.overrides.clone(),
        model_config: recipe.model_config.clone(),
        name: name(job),
        priority: job.spec.priority,
        idempotency_key: format!("trainingjob/{}", job.uid().unwrap_or_default()),
        min_ranks: ranks(job.spec.min_ranks),
        max_ranks: ranks(job.spec.max_ranks),
        resume: None,
        force: false,
    }
}

/// Identifies what was submitted: 32 hexadecimal digits of a SHA-256.
pub fn fingerprint(request: &v1::SubmitRequest) -> String {
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    let numbers = [i64::from(request.priority), i64::from(request.min_ranks), i64::from(request.max_ranks)];
    numbers.iter().for_each(|number| digest.update(&number.to_be_bytes()));
    let texts = [&request.recipe, &request.model_config, &request.name].into_iter().chain(&request.overrides);
    for text in texts {
        digest.update(&text.len().to_be_bytes());
        digest.update(text.as_bytes());
    }
    digest.finish().as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::job::{ConfigMapRef, TrainingJobSpec};

    fn object(uid: &str) -> TrainingJob {
        let spec = TrainingJobSpec {
            overrides: vec!["training.steps=10".into()],
            priority: 3,
            min_ranks: Some(1),
            ..TrainingJobSpec::default()
        };
        let mut job = TrainingJob::new("tiny", spec);
        job.metadata.namespace = Some("training".into());
        job.metadata.uid = Some(uid.into());
        job
    }

    #[test]
    fn one_object_is_one_job_and_one_made_anew_is_another() {
        let recipe = Recipe { text: "[model]".into(), ..Recipe::default() };
        let first = submission(&object("0a1b2c3d-1111"), &recipe);
        assert_eq!(first, submission(&object("0a1b2c3d-1111"), &recipe));
        assert_eq!(first.name, "training/tiny.0a1b2c3d");
        assert_eq!((first.priority, first.min_ranks, first.max_ranks), (3, 1, 0));
        let again = submission(&object("ffffffff-2222"), &recipe);
        assert_ne!(first.idempotency_key, again.idempotency_key);
        assert_ne!(first.name, again.name);
    }

    #[test]
    fn whatever_is_submitted_is_in_the_fingerprint() {
        let recipe = Recipe { text: "[model]".into(), ..Recipe::default() };
        let base = submission(&object("0a1b2c3d"), &recipe);
        let changed = [
            v1::SubmitRequest { recipe: "[data]".into(), ..base.clone() },
            v1::SubmitRequest { model_config: "{}".into(), ..base.clone() },
            v1::SubmitRequest { overrides: vec!["training.steps=1".into(), "0".into()], ..base.clone() },
            v1::SubmitRequest { priority: 4, ..base.clone() },
            v1::SubmitRequest { min_ranks: 2, ..base.clone() },
            v1::SubmitRequest { max_ranks: 2, ..base.clone() },
        ];
        let all: std::collections::BTreeSet<String> =
            changed.iter().chain([&base]).map(fingerprint).collect();
        assert_eq!(all.len(), 7);
        assert_eq!(fingerprint(&base), fingerprint(&base.clone()));
        assert_eq!(fingerprint(&base).len(), 32);
    }

    #[test]
    fn a_recipe_that_is_not_there_is_said_with_its_field() {
        let map = |key: Option<&str>| RecipeSource {
            config_map: Some(ConfigMapRef {
                name: "recipes".into(),
                key: key.map(str::to_owned),
                ..ConfigMapRef::default()
            }),
            ..RecipeSource::default()
        };
        let data = BTreeMap::from([("recipe.toml".to_owned(), "text".to_owned())]);
        assert_eq!(recipe(&map(None), Some(&data)).unwrap_or_default().text, "text");
        let words = |source: &RecipeSource, data| {
            recipe(source, data).err().map(|trouble| trouble.words).unwrap_or_default()
        };
        assert_eq!(
            words(&map(Some("other")), Some(&data)),
            "recipe.configMap: the ConfigMap recipes has no key other"
        );
        assert_eq!(words(&map(None), None), "recipe.configMap: there is no ConfigMap recipes");
        let named = |name: &str| RecipeSource { built_in: Some(name.into()), ..RecipeSource::default() };
        assert_eq!(
            words(&named("huge"), None),
            "recipe.builtIn: expected one of base, deepseek-v3, small, tiny, got \"huge\""
        );
        assert!(recipe(&named("tiny"), None).unwrap_or_default().text.contains("[parallel]"));
    }
}
