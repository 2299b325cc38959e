//! The tensor: a shape over a shared, recycled buffer, in one of several formats.
//!
//! Every operation of this crate takes tensors, never a bare slice with a type tag, so that narrower formats and
//! other devices can come behind the same signatures. It knows neither gradients nor names.

use std::{fmt, ops::Range, sync::Arc};

use half::bf16;

use crate::{
    gemm::{Mat, MatMut},
    pool::Buffer,
};

#[cfg(target_endian = "big")]
compile_error!("the raw payload of a tensor is little-endian");

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// The upper half of single precision.
    Bf16,
}

/// Memory that is not a tensor's own: where a frame has come to, for one.
pub trait Values: Send + Sync {
    /// The same as long as it lives.
    fn values(&self) -> &[f32];
}

/// Values with a shape, row-major. Clones share the buffer until one of them is written.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

#[derive(Clone)]
enum Storage {
    F32(Arc<Buffer>),
    /// Two values in the room of each f32; the last half is unused if their number is odd.
    Bf16(Arc<Buffer>),
    /// In f32, not to be written.
    Elsewhere(Arc<dyn Values>),
}

impl Tensor {
    /// Zeros, in f32.
    pub fn zeros(shape: &[usize]) -> Tensor {
        Tensor::over(shape, Buffer::zeros(shape.iter().product()))
    }

    /// Unspecified values, in f32: for an output that is going to be written in full.
    pub fn for_overwrite(shape: &[usize]) -> Tensor {
        Tensor::over(shape, Buffer::for_overwrite(shape.iter().product()))
    }

    /// The given values, in f32.
    ///
    /// **Errors**: panics if there are not as many as the shape holds.
    pub fn from_vec(shape: &[usize], values: Vec<f32>) -> Tensor {
        let len = shape.iter().product();
        assert_eq!(values.len(), len, "expected as many values as the shape {shape:?} holds");
        let mut buffer = Buffer::for_overwrite(len);
        buffer.as_mut_slice().copy_from_slice(&values);
        Tensor::over(shape, buffer)
    }

    /// Values that live elsewhere, in f32; copied when they are to be written.
    ///
    /// **Errors**: panics if there are not as many as the shape holds.
    pub fn borrowing(shape: &[usize], values: Arc<dyn Values>) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(values.values().len(), len, "expected as many values as the shape {shape:?} holds");
        Tensor { shape: shape.to_vec(), storage: Storage::Elsewhere(values) }
    }

    fn over(shape: &[usize], buffer: Buffer) -> Tensor {
        Tensor { shape: shape.to_vec(), storage: Storage::F32(Arc::new(buffer)) }
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
        match self.storage {
            Storage::F32(_) | Storage::Elsewhere(_) => Format::F32,
            Storage::Bf16(_) => Format::Bf16,
        }
    }

    /// The same values in another format, rounded to nearest, ties to even. The same format shares the buffer.
    pub fn to_format(&self, format: Format) -> Tensor {
        match (&self.storage, format) {
            (Storage::F32(_) | Storage::Elsewhere(_), Format::F32) | (Storage::Bf16(_), Format::Bf16) => {
                self.clone()
            }
            (Storage::F32(_) | Storage::Elsewhere(_), Format::Bf16) => {
                let values = self.f32();
                let mut narrow = Buffer::for_overwrite(self.len().div_ceil(2));
                let target = bytemuck::cast_slice_mut::<f32, bf16>(narrow.as_mut_slice());
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (target, &value) in target.iter_mut().zip(values) {
                            *target = bf16::from_f32(value);
                        }
                    },
                );
                Tensor { shape: self.shape.clone(), storage: Storage::Bf16(Arc::new(narrow)) }
            }
            (Storage::Bf16(values), Format::F32) => {
                let mut wide = Buffer::for_overwrite(self.len());
                let source = bytemuck::cast_slice::<f32, bf16>(values.as_slice());
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (target, value) in wide.as_mut_slice().iter_mut().zip(source) {
                            *target = value.to_f32();
                        }
                    },
                );
                Tensor::over(&self.shape, wide)
            }
        }
    }

    /// The values.
    ///
    /// **Errors**: panics if the format is not F32.
    pub fn f32(&self) -> &[f32] {
        match &self.storage {
            Storage::F32(buffer) => buffer.as_slice(),
            Storage::Elsewhere(values) => values.values(),
            Storage::Bf16(_) => panic!("expected a tensor in F32, got {self:?}"),
        }
    }

    /// The values, to be written; copied first if another tensor shares them.
    ///
    /// **Errors**: panics if the format is not F32.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        if let Storage::Elsewhere(values) = &self.storage {
            let mut own = Buffer::for_overwrite(self.len());
            own.as_mut_slice().copy_from_slice(values.values());
            self.storage = Storage::F32(Arc::new(own));
        }
        match &mut self.storage {
            Storage::F32(buffer) => Arc::make_mut(buffer).as_mut_slice(),
            _ => panic!("expected a tensor in F32, got Bf16{:?}", self.shape),
        }
    }

    /// Row `row` of the `[rows, cols]` view.
    ///
    /// **Errors**: panics if the format is not F32 or there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        let cols = self.cols();
        &self.f32()[row * cols..(row + 1) * cols]
    }

    /// The raw payload, little-endian: for the wire and for files.
    pub fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::F32(_) | Storage::Elsewhere(_) => bytemuck::cast_slice(self.f32()),
            Storage::Bf16(buffer) => &bytemuck::cast_slice(buffer.as_slice())[..2 * self.len()],
        }
    }

    /// The same values under another shape.
    ///
    /// **Errors**: panics if that shape holds another number of values.
    pub fn reshape(self, shape: &[usize]) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(len, self.len(), "expected a shape of as many values as {:?}, got {shape:?}", self.shape);
        Tensor { shape: shape.to_vec(), storage: self.storage }
    }

    /// The `[rows, cols]` view.
    ///
    /// **Errors**: panics if the format is not F32.
    pub fn mat(&self) -> Mat<'_> {
        Mat::new(self.f32(), self.rows(), self.cols())
    }

    /// The `[rows, cols]` view, to be written.
    ///
    /// **Errors**: panics if the format is not F32.
    pub fn mat_mut(&mut self) -> MatMut<'_> {
        let (rows, cols) = (self.rows(), self.cols());
        MatMut::new(self.f32_mut(), rows, cols)
    }

    /// A copy of some rows of the `[rows, cols]` view.
    ///
    /// **Errors**: panics if the format is not F32 or the range does not lie in the rows.
    pub fn slice_rows(&self, rows: Range<usize>) -> Tensor {
        let cols = self.cols();
        let mut part = Tensor::for_overwrite(&[rows.len(), cols]);
        part.f32_mut().copy_from_slice(&self.f32()[rows.start * cols..rows.end * cols]);
        part
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{:?}", self.format(), self.shape)
    }
}
