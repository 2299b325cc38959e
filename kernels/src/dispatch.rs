//! Choices of experts cut by who owns them: the rows and pairs that go to each owner.
//!
//! The all-to-all of the experts sends and receives what is made here. An owner has a run of neighbouring experts; who it
//! is and how anything gets there is not known here, nor whether it passes rows on to owners of its own.
//!
//! Shape letters: T tokens, K top-k, N rows, P pairs of a row and an expert.

use crate::{gate::Routing, permute::pairs_of, tensor::Tensor};

/// What goes to one owner of experts. A row goes once, however many of the owner's experts it chose.
#[derive(Clone, Debug)]
pub struct Share {
    /// The row at the sender, of each row; ascending where theirs are.
    ///
    /// **Shapes**: `[N]` in U32.
    pub rows: Tensor,
    /// Row among `rows`, and expert among the owner's.
    ///
    /// **Shapes**: `[P, 2]` in U32.
    pub pairs: Tensor,
    /// Routing weight of each pair.
    ///
    /// **Shapes**: `[P]`.
    pub weights: Tensor,
    /// Position of each pair among the choices.
    ///
    /// **Shapes**: `[P]` in U32.
    pub slots: Tensor,
}

/// That a row wants an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The row.
    pub row: u32,
    /// The expert, counted over all owners.
    pub expert: u32,
    /// Routing weight.
    pub weight: f32,
}

/// What the tokens of a routing choose, row-major.
///
/// **Shapes**: `routing` of T tokens and K experts each.
pub fn choices_of(routing: &Routing) -> impl Iterator<Item = Choice> {
    let top_k = routing.expert_ids.cols();
    let choices = routing.expert_ids.u32().iter().zip(routing.weights.f32()).enumerate();
    choices.map(move |(slot, (&expert, &weight))| Choice { row: (slot / top_k) as u32, expert, weight })
}

/// What rows that have arrived choose, in the order of their pairs.
///
/// **Shapes**: `pairs` `[P, 2]` in U32, `weights` `[P]`.
pub fn choices_of_pairs(pairs: &Tensor, weights: &Tensor) -> impl Iterator<Item = Choice> {
    pairs_of(pairs).iter().zip(weights.f32()).map(|(&[row, expert], &weight)| Choice { row, expert, weight })
}

/// The share of each of `num_owners` owners, of choices whose rows stand together.
///
/// **Errors**: panics if an expert is beyond the last owner's.
pub fn by_owner(
    choices: impl Iterator<Item = Choice>,
    num_owners: usize,
    experts_per_owner: usize,
) -> Vec<Share> {
    let mut lists = vec![Lists::default(); num_owners];
    for (slot, Choice { row, expert, weight }) in choices.enumerate() {
        let expert = expert as usize;
        let list = &mut lists[expert / experts_per_owner];
        if list.rows.last() != Some(&row) {
            list.rows.push(row);
        }
        list.pairs.extend([list.rows.len() as u32 - 1, (expert % experts_per_owner) as u32]);
        list.weights.push(weight);
        list.slots.push(slot as u32);
    }
    lists.into_iter().map(Share::from).collect()
}

/// A share that grows.
#[derive(Clone, Default)]
struct Lists {
    rows: Vec<u32>,
    pairs: Vec<u32>,
    weights: Vec<f32>,
    slots: Vec<u32>,
}

impl From<Lists> for Share {
    fn from(lists: Lists) -> Share {
        let Lists { rows, pairs, weights, slots } = lists;
        Share {
            rows: Tensor::from_vec(&[rows.len()], rows),
            pairs: Tensor::from_vec(&[slots.len(), 2], pairs),
            weights: Tensor::from_vec(&[weights.len()], weights),
            slots: Tensor::from_vec(&[slots.len()], slots),
        }
    }
}

/// Adds `first` to the row of every pair: for pairs whose rows come to stand behind those of others.
///
/// **Shapes**: `pairs` `[P, 2]` in U32.
/// **Errors**: panics if a row is then no U32.
pub fn shift_rows(pairs: &mut Tensor, first: usize) {
    let first = u32::try_from(first).expect("a micro-batch has fewer than 2^32 rows");
    for pair in pairs.u32_mut().chunks_exact_mut(2) {
        pair[0] = pair[0].checked_add(first).expect("a micro-batch has fewer than 2^32 rows");
    }
}

/// Whether every pair names a row below `num_rows` and an expert below `num_experts`.
///
/// **Shapes**: `pairs` `[P, 2]` in U32.
pub fn pairs_are_within(pairs: &Tensor, num_rows: usize, num_experts: usize) -> bool {
    pairs_of(pairs).iter().all(|&[row, expert]| (row as usize) < num_rows && (expert as usize) < num_experts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing() -> Routing {
        Routing {
            expert_ids: Tensor::from_vec(&[4, 2], vec![0_u32, 1, 3, 0, 2, 3, 1, 2]),
            weights: Tensor::from_vec(&[4, 2], (0..8).map(|slot| slot as f32).collect()),
            scores: Tensor::zeros(&[4, 4]),
        }
    }

    #[test]
    fn a_token_goes_once_to_each_owner_of_its_experts() {
        let [first, second] = by_owner(choices_of(&routing()), 2, 2).try_into().unwrap();

        assert_eq!(first.rows.u32(), [0, 1, 3]);
        assert_eq!(first.pairs.u32(), [0, 0, 0, 1, 1, 0, 2, 1]);
        assert_eq!(first.weights.f32(), [0.0, 1.0, 3.0, 6.0]);
        assert_eq!(first.slots.u32(), [0, 1, 3, 6]);
        assert_eq!(second.rows.u32(), [1, 2, 3]);
        assert_eq!(second.pairs.u32(), [0, 1, 1, 0, 1, 1, 2, 0]);
        assert_eq!(second.slots.u32(), [2, 4, 5, 7]);
    }

    #[test]
    fn what_arrived_is_passed_on_as_what_was_routed_is() {
        let [whole] = &by_owner(choices_of(&routing()), 1, 4)[..] else { panic!("expected one owner") };
        let again = by_owner(choices_of_pairs(&whole.pairs, &whole.weights), 2, 2);
        for (share, once) in again.iter().zip(by_owner(choices_of(&routing()), 2, 2)) {
            assert_eq!(share.rows.u32(), once.rows.u32());
            assert_eq!(share.pairs.u32(), once.pairs.u32());
            assert_eq!((share.weights.f32(), share.slots.u32()), (once.weights.f32(), once.slots.u32()));
        }
    }

    #[test]
    fn one_owner_gets_every_token_where_it_stands_and_an_idle_one_nothing() {
        let all = by_owner(choices_of(&routing()), 2, 4);
        assert_eq!(all[0].rows.u32(), [0, 1, 2, 3]);
        assert_eq!(all[0].slots.u32(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((all[1].rows.shape(), all[1].pairs.shape()), (&[0][..], &[0, 2][..]));
    }

    #[test]
    fn rows_shift_and_experts_stay() {
        let mut pairs = Tensor::from_vec(&[2, 2], vec![0_u32, 7, 3, 1]);
        shift_rows(&mut pairs, 10);
        assert_eq!(pairs.u32(), [10, 7, 13, 1]);
        assert!(pairs_are_within(&pairs, 14, 8));
        assert!(!pairs_are_within(&pairs, 13, 8) && !pairs_are_within(&pairs, 14, 7));
    }
}
