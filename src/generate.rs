//! `contraflow generate`: text from a run or from any HF directory of the architecture.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use contraflow_kernels::sampling::{Sampling, sample as sample_token};
use contraflow_kernels::tensor::Tensor;
use contraflow_runtime::random::SplitMix64;
use contraflow_workers::data::model_tokenizer::ModelTokenizer;
use contraflow_workers::error::RankError;
use contraflow_workers::hf::check::{check_against, read_config};
use contraflow_workers::infer::generate::{Cache, Generator};

use crate::failure::Failure;
use crate::output::{ModelText, say};
use crate::run_dir::{self, Wanted};

/// What the sample at the end of a training run on the default corpus begins with.
pub const SAMPLE_PROMPT: &str = "/// Returns ";

/// Arguments of `contraflow generate`.
#[derive(clap::Args, Debug)]
pub struct GenerateArgs {
    /// A run (its folder or its name), or an HF directory
    #[arg(default_value = "runs/latest")]
    pub model: String,
    /// Text to continue; -: what comes on stdin; empty: a text from its beginning [default: what the sample of the run begins with]
    #[arg(long)]
    pub prompt: Option<String>,
    /// Maximum number of tokens to add
    #[arg(long, default_value_t = 300)]
    pub tokens: usize,
    /// 0: greedy; 1: the model's distribution; above 1: flatter
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f32,
    /// Sample from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,
    /// Seed of the sampling
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs the command; the text goes to stdout as it is made.
///
/// **Errors**: code 2 with the file and what is wrong with it, or with an argument.
pub fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let mut faults = Vec::new();
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        faults.push(format!("--temperature: expected a number of at least 0, got {}", args.temperature));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        faults.push(format!("--top-p: expected a number above 0 and up to 1, got {}", args.top_p));
    }
    if !faults.is_empty() {
        return Err(Failure::faults("arguments", &faults));
    }
    let dir = run_dir::find_model(&args.model, Wanted::Model).map_err(Failure::input)?;
    let (generator, text) = load(&dir)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p };
    let of_run = || run_dir::sample_prompt(&dir).unwrap_or_else(|| SAMPLE_PROMPT.to_owned()).into_bytes();
    let prompt = args.prompt.as_deref().map(prompt).transpose()?.unwrap_or_else(of_run);
    let ids = prompt_ids(&text, &prompt, generator.max_len()).map_err(Failure::input)?;
    let mut shown = ModelText::to_stdout();
    shown.print(&prompt)?;
    let mut tokens = Continuation::new(&generator, &text, &ids, sampling, args.seed);
    let mut decode = text.tokenizer.stream();
    for token in tokens.by_ref().take(args.tokens) {
        shown.print(&decode(token))?;
    }
    shown.print(b"\n")?;
    if tokens.is_cut_off && args.tokens > generator.max_len() - ids.len() + 1 {
        let context = generator.max_len();
        say(format_args!(
            "note: the text ends where the model's context does, at {context} tokens with those of the prompt"
        ));
    }
    Ok(())
}

/// The bytes of a prompt: the argument's, or those on stdin.
fn prompt(argument: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = argument.as_bytes().to_vec();
    if argument == "-" {
        bytes.clear();
        let read = std::io::stdin().lock().read_to_end(&mut bytes);
        read.map_err(|error| Failure::input(format!("--prompt -: stdin: {error}")))?;
    }
    Ok(bytes)
}

/// The tokens of a prompt; before a text that has not begun stands the end of another one.
///
/// **Errors**: the tokenizer leaves nothing of it, or it is longer than the model's context.
fn prompt_ids(text: &ModelTokenizer, prompt: &[u8], longest: usize) -> Result<Vec<u32>, String> {
    let tokenizer = &text.tokenizer;
    let ids = if prompt.is_empty() { vec![tokenizer.end_of_document()] } else { tokenizer.encode(prompt) };
    match ids.len() {
        0 => Err("--prompt: expected text of at least one token, or none at all, got text of which the tokenizer leaves nothing"
            .into()),
        got if got > longest => {
            Err(format!("--prompt: expected at most {longest} tokens, the model's context, got {got}"))
        }
        _ => Ok(ids),
    }
}

/// The model of a directory with its tokenizer.
///
/// **Errors**: code 2 with the file and what is wrong with it.
pub fn load(dir: &Path) -> Result<(Generator, ModelTokenizer), Failure> {
    load_with(dir, Generator::load)
}

/// The same with the moving average of a checkpoint's weights.
///
/// **Errors**: as [`load`]; the directory is no checkpoint with an average.
pub fn load_average(dir: &Path) -> Result<(Generator, ModelTokenizer), Failure> {
    load_with(dir, Generator::load_average)
}

fn load_with(
    dir: &Path,
    load: impl FnOnce(&Path) -> Result<Generator, RankError>,
) -> Result<(Generator, ModelTokenizer), Failure> {
    let config = read_config(dir).map_err(|faults| Failure::input(faults.join("\n  ")))?;
    let text = ModelTokenizer::read(dir, &config, run_dir::tokenizer_of(dir).as_ref()).map_err(|fault| {
        let of_weights = check_against(&config, dir).err().unwrap_or_default();
        Failure::faults("model", &[vec![fault.to_string()], of_weights].concat())
    })?;
    let fits = text.tokenizer.check_fits(config.vocab_size);
    fits.map_err(|fault| Failure::input(format!("{}: {fault}", dir.display())))?;
    let generator = load(dir).map_err(|error| Failure::input(error.to_string()))?;
    Ok((generator, text))
}

/// A few lines after a prompt, lossily as text.
///
/// **Errors**: as [`run`].
pub fn sample(dir: &Path, prompt: &str, seed: u64) -> Result<String, Failure> {
    let (generator, text) = load(dir)?;
    let sampling = Sampling { temperature: 0.6, top_p: 0.95 };
    // A sample is no more than that: a context that is shorter than its prompt has none.
    let Ok(ids) = prompt_ids(&text, prompt.as_bytes(), generator.max_len()) else {
        return Ok(prompt.to_owned());
    };
    let tokens: Vec<u32> = Continuation::new(&generator, &text, &ids, sampling, seed).take(240).collect();
    Ok(format!("{prompt}{}", String::from_utf8_lossy(&text.tokenizer.decode(&tokens))))
}

/// The first words of a text, of its first line that has some: what a sample of it may begin with.
pub fn opening(text: &[u8]) -> Option<String> {
    /// Enough for a few words.
    const CHARACTERS: usize = 32;
    let text = String::from_utf8_lossy(text);
    let line = text.lines().map(str::trim).find(|line| line.chars().any(char::is_alphanumeric))?;
    let cut = line.char_indices().nth(CHARACTERS).map_or(line.len(), |(end, _)| end);
    let whole = if cut == line.len() { cut } else { line[..cut].rfind(char::is_whitespace).unwrap_or(cut) };
    Some(line[..whole].trim_end().to_owned())
}

/// The tokens after a prompt, until one that ends a text or the end of the model's context.
struct Continuation<'a> {
    generator: &'a Generator,
    cache: Cache,
    /// Logits of the latest token; none at the end.
    logits: Option<Tensor>,
    /// Ids from here on are no token's.
    id_limit: usize,
    ends: &'a BTreeSet<u32>,
    /// Whether the context was full before the text had ended.
    is_cut_off: bool,
    sampling: Sampling,
    random: SplitMix64,
}

impl<'a> Continuation<'a> {
    /// After these tokens, of which there are some, and no more than the context has.
    fn new(
        generator: &'a Generator,
        text: &'a ModelTokenizer,
        ids: &[u32],
        sampling: Sampling,
        seed: u64,
    ) -> Self {
        let mut cache = Cache::default();
        let logits = Some(generator.read(&mut cache, ids));
        let (id_limit, ends) = (text.tokenizer.id_limit(), &text.ends);
        let random = SplitMix64::new(seed);
        Continuation { generator, cache, logits, id_limit, ends, is_cut_off: false, sampling, random }
    }
}

impl Iterator for Continuation<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let logits = self.logits.take()?;
        let known = logits.view(0..logits.len().min(self.id_limit));
        let token = sample_token(known, self.sampling, self.random.next_f64());
        if self.ends.contains(&token) {
            return None;
        }
        self.is_cut_off = self.cache.len >= self.generator.max_len();
        if !self.is_cut_off {
            self.logits = Some(self.generator.read(&mut self.cache, &[token]));
        }
        Some(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_begins_with_whole_words_of_the_text() {
        let cases = [
            ("the 0 quick brown foxes jump over 0 lazy dogs\n", "the 0 quick brown foxes jump"),
            ("\n\n  ---\n  Guten Tag\n", "Guten Tag"),
            ("Donaudampfschifffahrtsgesellschaftskapitän", "Donaudampfschifffahrtsgesellscha"),
        ];
        for (text, expected) in cases {
            assert_eq!(opening(text.as_bytes()).as_deref(), Some(expected));
        }
        assert_eq!(opening(b"\n--\n"), None);
        assert_eq!(opening(b""), None);
    }
}
