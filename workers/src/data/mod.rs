//! What a run trains on: a corpus of documents, cut into packed sequences, drawn in a seeded order.
//!
//! The walk is corpus (documents) -> tokenizer (ids) -> packing (sequences) -> sampler (order); the Loader
//! actor holds a `PackedDataset` and a `Sampler` and nothing else. `baselines` measures what simple
//! compressors make of the very bytes that the model's validation predicts. Nothing here knows tensors, ranks
//! or actors: ids are plain `u32`.

pub mod baselines;
pub mod batches;
pub mod corpus;
mod crates;
pub mod documents;
mod embedded;
mod fault;
mod files;
mod format;
pub mod from_recipe;
pub mod hf_tokenizer;
mod input;
mod json;
pub mod jsonl;
pub mod load;
mod mmap;
pub mod model_tokenizer;
pub mod packing;
mod parquet_file;
pub mod prepare;
mod row;
pub mod sampler;
pub mod sequences;
mod shard_writer;
pub mod shards;
mod split;
mod text;
pub mod tokenizer;
mod tokenizer_choice;
mod workspace;

pub use baselines::Baselines;
pub use corpus::{Corpus, Document};
pub use fault::DataFault;
pub use files::Skipped;
pub use packing::PackedDataset;
pub use sampler::{Order, Sampler};
pub use tokenizer::Tokenizer;
