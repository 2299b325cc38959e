//! A text as it is read: a document, and what tells text from other bytes. Knows no files.

/// One text: a source file, a page. Nothing is attended or predicted across its end but by way of the
/// end-of-document token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it came from, for messages only: `NAME-VERSION/src/lib.rs`, or a path.
    pub name: String,
    /// Its bytes.
    pub text: Vec<u8>,
}

/// What some programs put before the text of a file; it is no text.
pub(super) const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// The first sign that `bytes` are no text, and where it is. Only the head of a file can be UTF-16 by its mark.
pub(super) fn first_binary(bytes: &[u8]) -> Option<(&'static str, usize)> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Some(("UTF-16", 0));
    }
    if let Some(offset) = bytes.iter().position(|&byte| byte == 0) {
        return Some(("a NUL byte", offset));
    }
    std::str::from_utf8(bytes).err().map(|error| ("invalid UTF-8", error.valid_up_to()))
}
