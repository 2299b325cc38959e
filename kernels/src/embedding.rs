//! The embedding table: one row per token id, and its gradient.
//!
//! First component of the first stage, and of the multi-token-prediction module. It knows no positions.
//!
//! Shape letters: T tokens, V vocabulary, D hidden.

use crate::{permute, tensor::Tensor};

/// The rows of `table` that `ids` name.
///
/// **Shapes**: `ids` `[T]` in U32, `table` `[V, D]`, result `[T, D]`.
/// **Errors**: panics if an id is not below V.
pub fn forward(ids: &Tensor, table: &Tensor) -> Tensor {
    check(ids, table);
    permute::gather(table, ids)
}

/// Adds row `i` of `dy` to the row of `d_table` that `ids[i]` names, in ascending `i`.
///
/// **Shapes**: `dy` `[T, D]`, `ids` `[T]` in U32, `d_table` `[V, D]`.
/// **Errors**: panics if an id is not below V.
pub fn backward(dy: &Tensor, ids: &Tensor, d_table: &mut Tensor) {
    check(ids, d_table);
    permute::scatter_add(dy, ids, d_table);
}

fn check(ids: &Tensor, table: &Tensor) {
    let vocabulary = table.rows();
    if let Some((index, id)) = ids.u32().iter().enumerate().find(|&(_, &id)| id as usize >= vocabulary) {
        panic!("token {index}: expected an id below {vocabulary}, got {id}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Tensor {
        Tensor::from_vec(&[3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    }

    fn ids(ids: &[u32]) -> Tensor {
        Tensor::from_vec(&[ids.len()], ids.to_vec())
    }

    #[test]
    fn each_id_gets_its_row() {
        assert_eq!(forward(&ids(&[2, 0, 2]), &table()).f32(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
    }

    #[test]
    fn the_gradient_of_a_repeated_id_sums_up_on_what_was_there() {
        let dy = Tensor::from_vec(&[3, 2], vec![10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
        let mut d_table = table();

        backward(&dy, &ids(&[2, 0, 2]), &mut d_table);

        assert_eq!(d_table.f32(), [31.0, 42.0, 3.0, 4.0, 65.0, 86.0]);
    }

    #[test]
    #[should_panic(expected = "token 1: expected an id below 3, got 3")]
    fn an_unknown_id_is_refused() {
        forward(&ids(&[0, 3]), &table());
    }
}
