//! The update of a training step under way: its inputs, its state, and its results, which every rank has.
//!
//! Knows no lanes; the operations are in `update_ops`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use contraflow_runtime::stability::Seen;
use contraflow_runtime::stability::evidence::{Evidence, Found};

use crate::checkpoint::Snapshot;
use crate::checkpoint::saves::Saves;
use crate::error::Missing;
use crate::optimizer::totals::{GlobalTotals, StopWish};
use crate::optimizer::update::{OptimizerState, UpdateRates};

/// What a rank has been told of an end; heard until the totals of the running step.
#[derive(Debug, Default)]
pub struct StopOrder {
    saved: AtomicBool,
    in_memory: AtomicBool,
}

impl StopOrder {
    /// The run is to stop between two steps.
    pub fn give(&self, in_memory: bool) {
        let told = if in_memory { &self.in_memory } else { &self.saved };
        told.store(true, Ordering::Relaxed);
    }

    /// What has been said so far.
    pub fn wish(&self) -> StopWish {
        let [saved, in_memory] = [&self.saved, &self.in_memory].map(|told| told.load(Ordering::Relaxed));
        StopWish { stops: saved || in_memory, in_memory }
    }
}

/// Inputs of a step's update.
#[derive(Clone, Debug)]
pub struct UpdateOrder {
    /// Which step, with which rates.
    pub rates: UpdateRates,
    /// Whether this rank was told to stop: if any was by the time of the totals, all stop after this step.
    pub stop: Arc<StopOrder>,
    /// When the state after the update is written to storage.
    pub save: SaveWhen,
    /// How this rank's saves go.
    pub saves: Arc<Saves>,
    /// Whether the state after the update is replicated in memory, unless the ranks stop after it.
    pub replicate: bool,
    /// Whether the ranks can stop after this step with the state in memory.
    pub can_keep: bool,
    /// Whether the update is gathered at once; otherwise the next step does it, unless the ranks stop after this one.
    pub gather: bool,
    /// This rank's share of the validation loss of the weights that the step begins with, if they were validated.
    pub validated: Option<f64>,
    /// `validate.patience`: for how many validations in a row the run waits for a lower loss; 0: for ever.
    pub patience: u64,
    /// Who must have this rank's state of the step before in memory: what is sent into the totals says so, and so no rank makes
    /// this update before every buddy has that state.
    pub buddy: Option<usize>,
}

impl UpdateOrder {
    /// Of a rank that goes on alone: it is not told to stop, keeps nothing in memory and gathers at once.
    pub fn alone(rates: UpdateRates, save: SaveWhen) -> Self {
        UpdateOrder {
            rates,
            stop: Arc::default(),
            save,
            saves: Arc::default(),
            replicate: false,
            can_keep: false,
            gather: true,
            validated: None,
            patience: 0,
            buddy: None,
        }
    }
}

/// When the state after an update is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveWhen {
    /// Not at all: there is nowhere to keep it.
    Never,
    /// If the ranks stop after this step and do not keep it in memory, or a save has failed and is tried again.
    AtStop,
    /// After this step, unless a rank still writes the one before and takes long.
    Due,
    /// After this step.
    Now,
}

/// The update of a step under way.
pub struct Update {
    /// What was asked for.
    pub order: UpdateOrder,
    /// The moments, handed over for the step.
    pub optimizer: OptimizerState,
    /// What every rank knows, once the totals are there.
    pub global: Option<GlobalTotals>,
    /// What is not finite here, where it was searched for.
    pub found: Option<Found>,
    /// What is not finite anywhere.
    pub evidence: Option<Evidence>,
    /// The state after the step, if it is wanted.
    pub snapshot: Option<Snapshot>,
}

impl Update {
    /// The update of a step, before its first operation.
    pub fn new(order: UpdateOrder, optimizer: OptimizerState) -> Self {
        Update { order, optimizer, global: None, found: None, evidence: None, snapshot: None }
    }

    /// What the watch judges.
    ///
    /// **Errors**: there are no totals yet.
    pub fn seen(&self) -> Result<Seen, Missing> {
        let global = self.global()?;
        Ok(Seen { step: self.order.rates.step, loss: global.loss, grad_norm: global.grad_norm })
    }

    /// Whether the state after the step is written to storage.
    pub fn saves(&self) -> bool {
        let wish = self.global.as_ref().map(|global| global.save).unwrap_or_default();
        match self.order.save {
            SaveWhen::Never => false,
            SaveWhen::AtStop => self.stops_saved() || (wish.retries && !wish.skips),
            SaveWhen::Due => self.stops_saved() || !wish.skips,
            SaveWhen::Now => true,
        }
    }

    /// Whether the state after the step is replicated in memory.
    pub fn replicates(&self) -> bool {
        self.order.replicate && !self.stops() || self.stops_in_memory()
    }

    /// Whether the update is gathered at once.
    pub fn gathers(&self) -> bool {
        self.order.gather || self.stops()
    }

    fn stops(&self) -> bool {
        self.global.as_ref().is_some_and(|global| global.stop || global.ends_early)
    }

    fn stops_in_memory(&self) -> bool {
        self.global.as_ref().is_some_and(|global| global.in_memory)
    }

    fn stops_saved(&self) -> bool {
        self.stops() && !self.stops_in_memory()
    }

    /// The totals.
    ///
    /// **Errors**: the totals are not known yet.
    pub fn global(&self) -> Result<&GlobalTotals, Missing> {
        self.global.as_ref().ok_or(Missing::OfStep { what: "the totals" })
    }

    /// The totals, for the verdict to be noted.
    ///
    /// **Errors**: the totals are not known yet.
    pub fn global_mut(&mut self) -> Result<&mut GlobalTotals, Missing> {
        self.global.as_mut().ok_or(Missing::OfStep { what: "the totals" })
    }
}
