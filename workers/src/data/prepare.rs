//! `data prepare`: text of any size to a prepared folder, in bounded memory, on all cores, and resumable.
//!
//! The documents are cut into units in their order: a unit ends behind the document with which its training tokens reach
//! the size of a shard. A unit's shards are written, flushed and renamed, then its record is; a later call keeps every
//! unit that has a record and continues behind it. So the folder does not depend on how often the work was interrupted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::documents::DocumentEncoder;
use super::fault::DataFault;
use super::files::{self, InputFile, Skipped};
use super::format::{PIECE_BYTES, Reading};
use super::shard_writer::{ShardWriter, WriteFault, cannot_write, write_whole};
use super::shards::{INDEX, ShardIndex, ShardRecord};
pub use super::split::Rule;
use super::split::{Survey, cut_end, number};
use super::text::Document;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Preparation {
    /// Files and folders of text, JSONL, JSON and Parquet.
    pub paths: Vec<PathBuf>,
    /// The same, to validate on; none: a share of the others.
    pub validation: Vec<PathBuf>,
    /// Share of the text that is held back for validation where no paths are.
    pub validation_share: f64,
    /// The field or column of rows that holds the text.
    pub field: String,
    /// How documents become tokens.
    pub encoder: DocumentEncoder,
    /// The folder that comes into being.
    pub to: PathBuf,
    /// Training tokens of a shard, at least.
    pub shard_tokens: usize,
}

/// A folder that is ready.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// What is in it.
    pub index: ShardIndex,
    /// What was passed by; unknown where it was ready, or begun, before.
    pub skipped: Skipped,
    /// How the text was split; unknown where it was ready before.
    pub rule: Option<Rule>,
}

/// How far the work is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of text that have been looked through, before anything is written.
    pub bytes_checked: u64,
    /// Bytes of the files that have been read whole.
    pub bytes_read: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Units in the folder.
    pub units: usize,
    /// Tokens in the folder.
    pub tokens: u64,
}

/// Why nothing was prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareFault {
    /// The user has to fix it.
    #[error(transparent)]
    Data(#[from] DataFault),
    /// The system refuses to write.
    #[error(transparent)]
    Write(#[from] WriteFault),
    /// The watcher asked for an end; what is finished is kept.
    #[error("stopped: finished shards are kept; run the same command again to continue")]
    Stopped,
}

/// Text that is encoded at a time, over all cores.
const BATCH_BYTES: usize = 4 << 20;

/// A unit that is finished.
#[derive(Debug, Serialize, Deserialize)]
struct Unit {
    /// Documents of the input up to its end.
    documents: u64,
    train: ShardRecord,
    validation: ShardRecord,
}

/// Prepares a folder, or finishes one. `watch` receives the progress and says whether to continue.
///
/// All text is read once before anything is written, to find its faults and how it is split.
///
/// **Errors**: everything wrong with the paths at once, and nothing is left behind; a folder of other contents; what the system
/// says, with the units before it kept.
pub fn prepare(
    preparation: &Preparation,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<Prepared, Vec<PrepareFault>> {
    let all = |faults: Vec<DataFault>| faults.into_iter().map(PrepareFault::from).collect::<Vec<_>>();
    let one = |fault: PrepareFault| vec![fault];
    let field = &preparation.field;
    let (train, validation) =
        match (files::list(&preparation.paths, field), files::list(&preparation.validation, field)) {
            (Ok(train), Ok(validation)) => (train, validation),
            (train, validation) => {
                // What is wrong inside of the other files comes with it.
                let faults = || [train.err(), validation.err()].into_iter().flatten().flatten().collect();
                return Err(all(survey(preparation, watch).err().unwrap_or_else(faults)));
            }
        };
    let input = describe(preparation, [&train, &validation]).map_err(|fault| one(fault.into()))?;
    let known = look_at(&preparation.to, &input).map_err(one)?;
    let (claim, skipped) = match known {
        Known::Ready(index) => return Ok(Prepared { index, skipped: Skipped::default(), rule: None }),
        Known::Begun(claim) => (claim, Skipped::default()),
        Known::Free => {
            let (rule, skipped) = survey(preparation, watch).map_err(all)?;
            (Claim { input, rule }, skipped)
        }
    };
    let rule = Some(claim.rule);
    let index = in_folder(preparation, [&train, &validation], &claim, watch).map_err(one)?;
    Ok(Prepared { index, skipped, rule })
}

/// Reads everything once.
fn survey(
    preparation: &Preparation,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<(Rule, Skipped), Vec<DataFault>> {
    let share = if preparation.validation.is_empty() { preparation.validation_share } else { 0.0 };
    let (mut survey, mut bytes_checked) = (Survey::new(share), 0);
    let reading = reading(preparation);
    let mut look = |document: &Document| {
        bytes_checked += document.text.len() as u64;
        // Whether to go on is asked once there is something to be kept.
        watch(Progress { bytes_checked, ..Progress::default() });
    };
    let train = files::visit(&preparation.paths, reading, &mut |document| {
        look(&document);
        survey.add(&document.text);
    });
    let validation = files::visit(&preparation.validation, reading, &mut |document| look(&document));
    match (train, validation) {
        (Ok(train), Ok(validation)) => Ok((survey.rule(), train + validation)),
        (train, validation) => Err([train.err(), validation.err()].into_iter().flatten().flatten().collect()),
    }
}

fn reading(preparation: &Preparation) -> Reading<'_> {
    Reading { field: &preparation.field, piece_bytes: PIECE_BYTES }
}

/// blake3 of what the folder's contents follow from, short of reading the files: their names and sizes.
fn describe(preparation: &Preparation, files: [&[InputFile]; 2]) -> Result<String, DataFault> {
    let mut hasher = blake3::Hasher::new();
    let Preparation { encoder, shard_tokens, validation_share, field, .. } = preparation;
    let parameters = format!(
        "{}\n{}\n{shard_tokens}\n{validation_share}\n{field}\n",
        encoder.tokenizer().hash(),
        encoder.fim_rate()
    );
    hasher.update(parameters.as_bytes());
    for side in files {
        hasher.update(&(side.len() as u64).to_le_bytes());
        for file in side {
            hasher.update(format!("{}\n{}\n", file.path.display(), file.size()?).as_bytes());
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The file that says whose folder an unfinished one is.
const CLAIM: &str = "preparing";

/// Its contents.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    /// See [`describe`].
    input: String,
    /// How the text is split.
    rule: Rule,
}

/// What a folder is before anything is done.
enum Known {
    /// It is finished.
    Ready(ShardIndex),
    /// A call that was stopped has left it.
    Begun(Claim),
    /// It is not there, or empty.
    Free,
}

/// Looks at a folder and leaves it as it is.
///
/// **Errors**: it holds something else.
fn look_at(to: &Path, input: &str) -> Result<Known, PrepareFault> {
    if ShardIndex::is_in(to) {
        let index = ShardIndex::read(to)?;
        return if index.input == input { Ok(Known::Ready(index)) } else { Err(other_contents(to)) };
    }
    match contraflow_runtime::files::read(&to.join(CLAIM)) {
        Ok(text) => match serde_json::from_slice::<Claim>(&text) {
            Ok(claim) if claim.input == input => Ok(Known::Begun(claim)),
            _ => Err(other_contents(to)),
        },
        Err(_) => match contraflow_runtime::files::read_dir(to) {
            Ok(entries) if !entries.iter().all(is_unfinished) => Err(other_contents(to)),
            Ok(_) => Ok(Known::Free),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Known::Free),
            Err(error) => Err(cannot_write(to, &error).into()),
        },
    }
}

/// Makes the folder, or goes on with it. What fails before a unit is finished leaves nothing.
fn in_folder(
    preparation: &Preparation,
    files: [&[InputFile]; 2],
    claim: &Claim,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<ShardIndex, PrepareFault> {
    let to = &preparation.to;
    let is_new = !to.exists();
    fs::create_dir_all(to).map_err(|error| cannot_write(to, &error))?;
    let lock_path = to.join("lock");
    let lock = File::create(&lock_path).map_err(|error| cannot_write(&lock_path, &error))?;
    lock.try_lock()
        .map_err(|_| occupied(to, "a folder that no other process is preparing", "one at work"))?;
    // Somebody else may have been quicker.
    if let Known::Ready(index) = look_at(to, &claim.input)? {
        drop(fs::remove_file(lock_path));
        return Ok(index);
    }
    let done = write_whole(&to.join(CLAIM), &serde_json::to_vec(claim).unwrap_or_default())
        .map_err(PrepareFault::from)
        .and_then(|()| run(preparation, files, claim, watch));
    match &done {
        Ok(_) => drop((fs::remove_file(to.join(CLAIM)), fs::remove_file(lock_path))),
        Err(PrepareFault::Stopped) => {}
        Err(_) if unit_path(to, 0).exists() => {}
        Err(_) => clear(to, is_new),
    }
    done
}

/// Removes what has been written into a folder that held nothing before. The first error is the one that is reported.
fn clear(to: &Path, is_new: bool) {
    for entry in fs::read_dir(to).into_iter().flatten().flatten() {
        drop(fs::remove_file(entry.path()));
    }
    if is_new {
        drop(fs::remove_dir(to));
    }
}

fn run(
    preparation: &Preparation,
    [train, validation]: [&[InputFile]; 2],
    claim: &Claim,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<ShardIndex, PrepareFault> {
    let to = &preparation.to;
    let bytes = train.iter().chain(validation).map(|file| file.size().unwrap_or(0)).sum();
    let mut writer = Writer::resume(preparation, claim.rule, bytes, watch);
    for (files, is_held) in [(train, false), (validation, true)] {
        for file in files {
            let take = &mut |document: Result<Document, DataFault>| writer.take(document?, is_held);
            file.format.each(&file.path, reading(preparation), take)?;
            writer.flush()?;
            writer.progress.bytes_read += file.size().unwrap_or(0);
            writer.report_progress()?;
        }
    }
    let units = writer.finish()?;
    let tokenizer = preparation.encoder.tokenizer();
    let mut index = ShardIndex::new(claim.input.clone(), tokenizer, preparation.encoder.fim_rate());
    let is_filled = |shard: &ShardRecord| shard.tokens > 0;
    let number = units.len();
    for unit in units {
        index.train.extend(Some(unit.train).filter(is_filled));
        index.validation.extend(Some(unit.validation).filter(is_filled));
    }
    // A run reads the folder with the very tokenizer.
    tokenizer.files().iter().try_for_each(|(name, bytes)| write_whole(&to.join(name), bytes))?;
    write_whole(&to.join(INDEX), &serde_json::to_vec_pretty(&index).unwrap_or_default())?;
    for number in 0..number {
        // Left-overs do no harm: the index is what counts from here on.
        drop(fs::remove_file(unit_path(to, number)));
    }
    Ok(index)
}

fn occupied(to: &Path, expected: &str, got: &str) -> PrepareFault {
    DataFault::Prepared { path: to.into(), expected: expected.into(), got: got.into() }.into()
}

fn other_contents(to: &Path) -> PrepareFault {
    let expected = "a new folder, or one of the same files, tokenizer, shard size and rate";
    occupied(to, expected, "one that holds something else")
}

/// What a call that was killed before it claimed the folder may have left.
fn is_unfinished(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    name == "lock" || name.as_encoded_bytes().ends_with(b".partial")
}

fn unit_path(to: &Path, number: usize) -> PathBuf {
    to.join(format!("unit-{number:05}.json"))
}

/// Where documents go.
struct Writer<'a> {
    preparation: &'a Preparation,
    rule: Rule,
    watch: &'a mut dyn FnMut(Progress) -> bool,
    progress: Progress,
    units: Vec<Unit>,
    /// Documents that finished units hold and that are only counted.
    to_skip: u64,
    /// Documents that wait, and whether they are of the files to validate on.
    batch: Vec<(Document, bool)>,
    batch_bytes: usize,
    /// Documents of the input so far.
    documents: u64,
    open: Option<(ShardWriter, ShardWriter)>,
}

impl<'a> Writer<'a> {
    fn resume(
        preparation: &'a Preparation,
        rule: Rule,
        bytes: u64,
        watch: &'a mut dyn FnMut(Progress) -> bool,
    ) -> Self {
        let mut units: Vec<Unit> = Vec::new();
        // A record that cannot be read ends what is kept: the unit is made again.
        while let Some(unit) = contraflow_runtime::files::read(&unit_path(&preparation.to, units.len()))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
        {
            units.push(unit);
        }
        let progress = Progress {
            bytes,
            units: units.len(),
            tokens: units.iter().map(|unit| unit.train.tokens + unit.validation.tokens).sum(),
            ..Progress::default()
        };
        let to_skip = units.last().map_or(0, |unit| unit.documents);
        let (batch, batch_bytes, documents) = (Vec::new(), 0, to_skip);
        Self { preparation, rule, watch, progress, units, to_skip, batch, batch_bytes, documents, open: None }
    }

    fn report_progress(&mut self) -> Result<(), PrepareFault> {
        if (self.watch)(self.progress) { Ok(()) } else { Err(PrepareFault::Stopped) }
    }

    fn take(&mut self, document: Document, is_held: bool) -> Result<(), PrepareFault> {
        if self.to_skip > 0 {
            self.to_skip -= 1;
            return Ok(());
        }
        self.batch_bytes += document.text.len();
        self.batch.push((document, is_held));
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    /// Encodes the waiting documents on all cores and writes them in their order.
    fn flush(&mut self) -> Result<(), PrepareFault> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let (encoder, rule) = (&self.preparation.encoder, self.rule);
        let plain = DocumentEncoder::plain(encoder.tokenizer().clone());
        let encoded: Vec<[Encoded; 2]> = batch
            .into_par_iter()
            .map(|(document, is_held)| {
                let [train, validation] = sides(document, is_held, rule);
                [encode(train, encoder), encode(validation, &plain)]
            })
            .collect();
        for [for_train, for_validation] in encoded {
            self.documents += 1;
            if for_train.text_bytes + for_validation.text_bytes == 0 {
                continue;
            }
            let (train, validation) = self.open()?;
            for_train.push_to(train)?;
            for_validation.push_to(validation)?;
            if for_train.text_bytes > 0 && train.tokens >= self.preparation.shard_tokens as u64 {
                self.close_unit()?;
            }
        }
        Ok(())
    }

    fn open(&mut self) -> Result<&mut (ShardWriter, ShardWriter), PrepareFault> {
        if self.open.is_none() {
            let number = self.units.len();
            let encoder = &self.preparation.encoder;
            let id_bytes = ShardIndex::new(String::new(), encoder.tokenizer(), 0.0).id_bytes;
            let make = |side: &str| {
                ShardWriter::create(self.preparation.to.join(format!("{side}-{number:05}.tokens")), id_bytes)
            };
            self.open = Some((make("train")?, make("validation")?));
        }
        Ok(self.open.as_mut().expect("it has just been filled"))
    }

    fn close_unit(&mut self) -> Result<(), PrepareFault> {
        let Some((train, validation)) = self.open.take() else { return Ok(()) };
        let (train, validation) = (train.close()?, validation.close()?);
        let unit = Unit { documents: self.documents, train, validation };
        let path = unit_path(&self.preparation.to, self.units.len());
        write_whole(&path, &serde_json::to_vec(&unit).unwrap_or_default())?;
        self.progress.units += 1;
        self.progress.tokens += unit.train.tokens + unit.validation.tokens;
        self.units.push(unit);
        self.report_progress()
    }

    fn finish(mut self) -> Result<Vec<Unit>, PrepareFault> {
        self.flush()?;
        self.close_unit()?;
        Ok(self.units)
    }
}

/// What of a document is trained on, and what is held back.
fn sides(document: Document, is_held: bool, rule: Rule) -> [Option<Document>; 2] {
    match rule {
        _ if is_held => [None, Some(document)],
        Rule::Nothing => [Some(document), None],
        Rule::Below(bound) if number(&document.text) < bound => [None, Some(document)],
        Rule::Below(_) => [Some(document), None],
        Rule::Ends(share) => {
            let (train, end) = cut_end(document, share);
            [Some(train), Some(end)]
        }
    }
}

/// A document, or none.
struct Encoded {
    ids: Vec<u32>,
    text_bytes: usize,
}

fn encode(document: Option<Document>, encoder: &DocumentEncoder) -> Encoded {
    let text = document.map(|document| document.text).unwrap_or_default();
    let ids = if text.is_empty() { Vec::new() } else { encoder.encode(&text) };
    Encoded { ids, text_bytes: text.len() }
}

impl Encoded {
    fn push_to(&self, shard: &mut ShardWriter) -> Result<(), WriteFault> {
        if self.text_bytes == 0 { Ok(()) } else { shard.push(&self.ids, self.text_bytes) }
    }
}

#[cfg(test)]
mod tests;
