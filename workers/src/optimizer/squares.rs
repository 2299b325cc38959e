//! How long the gradient is, and how long its parts are: sums of squares by the place of a parameter.
//!
//! Knows parameters by published name.

use contraflow_kernels::elementwise::sum_squares;
use contraflow_kernels::tensor::View;
use contraflow_proto::GradientNorms;
use contraflow_runtime::stability::evidence::layer_of;

use crate::model::params::Param;

/// Sums of squares by the place of a parameter: the embedding, each layer, final norm and head.
#[derive(Clone, Debug, PartialEq)]
pub struct SquaresByPlace(Vec<f64>);

impl SquaresByPlace {
    /// Zeros for a model of this many layers, those of multi-token prediction included.
    pub fn new(num_layers: usize) -> Self {
        SquaresByPlace(vec![0.0; Self::len(num_layers)])
    }

    /// How many sums there are.
    pub fn len(num_layers: usize) -> usize {
        num_layers + 2
    }

    /// Adds squares with their places, in order.
    pub fn add(&mut self, squares: &[(usize, f64)]) {
        squares.iter().for_each(|&(place, square)| self.0[place] += square);
    }

    /// The sums themselves.
    pub fn into_sums(self) -> Vec<f64> {
        self.0
    }
}

/// The place of a parameter, and the sum of squares of (part of) its gradient.
pub fn square(param: &Param, gradient: View, num_layers: usize) -> (usize, f64) {
    let name = &param.parts[0].name;
    let head = SquaresByPlace::len(num_layers) - 1;
    let place = match layer_of(name) {
        Some(layer) => 1 + layer,
        None if name.starts_with("model.embed_tokens") => 0,
        None => head,
    };
    (place, sum_squares(gradient))
}

/// The norms, out of sums of squares in the order of [`SquaresByPlace`].
pub fn gradient_norms(squares: &[f64]) -> GradientNorms {
    let norms: Vec<f64> = squares.iter().map(|squares| squares.sqrt()).collect();
    match norms.as_slice() {
        [embedding, layers @ .., head] => {
            GradientNorms { embedding: *embedding, layers: layers.to_vec(), head: *head }
        }
        _ => GradientNorms::default(),
    }
}
