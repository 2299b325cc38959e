//! `contraflow recipes`: what is built in, and where to find every key.

use clap::builder::PossibleValuesParser;
use contraflow_runtime::model_config::builtin as models;
use contraflow_runtime::recipe::{builtin, reference};

use crate::failure::Failure;
use crate::output::print;

/// Arguments of the command.
#[derive(clap::Args)]
pub struct RecipesArgs {
    /// Print every key of a recipe with its default and its meaning, as TOML
    #[arg(long)]
    pub keys: bool,
    /// Print the config.json of a built-in model, to make one of your own from
    #[arg(long, visible_alias = "config", value_name = "NAME", conflicts_with = "keys", value_parser = models())]
    pub model: Option<String>,
}

fn models() -> PossibleValuesParser {
    PossibleValuesParser::new(models::model_names())
}

/// Lists the built-in recipes, or all keys, or prints a model.
///
/// **Errors**: stdout cannot be written.
pub fn run(args: &RecipesArgs) -> Result<(), Failure> {
    let model = args.model.as_deref().and_then(models::model);
    print(&match model {
        Some(model) => model.to_hf_json(),
        None if args.keys => reference(),
        None => list(),
    })
}

fn list() -> String {
    let names = builtin::recipe_names();
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    let line =
        |name: &&str| format!("{name:width$}  {}\n", builtin::recipe_summary(name).unwrap_or_default());
    let lines: Vec<String> = names.iter().map(line).collect();
    let default = names.first().copied().unwrap_or_default();
    format!(
        "{}\n{default} is the default of `contraflow train`. A recipe of your own is a TOML file: \
         `contraflow train FILE.toml`.\n\
         Every key, with its default and its meaning: `contraflow recipes --keys`.\n\
         A recipe with every default written out: `contraflow train RECIPE --print-recipe`.\n\
         A built-in model's config.json ({}), to change: `contraflow recipes --model NAME`; single keys of it: \
         `--set model.hidden_size=256`.\n",
        lines.concat(),
        models::model_names().join(", ")
    )
}
