//! What `contraflow plan` prints of a plan: layout, actions, messages, peaks and bubble. Nothing is started for it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::action::Plan;
use super::bubble::{Bubble, UnitCosts, simulate};
use super::check::{PlanFault, check};
use super::lower::lower;
use super::messages::{Message, messages};
use super::program::TransferKind;
use crate::faults::count;

/// Width at which lists of actions are wrapped.
const WIDTH: usize = 110;

/// A plan in figures; as JSON it also lists every message.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// Name of the plan.
    pub schedule: String,
    /// Why it is not the plan that was asked for.
    pub note: Option<String>,
    /// Pipeline stages.
    pub stages: usize,
    /// Micro-batches, both directions together.
    pub micro_batches: usize,
    /// Every pipeline rank.
    pub ranks: Vec<RankPlan>,
    /// Everything that crosses between ranks.
    pub messages: Vec<Message>,
    /// Idle time for unit costs: without any gain by overlap, and with overlap that hides all of the forward pass.
    pub bubbles: Vec<BubbleFigures>,
    /// What a model weighs under this plan; a bare schedule has none.
    pub per_rank: Option<Vec<RankFigures>>,
    /// What a training step costs under this plan; a bare schedule has no costs.
    pub per_step: Option<Vec<StepCost>>,
}

/// One pipeline rank's share of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RankPlan {
    /// Pipeline rank.
    pub rank: usize,
    /// Stages it holds.
    pub stages: Vec<usize>,
    /// What it does, in order, in the notation of the text form.
    pub actions: Vec<String>,
    /// Chunks alive at the same time until their input gradient is done.
    pub peak_activations: usize,
    /// Chunks alive at the same time until their weight gradient is done.
    pub peak_activations_until_weight: usize,
    /// Weight parts waiting at the same time.
    pub queue_depth: usize,
}

/// The bubble under some costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BubbleFigures {
    /// Cost of each kind of action.
    pub costs: UnitCosts,
    /// What the clock says.
    pub bubble: Bubble,
}

/// What one pipeline rank holds of a model.
///
/// **Units**: bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RankFigures {
    /// Pipeline rank.
    pub rank: usize,
    /// Stages it holds.
    pub stages: Vec<usize>,
    /// Its layers as text.
    pub layers: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Weights.
    pub weight_bytes: u64,
    /// Gradients.
    pub gradient_bytes: u64,
    /// This rank's shard of the optimizer's state.
    pub optimizer_bytes: u64,
    /// What waits for a backward pass or for a weight gradient, and gradients on their way to other ranks, at their peak.
    pub activation_bytes: u64,
    /// What the operation that takes most takes beside that, and the step's tokens.
    pub working_bytes: u64,
    /// The peak of a step: at most all of it.
    pub device_bytes: u64,
    /// In the host's memory: the moving average of this rank's shard of the weights.
    pub host_bytes: u64,
}

impl RankFigures {
    /// The peak of a step where device and host are one.
    ///
    /// **Units**: bytes.
    pub fn bytes(&self) -> u64 {
        self.device_bytes + self.host_bytes
    }
}

/// What one pipeline rank does and sends in a training step, its update included; routing is taken to be balanced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepCost {
    /// Pipeline rank.
    pub rank: usize,
    /// Matrix products. **Units**: FLOP.
    pub flops: u64,
    /// **Units**: bytes to other ranks.
    pub sent_bytes: u64,
}

impl PlanReport {
    /// Checks the plan as a bare schedule and reports on it. `note` says why it is not the plan that was asked for.
    ///
    /// # Errors
    /// The faults of a plan that is not sound.
    pub fn new(plan: &Plan, note: Option<String>) -> Result<PlanReport, Vec<PlanFault>> {
        let checked = check(plan, &lower(plan, None, 1))?;
        let bubble = |costs| {
            let deadlocked = |deadlock: super::deadlock::Deadlock| {
                vec![PlanFault { rank: None, action: None, text: deadlock.to_string() }]
            };
            simulate(plan, costs).map(|bubble| BubbleFigures { costs, bubble }).map_err(deadlocked)
        };
        let rank_plan = |rank: usize| RankPlan {
            rank,
            stages: plan.placement[rank].clone(),
            actions: plan.actions[rank].iter().map(ToString::to_string).collect(),
            peak_activations: checked.peak_activations[rank],
            peak_activations_until_weight: checked.peak_activations_until_weight[rank],
            queue_depth: checked.queue_depth[rank],
        };
        Ok(PlanReport {
            schedule: plan.schedule.clone(),
            note,
            stages: plan.stages,
            micro_batches: plan.micro_batches,
            ranks: (0..plan.ranks()).map(rank_plan).collect(),
            messages: messages(plan),
            bubbles: vec![bubble(UnitCosts::SUM)?, bubble(UnitCosts::HIDDEN)?],
            per_rank: None,
            per_step: None,
        })
    }

    fn write_layout(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ranks, stages, micro_batches) = (self.ranks.len(), self.stages, self.micro_batches);
        let schedule = &self.schedule;
        let ranks = count(ranks, "pipeline rank");
        let (stages, batches) = (count(stages, "stage"), count(micro_batches, "micro-batch"));
        writeln!(f, "{schedule}: {ranks}, {stages}, {batches}")?;
        if let Some(note) = &self.note {
            writeln!(f, "note: {note}")?;
        }
        writeln!(f, "\nrank  stages    live activations  held until W  W queue  idle")?;
        for (rank, idle) in self.ranks.iter().zip(&self.bubbles[0].bubble.idle) {
            writeln!(
                f,
                "{:>4}  {:<8}  {:>16}  {:>12}  {:>7}  {idle:>4}",
                rank.rank,
                join(&rank.stages),
                rank.peak_activations,
                rank.peak_activations_until_weight,
                rank.queue_depth,
            )?;
        }
        Ok(())
    }

    fn write_bubbles(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nbubble, transfers free")?;
        for BubbleFigures { costs, bubble } in &self.bubbles {
            let UnitCosts { f: forward, b, i, w, fb } = costs;
            writeln!(
                f,
                "  F={forward} B={b} I={i} W={w} F&B={fb}: step {}, idle at most {} on a rank, {:.1}% of all time",
                bubble.makespan,
                bubble.max_idle,
                100.0 * bubble.share,
            )?;
        }
        Ok(())
    }

    fn write_messages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut pairs: BTreeMap<(usize, usize), [usize; 2]> = BTreeMap::new();
        for message in &self.messages {
            let counts = pairs.entry((message.from, message.to)).or_default();
            counts[usize::from(message.kind == TransferKind::Gradient)] += 1;
        }
        writeln!(f, "\nmessages: {}", self.messages.len())?;
        if !pairs.is_empty() {
            writeln!(f, "from    to  activations  gradients")?;
        }
        for ((from, to), [activations, gradients]) in pairs {
            writeln!(f, "{from:>4}  {to:>4}  {activations:>11}  {gradients:>9}")?;
        }
        Ok(())
    }

    fn write_actions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nactions as stage.micro-batch: F forward, B backward, I its input part, W its weight part"
        )?;
        for rank in &self.ranks {
            let mut line = format!("rank {:>2}:", rank.rank);
            for action in &rank.actions {
                if line.len() + 1 + action.len() > WIDTH {
                    writeln!(f, "{line}")?;
                    line = " ".repeat("rank 00:".len());
                }
                line.push(' ');
                line.push_str(action);
            }
            writeln!(f, "{line}")?;
        }
        Ok(())
    }

    fn write_figures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(figures) = &self.per_rank else { return Ok(()) };
        writeln!(
            f,
            "\nrank  parameters     weights   gradients   optimizer  activations     working       total  layers"
        )?;
        for rank in figures {
            writeln!(
                f,
                "{:>4}  {:>10}  {:>10}  {:>10}  {:>10}  {:>11}  {:>10}  {:>10}  {}",
                rank.rank,
                rank.parameters,
                size(rank.weight_bytes),
                size(rank.gradient_bytes),
                size(rank.optimizer_bytes),
                size(rank.activation_bytes),
                size(rank.working_bytes),
                size(rank.device_bytes),
                rank.layers,
            )?;
        }
        let host = figures.iter().map(|rank| rank.host_bytes).max().unwrap_or_default();
        if host > 0 {
            let host = size(host);
            writeln!(
                f,
                "in the host's memory besides: at most {host} a rank, its shard of the moving average"
            )?;
        }
        Ok(())
    }
}

impl PlanReport {
    fn write_step_costs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(costs) = &self.per_step else { return Ok(()) };
        writeln!(f, "\nrank  FLOP a step  sent a step")?;
        for StepCost { rank, flops, sent_bytes } in costs {
            writeln!(f, "{rank:>4}  {:>11.3e}  {:>11}", *flops as f64, size(*sent_bytes))?;
        }
        Ok(())
    }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_layout(f)?;
        self.write_bubbles(f)?;
        self.write_figures(f)?;
        self.write_step_costs(f)?;
        self.write_messages(f)?;
        self.write_actions(f)
    }
}

fn join(stages: &[usize]) -> String {
    stages.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Bytes in the unit that leaves three digits or fewer before the point.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1000.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} GiB")
}

/// A size with its unit, powers of 1000 as Hugging Face counts them. **Units**: bytes.
///
/// **Errors**: what was expected.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "" | "B" => Some(1),
        "KB" => Some(1_000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "TB" => Some(1_000_000_000_000),
        _ => None,
    };
    let size = unit.and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit));
    let expected = || "expected a number above 0 with B, KB, MB, GB or TB, as 5GB".to_owned();
    size.filter(|&size| size > 0).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Mode, ScheduleKind};

    #[test]
    fn sizes_are_read_with_their_units_and_nothing_else() {
        assert_eq!(parse_bytes("2TB"), Ok(2_000_000_000_000));
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_bytes("500MB"), Ok(500_000_000));
        assert_eq!(parse_bytes("20000"), Ok(20_000));
        for wrong in ["", "GB", "0GB", "-1", "5GiB", "1.5GB", "99999999999999999999", "99999999999GB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_report_reads_well() {
        let (plan, note) = ScheduleKind::Dualpipe.plan(2, 4, Mode::Train).unwrap();
        let mut report = PlanReport::new(&plan, note).unwrap();
        let expected = "\
dualpipe: 2 pipeline ranks, 2 stages, 4 micro-batches

rank  stages    live activations  held until W  W queue  idle
   0  0 1                      3             3        1     0
   1  1 0                      3             3        1     0

bubble, transfers free
  F=1 B=2 I=1 W=1 F&B=3: step 12, idle at most 0 on a rank, 0.0% of all time
  F=1 B=2 I=1 W=1 F&B=2: step 11, idle at most 0 on a rank, 0.0% of all time

messages: 8
from    to  activations  gradients
   0     1            2          2
   1     0            2          2

actions as stage.micro-batch: F forward, B backward, I its input part, W its weight part
rank  0: F0.0 F1.2 F0.1 B1.2 F1.3&B0.0 B1.3 I0.1 W0.1
rank  1: F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3
";
        assert_eq!(report.to_string(), expected);
        report.per_rank = Some(vec![RankFigures {
            rank: 0,
            stages: vec![0, 1],
            layers: "2 moe".to_string(),
            parameters: 1234,
            weight_bytes: 4936,
            gradient_bytes: 4936,
            optimizer_bytes: 3 << 30,
            activation_bytes: 12,
            working_bytes: 5 << 20,
            device_bytes: 4 << 30,
            host_bytes: 7 << 20,
        }]);
        report.per_step = Some(vec![StepCost { rank: 0, flops: 12_345_678, sent_bytes: 3 << 20 }]);
        assert!(report.to_string().contains("   0      1.235e7      3.0 MiB\n"), "{report}");
        let figures = "   0        1234     4.8 KiB     4.8 KiB     3.0 GiB       12.0 B     5.0 MiB     4.0 GiB  2 moe\n";
        assert!(report.to_string().contains(figures), "{report}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["messages"].as_array().unwrap().len(), 8);
        assert_eq!(json["ranks"][0]["actions"][4], "F1.3&B0.0");
    }

    #[test]
    fn long_lists_wrap_and_faults_are_handed_on() {
        let (mut plan, note) = ScheduleKind::Dualpipe.plan(8, 20, Mode::Train).unwrap();
        let text = PlanReport::new(&plan, note).unwrap().to_string();
        assert!(text.lines().all(|line| line.len() <= WIDTH));
        assert!(text.contains("step 66, idle at most 6 on a rank"));
        plan.actions[3].pop();
        assert!(PlanReport::new(&plan, None).is_err());
    }
}
