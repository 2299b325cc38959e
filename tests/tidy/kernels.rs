//! The kernels' door: public operations take and give tensors, and who outside of the crate may see their numbers.
//!
//! Reads signatures and imports as text. Knows no types.

use crate::{assert_none, sources};

/// Where a public signature may contain plain numbers: the door itself, and the tensor with its constructors, shape and bytes.
const DOOR: [&str; 2] = ["kernels/src/host.rs", "kernels/src/tensor.rs"];

/// Of the tensor only these.
const OF_TENSOR: [&str; 10] = [
    "fn zeros(",
    "fn zeros_in(",
    "fn for_overwrite_in(",
    "fn for_overwrite(",
    "fn from_vec<",
    "fn borrowing(",
    "fn bytes(",
    "fn shape(",
    "fn parts(",
    "fn reshape(",
];

/// Lists of tensors, and what [`Spans`](contraflow_kernels::attention::Spans) is made from.
const LISTS: [&str; 3] = ["[Tensor]", "Vec<Share>", "Vec<Span>"];

/// Who may pass through the door: files of checkpoints and models, data, and the counts that become a step's totals.
const GUESTS: [&str; 4] =
    ["workers/src/checkpoint/", "workers/src/hf/", "workers/src/data/", "workers/src/model/expert_counts.rs"];

/// The text of a file without its tests.
fn production(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default()
}

/// What other crates see of a file, each item on one line up to where its body begins.
/// A trait's methods are as public as the trait.
fn public_items(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut lines = text.lines();
    let mut in_trait = false;
    while let Some(line) = lines.next() {
        let start = line.trim_start();
        in_trait = if line.starts_with("pub trait ") { true } else { in_trait && !line.starts_with('}') };
        let is_public = start.starts_with("pub ") || in_trait && start.starts_with("fn ");
        if !is_public {
            continue;
        }
        let mut item = start.to_owned();
        let is_open = |item: &str| item.contains("fn ") && !item.contains('{') && !item.ends_with(';');
        while is_open(&item) {
            let Some(next) = lines.next() else { break };
            item = format!("{item} {}", next.trim());
        }
        items.push(item.split('{').next().unwrap_or_default().trim_end().to_owned());
    }
    items
}

/// Whether a signature takes or gives numbers in another form than a tensor.
fn names_numbers(item: &str) -> bool {
    if item.starts_with("pub use ") || item.starts_with("pub mod ") || item.starts_with("pub const ") {
        return false;
    }
    let rest = LISTS.iter().fold(item.to_owned(), |item, list| item.replace(list, ""));
    let is_slice = |at: usize| rest[..at].ends_with(['&', ' ', '(', '<', '[']);
    let has_slice = rest.match_indices('[').any(|(at, _)| is_slice(at));
    has_slice
        || ["Vec<", "Box<[", "Mat<", "MatMut<", ": Mat", "*const ", "*mut "]
            .iter()
            .any(|form| rest.contains(form))
}

#[test]
fn public_operations_of_kernels_take_and_give_tensors() {
    let mut num_items = 0;
    let mut faults = Vec::new();
    for (path, text) in sources() {
        if !path.starts_with("kernels/src/") || path.ends_with("tests.rs") {
            continue;
        }
        for item in public_items(production(&text)) {
            num_items += 1;
            let is_door = DOOR.contains(&path.as_str())
                && (path.ends_with("host.rs") || OF_TENSOR.iter().any(|known| item.contains(known)));
            if names_numbers(&item) && !is_door {
                faults.push(format!("{path}: {item}"));
            }
        }
    }
    assert!(num_items > 100, "{num_items} public items");
    assert_none("public signatures of kernels with other things than tensors", &faults);
}

#[test]
fn the_numbers_of_tensors_are_seen_by_files_and_data_alone() {
    let mut seen = 0;
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let is_test = path.contains("tests/") || path.ends_with("tests.rs");
        if is_test || path.starts_with("kernels/") || !production(&text).contains("kernels::host") {
            continue;
        }
        seen += 1;
        if !GUESTS.iter().any(|guest| path.starts_with(guest)) {
            faults.push(path);
        }
    }
    assert!(seen > 0);
    assert_none("files that use `contraflow_kernels::host`", &faults);
}

#[test]
fn signatures_are_judged_as_they_are_meant() {
    let text = "pub fn a(\n    x: &Tensor,\n    y: &[f32],\n) -> Tensor {\n    pub_not()\n}\npub(crate) fn b(x: &[f32]) {}\n\
                pub struct C {\n    /// Doc.\n    pub d: Vec<u32>,\n}\npub trait E {\n    fn f(&self) -> &[u8];\n}\nfn g() {}\n";
    let items = public_items(text);
    assert_eq!(
        items,
        [
            "pub fn a( x: &Tensor, y: &[f32], ) -> Tensor",
            "pub struct C",
            "pub d: Vec<u32>,",
            "pub trait E",
            "fn f(&self) -> &[u8];"
        ]
    );
    assert_eq!(items.iter().filter(|item| names_numbers(item)).count(), 3);
    for fine in ["pub fn concat_rows(parts: &[Tensor]) -> Tensor", "pub fn sum_squares(values: View) -> f64"]
    {
        assert!(!names_numbers(fine), "{fine}");
    }
    for wrong in
        ["pub fn a(x: &mut [f32])", "pub fn a(x: [f32; 2])", "pub fn a(m: Mat)", "pub fn a() -> Vec<f32>"]
    {
        assert!(names_numbers(wrong), "{wrong}");
    }
}
