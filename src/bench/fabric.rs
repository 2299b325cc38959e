//! `contraflow bench fabric`: what frames cost between real processes of this machine, next to what copying them costs.
//!
//! The command starts itself once for each rank. Ranks send frames there and back, then all to all; CPU time is that of all of
//! them together, per payload byte, in units of one copy of 64 MiB in the same run. Frames are received where they arrive and
//! are not read.

use std::time::Instant;

use contraflow_runtime::fabric::{Endpoint, FabricError, FrameKind, Phase, Region, Tag, Transport};
use contraflow_runtime::topology::FormationId;

use super::cpu_seconds;
use super::processes::{self, Processes};
use crate::failure::Failure;
use crate::output::print;

const WIRES: [(&str, Transport); 3] =
    [("tcp", Transport::Tcp), ("unix", Transport::Socket), ("shm", Transport::SharedMemory)];
const WORLDS: [usize; 2] = [2, 4];
/// **Units**: bytes of a frame.
const SIZES: [usize; 7] = [8, 512, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];
/// **Units**: MiB that each rank has for all of them together, itself included.
const ALL_TO_ALL: [usize; 4] = [1, 4, 16, 64];

/// Role of a child process.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Part {
    rank: usize,
    world: usize,
    wire: usize,
    repeats: usize,
}

/// Runs the command, or the part of one rank in it; figures go to stdout.
///
/// **Errors**: code 1 if a process cannot be started or a rank fails.
pub fn run(repeats: usize, part: Option<&str>) -> Result<(), Failure> {
    if let Some(part) = part {
        let part = serde_json::from_str(part).map_err(|error| Failure::run(error.to_string()))?;
        return be(&part).map_err(|error| Failure::run(error.to_string()));
    }
    for world in WORLDS {
        for (wire, (name, _)) in WIRES.iter().enumerate() {
            print(&format!("{name}, {world} processes\n"))?;
            let part = |rank| Part { rank, world, wire, repeats };
            together(&(0..world).map(part).collect::<Vec<_>>())
                .map_err(|error| Failure::run(format!("{name}: {error}")))?;
        }
    }
    Ok(())
}

/// Runs one process for each part; the first one's lines go to stdout.
fn together(parts: &[Part]) -> Result<(), Box<dyn std::error::Error>> {
    let mut processes = Processes::start("fabric", parts)?;
    loop {
        let line = processes.line(0)?;
        if line.is_empty() {
            break;
        }
        print(&line).map_err(|_| "stdout is closed")?;
    }
    processes.end()
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

fn be(part: &Part) -> Result<(), Box<dyn std::error::Error>> {
    let network = processes::join(part.rank, WIRES[part.wire].1, None)?;
    let end = network.join(part.rank)?;
    let mut rank = Rank { end, world: part.world, repeats: part.repeats, step: 0, copy: copy_cost() };
    if part.rank == 0 {
        println!("  one copy of 64 MiB: {:.2} GiB per CPU second", 1.0 / rank.copy / (1_u64 << 30) as f64);
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

    fn there_and_back(&mut self) -> Result<(), FabricError> {
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
            self.print_row(&format!("{size:>9} B there and back"), &taken, 2 * size, 0.5, size);
        }
        Ok(())
    }

    fn all_to_all(&mut self) -> Result<(), FabricError> {
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
            self.print_row(&format!("{mib:>2} MiB all to all"), &taken, self.world * sent, 1.0, sent);
        }
        Ok(())
    }

    /// `bytes` of all ranks in a round; `part` of a round is one way, which takes `one_way` bytes.
    fn print_row(&self, what: &str, taken: &Taken, bytes: usize, part: f64, one_way: usize) {
        if self.end.rank() > 0 {
            return;
        }
        let (best, median) = (taken.seconds[0] * part, taken.seconds[taken.seconds.len() / 2] * part);
        let copies = taken.cpu / bytes as f64 / self.copy;
        let rate = one_way as f64 / best / (1_u64 << 30) as f64;
        println!(
            "  {what:<24} {:>9.1} us best {:>9.1} us median {rate:>7.2} GiB/s {:>9.1} us CPU {}",
            best * 1e6,
            median * 1e6,
            taken.cpu * part * 1e6,
            if one_way < 64 << 10 { String::new() } else { format!("{copies:>5.2} copies") },
        );
    }
}
