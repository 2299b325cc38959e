//! Generation with the cache of latents: greedy tokens, their logits, what the cache holds.

use contraflow_kernels::host::HostValues;
use contraflow_kernels::sampling::{Sampling, sample};
use contraflow_workers::infer::generate::{Cache, Generator};

use crate::findings::{ACTIVATIONS, Findings, LOGITS, Mark};
use crate::fixture::Fixture;

const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0 };

pub fn check(fixture: &Fixture, findings: &mut Findings) {
    let (Some(prompt), Some(tokens)) = (fixture.values.get("gen.prompt"), fixture.values.get("gen.tokens"))
    else {
        return;
    };
    let generator = Generator::load(&fixture.dir).unwrap();
    let mut cache = Cache::default();
    let mut chosen = Vec::new();
    let mut all_logits = Vec::new();
    let mut ids = prompt.sequences().concat();
    for _ in 0..tokens.values.len() {
        let logits = generator.read(&mut cache, &ids);
        ids = vec![sample(logits.view(0..logits.len()), GREEDY, 0.5)];
        chosen.push(ids[0] as f32);
        all_logits.extend_from_slice(logits.values::<f32>());
    }
    for (name, truth) in fixture.under("gen.") {
        let (key, values) = (format!("gen.{name}"), &truth.values);
        match name.split('.').collect::<Vec<_>>()[..] {
            ["prompt"] => {}
            ["tokens"] => findings.compare("greedy tokens", &key, values, &chosen, Mark::Absolute(0.0)),
            ["logits"] => findings.compare("logits in generation", &key, values, &all_logits, LOGITS),
            ["cache", layer, "kv_latent"] => {
                let found = cache.layers[layer.parse::<usize>().unwrap()].latents();
                findings.compare("cached latents", &key, values, found.values(), ACTIVATIONS);
            }
            ["cache", layer, "k_rope"] => {
                let found = cache.layers[layer.parse::<usize>().unwrap()].rope_keys();
                let found = members_apart(found.values(), fixture.config.qk_rope_head_dim);
                findings.compare("cached rope keys", &key, values, &found, ACTIVATIONS);
            }
            _ => findings.unknown(&key),
        }
    }
}

/// Our rotated key has its pairs side by side, as in the published weights; the truth has all first members, then all
/// second ones.
fn members_apart(keys: &[f32], dim: usize) -> Vec<f32> {
    let member = |key: &[f32], which: usize| key.iter().skip(which).step_by(2).copied().collect::<Vec<f32>>();
    keys.chunks(dim).flat_map(|key| [member(key, 0), member(key, 1)].concat()).collect()
}
