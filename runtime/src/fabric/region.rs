//! What the fabric moves: regions of memory that keep themselves alive, with no idea of what they hold.

use std::any::Any;
use std::sync::Arc;

/// Memory that can be put on the wire. In process it travels as the value that it is; a wire takes its bytes.
pub trait Memory: Any + Send + Sync {
    /// The payload in little-endian byte order.
    fn bytes(&self) -> &[u8];
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

    /// The value inside, if it is a `T`: the way back from the fabric to a typed packet.
    pub fn downcast<T: Memory>(self) -> Option<Arc<T>> {
        let any: Arc<dyn Any + Send + Sync> = self.memory;
        any.downcast().ok()
    }
}
