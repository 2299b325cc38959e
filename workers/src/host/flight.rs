//! The flight recorder of a job's ranks in this process: their rings in the job's folder, and what the rings of a formation that was lost
//! tell together. Recording neither ends training nor delays it: what the storage does not give in time is done without.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use contraflow_proto::v1;
use contraflow_runtime::checkpoint::{JobFolder, Owner, Storage};
use contraflow_runtime::control::wire::{formation_of, ranks_of};
use contraflow_runtime::files;
use contraflow_runtime::flight::{self, About, Analysis, FOLDER, Recorders};
use contraflow_runtime::topology::{FormationId, Rank};

use super::formation::world_of;
use super::{Host, Input, reading};
use crate::error::RankError;

/// How long beginning the rings may take.
const BEGIN: Duration = Duration::from_secs(5);

/// Rings of a formation that are read here at most: some 280 MiB while they are read. `contraflow doctor` reads any number.
const MAX_READ: usize = 1_024;

/// Begins the rings of a formation's ranks that are here. There are none where that fails or takes too long, which is said once.
pub(super) fn begin(job: &Path, id: FormationId, assign: &v1::Assign) -> Recorders {
    let ranks: Vec<usize> = ranks_of(&assign.ranks).into_iter().flatten().map(Rank::index).collect();
    let world = world_of(&assign.workers, assign.bringers).unwrap_or(assign.workers.len());
    let first = ranks.first().copied().unwrap_or_default();
    let (sender, begun) = mpsc::channel();
    let dir = job.to_owned();
    let begin = move || {
        let recorders = in_folder(&dir, ranks, &About { formation: id, world });
        drop(sender.send(recorders));
        // Whose rank 0 is here has the rings of earlier formations removed: nobody waits for that.
        if first == 0
            && let Err(error) = flight::drop_old(&dir, id.generation)
        {
            tracing::warn!("what the ranks of earlier formations did: {}: {error}", dir.display());
        }
    };
    let why = match std::thread::Builder::new().name("flight".into()).spawn(begin) {
        Err(error) => error.to_string(),
        Ok(_) => match begun.recv_timeout(BEGIN) {
            Ok(Ok(recorders)) => return recorders,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the file system has not answered within {} s", BEGIN.as_secs()),
        },
    };
    let folder = flight::generation_folder(job, id.generation);
    let (job, rank) = (id.job.bits(), first as u64);
    tracing::warn!(job, rank, "{}: {why}; what the ranks do is not recorded", folder.display());
    Recorders::default()
}

fn in_folder(job: &Path, ranks: Vec<usize>, about: &About) -> std::io::Result<Recorders> {
    files::make_dir(&job.join(FOLDER))?;
    Recorders::join(&flight::generation_folder(job, about.formation.generation), ranks, about)
}

impl Host {
    /// Has the rings of a formation read, beside the loop, and says what they tell.
    ///
    /// **Errors**: the order is malformed.
    pub(super) fn read_flight(&mut self, order: &v1::ReadFlight) -> Result<(), String> {
        let &v1::ReadFlight { job, generation, state, .. } = order;
        let formation = formation_of(job, generation)?;
        let lost: BTreeSet<usize> = ranks_of(&order.lost)?.into_iter().map(Rank::index).collect();
        // Where the storage does not answer the orchestrator asks somebody else.
        if files::stuck().len() >= reading::MAX_STUCK {
            return Ok(());
        }
        let (storage, inputs) = (self.storage.clone(), self.inputs.clone());
        let owner = Owner { state, job: formation.job };
        tokio::task::spawn_blocking(move || {
            let read = || files::in_task(files::new_task(), || said(&storage, owner, formation, &lost));
            let says = RankError::catch(read).unwrap_or_else(|error| {
                tracing::warn!(job, "what the ranks of generation {generation} did: {error}");
                None
            });
            let says = says.unwrap_or_default();
            drop(inputs.send(Input::FlightRead(v1::FlightRead { job, generation, says })));
        });
        Ok(())
    }
}

/// What the rings of a formation tell of the loss of these ranks, if they tell anything.
fn said(
    storage: &Storage,
    owner: Owner,
    formation: FormationId,
    lost: &BTreeSet<usize>,
) -> Result<Option<String>, RankError> {
    let Some(job) = JobFolder::find(storage, owner)? else { return Ok(None) };
    let folder = flight::generation_folder(job.path(), formation.generation);
    let in_folder = |error| RankError::file(&folder)(error).in_storage();
    let num_rings = match files::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(in_folder)?.len(),
    };
    if num_rings > MAX_READ {
        return Ok(Some(format!("contraflow doctor {} says what they were about", owner.job)));
    }
    let rings = flight::read_folder(&folder).map_err(in_folder)?;
    Ok(Analysis::after_loss(&rings, lost).incident())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use contraflow_runtime::flight::{Event, read_all};
    use contraflow_runtime::schedule::Work;
    use contraflow_runtime::topology::{Generation, JobId};

    use super::*;

    fn assign(ranks: &[u64]) -> v1::Assign {
        v1::Assign { ranks: ranks.to_vec(), workers: vec![0, 0, 1], ..v1::Assign::default() }
    }

    fn id(generation: u32) -> FormationId {
        FormationId::new(JobId::new(1, 5), Generation::new(generation))
    }

    #[test]
    fn the_workers_of_a_formation_record_beside_each_other_and_any_of_them_says_what_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        let owner = Owner { state: 7, job: id(1).job };
        let job = JobFolder::claim(&storage, owner).unwrap();
        let said = |lost: &[usize]| said(&storage, owner, id(1), &lost.iter().copied().collect()).unwrap();
        assert_eq!(said(&[2]), None, "nothing was recorded");
        let here = begin(job.path(), id(1), &assign(&[0, 1]));
        let there = begin(job.path(), id(1), &assign(&[2]));
        assert!(here.of(0).is_some() && here.of(1).is_some() && here.of(2).is_none());
        here.of(0).unwrap().note(Event::Ended(Work::Totals, 3), Instant::now());
        here.of(1).unwrap().note(Event::Ended(Work::Totals, 3), Instant::now());
        there.of(2).unwrap().note(Event::Began(Work::Balance, 4), Instant::now());
        let words = said(&[2]).unwrap();
        assert!(words.starts_with("rank 2 had been in ") && words.ends_with(" when it was lost"), "{words}");
        // Another state has another folder.
        let other = super::said(&storage, Owner { state: 8, ..owner }, id(1), &BTreeSet::new());
        assert_eq!(other.unwrap(), None);
    }

    #[test]
    fn where_nothing_can_be_recorded_there_are_no_rings_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        // The job's folder is gone, or a file is in the way.
        assert!(begin(&dir.path().join("gone"), id(1), &assign(&[0])).of(0).is_none());
        std::fs::write(dir.path().join(FOLDER), "").unwrap();
        assert!(begin(dir.path(), id(1), &assign(&[0])).of(0).is_none());
        std::fs::remove_file(dir.path().join(FOLDER)).unwrap();
        assert!(begin(dir.path(), id(1), &assign(&[0])).of(0).is_some());
        // The same formation once more, of another process.
        assert!(begin(dir.path(), id(1), &assign(&[0])).of(0).is_none());
        assert!(read_all(dir.path()).unwrap()[0].1[0].1.is_ok(), "the first one's ring stays");
    }
}
