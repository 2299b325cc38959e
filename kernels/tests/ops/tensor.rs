//! Tensors: sharing, formats, rounding.

use contraflow_kernels::tensor::{Format, Tensor};

fn through_bf16(values: Vec<f32>) -> Vec<f32> {
    let len = values.len();
    Tensor::from_vec(&[len], values).to_format(Format::Bf16).to_format(Format::F32).f32().to_vec()
}

#[test]
fn bf16_is_the_nearest_and_on_ties_the_even_one() {
    let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let bits: Vec<u32> = (0..=0xffff_u32).flat_map(|upper| lower.map(|lower| upper << 16 | lower)).collect();
    let rounded = through_bf16(bits.iter().map(|&bits| f32::from_bits(bits)).collect());
    for (&bits, &rounded) in bits.iter().zip(&rounded) {
        let value = f32::from_bits(bits);
        if value.is_nan() {
            assert!(rounded.is_nan(), "{bits:08x}");
            continue;
        }
        // The candidates are the neighbours in bf16; beyond the largest one 2^128 stands for infinity.
        let down = bits & 0xffff_0000;
        let up = down.wrapping_add(0x1_0000);
        let real = |bits: u32| {
            let value = f64::from(f32::from_bits(bits));
            if value.is_infinite() { 2.0_f64.powi(128).copysign(value) } else { value }
        };
        let (to_down, to_up) = ((real(bits) - real(down)).abs(), (real(bits) - real(up)).abs());
        let even = if down >> 16 & 1 == 0 { down } else { up };
        let expected = match to_down.total_cmp(&to_up) {
            _ if value.is_infinite() => bits,
            std::cmp::Ordering::Less => down,
            std::cmp::Ordering::Greater => up,
            std::cmp::Ordering::Equal => even,
        };
        assert_eq!(rounded.to_bits(), expected, "{bits:08x}");
    }
}

#[test]
fn formats_tell_themselves_and_their_bytes() {
    let wide = Tensor::from_vec(&[3], vec![1.0, -2.0, 0.5]);
    let narrow = wide.to_format(Format::Bf16);
    assert_eq!((wide.format(), narrow.format()), (Format::F32, Format::Bf16));
    assert_eq!(wide.bytes(), [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0, 0, 0, 0x3f]);
    assert_eq!(narrow.bytes(), [0x80, 0x3f, 0, 0xc0, 0, 0x3f]);
    assert_eq!(narrow.to_format(Format::Bf16).bytes(), narrow.bytes());
    assert_eq!(format!("{narrow:?}"), "Bf16[3]");
}

#[test]
fn clones_share_until_one_is_written() {
    let original = Tensor::from_vec(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
    let mut copy = original.clone();
    assert_eq!(copy.f32().as_ptr(), original.f32().as_ptr());

    copy.f32_mut()[0] = 9.0;

    assert_eq!(original.f32(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(copy.f32(), [9.0, 2.0, 3.0, 4.0]);
    let address = copy.f32().as_ptr();
    copy.f32_mut()[1] = 8.0;
    assert_eq!(copy.f32().as_ptr(), address, "an unshared buffer is written in place");
}

#[test]
fn shapes_view_the_same_values() {
    let tensor = Tensor::from_vec(&[2, 3, 2], (0..12).map(|i| i as f32).collect());
    assert_eq!((tensor.rows(), tensor.cols(), tensor.len()), (6, 2, 12));
    assert_eq!(tensor.row(4), [8.0, 9.0]);
    assert_eq!(tensor.slice_rows(1..3).f32(), [2.0, 3.0, 4.0, 5.0]);
    assert_eq!(tensor.mat().row(5), [10.0, 11.0]);
    assert_eq!(tensor.reshape(&[3, 4]).row(2), [8.0, 9.0, 10.0, 11.0]);
    assert!(Tensor::zeros(&[0, 5]).is_empty());
    assert_eq!(Tensor::zeros(&[0, 5]).slice_rows(0..0).shape(), [0, 5]);
}

#[test]
#[should_panic(expected = "expected a tensor in F32, got Bf16[2]")]
fn narrow_values_are_not_handed_out_as_f32() {
    Tensor::zeros(&[2]).to_format(Format::Bf16).f32();
}

#[test]
#[should_panic(expected = "expected a shape of as many values as [2, 3], got [4]")]
fn a_shape_of_another_size_is_refused() {
    Tensor::zeros(&[2, 3]).reshape(&[4]);
}
