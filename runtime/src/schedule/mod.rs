//! Pipeline schedules as data: what every rank does in one step, before anything runs.
//!
//! The path of a plan: a generator ([`ScheduleKind::plan`]) or the text form ([`text`]) makes a [`Plan`]; [`lower()`] turns
//! it into one [`Program`] per pipeline rank; [`check()`] proves both on a virtual clock ([`walk()`]); then the ranks issue
//! the program. The update of a training step is lowered by [`update`] and proved by [`check_step()`]. [`report`] is what
//! `contraflow plan` prints. Nothing here knows tensors, transports or threads.

pub mod action;
pub mod bubble;
pub mod bucket;
pub mod check;
mod check_programs;
mod check_update;
pub mod csv;
pub mod deadlock;
pub mod dualpipe;
pub mod fallback;
mod flow;
pub mod forward;
pub mod interleaved;
pub mod kind;
pub mod lower;
pub mod messages;
mod neighbours;
pub mod one_f_one_b;
mod overlap;
pub mod program;
mod receives;
pub mod recorded;
pub mod report;
pub mod text;
pub mod timeline;
pub mod update;
pub mod walk;
pub mod zb1p;

pub use action::{Action, Chunk, Plan};
pub use bubble::{Bubble, UnitCosts, clock, clock_by, simulate};
pub use bucket::{Bucket, Contents};
pub use check::{PlanFault, Report, check};
pub use check_update::check_step;
pub use deadlock::Deadlock;
pub use kind::{Mode, ScheduleError, ScheduleKind};
pub use lower::{lower, lower_with};
pub use messages::{Message, messages};
pub use neighbours::{Neighbours, pair_up, paired};
pub use overlap::{Overlap, PairOrder};
pub use program::{Component, Lane, LayerKind, Op, OpId, Pass, Program, StageLayout, TransferKind, Work};
pub use recorded::{RecordedRank, RecordedStep};
pub use report::{PlanReport, RankFigures, StepCost, parse_bytes, size};
pub use timeline::{Idle, Span, Timeline};
pub use update::{Sharding, StepPrograms, buckets};
pub use walk::walk;
