//! What the fabric moves: regions of memory that keep themselves alive, with no idea of what they hold.

use std::any::Any;
use std::sync::Arc;

/// How the reader has to interpret a region's bytes; sent along with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PayloadShape {
    /// The kind of thing; 0 for bytes of no kind.
    pub kind: u8,
    /// Number of rows.
    pub rows: u64,
    /// Values per row.
    pub cols: u64,
}

/// Memory that can be put on the wire. In process it travels as the value that it is; a wire takes its bytes.
pub trait Memory: Any + Send + Sync {
    /// Part `index` of the payload, in little-endian byte order; `None` after the last. Most memory is one part; values with
    /// scales of their own are two.
    fn part(&self, index: usize) -> Option<&[u8]>;

    /// **Units**: bytes of all parts. Reads none of them.
    fn num_bytes(&self) -> usize;

    /// What the reader of the bytes on another host needs to know.
    fn form(&self) -> PayloadShape {
        PayloadShape::default()
    }
}

impl Memory for Vec<u8> {
    fn part(&self, index: usize) -> Option<&[u8]> {
        (index == 0).then_some(self)
    }

    fn num_bytes(&self) -> usize {
        self.len()
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

    /// **Units**: bytes. Reads none of them.
    pub fn len(&self) -> usize {
        self.memory.num_bytes()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The payload, part by part; a wire carries them one behind the other.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        (0..).map_while(|index| self.memory.part(index))
    }

    /// The payload of memory in one part, as all is that has arrived.
    ///
    /// # Panics
    /// If it has another number of parts.
    pub fn bytes(&self) -> &[u8] {
        match (self.memory.part(0), self.memory.part(1)) {
            (Some(bytes), None) => bytes,
            _ => panic!("expected memory in one part, got {}", self.parts().count()),
        }
    }

    /// What the bytes are.
    pub fn form(&self) -> PayloadShape {
        self.memory.form()
    }

    /// The value inside, if it is a `T`: the way back from the fabric to a typed packet.
    pub fn downcast<T: Memory>(self) -> Option<Arc<T>> {
        let any: Arc<dyn Any + Send + Sync> = self.memory;
        any.downcast().ok()
    }
}
