//! What of object stores is read for others: the prefixes that an operator has named, and nothing else.
//!
//! Locations are compared as they are parsed, by whole parts: as text `s3://bucket-evil` would begin like `s3://bucket`. Knows no
//! client and no credentials.

use std::fmt;

use super::Location;

/// The option that names a prefix.
const OPTION: &str = "--allow-source";

/// Prefixes below which locations may be read; none: no location.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(Vec<Location>);

impl Sources {
    /// Reads prefixes: buckets, containers, web servers, or what is below a key in one.
    ///
    /// **Errors**: every one that is none.
    pub fn parse<T: AsRef<str>>(prefixes: &[T]) -> Result<Self, Vec<String>> {
        let (mut sources, mut faults) = (Vec::new(), Vec::new());
        for prefix in prefixes {
            let text = prefix.as_ref();
            match Location::parse_prefix(text) {
                Some(Ok(location)) => sources.push(location),
                Some(Err(fault)) => faults.push(fault),
                None => faults.push(format!(
                    "expected a prefix as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or https://HOST/PREFIX, \
                     got {text:?}"
                )),
            }
        }
        if faults.is_empty() { Ok(Sources(sources)) } else { Err(faults) }
    }

    /// Whether a location may be read.
    pub fn allow(&self, location: &Location) -> bool {
        self.0.iter().any(|prefix| prefix.holds(location))
    }

    /// As text, to be parsed again.
    pub fn texts(&self) -> Vec<String> {
        self.0.iter().map(Location::to_string).collect()
    }
}

/// What is expected of a location.
impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.texts() {
            none if none.is_empty() => {
                write!(
                    f,
                    "a path below the workers' data root, since they allow no location (worker {OPTION})"
                )
            }
            texts => write!(f, "a location below {} (worker {OPTION})", texts.join(" or ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(prefixes: &[&str], text: &str) -> bool {
        Sources::parse(prefixes).unwrap().allow(&Location::parse(text).unwrap().unwrap())
    }

    #[test]
    fn locations_are_allowed_by_whole_parts_of_parsed_prefixes() {
        for (prefix, text) in [
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket", "s3://bucket/a/b.txt"),
            ("s3://bucket/", "s3://bucket/a"),
            ("s3://bucket/data", "s3://bucket/data"),
            ("s3://bucket/data/", "s3://bucket/data/"),
            ("s3://bucket/data", "s3://bucket/data/a.txt"),
            ("https://host", "https://host/a"),
            ("https://host/a", "https://host/a/b"),
        ] {
            assert!(allows(&[prefix], text), "{prefix} {text}");
        }
        for (prefix, text) in [
            ("s3://bucket", "s3://bucket-evil/a"),
            ("s3://bucket", "s3://bucket.evil"),
            ("s3://bucket", "gs://bucket/a"),
            ("s3://bucket/data", "s3://bucket"),
            ("s3://bucket/data", "s3://bucket/data-2/a"),
            ("s3://bucket/data", "s3://bucket/Data/a"),
            ("s3://bucket/data", "s3://bucket/other/data"),
            ("https://host", "http://host/a"),
            ("https://host", "https://host.evil/a"),
            ("https://host", "https://host:8080/a"),
            ("https://host/a", "https://host/a.evil"),
        ] {
            assert!(!allows(&[prefix], text), "{prefix} {text}");
        }
        assert!(!allows(&[], "s3://bucket/a"), "nothing is named");
        assert!(allows(&["gs://one", "s3://bucket/a", "s3://bucket/b"], "s3://bucket/b/c"));
        // A way around the prefix is no location at all.
        for text in [
            "s3://bucket/data/../secret",
            "s3://bucket/./a",
            "s3://bucket//a",
            "https://host/.\n./a",
            "https://host@evil/a",
        ] {
            assert!(Location::parse(text).unwrap().is_err(), "{text}");
        }
    }

    #[test]
    fn prefixes_are_read_and_each_that_is_none_is_named() {
        let texts = ["s3://bucket/data/", "https://host", "az://container"];
        let sources = Sources::parse(&texts).unwrap();
        assert_eq!(sources.texts(), ["s3://bucket/data", "https://host", "az://container"]);
        assert_eq!(Sources::parse(&sources.texts()).unwrap(), sources);
        let faults = Sources::parse(&["data", "s3://", "s3://b/../c", "s3://good"]).unwrap_err();
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[0].contains("got \"data\"") && faults[1].starts_with("s3://: "), "{faults:?}");
    }
}
