//! What the operations of an update do: the compute lane works on the rank's parameters and moments, the collective lane on
//! what lies between, and each takes what the one before it has put there.
//!
//! The arithmetic is [`crate::optimizer`]'s, the frames are [`crate::comm`]'s; what comes after what is in the program.

use contraflow_runtime::fabric::Phase;
use contraflow_runtime::schedule::Work;
use contraflow_runtime::stability::validation::Validated;

use super::probe::ProbePoint;
use super::running::RunningProgram;
use super::update::Update;
use crate::comm::address::StepId;
use crate::comm::collectives::Collectives;
use crate::error::{Missing, RankError};
use crate::model::params::RankParams;
use crate::optimizer::inspect;
use crate::optimizer::update::balance;
use crate::replica;

/// The all-reduce of the totals has this number, that of the evidence the next one.
const TOTALS: usize = 0;

impl RunningProgram {
    /// Works on the update; nothing here waits for another rank.
    ///
    /// **Errors**: those of `work`; the program has an update, and none was handed over.
    fn with_update<T>(&self, work: impl FnOnce(&mut Update) -> Result<T, RankError>) -> Result<T, RankError> {
        let mut update = self.update.lock();
        work(update.as_mut().ok_or(Missing::OfStep { what: "the optimizer" })?)
    }

    /// Those of the update of a step.
    fn collectives(&self, step: u64) -> Collectives<'_> {
        let id = StepId { phase: Phase::Update, step, ..self.id };
        Collectives { endpoint: &self.context.endpoint, id }
    }

    /// Runs an operation of the update.
    ///
    /// **Errors**: those of the fabric; an operation without its input.
    pub(super) fn run_update(&self, work: Work) -> Result<(), RankError> {
        match work {
            Work::Pack { bucket } => self.pack(bucket),
            Work::Reduce { bucket } => self.reduce(bucket),
            Work::GradNorm { bucket } => self.grad_norm(bucket),
            Work::AwaitReplica => self.await_replica(),
            Work::Totals => self.totals(),
            Work::Inspect => self.inspect(),
            Work::Evidence => self.evidence(),
            Work::Apply { bucket } => self.apply(bucket),
            Work::Balance => self.balance(),
            Work::Gather { bucket } => self.gather(bucket),
            Work::Unpack { bucket } => self.unpack(bucket),
            Work::Snapshot => self.snapshot(),
            Work::Component { .. } | Work::Send { .. } | Work::Receive { .. } => {
                Err(RankError::Panic { message: format!("{work} is no part of an update") })
            }
        }
    }

    fn pack(&self, bucket: usize) -> Result<(), RankError> {
        let mut compute = self.compute();
        self.show_gradients(bucket, &mut compute.params);
        let packed = self.with_update(|update| Ok(update.optimizer.pack(&compute.params, bucket)))?;
        self.in_flight.bucket(bucket, |in_flight| in_flight.packed = Some(packed));
        Ok(())
    }

    fn reduce(&self, bucket: usize) -> Result<(), RankError> {
        let packed = self.in_flight.take_from_bucket(bucket, "the gradients", |t| &mut t.packed)?;
        let sum = self.collectives(self.id.step).reduce_scatter(&self.group(bucket).ranks, bucket, packed)?;
        self.in_flight.bucket(bucket, |in_flight| in_flight.reduced = Some(sum));
        Ok(())
    }

    fn grad_norm(&self, bucket: usize) -> Result<(), RankError> {
        let mut compute = self.compute();
        let reduced = self.in_flight.bucket(bucket, |in_flight| in_flight.reduced.clone());
        if reduced.is_none() {
            self.show_gradients(bucket, &mut compute.params);
        }
        let squares = self
            .with_update(|update| Ok(update.optimizer.squares(&compute.params, bucket, reduced.as_ref())))?;
        self.in_flight.bucket(bucket, |in_flight| in_flight.squares = Some(squares));
        Ok(())
    }

    /// The first operation of a bucket's reduction is about to read the rank's own gradients.
    fn show_gradients(&self, bucket: usize, params: &mut RankParams) {
        let (rank, step) = (self.context.endpoint.rank(), self.id.step);
        self.context.probe.at(ProbePoint::Gradients { rank, step, bucket, params });
    }

    fn await_replica(&self) -> Result<(), RankError> {
        let Some(buddy) = self.with_update(|update| Ok(update.order.buddy))? else { return Ok(()) };
        Ok(replica::acknowledged(&self.context.endpoint, self.id.formation, buddy, self.id.step - 1)?)
    }

    fn totals(&self) -> Result<(), RankError> {
        let own = self.compute().totals.clone();
        let numbers = self.with_update(|update| {
            let squares = update.optimizer.sum_squares(|bucket| {
                self.in_flight.bucket(bucket, |in_flight| in_flight.squares.take().unwrap_or_default())
            });
            let wishes = (update.order.stop.wish(), update.order.saves.wish());
            let validated = update.order.validated.unwrap_or_default();
            Ok(update.optimizer.layout.encode(squares, &own, wishes, validated))
        })?;
        let sums = self.collectives(self.id.step).all_reduce(&self.context.world, TOTALS, numbers)?;
        self.with_update(|update| {
            let layers = own.expert_counts.keys().copied();
            let mut global = update.optimizer.layout.decode(&sums, layers);
            if update.order.validated.is_some() {
                let step = update.order.rates.step - 1;
                update.optimizer.watch.validation.note(Validated { step, loss: global.validation_loss });
            }
            global.ends_early = update.optimizer.watch.validation.is_exhausted(update.order.patience);
            global.in_memory &= global.stop && !global.ends_early && update.order.can_keep;
            update.global = Some(global);
            Ok(())
        })
    }

    fn inspect(&self) -> Result<(), RankError> {
        let compute = self.compute();
        self.with_update(|update| {
            let found = inspect::find(&compute.params, &compute.totals, &update.optimizer.names);
            update.found = Some(found);
            Ok(())
        })
    }

    fn evidence(&self) -> Result<(), RankError> {
        let (seen, found, names) = self.with_update(|update| {
            let found = update.found.take().ok_or(Missing::OfStep { what: "what is not finite" })?;
            Ok((update.seen()?, found, update.optimizer.names.clone()))
        })?;
        let evidence =
            inspect::evidence(&self.collectives(self.id.step), &self.context.world, &seen, &found, &names)?;
        self.with_update(|update| {
            update.evidence = Some(evidence);
            Ok(())
        })
    }

    fn apply(&self, bucket: usize) -> Result<(), RankError> {
        let mut compute = self.compute();
        let reduced = self.in_flight.bucket(bucket, |in_flight| in_flight.reduced.take());
        let updated = self.with_update(|update| {
            let with = (update.order.rates, update.global()?.grad_norm);
            update.optimizer.apply(&mut compute.params, bucket, reduced.as_ref(), with);
            let is_shared = reduced.is_some();
            Ok(is_shared.then(|| update.optimizer.own_weights(&compute.params, bucket)))
        })?;
        let updated = updated.map(|shard| (self.id.step, shard));
        self.in_flight.bucket(bucket, |in_flight| in_flight.updated = updated);
        Ok(())
    }

    fn balance(&self) -> Result<(), RankError> {
        let mut compute = self.compute();
        self.with_update(|update| {
            let speed = update.order.rates.bias_speed;
            balance(&mut compute.params, &update.global()?.expert_counts, speed);
            Ok(())
        })
    }

    fn gather(&self, bucket: usize) -> Result<(), RankError> {
        let (step, own) = self.in_flight.take_from_bucket(bucket, "the updated shard", |t| &mut t.updated)?;
        let group = self.group(bucket);
        let collectives = self.collectives(step);
        let gathered = collectives.all_gather((&group.ranks, bucket), own, |at| group.runs(at))?;
        self.in_flight.bucket(bucket, |in_flight| in_flight.gathered = Some(gathered));
        Ok(())
    }

    fn unpack(&self, bucket: usize) -> Result<(), RankError> {
        let gathered = self.in_flight.take_from_bucket(bucket, "the other shards", |t| &mut t.gathered)?;
        let mut compute = self.compute();
        self.with_update(|update| {
            update.optimizer.unpack(&mut compute.params, bucket, &gathered);
            Ok(())
        })
    }

    fn snapshot(&self) -> Result<(), RankError> {
        let compute = self.compute();
        self.with_update(|update| {
            let is_wanted = update.saves() || update.replicates();
            let has_updated = !update.global()?.skipped;
            let averages = update.optimizer.average(&compute.params, has_updated, is_wanted)?;
            update.snapshot = is_wanted.then(|| update.optimizer.snapshot(&compute.params, averages));
            Ok(())
        })
    }
}
