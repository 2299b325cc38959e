//! What stands at the head of weights: the header of a safetensors file, and the index of several.
//!
//! Knows texts and bytes, no folders and no tensors' values.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use contraflow_runtime::model_config::is_derived_buffer;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

/// Longest header that is read: that of the 91,991 tensors of DeepSeek-V3 is a tenth of it.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// The tensors that are expected in each file.
pub type Listed = BTreeMap<String, Vec<String>>;

/// What an index says: the weights of each file of its directory. Buffers that follow from the configuration need not be
/// where the index has them.
///
/// **Errors**: if it is no index or names a file elsewhere.
pub fn parse_index(text: &str) -> Result<Listed, String> {
    #[derive(serde::Deserialize)]
    struct WeightIndex {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: WeightIndex = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut files = Listed::new();
    for (tensor, file) in parsed.weight_map {
        if Path::new(&file).file_name() != Some(file.as_ref()) {
            return Err(format!("{tensor}: expected the name of a file beside the index, got {file:?}"));
        }
        if !is_derived_buffer(&tensor) {
            files.entry(file).or_default().push(tensor);
        }
    }
    Ok(files)
}

/// Reads the header of a safetensors file of `size` bytes; no tensor in it reaches beyond the file. Also gives the length
/// of the header.
///
/// **Errors**: if it is damaged, truncated or no safetensors file.
pub fn read_header(file: &mut impl Read, size: u64) -> Result<(u64, Metadata), String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| format!("header: {error}"))?;
    let length = u64::from_le_bytes(length);
    // No more memory is asked for than the file has bytes.
    if length > MAX_HEADER_BYTES || length + 8 > size {
        return Err(format!("a header of {length} bytes in a file of {size}: damaged or no safetensors"));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|error| format!("header: {error}"))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| format!("header: {error}"))?;
    let room = size - 8 - length;
    for (name, info) in metadata.tensors() {
        let end = info.data_offsets.1 as u64;
        if end > room {
            return Err(format!("{name}: expected {end} bytes of data in the file, got {room}: truncated"));
        }
    }
    Ok((length, metadata))
}

/// The header of a safetensors file with these tensors in this order, and how many bytes of data follow it.
pub fn header_text<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>) -> (String, u64) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for (name, dtype, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.to_owned(), info);
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // The format wants the data to begin at a multiple of 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    (text, offset as u64)
}
