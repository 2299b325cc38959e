//! The header of a safetensors file: refused, or every tensor lies in the file.
#![no_main]

use contraflow_fuzz as _;
use contraflow_workers::hf::header::read_header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok((length, metadata)) = read_header(&mut &bytes[..], bytes.len() as u64) {
        let room = bytes.len() - 8 - length as usize;
        for info in metadata.tensors().values() {
            let (from, to) = info.data_offsets;
            assert!(from <= to && to <= room);
            assert_eq!(to - from, info.shape.iter().product::<usize>() * info.dtype.bitsize() / 8);
        }
    }
});
