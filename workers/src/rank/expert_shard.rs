//! The expert-shard actor: owns the routed experts of a rank and lends them to one program at a time.
//!
//! It is off the path of a micro-batch: the program works on the lent parameters, the actor only hands them out and
//! takes them back. Knows no schedule and no fabric.

use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::RankMessage;
use crate::engine::probe::{Probe, ProbePoint};
use crate::model::params::Params;

/// Messages of the expert shard actor.
pub enum ExpertShardMessage {
    /// Hand the experts out; the answer is [`RankMessage::ExpertsLent`].
    Lend {
        /// For which step.
        step: u64,
    },
    /// Take the experts back.
    Return(Box<Params>),
}

/// What the actor is made with.
pub struct ExpertShardSetup {
    /// Whom to lend to.
    pub rank: ActorRef<RankMessage>,
    /// Number of the rank, for probes.
    pub rank_id: usize,
    /// The routed experts.
    pub experts: Params,
    /// For tests.
    pub probe: Probe,
}

/// The actor's state.
pub struct ExpertShardState {
    setup: ExpertShardSetup,
    lent: bool,
}

impl ExpertShardState {
    /// The experts, unless they are out.
    fn lend(&mut self) -> Option<Params> {
        let free = !std::mem::replace(&mut self.lent, true);
        free.then(|| std::mem::take(&mut self.setup.experts))
    }

    fn take_back(&mut self, experts: Params) {
        self.setup.experts = experts;
        self.lent = false;
    }
}

/// The expert-shard actor.
pub struct ExpertShard;

impl Actor for ExpertShard {
    type Msg = ExpertShardMessage;
    type State = ExpertShardState;
    type Arguments = ExpertShardSetup;

    async fn pre_start(
        &self,
        _myself: ActorRef<ExpertShardMessage>,
        setup: ExpertShardSetup,
    ) -> Result<ExpertShardState, ActorProcessingErr> {
        Ok(ExpertShardState { setup, lent: false })
    }

    async fn handle(
        &self,
        _myself: ActorRef<ExpertShardMessage>,
        message: ExpertShardMessage,
        state: &mut ExpertShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ExpertShardMessage::Lend { step } => {
                let rank = state.setup.rank_id;
                state.setup.probe.at(ProbePoint::Actor { rank, step, name: "expert shard" });
                let experts = state.lend().ok_or("the experts are lent already")?;
                state.setup.rank.cast(RankMessage::ExpertsLent(Box::new(experts)))?;
            }
            ExpertShardMessage::Return(experts) => state.take_back(*experts),
        }
        Ok(())
    }
}
