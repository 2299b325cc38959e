//! Where an object is: a scheme, what holds the objects (a bucket, a container, a host), and the key of one or of a prefix.
//!
//! Text alone: knows no client and no credentials.

use std::fmt;
use std::path::Path;

/// Which kind of store, by the scheme of a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Amazon S3, and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage: a container of the account that the environment names.
    Az,
    /// A web server over TLS: single files.
    Https,
    /// A web server in plain text.
    Http,
}

/// Every scheme with what stands before the rest of a location.
const SCHEMES: [(&str, Scheme); 5] = [
    ("s3://", Scheme::S3),
    ("gs://", Scheme::Gs),
    ("az://", Scheme::Az),
    ("https://", Scheme::Https),
    ("http://", Scheme::Http),
];

/// An object or a prefix of objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Of which kind of store.
    pub scheme: Scheme,
    /// Bucket, container or host.
    pub bucket: String,
    /// The key, without slashes at its ends; empty: all of the bucket.
    pub key: String,
}

impl Location {
    /// Whether a text is meant as a location, whole or not, and no path.
    pub fn is(text: &str) -> bool {
        SCHEMES.iter().any(|(prefix, _)| text.starts_with(prefix))
    }

    /// As [`Location::is`], of a path as the command line has it.
    pub fn is_path(path: &Path) -> bool {
        path.to_str().is_some_and(Location::is)
    }

    /// Reads a location; `None` where the text is a path.
    ///
    /// **Errors**: no bucket; credentials, a query or a fragment in it; a key with an empty part, `.` or `..`; a web server without
    /// the name of a file.
    pub fn parse(text: &str) -> Option<Result<Location, String>> {
        let read = Location::parse_prefix(text)?;
        Some(read.and_then(|location| match location.is_web() && location.key.is_empty() {
            true => Err(format!("{text}: expected the name of a file behind the host, got none")),
            false => Ok(location),
        }))
    }

    /// Reads what other locations may lie below: as [`Location::parse`], also all of a web server.
    ///
    /// **Errors**: as there.
    pub fn parse_prefix(text: &str) -> Option<Result<Location, String>> {
        let (prefix, scheme) = SCHEMES.iter().find(|(prefix, _)| text.starts_with(prefix))?;
        let (bucket, key) = text[prefix.len()..].split_once('/').unwrap_or((&text[prefix.len()..], ""));
        let key = key.strip_suffix('/').unwrap_or(key);
        let is_web = matches!(scheme, Scheme::Https | Scheme::Http);
        let refused = if bucket.contains('@') {
            // The text may hold a password: it is not repeated.
            return Some(Err(format!(
                "{prefix}...: expected a location without credentials, got some before @"
            )));
        } else if bucket.is_empty() {
            Some(format!(
                "expected {prefix}{} and the name of an object",
                if is_web { "HOST" } else { "BUCKET" }
            ))
        } else if is_web && text.contains(['?', '#']) {
            let (plain, _) = text.split_once(['?', '#']).unwrap_or((text, ""));
            return Some(Err(format!("{plain}: expected a location without a query, got one with ? or #")));
        } else if key.split('/').any(|part| matches!(part, "." | "..") || part.is_empty()) && !key.is_empty()
        {
            Some("expected a key without empty parts, . and ..".into())
        } else if text.contains(char::is_control) {
            // Some are left out where URLs are made, which may make .. of what was none.
            return Some(Err(format!(
                "{prefix}...: expected a location without control characters, got some"
            )));
        } else {
            None
        };
        Some(match refused {
            Some(why) => Err(format!("{text}: {why}")),
            None => Ok(Location { scheme: *scheme, bucket: bucket.to_owned(), key: key.to_owned() }),
        })
    }

    /// The location of what has this name below it.
    pub fn join(&self, name: &str) -> Location {
        let key = if self.key.is_empty() { name.to_owned() } else { format!("{}/{name}", self.key) };
        Location { key, ..self.clone() }
    }

    /// Whether another location is this one or lies below it: by whole parts of the key, in the same bucket of the same kind of
    /// store.
    pub fn holds(&self, other: &Location) -> bool {
        let behind = other.key.strip_prefix(&self.key);
        let is_below = |rest: &str| self.key.is_empty() || rest.is_empty() || rest.starts_with('/');
        (self.scheme, &self.bucket) == (other.scheme, &other.bucket) && behind.is_some_and(is_below)
    }

    /// The last part of its key, or the bucket.
    pub fn name(&self) -> &str {
        match self.key.rsplit('/').next() {
            Some(name) if !name.is_empty() => name,
            _ => &self.bucket,
        }
    }

    /// Whether it is a web server's, which lists nothing and is not written to.
    pub fn is_web(&self) -> bool {
        matches!(self.scheme, Scheme::Https | Scheme::Http)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, _) = SCHEMES.iter().find(|(_, scheme)| *scheme == self.scheme).unwrap_or(&SCHEMES[0]);
        write!(f, "{prefix}{}", self.bucket)?;
        if self.key.is_empty() { Ok(()) } else { write!(f, "/{}", self.key) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Location {
        Location::parse(text).unwrap().unwrap()
    }

    #[test]
    fn locations_are_read_and_paths_are_none() {
        for text in ["text.txt", "/s3/x", "./s3://x", "c4", "s3:/b/k", "file:///x", ""] {
            assert_eq!(Location::parse(text), None, "{text}");
        }
        let location = parsed("s3://bucket/a/b.txt");
        assert_eq!((location.scheme, location.bucket.as_str()), (Scheme::S3, "bucket"));
        assert_eq!((location.key.as_str(), location.name()), ("a/b.txt", "b.txt"));
        assert_eq!(parsed("gs://bucket/a/"), parsed("gs://bucket/a"), "a folder is the same with its slash");
        assert_eq!(parsed("az://container").name(), "container");
        assert_eq!(parsed("az://container").join("a").to_string(), "az://container/a");
        assert_eq!(parsed("https://host:8080/a/b").bucket, "host:8080");
        for text in ["s3://b/k", "gs://b/k/l", "az://c/k", "https://h/k", "http://h:1/k"] {
            assert_eq!(parsed(text).to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_a_location_is_said_and_secrets_are_not_repeated() {
        for (text, words) in [
            ("s3://", "expected s3://BUCKET and the name of an object"),
            ("s3:///key", "expected s3://BUCKET"),
            ("s3://b/a//c", "without empty parts"),
            ("s3://b/../c", "without empty parts, . and .."),
            ("https://host", "the name of a file behind the host"),
            ("https://u:secret@host/a", "without credentials"),
            ("https://host/.\t./a", "without control characters"),
            ("https://host/a?signature=secret", "https://host/a: expected a location without a query"),
        ] {
            let reported = Location::parse(text).unwrap().unwrap_err();
            assert!(reported.contains(words) && !reported.contains("secret"), "{text}: {reported}");
        }
    }
}
