//! A link between ranks, as profiles have it. Knows nothing of what goes over it.

use super::section::{Range, Section};

/// A link of a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// **Units**: bytes/s, each way.
    pub bytes_per_s: f64,
    /// **Units**: seconds.
    pub latency_s: f64,
}

/// Of a section.
pub(super) fn link(mut section: Section) -> Link {
    let link = Link {
        bytes_per_s: section.number("bytes_per_s", Range::Positive),
        latency_s: section.number_or("latency_s", Range::NotNegative, 0.0),
    };
    section.close();
    link
}
