//! Tensors: sharing, formats, bytes, memory of others.

use std::sync::Arc;

use contraflow_kernels::{
    host::{HostValues, HostValuesMut},
    tensor::{Format, HostMemory, Tensor},
};

#[test]
fn file_formats_are_detected_by_name_and_bytes() {
    let values = Tensor::from_vec(&[3], vec![1.0_f32, -2.0, 0.5]);
    let ids = Tensor::from_vec(&[1, 2], vec![7_u32, 0x0102_0304]);
    assert_eq!((values.format(), ids.format()), (Format::F32, Format::U32));
    assert_eq!(values.parts().collect::<Vec<_>>(), [[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0, 0, 0, 0x3f]]);
    assert_eq!(ids.parts().collect::<Vec<_>>(), [[7, 0, 0, 0, 4, 3, 2, 1]]);
    assert_eq!((values.num_bytes(), ids.num_bytes()), (12, 8));
    assert_eq!(format!("{values:?} {ids:?}"), "F32[3] U32[1, 2]");
}

#[test]
fn clones_share_until_one_is_written() {
    let original = Tensor::from_vec(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
    let mut copy = original.clone();
    assert_eq!(copy.values::<f32>().as_ptr(), original.values::<f32>().as_ptr());

    copy.values_mut::<f32>()[0] = 9.0;

    assert_eq!(original.values::<f32>(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(copy.values::<f32>(), [9.0, 2.0, 3.0, 4.0]);
    let address = copy.values::<f32>().as_ptr();
    copy.values_mut::<f32>()[1] = 8.0;
    assert_eq!(copy.values::<f32>().as_ptr(), address, "an unshared buffer is written in place");
}

#[test]
fn shapes_view_the_same_values() {
    let tensor = Tensor::from_vec(&[2, 3, 2], (0..12).map(|i| i as f32).collect());
    assert_eq!((tensor.rows(), tensor.cols(), tensor.len()), (6, 2, 12));
    let wide = tensor.clone().reshape(&[3, 4]);
    assert_eq!((wide.rows(), wide.cols()), (3, 4));
    assert_eq!(wide.values::<f32>().as_ptr(), tensor.values::<f32>().as_ptr());
    assert!(Tensor::zeros(&[0, 5]).is_empty());
}

#[test]
fn runs_are_copied_from_tensor_to_tensor() {
    let source = Tensor::from_vec(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let mut target = Tensor::zeros(&[4]);
    let shared = target.clone();
    target.view_mut(1..3).copy_from(source.view(2..4));
    assert_eq!(target.values::<f32>(), [0.0, 3.0, 4.0, 0.0]);
    assert_eq!(shared.values::<f32>(), [0.0; 4]);
    let run = Tensor::from(source.view(4..6));
    assert_eq!((run.shape(), run.values::<f32>()), (&[2][..], &[5.0, 6.0][..]));
}

/// Sixteen aligned bytes without the first few.
struct Frame {
    words: [f32; 4],
    skip: usize,
}

impl HostMemory for Frame {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[self.skip..]
    }
}

#[test]
fn memory_of_others_is_read_in_place_and_copied_when_it_is_written() {
    let frame = |skip| Arc::new(Frame { words: [1.0, 2.0, 3.0, 4.0], skip });
    let memory = frame(4);
    let address = memory.bytes().as_ptr();
    let mut tensor = Tensor::borrowing(Format::F32, &[3, 1], memory.clone()).unwrap();
    assert_eq!(tensor.values::<f32>(), [2.0, 3.0, 4.0]);
    assert_eq!(tensor.parts().next().unwrap().as_ptr(), address);

    tensor.values_mut::<f32>()[0] = 9.0;

    assert_eq!(tensor.values::<f32>(), [9.0, 3.0, 4.0]);
    assert_eq!(memory.words, [1.0, 2.0, 3.0, 4.0]);
    for (shape, skip) in [(&[2][..], 4), (&[4], 4), (&[3], 5), (&[usize::MAX, 3], 4)] {
        assert!(
            Tensor::borrowing(Format::F32, shape, frame(skip)).is_none(),
            "{shape:?} without {skip} bytes"
        );
    }
}

#[test]
#[should_panic(expected = "expected a tensor in F32, got U32[2]")]
fn ids_are_not_handed_out_as_f32() {
    Tensor::from_vec(&[2], vec![1_u32, 2]).values::<f32>();
}

#[test]
#[should_panic(expected = "expected a shape of as many values as [2, 3], got [4]")]
fn a_shape_of_another_size_is_refused() {
    Tensor::zeros(&[2, 3]).reshape(&[4]);
}
