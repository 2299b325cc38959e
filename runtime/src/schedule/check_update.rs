//! The part of `check` that looks at the update of a training step: is every bucket reduced once after its last weight
//! gradient, updated once after the verdict, gathered once after that and before it is read again, and does every pair of
//! ranks come to their collectives in one order.

use std::collections::HashMap;

use super::action::Plan;
use super::bucket::Bucket;
use super::check::{PlanFault, PlanFaults, Report, check, unit_cost};
use super::check_programs::{deadlock_faults, op_faults};
use super::deadlock::list_ranks;
use super::program::{Lane, OpId, Program, Work};
use super::update::{StepPrograms, differentiates, uses};
use super::walk::walk;

/// Checks a plan and the programs of a whole training step made of it.
///
/// # Errors
/// All faults: those of [`check()`] in the first half; a bucket that is reduced too early, too late or never; members of a
/// collective that do not agree on who takes part or on the order; a deadlock in any of the programs.
pub fn check_step(plan: &Plan, step: &StepPrograms) -> Result<Report, Vec<PlanFault>> {
    let mut faults = PlanFaults::default();
    let checked = check(plan, &step.gradients);
    let report = checked.map_err(|found| faults.0 = found).ok();
    if step.overlap {
        faults.0.extend(check(plan, &step.gathering).err().unwrap_or_default());
    }
    for programs in [&step.evidence, &step.update, &step.skip, &step.gather] {
        if programs.len() != plan.ranks() {
            let (expected, got) = (plan.ranks(), programs.len());
            faults.add(None, None, format!("expected {expected} programs, one per rank, got {got}"));
        }
        for (rank, program) in programs.iter().enumerate() {
            op_faults(rank, program, &mut faults);
        }
        if let Err(deadlock) = walk(programs, unit_cost) {
            deadlock_faults(&deadlock, programs, &mut faults);
        }
    }
    if faults.0.is_empty() {
        whole_faults(&step.alone(), false, &mut faults);
        if step.overlap {
            whole_faults(&step.whole(), true, &mut faults);
        }
    }
    report.filter(|_| faults.0.is_empty()).ok_or(faults.0)
}

/// Whether a step does all that it should, with its ranks in agreement. Where it is `behind` another one it begins with the
/// gathering of that one's update, and leaves its own to the next.
fn whole_faults(programs: &[Program], behind: bool, faults: &mut PlanFaults) {
    for (rank, program) in programs.iter().enumerate() {
        bucket_faults(rank, program, behind, faults);
    }
    membership_faults(programs, faults);
    order_faults(programs, faults);
    replica_faults(programs, faults);
}

/// The operations on a bucket's gradients, in order; a bucket that one rank holds alone needs no other rank.
fn reduction(&Bucket { number: bucket, copies, .. }: &Bucket) -> Vec<Work> {
    let alone = [Work::GradNorm { bucket }, Work::Totals, Work::Apply { bucket }];
    match copies {
        0 | 1 => Vec::from(alone),
        _ => [Work::Pack { bucket }, Work::Reduce { bucket }].into_iter().chain(alone).collect(),
    }
}

/// The operations on a bucket's updated weights, in order.
fn gathering(&Bucket { number: bucket, copies, .. }: &Bucket) -> Vec<Work> {
    match copies {
        0 | 1 => Vec::new(),
        _ => vec![Work::Gather { bucket }, Work::Unpack { bucket }],
    }
}

/// Whether every bucket of a rank is reduced after its last gradient, updated after that, gathered after its update, and read
/// only when it is gathered.
fn bucket_faults(rank: usize, program: &Program, behind: bool, faults: &mut PlanFaults) {
    let places: HashMap<Work, OpId> = program.ops.iter().enumerate().map(|(id, op)| (op.work, id)).collect();
    let order = Order::of(program);
    let mut chain = |first: Option<OpId>, works: Vec<Work>, last: Option<OpId>| {
        let mut before = first;
        let places = works.into_iter().map(|work| (work, places.get(&work).copied()));
        for (work, place) in places.chain(last.map(|id| (program.ops[id].work, Some(id)))) {
            let Some(id) = place else {
                faults.add(Some(rank), None, format!("the program has no {work}"));
                continue;
            };
            if let Some(before) = before.filter(|&before| !order.is_before(before, id)) {
                let earlier = program.ops[before].work;
                faults.of(rank, &program.ops[id], format!("{work} does not wait for {earlier}"));
            }
            before = Some(id);
        }
    };
    for bucket in &program.buckets {
        let last_gradient = program.ops.iter().rposition(|op| differentiates(&op.work, bucket));
        let first_read = program.ops.iter().position(|op| uses(&op.work, bucket));
        match behind {
            false => {
                chain(last_gradient, [reduction(bucket), gathering(bucket)].concat(), None);
            }
            true => {
                chain(last_gradient, reduction(bucket), None);
                chain(None, gathering(bucket), first_read);
            }
        }
    }
    if !places.contains_key(&Work::Totals) {
        faults.add(Some(rank), None, format!("the program has no {}", Work::Totals));
    }
    let mut before = program.ops.iter().rposition(|op| matches!(op.work, Work::Apply { .. }));
    for work in [Work::Balance, Work::Snapshot] {
        let place = places.get(&work).copied();
        if !place.is_some_and(|id| before.is_none_or(|before| order.is_before(before, id))) {
            faults.add(Some(rank), None, format!("the program has no {work} where all is updated"));
        }
        before = place.or(before);
    }
}

/// Whether all ranks wait for their replicas before the totals say so, or none does.
fn replica_faults(programs: &[Program], faults: &mut PlanFaults) {
    let place = |program: &Program, work| program.ops.iter().position(|op| op.work == work);
    let waits = |program: &Program| {
        let (replica, totals) = (place(program, Work::AwaitReplica), place(program, Work::Totals));
        replica.is_some() && replica < totals
    };
    if programs.iter().any(|program| place(program, Work::AwaitReplica).is_some()) {
        for (rank, _) in programs.iter().enumerate().filter(|(_, program)| !waits(program)) {
            let text = format!("{} does not wait for {}", Work::Totals, Work::AwaitReplica);
            faults.add(Some(rank), None, text);
        }
    }
}

/// Which operations of a program end before which others start.
struct Order<'a> {
    program: &'a Program,
    /// The operation before each on its lane.
    previous: Vec<Option<OpId>>,
}

impl Order<'_> {
    fn of(program: &Program) -> Order<'_> {
        let mut tails: HashMap<Lane, OpId> = HashMap::new();
        let previous = program.ops.iter().enumerate().map(|(id, op)| tails.insert(op.lane, id)).collect();
        Order { program, previous }
    }

    /// Whether `earlier` has ended whenever `later` starts.
    fn is_before(&self, earlier: OpId, later: OpId) -> bool {
        let lane = self.program.ops[earlier].lane;
        let mut seen = vec![false; self.program.ops.len()];
        let mut open = vec![later];
        while let Some(id) = open.pop() {
            for before in self.program.ops[id].after.iter().copied().chain(self.previous[id]) {
                if before >= earlier && self.program.ops[before].lane == lane {
                    return true;
                }
                // Nothing waits for later operations.
                if before > earlier && !std::mem::replace(&mut seen[before], true) {
                    open.push(before);
                }
            }
        }
        false
    }
}

/// Whether the programs agree on who holds which bucket, and name no other.
fn membership_faults(programs: &[Program], faults: &mut PlanFaults) {
    let mut known: HashMap<usize, (usize, &Bucket)> = HashMap::new();
    for (rank, program) in programs.iter().enumerate() {
        for bucket in &program.buckets {
            let (first, other) = *known.entry(bucket.number).or_insert((rank, bucket));
            let number = bucket.number;
            if other != bucket {
                let both = list_ranks(&[first, rank]);
                faults.add(Some(rank), None, format!("{both} do not agree on who holds bucket {number}"));
            }
            if !bucket.positions.contains(&rank) {
                let text = format!("the rank has bucket {number}, which it does not hold");
                faults.add(Some(rank), None, text);
            }
        }
        for op in &program.ops {
            if let Some(number) = op.work.bucket()
                && program.buckets.iter().all(|bucket| bucket.number != number)
            {
                faults.of(rank, op, format!("{}: the rank does not hold that bucket", op.work));
            }
        }
    }
}

/// The collectives of one rank in which another takes part, in order.
fn shared_with(program: &Program, other: usize) -> impl Iterator<Item = Work> {
    let takes_part = move |work: &Work| match work.bucket() {
        None => true,
        Some(number) => {
            let bucket = program.buckets.iter().find(|bucket| bucket.number == number);
            bucket.is_some_and(|bucket| bucket.positions.contains(&other))
        }
    };
    let works = program.ops.iter().map(|op| op.work);
    works.filter(Work::is_collective).filter(takes_part)
}

/// Whether every pair of ranks comes to the collectives that they share in one order.
fn order_faults(programs: &[Program], faults: &mut PlanFaults) {
    for (one, program) in programs.iter().enumerate() {
        for (other, its) in programs.iter().enumerate().skip(one + 1) {
            let both = shared_with(program, other).zip(shared_with(its, one));
            if let Some((own, theirs)) = both.into_iter().find(|(own, theirs)| own != theirs) {
                let text = format!("{own} comes where rank {other} comes to {theirs}");
                faults.add(Some(one), None, text);
            }
        }
    }
}
