//! Looks through a rank's tensors for what is not finite, and shares the result with the other ranks.
//!
//! Reads every tensor, so it is done only once the totals are known to be bad. Knows parameters by published name, no
//! optimizer state.

use std::collections::HashMap;

use contraflow_kernels::elementwise::count_not_finite;
use contraflow_kernels::tensor::View;
use contraflow_runtime::fabric::FabricError;
use contraflow_runtime::stability::Seen;
use contraflow_runtime::stability::evidence::{BadTensor, Evidence, FOUND_LEN, Found};

use super::totals::Totals;
use crate::comm::collectives::Collectives;
use crate::model::params::RankParams;

/// The all-reduce of the evidence; the totals are number 0.
const EVIDENCE_BUCKET: usize = 1;

/// Everything that is known about a step that is not finite: each rank scans its tensors and shares the result.
///
/// **Errors**: those of the fabric.
pub fn evidence(
    collectives: &Collectives,
    world: &[usize],
    seen: &Seen,
    found: &Found,
    names: &[String],
) -> Result<Evidence, FabricError> {
    let own = collectives.endpoint.rank();
    let mut numbers = vec![0.0; FOUND_LEN * world.len()];
    for (rank, numbers) in world.iter().zip(numbers.chunks_exact_mut(FOUND_LEN)) {
        if *rank == own {
            numbers.copy_from_slice(&found.to_numbers());
        }
    }
    let numbers = collectives.all_reduce(world, EVIDENCE_BUCKET, numbers)?;
    let (all, _) = numbers.as_chunks::<FOUND_LEN>();
    let all: Vec<Found> = all.iter().map(|&numbers| Found::from_numbers(numbers)).collect();
    Ok(Evidence::new(seen.step, (seen.loss, seen.grad_norm), &all, names))
}

/// What is not finite among a rank's own tensors; gradients before they are summed over ranks.
pub fn find(params: &RankParams, totals: &Totals, names: &[String]) -> Found {
    let places: HashMap<&str, usize> =
        names.iter().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
    let mut found = Found { micro_batch: totals.bad_micro_batch, ..Found::default() };
    for param in params.dense.iter().chain(params.experts.iter()) {
        for part in &param.parts {
            let Some(&place) = places.get(part.name.as_str()) else { continue };
            // Where the masters of others are not here, they look through those.
            let (kept, of_part) = (param.kept(), part.range());
            let own = of_part.start.max(kept.start)..of_part.end.min(kept.end);
            let weight = (!own.is_empty()).then(|| param.master_view(own));
            if let Some(bad) = weight.and_then(|weight| bad_tensor(place, weight)) {
                found.weight = Some(first(found.weight, bad));
            }
            let gradient = param.grad.as_ref().map(|gradient| gradient.view(part.range()));
            if let Some(bad) = gradient.and_then(|gradient| bad_tensor(place, gradient)) {
                found.first_gradient = Some(first(found.first_gradient, bad));
                found.last_gradient = Some(last(found.last_gradient, bad));
                found.num_gradients += 1;
            }
        }
    }
    found
}

fn bad_tensor(place: usize, values: View) -> Option<BadTensor> {
    let num_values = count_not_finite(values);
    (num_values > 0).then_some(BadTensor { place, num_values })
}

fn first(known: Option<BadTensor>, bad: BadTensor) -> BadTensor {
    known.filter(|known| known.place < bad.place).unwrap_or(bad)
}

fn last(known: Option<BadTensor>, bad: BadTensor) -> BadTensor {
    known.filter(|known| known.place > bad.place).unwrap_or(bad)
}
