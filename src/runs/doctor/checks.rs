//! The checks of a folder: program, machine, disk, clock, recipe, checkpoints, metrics, what the ranks were about. Reads; changes
//! nothing. Those of a job are in `job`.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use contraflow_kernels::isa::instruction_set;
use contraflow_runtime::checkpoint::{CheckpointError, CheckpointFolder, Manifest};
use contraflow_runtime::files;
use contraflow_runtime::flight::{Analysis, CLOCK_SKEW, RankRing, Verdict};
use contraflow_runtime::layout::MemoryLimit;
use contraflow_runtime::model_config::ModelConfig;
use contraflow_runtime::recipe::{Recipe, RecipeSource};
use contraflow_runtime::schedule::size;
use contraflow_runtime::stability::evidence::EVIDENCE_FILE;
use contraflow_workers::checkpoint::provenance::made_by;

use super::super::survey::{Disk, Record, RunState, age};
use super::{Check, latest, nanoseconds};
use crate::machine;
use crate::output::{count, quoted};
use crate::run_dir::{self, METRICS};

/// This program.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A clock before this one is wrong: no version of this program is older. **Units**: seconds since 1970.
const PROGRAM_BEGAN: u64 = 1_735_689_600;

/// With less a run cannot write what is beside its checkpoints. **Units**: bytes.
const LEAST_FREE: u64 = 64 << 20;

/// What was found out about a run or a job.
pub(super) struct Examined {
    /// In the order of the report.
    pub(super) checks: Vec<Check>,
    /// What its ranks were about.
    pub(super) analysis: Analysis,
    /// By formation, the latest first: the folder, and the rings by rank.
    pub(super) rings: Vec<(PathBuf, Vec<RankRing>)>,
}

/// What several checks need.
pub(super) struct Patient<'a> {
    /// Its folder.
    pub(super) run: &'a Path,
    pub(super) state: RunState,
    pub(super) now: SystemTime,
    pub(super) recipe: Option<Recipe>,
    /// Of the newest checkpoint, if it can be read.
    pub(super) manifest: Option<Manifest>,
    /// How to go on with it.
    pub(super) resume: String,
}

impl Examined {
    /// Of a run's folder, by this clock.
    pub(super) fn of(run: &Path, now: SystemTime) -> Examined {
        let folder = CheckpointFolder::of_run(run);
        let manifest = newest_manifest(&folder);
        let state = super::super::survey::Survey::of(run).state;
        let (recipe, of_recipe) = recipe(run, manifest.as_ref(), state);
        let in_use = (state == RunState::Training).then(|| nanoseconds(now));
        let rings = super::rings(run);
        let analysis = Analysis::of(latest(&rings), in_use);
        let resume = match manifest {
            Some(_) => {
                format!(
                    "contraflow train --resume {} goes on from its newest checkpoint",
                    quoted(run.display())
                )
            }
            None => "it has no checkpoint to go on from: begin anew, with a smaller checkpoint.every".into(),
        };
        let patient = Patient { run, state, now, recipe, manifest, resume };
        let mut checks = vec![
            patient.state(),
            patient.program(&rings),
            patient.machine(),
            patient.disk(),
            patient.clock(run_dir::last_change(run)),
            of_recipe,
            patient.checkpoints(&folder),
            patient.metrics(),
        ];
        checks.extend(patient.evidence());
        checks.push(patient.flight(&analysis));
        Examined { checks, analysis, rings }
    }
}

/// Of the newest checkpoint in a folder, if it can be read.
pub(super) fn newest_manifest(folder: &CheckpointFolder) -> Option<Manifest> {
    let newest = folder.list().unwrap_or_default().last().map(|&step| folder.committed(step));
    newest.and_then(|dir| Manifest::read(&dir).ok())
}

/// The run's recipe, with the model of its checkpoint if there is one: its `config.json` may be elsewhere by now.
fn recipe(run: &Path, manifest: Option<&Manifest>, state: RunState) -> (Option<Recipe>, Check) {
    const NAME: &str = "recipe";
    let path = run.join("recipe.toml");
    if state == RunState::Imported {
        return (None, Check::ok(NAME, "none, as the model was trained elsewhere"));
    }
    let name = path.display().to_string();
    let model = manifest.and_then(|manifest| ModelConfig::from_hf_json(&manifest.model.to_string()).ok());
    let text = match files::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => {
            let says = format!("{name}: {error}");
            return (None, Check::failed(NAME, says, "a checkpoint holds it too: contraflow train --resume"));
        }
    };
    let read = match model {
        Some(model) => Recipe::reload(&text, &name, &[], model),
        None => Recipe::load(&RecipeSource::File(path), &[]),
    };
    match read {
        Ok(recipe) => {
            let parallel = &recipe.parallel;
            let says = format!(
                "no faults; {} (pipeline {} x expert {} x data {}), {}, {}",
                count(recipe.topology().world(), "rank"),
                parallel.pipeline,
                parallel.expert,
                parallel.data,
                recipe.schedule_name(),
                count(recipe.training.steps, "step"),
            );
            (Some(recipe), Check::ok(NAME, says))
        }
        Err(faults) => {
            (None, Check::failed(NAME, faults.to_string(), "mend these keys; --set KEY=VALUE does as well"))
        }
    }
}

impl Patient<'_> {
    fn state(&self) -> Check {
        let changed = self.now.duration_since(run_dir::last_change(self.run)).unwrap_or_default();
        let says = format!("{}, last changed {} ago", self.state, age(changed.as_secs()));
        match self.state {
            RunState::Training | RunState::Done | RunState::Imported => Check::ok("run", says),
            RunState::Stopped | RunState::Failed => Check::warning("run", says, self.resume.clone()),
        }
    }

    pub(super) fn program(&self, rings: &[(PathBuf, Vec<RankRing>)]) -> Check {
        const NAME: &str = "program";
        let this = format!("contraflow {VERSION}");
        let same_bits =
            "the program that began the run goes on with the same bits; this one agrees within rounding";
        if let (Some(recipe), Some(manifest)) = (&self.recipe, &self.manifest) {
            let (now, then) = (made_by(recipe), &manifest.made_by);
            let short = |binary: &str| {
                let (version, digest) = binary.split_once(' ').unwrap_or((binary, ""));
                format!("{version} ({})", digest.chars().take(12).collect::<String>())
            };
            if now.binary != then.binary {
                let (now, then) = (short(&now.binary), short(&then.binary));
                let says = format!("contraflow {now}, the newest checkpoint is of {then}");
                return Check::warning(NAME, says, same_bits);
            }
            if now.instruction_set != then.instruction_set {
                let says = format!(
                    "{this} on {}, the newest checkpoint was written on {}",
                    now.instruction_set, then.instruction_set
                );
                return Check::warning(NAME, says, same_bits);
            }
        }
        let mut rings = rings.iter().flat_map(|(_, rings)| rings);
        let of_ring = rings.find_map(|(_, ring)| Some(ring.as_ref().ok()?.header.program.clone()));
        match of_ring.filter(|other| other != VERSION) {
            Some(other) => Check::warning(NAME, format!("{this}, the run is of {other}"), same_bits),
            None => Check::ok(NAME, format!("{this}, which is also that of the run")),
        }
    }

    pub(super) fn machine(&self) -> Check {
        const NAME: &str = "machine";
        let system = rustix::system::uname();
        let memory = MemoryLimit::of_process();
        let says = format!(
            "{}, {}; memory {}; {} {}",
            count(machine::cores(), "core"),
            instruction_set(),
            memory
                .as_ref()
                .map_or_else(|| "unknown".into(), |limit| format!("{} ({})", size(limit.bytes), limit.by)),
            system.sysname().to_string_lossy(),
            system.release().to_string_lossy(),
        );
        let too_small = self.recipe.as_ref().map(|recipe| machine::check_memory(recipe, memory, true));
        match too_small {
            Some(Ok(Some(words))) => {
                let to_do = "fewer sequences in a micro-batch, or a machine with more memory";
                Check::warning(NAME, format!("{says}\n{words}"), to_do)
            }
            _ => Check::ok(NAME, says),
        }
    }

    pub(super) fn disk(&self) -> Check {
        const NAME: &str = "disk";
        let free = match files::free_bytes(self.run) {
            Ok(free) => free,
            Err(error) => {
                let says = format!("{}: {error}", self.run.display());
                return Check::failed(NAME, says, "look at the file system of the run's folder");
            }
        };
        let next =
            self.manifest.as_ref().map(|manifest| manifest.files().map(|file| file.bytes).sum::<u64>());
        let says = format!("{} free, the run takes {}", size(free), size(Disk::of(self.run).all()));
        let to_do = "make room; contraflow runs du shows what runs take";
        match next.unwrap_or_default() {
            _ if self.state == RunState::Done || self.state == RunState::Imported => Check::ok(NAME, says),
            next if free < next.max(LEAST_FREE) => {
                Check::failed(NAME, format!("{says}: no room for another checkpoint"), to_do)
            }
            next if free < 2 * next => {
                Check::warning(NAME, format!("{says}: no room for the next two checkpoints"), to_do)
            }
            _ => Check::ok(NAME, says),
        }
    }

    /// `newest`: the latest time that another clock has given to something of it.
    pub(super) fn clock(&self, newest: SystemTime) -> Check {
        const NAME: &str = "clock";
        let to_do = "set the clock, on this machine or on that of the storage";
        let since = self.now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if since.as_secs() < PROGRAM_BEGAN {
            return Check::failed(NAME, "it shows a time before this program was written", to_do);
        }
        match newest.duration_since(self.now) {
            Ok(ahead) if ahead > CLOCK_SKEW => {
                let says = format!("the run's files are of {} later than now", age(ahead.as_secs()));
                Check::warning(NAME, says, to_do)
            }
            _ => Check::ok(NAME, "no file of the run is of a later time than now"),
        }
    }

    /// Every file against the sums in its manifest.
    pub(super) fn checkpoints(&self, folder: &CheckpointFolder) -> Check {
        const NAME: &str = "checkpoints";
        let steps = match folder.list() {
            Ok(steps) => steps,
            Err(error) => {
                let says = format!("{}: {error}", folder.path().display());
                return Check::failed(NAME, says, "look at the file system of the run's folder");
            }
        };
        let verified = |step: &u64| -> Result<(), Vec<CheckpointError>> {
            let dir = folder.committed(*step);
            let manifest = Manifest::read(&dir)?;
            let faults: Vec<_> = manifest.files().filter_map(|file| file.verify(&dir).err()).collect();
            if faults.is_empty() { Ok(()) } else { Err(faults) }
        };
        let faults: Vec<String> = steps
            .iter()
            .filter_map(|step| Some((step, verified(step).err()?)))
            .flat_map(|(step, faults)| faults.into_iter().map(move |fault| format!("step {step}: {fault}")))
            .collect();
        let of_steps = steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        match (steps.is_empty(), faults.is_empty()) {
            (true, _) if matches!(self.state, RunState::Done | RunState::Imported | RunState::Training) => {
                Check::ok(NAME, "none")
            }
            (true, _) => Check::warning(NAME, "none", self.resume.clone()),
            (false, true) => Check::ok(NAME, format!("whole, of step {of_steps}")),
            (false, false) => {
                let says = format!("damaged:\n{}", faults.join("\n"));
                Check::failed(NAME, says, "resuming takes the newest that is whole; look at the disk")
            }
        }
    }

    pub(super) fn metrics(&self) -> Check {
        const NAME: &str = "metrics";
        let path = self.run.join(METRICS);
        let text = match files::read_to_string(&path) {
            Ok(text) => text,
            Err(_) if matches!(self.state, RunState::Imported | RunState::Training) => {
                return Check::ok(NAME, "none");
            }
            Err(error) => {
                let says = format!("{}: {error}", path.display());
                return Check::warning(NAME, says, "the run may have ended before its first step");
            }
        };
        let lines: Vec<&str> = text.lines().collect();
        let records: Vec<Option<Record>> = lines.iter().map(|line| serde_json::from_str(line).ok()).collect();
        // The end of a process may cut the last line off.
        let whole = if text.ends_with('\n') { lines.len() } else { lines.len().saturating_sub(1) };
        let damaged: Vec<String> = (0..whole)
            .filter(|&index| records[index].is_none())
            .map(|index| (index + 1).to_string())
            .take(10)
            .collect();
        let last = records.iter().rev().flatten().next();
        let says = last.map_or_else(
            || "no step".into(),
            |last| {
                let steps = count(records.iter().flatten().count(), "step");
                format!("{steps}, the last is step {} with a loss of {:.4}", last.step, last.loss)
            },
        );
        if damaged.is_empty() {
            return Check::ok(NAME, says);
        }
        let says = format!("{says}; no record in line {}", damaged.join(", "));
        Check::warning(NAME, says, "these steps are missing from curves; look at the disk")
    }

    pub(super) fn evidence(&self) -> Option<Check> {
        let path = self.run.join(EVIDENCE_FILE);
        path.is_file().then(|| {
            let says = "numbers that were not finite, or a spike, have stopped the training";
            let to_do = format!(
                "{} names tensors and sequences; watch.on_nan and watch.on_spike say what is done then",
                quoted(path.display())
            );
            Check::warning("evidence", says, to_do)
        })
    }

    /// What the ranks were about when the record ended.
    pub(super) fn flight(&self, analysis: &Analysis) -> Check {
        const NAME: &str = "ranks";
        let unreadable: usize = analysis.ranks.iter().map(|state| state.unreadable).sum();
        let torn = if unreadable == 0 {
            String::new()
        } else {
            format!("; {} cannot be read", count(unreadable, "record"))
        };
        let says = format!("{analysis}{torn}");
        let is_over = matches!(self.state, RunState::Done | RunState::Imported | RunState::Training);
        match &analysis.verdict {
            Verdict::Failed(..) => Check::failed(
                NAME,
                says,
                "the message of the run has the cause; attach --archive to a report",
            ),
            _ if analysis.is_stuck() => {
                let to_do = "look at the machine of that rank; attach --archive to a report";
                Check::failed(NAME, says, to_do)
            }
            Verdict::Finished => Check::ok(NAME, says),
            _ if is_over => Check::ok(NAME, says),
            _ => Check::warning(NAME, format!("ended before they had finished: {says}"), self.resume.clone()),
        }
    }
}
