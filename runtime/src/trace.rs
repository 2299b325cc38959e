//! Where work belongs in a distributed trace: the context that travels in frames, assignments and commands, and how the
//! running span and such a context come together.
//!
//! Knows no exporter. A process that has one registers with [`install`] how spans are linked; until then no span has
//! a context and nothing is spent on them.

use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing::Span;

/// Target of the spans that are exported; log lines have others, so that the one is filtered without the other.
pub const SPAN: &str = "span";

/// A span of some process, in the terms of W3C Trace Context. All zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// What all spans of a job have in common.
    pub trace_id: [u8; 16],
    /// Which span.
    pub span_id: [u8; 8],
    /// Bit 0: the trace is recorded.
    pub flags: u8,
}

impl TraceContext {
    /// Whether there is a span.
    pub fn is_some(&self) -> bool {
        self.trace_id != [0; 16] && self.span_id != [0; 8]
    }

    /// Reads the value of a `traceparent` header. As the standard asks, what makes no sense is as if it were not there.
    pub fn parse(header: &str) -> TraceContext {
        parse(header).filter(TraceContext::is_some).unwrap_or_default()
    }
}

fn parse(header: &str) -> Option<TraceContext> {
    let mut fields = header.split('-');
    let [version] = hex(fields.next()?)?;
    let context = TraceContext {
        trace_id: hex(fields.next()?)?,
        span_id: hex(fields.next()?)?,
        flags: hex::<1>(fields.next()?)?[0],
    };
    // Later versions may have more fields behind those of version 0; 255 is no version.
    let is_known = version != 255 && (version > 0 || fields.next().is_none());
    is_known.then_some(context)
}

/// Bytes of lower-case hex digits.
fn hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// The value of a `traceparent` header; empty where there is no span.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_some() {
            return Ok(());
        }
        let write = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        f.write_str("00-")?;
        write(f, &self.trace_id)?;
        f.write_str("-")?;
        write(f, &self.span_id)?;
        write!(f, "-{:02x}", self.flags)
    }
}

/// How spans of this process are linked to those of others.
pub trait Tracer: Send + Sync {
    /// As what others know a span; none if it is not recorded.
    fn context_of(&self, span: &Span) -> TraceContext;
    /// Makes a span that has not been entered the child of a remote one.
    fn set_parent(&self, span: &Span, parent: TraceContext);
    /// Says that a span has to do with one elsewhere.
    fn add_link(&self, span: &Span, other: TraceContext);
}

static TRACER: OnceLock<Box<dyn Tracer>> = OnceLock::new();

/// Lets spans have contexts from now on; the first call counts.
pub fn install(tracer: impl Tracer + 'static) {
    drop(TRACER.set(Box::new(tracer)));
}

/// The running span, for others to refer to.
pub fn current() -> TraceContext {
    TRACER.get().map(|tracer| tracer.context_of(&Span::current())).unwrap_or_default()
}

/// A span that has just been made, as the child of one elsewhere.
pub fn below(parent: TraceContext, span: Span) -> Span {
    if let Some(tracer) = TRACER.get().filter(|_| parent.is_some()) {
        tracer.set_parent(&span, parent);
    }
    span
}

/// Links a span to one elsewhere that has set it going.
pub fn link(span: &Span, other: TraceContext) {
    if let Some(tracer) = TRACER.get().filter(|_| other.is_some()) {
        tracer.add_link(span, other);
    }
}

/// Links the spans that take frames to those that have sent them: once for each two, however many frames there are.
#[derive(Default)]
pub struct Links {
    /// By rank that sends, the last two.
    linked: Mutex<HashMap<u32, (TraceContext, TraceContext)>>,
}

impl Links {
    /// The running span has taken something that a span of rank `source` sent.
    pub fn took(&self, source: u32, sender: TraceContext) {
        if !sender.is_some() {
            return;
        }
        let pair = (current(), sender);
        let before = self.linked.lock().insert(source, pair);
        if before != Some(pair) {
            link(&Span::current(), sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of the standard.
    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_header_is_read_and_written() {
        let context = TraceContext::parse(HEADER);
        assert_eq!(context.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes());
        assert_eq!(context.span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
        assert_eq!(context.flags, 1);
        assert_eq!(context.to_string(), HEADER);
        assert_eq!(TraceContext::default().to_string(), "");
    }

    #[test]
    fn later_versions_may_send_more_and_version_0_may_not() {
        let later = HEADER.replacen("00", "cc", 1) + "-what-the-future-will-be";
        assert_eq!(TraceContext::parse(&later), TraceContext::parse(HEADER));
        assert_eq!(TraceContext::parse(&format!("{HEADER}-more")), TraceContext::default());
    }

    #[test]
    fn what_is_no_header_is_none() {
        let wrong = [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01",
        ];
        for header in wrong {
            assert_eq!(TraceContext::parse(header), TraceContext::default(), "{header}");
        }
    }

    #[test]
    fn without_a_tracer_no_span_has_a_context() {
        assert!(!current().is_some());
    }
}
