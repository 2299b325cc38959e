//! What is in the archive of `contraflow doctor`; knows nothing of what has to be there.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Files of a gzipped tar by name.
pub fn unpack(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(archive).unwrap()));
    let file = |mut entry: tar::Entry<'_, _>| {
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.path().unwrap().display().to_string(), bytes)
    };
    tar.entries().unwrap().map(|entry| file(entry.unwrap())).collect()
}
