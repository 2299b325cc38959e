//! `contraflow bench fabric`: what frames cost between real processes of this machine, next to what copying them costs.
//!
//! The command starts itself once for each rank. Ranks send frames there and back, then all to all; CPU time is that of all of
//! them together, per payload byte, in units of one copy of 64 MiB in the same run. Frames are received where they arrive and
//! are not read.

use std::fmt;
use std::time::Instant;

use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Phase, Region, Tag, Transport};
use contraflow_runtime::topology::FormationId;
use serde::{Deserialize, Serialize};

use super::cpu_seconds;
use super::processes::{self, Processes};
use crate::failure::Failure;

const WIRES: [(&str, Transport); 3] =
    [("tcp", Transport::Tcp), ("unix", Transport::Socket), ("shm", Transport::SharedMemory)];
const WORLDS: [usize; 2] = [2, 4];
/// **Units**: bytes of a frame.
const SIZES: [usize; 7] = [8, 512, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];
/// **Units**: MiB that each rank has for all of them together, itself included.
const ALL_TO_ALL: [usize; 4] = [1, 4, 16, 64];

/// Role of a child process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Part {
    rank: usize,
    world: usize,
    wire: usize,
    repeats: usize,
}

/// All measurements.
#[derive(Debug, Serialize)]
pub(super) struct FabricFigures {
    runs: Vec<WireFigures>,
}

/// Those of one transport between some processes.
#[derive(Debug, Serialize)]
struct WireFigures {
    wire: &'static str,
    processes: usize,
    rows: Vec<Row>,
}

/// What the first rank of a run prints, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Row {
    /// One copy of 64 MiB.
    CopyGibPerCpuSecond(f64),
    Frames(FrameFigures),
}

/// What frames of one size took.
#[derive(Debug, Serialize, Deserialize)]
struct FrameFigures {
    what: String,
    /// One way.
    best_us: f64,
    median_us: f64,
    gib_per_second: f64,
    /// Of all ranks together.
    cpu_us: f64,
    /// CPU time per payload byte, in copies; meaningless for small frames.
    copies: Option<f64>,
}

/// Measures everything.
///
/// **Errors**: code 1 if a process cannot be started or a rank fails.
pub(super) fn run(repeats: usize) -> Result<FabricFigures, Failure> {
    let mut runs = Vec::new();
    for processes in WORLDS {
        for (number, (wire, _)) in WIRES.into_iter().enumerate() {
            let part = |rank| Part { rank, world: processes, wire: number, repeats };
            let rows = together(&(0..processes).map(part).collect::<Vec<_>>());
            let rows = rows.map_err(|error| Failure::run(format!("{wire}: {error}")))?;
            runs.push(WireFigures { wire, processes, rows });
        }
    }
    Ok(FabricFigures { runs })
}

/// The part of one rank in it, given as JSON.
///
/// **Errors**: code 1 if the rank fails.
pub(super) fn be(part: &str) -> Result<(), Failure> {
    let part = serde_json::from_str(part).map_err(|error| Failure::run(error.to_string()))?;
    measure(&part).map_err(|error| Failure::run(error.to_string()))
}

/// Runs one process for each part: what the first one prints.
fn together(parts: &[Part]) -> Result<Vec<Row>, Box<dyn std::error::Error>> {
    let mut processes = Processes::start("fabric", parts)?;
    let mut rows = Vec::new();
    loop {
        let line = processes.line(0)?;
        if line.is_empty() {
            break;
        }
        rows.push(serde_json::from_str(&line)?);
    }
    processes.end()?;
    Ok(rows)
}

impl fmt::Display for FabricFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for WireFigures { wire, processes, rows } in &self.runs {
            writeln!(f, "{wire}, {processes} processes")?;
            rows.iter().try_for_each(|row| row.fmt(f))?;
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Row::CopyGibPerCpuSecond(rate) => {
                writeln!(f, "  one copy of 64 MiB: {rate:.2} GiB per CPU second")
            }
            Row::Frames(FrameFigures { what, best_us, median_us, gib_per_second, cpu_us, copies }) => {
                let copies = copies.map_or_else(String::new, |copies| format!(" {copies:>5.2} copies"));
                writeln!(
                    f,
                    "  {what:<24} {best_us:>9.1} us best {median_us:>9.1} us median {gib_per_second:>7.2} GiB/s \
                     {cpu_us:>9.1} us CPU{copies}"
                )
            }
        }
    }
}

/// One rank of a measurement.
struct Rank {
    end: Endpoint,
    world: usize,
    repeats: usize,
    /// Counts frames, so that each has an address of its own.
    step: u64,
    /// CPU seconds per byte of a copy.
    copy: f64,
}

/// What a repeat took.
struct Taken {
    /// Seconds of one round, of each repeat, ascending.
    seconds: Vec<f64>,
    /// CPU seconds of one round, all ranks together: the median of the repeats.
    cpu: f64,
}

fn measure(part: &Part) -> Result<(), Box<dyn std::error::Error>> {
    let network = processes::join(part.rank, WIRES[part.wire].1, None)?;
    let end = network.join(part.rank)?;
    let mut rank = Rank { end, world: part.world, repeats: part.repeats, step: 0, copy: copy_cost() };
    if part.rank == 0 {
        print_row(&Row::CopyGibPerCpuSecond(1.0 / rank.copy / (1_u64 << 30) as f64))?;
    }
    if part.world == 2 {
        rank.there_and_back()?;
    }
    rank.all_to_all()?;
    network.close();
    Ok(())
}

/// CPU seconds per byte of copying 64 MiB.
fn copy_cost() -> f64 {
    const LEN: usize = 64 << 20;
    let from = vec![1_u8; LEN];
    let mut to = vec![2_u8; LEN];
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let began = cpu_seconds();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        best = best.min(cpu_seconds() - began);
    }
    best / LEN as f64
}

impl Rank {
    fn tag(&self, source: usize) -> Tag {
        Tag {
            formation: FormationId::default(),
            phase: Phase::Train,
            step: self.step,
            kind: FrameKind::Dispatch,
            stage: 0,
            micro_batch: 0,
            layer: 0,
            hop: 0,
            source: source as u32,
        }
    }

    fn send(&self, to: usize, payload: &Region) -> Result<(), FabricError> {
        self.end.send(to, self.tag(self.end.rank()), vec![payload.clone()])
    }

    fn receive(&self, from: usize) -> Result<Vec<Region>, FabricError> {
        self.end.receive(self.tag(from))
    }

    /// All-reduce of a number over the ranks.
    fn sum(&mut self, number: f64) -> Result<f64, FabricError> {
        self.step += 1;
        let packed = |number: f64| Region::new(number.to_le_bytes().to_vec());
        let read = |parts: Vec<Region>| parts[0].bytes().try_into().map_or(f64::NAN, f64::from_le_bytes);
        if self.end.rank() > 0 {
            self.send(0, &packed(number))?;
            return Ok(read(self.receive(0)?));
        }
        let mut sum = number;
        for rank in 1..self.world {
            sum += read(self.receive(rank)?);
        }
        for rank in 1..self.world {
            self.send(rank, &packed(sum))?;
        }
        Ok(sum)
    }

    fn measure(
        &mut self,
        rounds: usize,
        mut round: impl FnMut(&mut Self) -> Result<(), FabricError>,
    ) -> Result<Taken, FabricError> {
        let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
        // Once to warm memory up.
        round(self)?;
        for _ in 0..self.repeats {
            self.sum(0.0)?;
            let (began, spent) = (Instant::now(), cpu_seconds());
            for _ in 0..rounds {
                round(self)?;
            }
            seconds.push(began.elapsed().as_secs_f64() / rounds as f64);
            let spent = cpu_seconds() - spent;
            cpu.push(self.sum(spent)? / rounds as f64);
        }
        seconds.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
        Ok(Taken { seconds, cpu: cpu[cpu.len() / 2] })
    }

    fn there_and_back(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let peer = 1 - self.end.rank();
        for size in SIZES {
            let payload = Region::new(vec![1_u8; size]);
            let rounds = if size < 1 << 20 { 500 } else { ((64 << 20) / size).clamp(2, 16) };
            let taken = self.measure(rounds, |rank| {
                rank.step += 1;
                if rank.end.rank() == 0 {
                    rank.send(peer, &payload)?;
                    rank.receive(peer).map(drop)
                } else {
                    rank.receive(peer).map(drop)?;
                    rank.send(peer, &payload)
                }
            })?;
            self.report(format!("{size:>9} B there and back"), &taken, 2 * size, 0.5, size)?;
        }
        Ok(())
    }

    fn all_to_all(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        for mib in ALL_TO_ALL {
            let share = (mib << 20) / self.world;
            let payload = Region::new(vec![1_u8; share]);
            let rounds = (64 / mib).clamp(2, 8);
            let taken = self.measure(rounds, |rank| {
                rank.step += 1;
                let others = || (0..rank.world).filter(|&other| other != rank.end.rank());
                others().try_for_each(|other| rank.send(other, &payload))?;
                others().try_for_each(|other| rank.receive(other).map(drop))
            })?;
            let sent = (self.world - 1) * share;
            self.report(format!("{mib:>2} MiB all to all"), &taken, self.world * sent, 1.0, sent)?;
        }
        Ok(())
    }

    /// `bytes` of all ranks in a round; `part` of a round is one way, which takes `one_way` bytes.
    fn report(
        &self,
        what: String,
        taken: &Taken,
        bytes: usize,
        part: f64,
        one_way: usize,
    ) -> serde_json::Result<()> {
        if self.end.rank() > 0 {
            return Ok(());
        }
        let (best, median) = (taken.seconds[0] * part, taken.seconds[taken.seconds.len() / 2] * part);
        let copies = taken.cpu / bytes as f64 / self.copy;
        print_row(&Row::Frames(FrameFigures {
            what,
            best_us: best * 1e6,
            median_us: median * 1e6,
            gib_per_second: one_way as f64 / best / (1_u64 << 30) as f64,
            cpu_us: taken.cpu * part * 1e6,
            copies: (one_way >= 64 << 10).then_some(copies),
        }))
    }
}

/// To the process that has started this one.
fn print_row(row: &Row) -> serde_json::Result<()> {
    println!("{}", serde_json::to_string(row)?);
    Ok(())
}
