//! The one door to the numbers of a tensor: for files, for data and for tests. All else works with tensors.
//!
//! Where the tensor lies elsewhere than in this process, this is where its numbers would have to be fetched.

use crate::tensor::{Element, Tensor, View, ViewMut};

/// Values that can be read here.
pub trait HostValues {
    /// The values, row-major.
    ///
    /// **Errors**: panics if they have another format.
    fn values<T: Element>(&self) -> &[T];
}

/// Values that can be written here.
pub trait HostValuesMut {
    /// The values, row-major, to be written. Those of a tensor are copied first if another one shares them.
    ///
    /// **Errors**: panics if they have another format.
    fn values_mut<T: Element>(&mut self) -> &mut [T];
}

impl HostValues for Tensor {
    fn values<T: Element>(&self) -> &[T] {
        self.typed()
    }
}

impl HostValuesMut for Tensor {
    fn values_mut<T: Element>(&mut self) -> &mut [T] {
        self.typed_mut()
    }
}

impl HostValues for View<'_> {
    fn values<T: Element>(&self) -> &[T] {
        self.typed()
    }
}

impl HostValuesMut for ViewMut<'_> {
    fn values_mut<T: Element>(&mut self) -> &mut [T] {
        self.typed_mut()
    }
}
