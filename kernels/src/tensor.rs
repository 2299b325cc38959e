//! The tensor: a shape over shared, recycled memory, in one of several formats.
//!
//! Every operation of this crate takes and gives tensors, never a bare slice, so that narrower formats and other devices
//! come behind the same signatures. Outside of this crate their numbers are seen through one door, [`crate::host`]. A
//! tensor knows neither gradients nor names.

use std::{fmt, ops::Range, sync::Arc};

pub use crate::{
    format::{Element, Format, ScaleRule, Study, Tile},
    view::{View, ViewMut},
};
use crate::{
    pool::Buffer,
    view::{Mat, MatMut},
};

#[cfg(target_endian = "big")]
compile_error!("the bytes of a tensor are little-endian");

/// Memory of this process that no tensor allocated: where a frame has arrived, for one.
pub trait HostMemory: Send + Sync {
    /// Its bytes, the same as long as it lives.
    fn bytes(&self) -> &[u8];
}

/// Values with a shape, row-major. Clones share the memory until one of them is written.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    format: Format,
    storage: Storage,
}

/// Where the bytes of a tensor are: its values, then their scales if the format has any.
#[derive(Clone)]
enum Storage {
    /// In this process, allocated here.
    Host(Arc<Buffer>),
    /// In this process, allocated elsewhere; not to be written.
    Borrowed(Arc<dyn HostMemory>),
}

impl Tensor {
    /// Zeros, in F32.
    pub fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros_in(Format::F32, shape)
    }

    /// Zeros in a format without scales.
    pub fn zeros_in(format: Format, shape: &[usize]) -> Tensor {
        Tensor::over(shape, format, Buffer::zeros(format.num_bytes(shape)))
    }

    /// Unspecified values, in F32: for an output that is going to be written in full.
    pub fn for_overwrite(shape: &[usize]) -> Tensor {
        Tensor::for_overwrite_in(Format::F32, shape)
    }

    /// Unspecified values in a format: for an output that is going to be written in full.
    pub fn for_overwrite_in(format: Format, shape: &[usize]) -> Tensor {
        Tensor::over(shape, format, Buffer::for_overwrite(format.num_bytes(shape)))
    }

    /// The given values, in their own format.
    ///
    /// **Errors**: panics if there are not as many as the shape holds.
    pub fn from_vec<T: Element>(shape: &[usize], values: Vec<T>) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(values.len(), len, "expected as many values as the shape {shape:?} holds");
        Tensor::over(shape, T::FORMAT, Buffer::copy_of(bytemuck::cast_slice(&values)))
    }

    /// Values, and their scales if the format has any, that already lie in `memory`; copied when they are to be written. `None`
    /// if it does not hold exactly what the shape does, or they are not aligned.
    pub fn borrowing(format: Format, shape: &[usize], memory: Arc<dyn HostMemory>) -> Option<Tensor> {
        // Four bytes each, and scales: a bound on what is computed below.
        shape.iter().try_fold(8_usize, |len, &dim| len.checked_mul(dim.max(1)))?;
        let is_aligned = memory.bytes().as_ptr().addr().is_multiple_of(size_of::<u32>());
        let is_whole = memory.bytes().len() == format.num_bytes(shape);
        let storage = Storage::Borrowed(memory);
        (is_aligned && is_whole).then(|| Tensor { shape: shape.to_vec(), format, storage })
    }

    fn over(shape: &[usize], format: Format, buffer: Buffer) -> Tensor {
        Tensor { shape: shape.to_vec(), format, storage: Storage::Host(Arc::new(buffer)) }
    }

    /// The lengths of all dims.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Product of all dims but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The last dim.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How the values are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The same codes and scales, as a factor of products under a study.
    pub(crate) fn in_study(&self, study: Study) -> Tensor {
        let format = match self.format {
            Format::E4M3(tile, rule) => Format::E4M3(tile, ScaleRule { study, ..rule }),
            other => other,
        };
        Tensor { format, ..self.clone() }
    }

    /// **Units**: bytes of all [`Tensor::parts`]. Reads nothing.
    pub fn num_bytes(&self) -> usize {
        self.format.num_bytes(&self.shape)
    }

    /// The raw payload, little-endian, for the wire and for files: the values, then their scales if the format has any; codes of
    /// one byte are filled up to a multiple of four of them.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let first = self.num_bytes() - 4 * self.format.num_scales(&self.shape);
        let (values, scales) = self.bytes().split_at(first);
        std::iter::once(values).chain((!scales.is_empty()).then_some(scales))
    }

    /// The values as they lie, without scales.
    pub(crate) fn codes(&self) -> &[u8] {
        &self.bytes()[..self.format.value_bytes(self.len())]
    }

    /// The scales of a narrow format, in rows as [`Format::scale_grid`] has them.
    pub(crate) fn scales(&self) -> &[f32] {
        let first = self.num_bytes() - 4 * self.format.num_scales(&self.shape);
        bytemuck::cast_slice(&self.bytes()[first..])
    }

    /// Codes and scales, to be written.
    pub(crate) fn codes_and_scales_mut(&mut self) -> (&mut [u8], &mut [f32]) {
        let num_codes = self.format.value_bytes(self.len());
        let first = self.num_bytes() - 4 * self.format.num_scales(&self.shape);
        let (codes, scales) = self.bytes_mut().split_at_mut(first);
        (&mut codes[..num_codes], bytemuck::cast_slice_mut(scales))
    }

    /// The same values under another shape.
    ///
    /// **Errors**: panics if that shape holds another number of values.
    pub fn reshape(self, shape: &[usize]) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(len, self.len(), "expected a shape of as many values as {:?}, got {shape:?}", self.shape);
        Tensor { shape: shape.to_vec(), ..self }
    }

    /// A run of the values, row-major.
    ///
    /// **Errors**: panics if the range does not lie in the tensor.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        View::new(self.format, &self.bytes()[self.bytes_of(range)])
    }

    /// A run of the values, to be written; all of them are copied first if another tensor shares them.
    ///
    /// **Errors**: panics if the range does not lie in the tensor.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        let bytes = self.bytes_of(range);
        ViewMut::new(self.format, &mut self.bytes_mut()[bytes])
    }

    fn bytes_of(&self, range: Range<usize>) -> Range<usize> {
        self.format.value_bytes(range.start)..self.format.value_bytes(range.end)
    }

    fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Host(buffer) => buffer.as_slice(),
            Storage::Borrowed(memory) => memory.bytes(),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        if let Storage::Borrowed(memory) = &self.storage {
            self.storage = Storage::Host(Arc::new(Buffer::copy_of(memory.bytes())));
        }
        match &mut self.storage {
            Storage::Host(buffer) => Arc::make_mut(buffer).as_mut_slice(),
            Storage::Borrowed(_) => unreachable!("replaced in the lines above"),
        }
    }

    fn expect(&self, format: Format) {
        assert!(self.format == format, "expected a tensor in {format:?}, got {self:?}");
    }

    /// The values, row-major.
    ///
    /// **Errors**: panics if they have another format.
    pub(crate) fn typed<T: Element>(&self) -> &[T] {
        self.expect(T::FORMAT);
        bytemuck::cast_slice(self.bytes())
    }

    /// The values, to be written; copied first if another tensor shares them.
    ///
    /// **Errors**: panics if they have another format.
    pub(crate) fn typed_mut<T: Element>(&mut self) -> &mut [T] {
        self.expect(T::FORMAT);
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    pub(crate) fn f32(&self) -> &[f32] {
        self.typed()
    }

    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        self.typed_mut()
    }

    pub(crate) fn u32(&self) -> &[u32] {
        self.typed()
    }

    pub(crate) fn u32_mut(&mut self) -> &mut [u32] {
        self.typed_mut()
    }

    /// Row `row` of the `[rows, cols]` view.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        let cols = self.cols();
        &self.f32()[row * cols..(row + 1) * cols]
    }

    /// The `[rows, cols]` view.
    pub(crate) fn mat(&self) -> Mat<'_> {
        Mat::new(self.f32(), self.rows(), self.cols())
    }

    /// The `[rows, cols]` view, to be written.
    pub(crate) fn mat_mut(&mut self) -> MatMut<'_> {
        let (rows, cols) = (self.rows(), self.cols());
        MatMut::new(self.f32_mut(), rows, cols)
    }
}

impl From<View<'_>> for Tensor {
    /// A copy of the run, with one dim.
    fn from(view: View<'_>) -> Tensor {
        Tensor::over(&[view.len()], view.format(), Buffer::copy_of(view.bytes()))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{:?}", self.format, self.shape)
    }
}
