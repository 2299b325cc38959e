//! What the fabric moves: regions of memory that keep themselves alive, with no idea of what they hold.

use std::any::Any;
use std::sync::Arc;

/// What a region's bytes are, in words that only its maker and its reader understand: it goes over the wire with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// The kind of thing; 0 for bytes of no kind.
    pub kind: u8,
    /// Number of rows.
    pub rows: u64,
    /// Values per row.
    pub cols: u64,
}

/// Memory that can be put on the wire. In process it travels as the value that it is; a wire takes its bytes.
pub trait Memory: Any + Send + Sync {
    /// The payload in little-endian byte order.
    fn bytes(&self) -> &[u8];

    /// What the reader of the bytes on another host needs to know.
    fn form(&self) -> Form {
        Form::default()
    }
}

impl Memory for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A shared, read-only piece of memory on the move.
#[derive(Clone)]
pub struct Region {
    memory: Arc<dyn Memory>,
}

impl Region {
    /// Wraps a value; the receiver in the same process gets this very value.
    pub fn new(memory: impl Memory) -> Self {
        Region { memory: Arc::new(memory) }
    }

    /// **Units**: bytes.
    pub fn len(&self) -> usize {
        self.memory.bytes().len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The payload.
    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// What the bytes are.
    pub fn form(&self) -> Form {
        self.memory.form()
    }

    /// The value inside, if it is a `T`: the way back from the fabric to a typed packet.
    pub fn downcast<T: Memory>(self) -> Option<Arc<T>> {
        let any: Arc<dyn Any + Send + Sync> = self.memory;
        any.downcast().ok()
    }
}
