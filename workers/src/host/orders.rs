//! What the orchestrator tells this worker, and how it is carried out: formations are joined, commanded and left, states put
//! in place and written down. What takes long runs beside the loop and comes back as its input.

use contraflow_proto::v1;
use contraflow_runtime::control::wire::{decode_command, encode_event};
use contraflow_runtime::topology::JobId;
use contraflow_runtime::trace::TraceContext;
use v1::from_worker::Message as Up;
use v1::to_worker::Message as Down;

use super::formation::Formation;
use super::job::{Prepared, Roots};
use super::{Host, Input, memory};
use crate::error::RankError;

impl Host {
    pub(super) fn hear(&mut self, message: Down) -> Result<(), String> {
        match message {
            Down::Welcome(welcome) => self.welcome(&welcome)?,
            Down::Assign(assign) => self.assign(assign),
            Down::Command(command) => {
                let prepared =
                    self.formations.get(&command.job).and_then(|formation| formation.prepared.as_ref());
                let dir = prepared.map(|prepared| prepared.export_dir()).unwrap_or_default();
                let trace = TraceContext::parse(&command.traceparent);
                match decode_command(command, &dir) {
                    Ok((to, command)) => {
                        if let Some(formation) = self.formations.get_mut(&to.job) {
                            formation.command(to, command, trace);
                        }
                    }
                    Err(words) => tracing::warn!("a command that makes no sense: {words}"),
                }
            }
            Down::Release(release) => self.release(&release),
            Down::Durable(v1::Durable { job, step }) => {
                if let Some(formation) = self.formations.get_mut(&job) {
                    formation.outbox.durable(step);
                }
                self.memory.durable(job, step);
            }
            Down::Commit(commit) => self.commit(commit),
            Down::WriteDown(order) => self.write_down(order),
            Down::Refused(why) => return Err(why),
        }
        Ok(())
    }

    fn welcome(&mut self, welcome: &v1::Welcome) -> Result<(), String> {
        if welcome.state == self.state && welcome.incarnation < self.incarnation {
            // Another orchestrator has taken over; this one has not noticed.
            self.link = None;
            return Ok(());
        }
        (self.state, self.incarnation) = (welcome.state, welcome.incarnation);
        tracing::info!(incarnation = welcome.incarnation, "a member of the cluster");
        let Some(link) = &mut self.link else { return Ok(()) };
        link.welcomed(welcome.beat_ms);
        if self.leaves_by.is_some() {
            link.say(Up::Leaving(v1::Empty {}));
        }
        for (&job, formation) in &self.formations {
            for event in formation.outbox.repeat() {
                link.say(Up::Event(encode_event(job, formation.generation, event)));
            }
            if let Some(committed) = &formation.committed {
                link.say(Up::Committed(committed.clone()));
            }
        }
        Ok(())
    }

    /// Joins a formation; one that it is in already is left as it is.
    fn assign(&mut self, assign: v1::Assign) {
        let job = assign.job;
        if let Some(formation) = self.formations.get(&job) {
            if formation.generation >= assign.generation {
                return;
            }
            self.leave(job, assign.generation - 1, "another formation takes its place");
        }
        let formation = match Formation::new(&assign) {
            Ok(formation) => formation,
            Err(words) => return tracing::warn!("an assignment that makes no sense: {words}"),
        };
        self.memory.enter(&assign);
        self.formations.insert(job, formation);
        // Data of jobs that have left makes room; that of this one may be here from its formation before.
        self.loaded.retain(|job, _| self.formations.contains_key(job));
        let roots = Roots { storage: self.settings.storage.clone(), data: self.settings.data_root.clone() };
        let loaded = self.loaded.get(&job).cloned();
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let result = RankError::catch(|| Prepared::new(&assign, &roots, loaded));
            drop(inputs.send(Input::Prepared { assign: Box::new(assign), result: result.map(Box::new) }));
        });
    }

    pub(super) fn prepared(&mut self, assign: &v1::Assign, result: Result<Box<Prepared>, RankError>) {
        let job = assign.job;
        let formation =
            self.formations.get_mut(&job).filter(|formation| formation.generation == assign.generation);
        let Some(formation) = formation else { return };
        let started = result.and_then(|prepared| {
            self.loaded.insert(job, prepared.loaded());
            self.settings.log_levels.set(job, prepared.recipe.log.level);
            if assign.ranks.contains(&0) {
                tracing::info!(job, rank = 0_u64, "the files of the job are in {}", prepared.dir().display());
            }
            let kept = self.memory.of(job);
            formation.start(assign, (*prepared, &kept), &self.listener, self.inputs.clone())
        });
        if let Err(cause) = started {
            formation.fail(&cause, &self.inputs, job);
        }
    }

    fn commit(&self, commit: v1::Commit) {
        let v1::Commit { job, generation, what } = commit;
        let formation = self.formations.get(&job).filter(|formation| formation.generation == generation);
        let prepared = match formation {
            Some(formation) => formation.prepared.clone(),
            None => self.memory.of_next(job, generation),
        };
        let (Some(prepared), Some(what)) = (prepared, what) else {
            return;
        };
        let position = match &what {
            v1::commit::What::Checkpoint(checkpoint) => checkpoint.position,
            v1::commit::What::Weights(_) => None,
        };
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let error = prepared.commit(what).err().unwrap_or_default();
            drop(inputs.send(Input::Committed(v1::Committed { job, generation, position, error })));
        });
    }

    /// Writes down what is kept of a formation that was left.
    fn write_down(&mut self, order: v1::WriteDown) {
        let v1::WriteDown { job, generation, .. } = order;
        let Some(prepared) = self.memory.of_next(job, generation) else { return };
        let (kept, inputs) = (self.memory.of(job), self.inputs.clone());
        tokio::task::spawn_blocking(move || {
            let events = memory::write_down(&prepared, &kept, &order);
            drop(inputs.send(Input::WrittenDown { job, generation, events }));
        });
    }

    /// Leaves a formation on the orchestrator's word, and says what is kept of it or lets that go.
    fn release(&mut self, release: &v1::Release) {
        let &v1::Release { job, generation, keep, .. } = release;
        self.leave(job, generation, &release.reason);
        if self.formations.contains_key(&job) {
            // Of a later generation: what is kept is its.
            return;
        }
        if keep {
            let kept = self.memory.inventory(job);
            self.say(Up::Released(v1::Released { job, generation, kept }));
        } else {
            self.memory.let_go(job, generation);
        }
    }

    /// Leaves a job's formation, if it is of this generation or an earlier one.
    pub(super) fn leave(&mut self, job: u64, generation: u32, reason: &str) {
        if self.formations.get(&job).is_none_or(|formation| formation.generation > generation) {
            return;
        }
        if let Some(formation) = self.formations.remove(&job) {
            tracing::info!(job, generation = formation.generation, "left {}: {reason}", JobId::of(job));
            self.settings.log_levels.forget(job);
            self.memory.note_left(job, formation.generation, formation.prepared.clone());
            formation.leave(reason);
        }
    }
}
