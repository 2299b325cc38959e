//! Handlers of the orchestrator's commands: formations are joined, commanded and left, states put
//! in place and written down. What takes long runs beside the loop and comes back as its input.

use std::time::Instant;

use contraflow_proto::v1;
use contraflow_runtime::control::RankEvent;
use contraflow_runtime::control::wire::{
    decode_command, encode_event, formation_numbers, formation_of, job_of,
};
use contraflow_runtime::files::{free_bytes, in_task};
use contraflow_runtime::flight::Recorders;
use contraflow_runtime::layout;
use contraflow_runtime::topology::{FormationId, JobId};
use contraflow_runtime::trace::TraceContext;
use tokio::sync::mpsc::UnboundedSender;
use v1::from_worker::Message as Up;
use v1::to_worker::Message as Down;

use super::bringing::Bringing;
use super::formation::Formation;
use super::job::{Prepared, Roots};
use super::records::{Note, RecordKeeper};
use super::{FILES_LINE, Host, Input, flight, reading};
use crate::error::RankError;

impl Host {
    pub(super) fn handle(&mut self, message: Down) -> Result<(), String> {
        if let Down::Refused(why) = message {
            if !self.route.failed() {
                return Err(why);
            }
            tracing::warn!("the renewed certificate is refused, the one before it is shown again: {why}");
            self.attach();
            return Ok(());
        }
        if let Err(words) = self.obey(message) {
            tracing::warn!("ignored a malformed command: {words}");
        }
        Ok(())
    }

    fn obey(&mut self, message: Down) -> Result<(), String> {
        match message {
            Down::Welcome(welcome) => self.welcome(&welcome),
            Down::Assign(assign) => self.assign(assign)?,
            Down::Command(command) => self.command(command)?,
            Down::Release(release) => self.release(&release)?,
            Down::Durable(v1::Durable { job, step }) => {
                let job = job_of(job)?;
                if let Some(formation) = self.formations.get_mut(&job) {
                    formation.outbox.durable(step);
                    formation.durable = formation.durable.max(step);
                }
                self.note_records(job, Note::Durable(step));
                self.memory.durable(job, step);
            }
            Down::Commit(commit) => self.commit(commit)?,
            Down::Bring(order) => self.bring(&order)?,
            Down::Discard(order) => self.discard(order)?,
            Down::ReadFlight(order) => self.read_flight(&order)?,
            Down::Records(records) => self.note_records(job_of(records.job)?, Note::Records(records)),
            Down::Refused(_) => {}
        }
        Ok(())
    }

    fn note_records(&self, job: JobId, note: Note) {
        if let Some(keeper) = self.records.get(&job) {
            keeper.note(note);
        }
    }

    fn command(&mut self, command: v1::RankCommand) -> Result<(), String> {
        let Some(formation) = self.formations.get_mut(&job_of(command.job)?) else { return Ok(()) };
        let prepared = formation.prepared.as_ref();
        let dir = prepared.map(|prepared| prepared.export_dir()).unwrap_or_default();
        let trace = TraceContext::parse(&command.traceparent);
        let (to, command) = decode_command(command, &dir)?;
        formation.command(to, command, trace);
        Ok(())
    }

    fn welcome(&mut self, welcome: &v1::Welcome) {
        if welcome.state == self.state && welcome.incarnation < self.incarnation {
            // Another orchestrator has taken over; this one has not noticed.
            self.link = None;
            return;
        }
        if welcome.state != self.state {
            self.facts = 0;
        }
        (self.state, self.incarnation) = (welcome.state, welcome.incarnation);
        if let Some(away) = self.absence.end(Instant::now()) {
            tracing::info!("the orchestrator is back after {:.1} s", away.as_secs_f64());
        }
        tracing::info!(incarnation = welcome.incarnation, "a member of the cluster");
        let Some(link) = &mut self.link else { return };
        link.welcomed(welcome.beat_ms);
        self.route.worked(Instant::now());
        if self.leaves_by.is_some() {
            link.send(Up::LeaveRequest(v1::Empty {}));
        }
        self.records.values().for_each(|keeper| keeper.note(Note::AskAgain));
        for formation in self.formations.values() {
            for event in formation.outbox.repeat() {
                link.send(Up::Event(encode_event(formation.id, event)));
            }
            if let Some(committed) = &formation.committed {
                link.send(Up::Committed(committed.clone()));
            }
        }
    }

    /// Joins a formation; one that it is in already is left as it is.
    fn assign(&mut self, assign: v1::Assign) -> Result<(), String> {
        let id = formation_of(assign.job, assign.generation)?;
        let FormationId { job, generation } = id;
        let mut formation = Formation::new(id, &assign)?;
        if let Some(before) = self.formations.get(&job) {
            if before.id >= id {
                return Ok(());
            }
            let before = FormationId::new(job, generation.previous());
            self.leave(before, "superseded by another formation");
        }
        self.stop_bringing(id);
        self.memory.enter(id, assign.memory.as_ref());
        let task = reading::begin(&mut formation, &self.inputs);
        self.formations.insert(job, formation);
        let Some(task) = task else { return Ok(()) };
        // Data of jobs that have left makes room; that of this one may be here from its formation before.
        self.loaded.retain(|job, _| self.formations.contains_key(job));
        let (storage, settings) = (self.storage.clone(), &self.settings);
        let roots = Roots { storage, data: settings.data_root.clone(), sources: settings.sources.clone() };
        let loaded = self.loaded.get(&job).cloned();
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let prepare = || RankError::catch(|| Prepared::new(id, &assign, &roots, loaded));
            let result = in_task(task, prepare);
            let result = result.map(|prepared| {
                let recorders = flight::begin(prepared.dir(), id, &assign);
                (Box::new(prepared), recorders)
            });
            let assign = Box::new(assign);
            drop(inputs.send(Input::Prepared { formation: id, assign, result }));
        });
        Ok(())
    }

    pub(super) fn prepared(
        &mut self,
        id: FormationId,
        assign: &v1::Assign,
        result: Result<(Box<Prepared>, Recorders), RankError>,
    ) {
        let job = id.job;
        let Some(formation) = self.formations.get_mut(&job).filter(|formation| formation.id == id) else {
            return;
        };
        if formation.reading.take().is_none() {
            // Given up before: it has been reported as failed.
            return;
        }
        let started = result.and_then(|(prepared, recorders)| {
            self.loaded.insert(job, prepared.loaded());
            self.settings.log_levels.set(job, prepared.recipe.log.level);
            if assign.ranks.contains(&0) {
                let dir = prepared.dir().display();
                tracing::info!(job = job.bits(), rank = 0_u64, "{FILES_LINE}{dir}");
            }
            if assign.ranks.contains(&0) {
                look_for_room(id, &prepared, self.inputs.clone());
                let inputs = self.inputs.clone();
                let ask = move |wanted| drop(inputs.send(Input::RecordsWanted(wanted)));
                self.records.insert(job, RecordKeeper::start(id, prepared.job.clone(), ask));
            }
            let store = self.memory.of(job);
            formation.start(assign, (*prepared, recorders, &store), &self.listener, self.inputs.clone())
        });
        if let Err(cause) = started {
            formation.fail(&cause, &self.inputs);
        }
    }

    fn commit(&mut self, commit: v1::Commit) -> Result<(), String> {
        let v1::Commit { job, generation, what } = commit;
        let formation = formation_of(job, generation)?;
        let prepared = self.running(formation).and_then(|running| running.prepared.clone());
        let (Some(prepared), Some(what)) = (prepared, what) else {
            return Ok(());
        };
        let position = match &what {
            v1::commit::What::Checkpoint(checkpoint) => checkpoint.position,
            v1::commit::What::Weights(_) => None,
        };
        if !self.committing.insert((formation, position.map(|position| position.step))) {
            // An orchestrator that was started again repeats what it may have lost; the answer is on its way, however long it takes.
            return Ok(());
        }
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let checkpoint_bytes = checkpoint_bytes(&what);
            let failed = RankError::catch(|| prepared.commit(what)).err();
            let error = failed.map_or_else(String::new, |failed| failed.to_string());
            let free = checkpoint_bytes.and_then(|bytes| Some((bytes, free_bytes(prepared.dir()).ok()?)));
            let space = free.map(|(checkpoint_bytes, free_bytes)| v1::StorageSpace {
                job,
                generation,
                free_bytes,
                checkpoint_bytes,
            });
            let answer = v1::Committed { job, generation, position, error };
            drop(inputs.send(Input::Committed { formation, answer, space }));
        });
        Ok(())
    }

    /// Brings what is kept of a job's state to a formation that has no rank here; one that it is brought to already is left as it is.
    fn bring(&mut self, order: &v1::Bring) -> Result<(), String> {
        let id = Bringing::id_of(order)?;
        let is_known = self.bringing.get(&id.job).is_some_and(|bringing| bringing.id >= id);
        if is_known || self.formations.get(&id.job).is_some_and(|formation| formation.id >= id) {
            return Ok(());
        }
        self.leave(id, "the job continues without this worker");
        self.stop_bringing(id);
        self.memory.enter(id, order.memory.as_ref());
        match Bringing::begin(order, &self.memory.of(id.job), &self.listener) {
            Ok(bringing) => drop(self.bringing.insert(id.job, bringing)),
            // Its ranks find nobody here, and form again.
            Err(error) => {
                let (job, generation) = formation_numbers(id);
                tracing::warn!(job, generation, "the state in memory cannot be brought: {error}");
            }
        }
        Ok(())
    }

    /// Nothing is brought to this formation of a job any more, nor to an earlier one.
    fn stop_bringing(&mut self, last: FormationId) {
        if self.bringing.get(&last.job).is_some_and(|bringing| bringing.id <= last) {
            self.bringing.remove(&last.job).into_iter().for_each(Bringing::end);
        }
    }

    /// Leaves a formation on the orchestrator's command, and reports its replicas or drops them.
    fn release(&mut self, release: &v1::Release) -> Result<(), String> {
        let &v1::Release { job, generation, keep, .. } = release;
        let formation = formation_of(job, generation)?;
        self.leave(formation, &release.reason);
        self.stop_bringing(formation);
        if self.formations.contains_key(&formation.job) {
            // Of a later generation: what is kept is its.
            return Ok(());
        }
        if keep {
            for report in self.memory.reports(formation) {
                self.send(Up::Event(encode_event(formation, &RankEvent::StepDone { report })));
            }
            let replicas = self.memory.inventory(formation.job);
            self.send(Up::Released(v1::Released { job, generation, replicas }));
        } else {
            self.memory.drop_replicas(formation);
        }
        Ok(())
    }

    /// Leaves this formation of a job, or an earlier one if that is here.
    pub(super) fn leave(&mut self, last: FormationId, reason: &str) {
        let job = last.job;
        if self.formations.get(&job).is_none_or(|formation| formation.id > last) {
            return;
        }
        if let Some(formation) = self.formations.remove(&job) {
            let generation = formation.id.generation.number();
            tracing::info!(job = job.bits(), generation, "left {job}: {reason}");
            self.settings.log_levels.forget(job);
            self.note_records(job, Note::Over);
            formation.leave(reason);
        }
    }
}

/// Reports what room the storage has for the checkpoints of a formation that begins.
fn look_for_room(id: FormationId, prepared: &Prepared, inputs: UnboundedSender<Input>) {
    let (dir, checkpoint_bytes) = (prepared.dir().to_owned(), layout::checkpoint_bytes(&prepared.recipe));
    tokio::task::spawn_blocking(move || {
        // A storage that does not answer says so where something is written to it.
        if let Ok(free_bytes) = free_bytes(&dir) {
            let (job, generation) = formation_numbers(id);
            drop(inputs.send(Input::Space(v1::StorageSpace {
                job,
                generation,
                free_bytes,
                checkpoint_bytes,
            })));
        }
    });
}

/// What a checkpoint takes in the storage; none: it is no checkpoint.
fn checkpoint_bytes(what: &v1::commit::What) -> Option<u64> {
    match what {
        v1::commit::What::Checkpoint(checkpoint) => {
            Some(checkpoint.shards.iter().map(|shard| shard.bytes).sum())
        }
        v1::commit::What::Weights(_) => None,
    }
}
