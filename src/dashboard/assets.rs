//! The files of the page, in the binary.

/// A file.
pub struct Asset {
    /// Its path below `/assets/`.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: &'static [u8],
}

macro_rules! asset {
    ($name:literal) => {
        Asset { name: $name, bytes: include_bytes!(concat!("assets/", $name)) }
    };
}

/// The page itself, under every address of a page.
pub const PAGE: &[u8] = include_bytes!("assets/index.html");

/// All that it loads.
pub const ASSETS: &[Asset] = &[
    asset!("app.js"),
    asset!("chart.js"),
    asset!("cluster.js"),
    asset!("dom.js"),
    asset!("experts.js"),
    asset!("icon.svg"),
    asset!("layers.js"),
    asset!("pipeline.js"),
    asset!("placement.js"),
    asset!("run.js"),
    asset!("style.css"),
    asset!("uplot/LICENSE"),
    asset!("uplot/uPlot.esm.js"),
    asset!("uplot/uPlot.min.css"),
];

/// A file by its path below `/assets/`.
pub fn find(name: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.name == name)
}

/// Media type by the ending of a name.
pub fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dashboard/assets");
        let mut found = BTreeSet::from(["index.html".to_owned()]);
        let (mut folders, mut files) = (vec![folder.clone()], BTreeSet::new());
        while let Some(next) = folders.pop() {
            for entry in next.read_dir().unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.insert(path.strip_prefix(&folder).unwrap().display().to_string());
                }
            }
        }
        found.extend(ASSETS.iter().map(|asset| asset.name.to_owned()));
        assert_eq!(found, files);
    }

    #[test]
    fn the_page_loads_nothing_from_elsewhere_and_has_no_script_in_it() {
        let page = std::str::from_utf8(PAGE).unwrap();
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("style="), "{page}");
        assert_eq!(
            page.matches("<script").count(),
            page.matches("<script type=\"module\" src=\"/assets/").count()
        );
        for asset in ASSETS.iter().filter(|asset| asset.name.ends_with(".js") && !asset.name.contains('/')) {
            let text = std::str::from_utf8(asset.bytes).unwrap();
            for form in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!text.contains(form), "{}: {form}", asset.name);
            }
        }
    }
}
