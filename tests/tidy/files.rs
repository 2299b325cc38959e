//! What a user's path names is opened in one place, which refuses pipes and devices, and notes what it waits for.

use crate::{assert_none, sources};

/// Files that read what no recipe names: the system's own tables, this program and its sources, the recipe that a command line names.
const EXEMPT: [&str; 6] = [
    "runtime/src/files",
    "runtime/src/fabric/stream.rs",
    "runtime/src/layout/limit.rs",
    "runtime/src/recipe/mod.rs",
    "workers/src/checkpoint/provenance.rs",
    "workers/src/data/workspace.rs",
];

#[test]
fn files_are_opened_for_reading_in_one_place() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let is_read_by_ranks = path.starts_with("runtime/src/") || path.starts_with("workers/src/");
        if !is_read_by_ranks
            || path.ends_with("tests.rs")
            || EXEMPT.iter().any(|exempt| path.starts_with(exempt))
        {
            continue;
        }
        let code = text.split("mod tests {").next().unwrap();
        for (index, line) in code.lines().enumerate() {
            let calls =
                ["fs::read(", "fs::read_to_string(", " File::open(", "(File::open(", "fs::File::open("];
            let opens = calls.iter().any(|call| line.contains(call));
            if opens && !line.trim_start().starts_with("//") {
                faults.push(format!("{path}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert_none("files opened elsewhere than in runtime/src/files", &faults);
}
