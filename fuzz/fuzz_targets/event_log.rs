//! The event log's file: refused with a message, or read without a gap, and good for more.
//!
//! The first byte chooses: the rest is the whole file, or it is written over places of a file that was sound. The database
//! says of itself that it may panic on a file changed by others; the store turns that into damage, so a panic in its code
//! is no finding here. One in ours is, and so is memory.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use contraflow_fuzz as _;
use contraflow_orchestrator::store::{Batch, FILE_NAME, Store};
use libfuzzer_sys::fuzz_target;

/// A folder of this process's own, and a sound file.
fn ground() -> &'static (PathBuf, Vec<u8>) {
    static GROUND: OnceLock<(PathBuf, Vec<u8>)> = OnceLock::new();
    GROUND.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("contraflow-fuzz-{}", std::process::id()));
        {
            let (store, _) = Store::open(&dir).expect("an empty folder");
            for size in [10, 700, 5000] {
                let records = vec![vec![b'r'; size]; 4];
                store.keep(&Batch { records, ..Batch::default() }).expect("room");
            }
            store.snapshot(3, std::iter::once(b"state".to_vec())).expect("a record");
            let (steps, lines) =
                ([(1, vec![(1, vec![b's'; 90])])].into(), [(1, vec![b"a line".to_vec()])].into());
            store.keep(&Batch { steps, lines, ..Batch::default() }).expect("room");
        }
        let sound = std::fs::read(dir.join(FILE_NAME)).expect("the file just made");
        (dir, sound)
    })
}

/// Panics within the database's own files do not end the process, as all others do here.
fn let_the_database_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|place| place.file().contains("/redb-")) {
            hook(panic);
        }
    }));
}

fuzz_target!(init: let_the_database_panic(), |bytes: &[u8]| {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let (dir, sound) = ground();
    let file = if how == 0 { rest.to_vec() } else { changed(sound.clone(), rest) };
    if std::fs::write(dir.join(FILE_NAME), file).is_err() {
        return;
    }
    let Ok((store, replay)) = Store::open(dir) else { return };
    let first = 1 + replay.snapshot.map_or(0, |(number, _)| number);
    assert!((first..).zip(&replay.records).all(|(expected, (number, _))| *number == expected));
    for job in 0..2 {
        assert!(store.steps(job, 0).into_iter().flatten().count() < 1000);
        assert!(store.lines(job, 0).into_iter().flatten().count() < 1000);
    }
    // A payload is as good as any other, and comes back as it was.
    if store.keep(&Batch { records: vec![rest.to_vec()], ..Batch::default() }).is_ok() {
        drop(store);
        let (_, replay) = Store::open(dir).expect("what was just written");
        assert_eq!(replay.records.last().map(|(_, record)| record.as_slice()), Some(rest));
    }
});

/// The file with bytes in other places: three for a place, one for a length, then what goes there.
fn changed(mut file: Vec<u8>, mut changes: &[u8]) -> Vec<u8> {
    while let [a, b, c, len, rest @ ..] = changes {
        // Half of the places are in the header, where most of the meaning is.
        let place = usize::from(*a) << 8 | usize::from(*b);
        let place = if c % 2 == 0 { place % 512 } else { (place << 8 | usize::from(*c)) % file.len() };
        let (new, after) = rest.split_at(rest.len().min(1 + usize::from(len % 16)));
        let end = file.len().min(place + new.len());
        file[place..end].copy_from_slice(&new[..end - place]);
        changes = after;
    }
    file
}
