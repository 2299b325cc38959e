//! A cluster whose processes have a network namespace each, between them a switch that delays, loses and cuts. Needs root, `ip`,
//! `/dev/net/tun` and Python; says so where one of them is not there.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::cluster::{Cluster, ENDLESS, curve, until};

/// Counts those of this process.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// Hosts by number: 0 has the orchestrator and the clients, n + 1 the worker of node n.
pub struct Network {
    name: String,
    switch: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    hosts: usize,
}

impl Network {
    /// **Errors**: what it needs is not there.
    fn of(hosts: usize) -> Result<Self, String> {
        // The name of a device has 15 bytes at most.
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("cf{}x{number}x", std::process::id());
        let mut switch = Command::new("python3")
            .args([
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/processes/switch.py"),
                &name,
                &hosts.to_string(),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("python3: {error}"))?;
        let (commands, answers) = (switch.stdin.take().unwrap(), switch.stdout.take().unwrap());
        let mut network = Network { name, switch, commands, answers: BufReader::new(answers), hosts };
        if network.answer() != "ready" {
            return Err("no tap device can be made".into());
        }
        for host in 0..hosts {
            network.add(host)?;
        }
        Ok(network)
    }

    /// Moves the device of a host into a namespace of its own.
    fn add(&self, host: usize) -> Result<(), String> {
        let (space, device, address) = (self.space(host), self.space(host), format!("{}/24", address(host)));
        ip(&["netns", "add", &space])?;
        ip(&["link", "set", &device, "netns", &space])?;
        for (device, address) in [("lo", None), (&*device, Some(&address))] {
            if let Some(address) = address {
                ip(&["-n", &space, "address", "add", address, "dev", device])?;
            }
            ip(&["-n", &space, "link", "set", device, "up"])?;
        }
        Ok(())
    }

    fn space(&self, host: usize) -> String {
        format!("{}{host}", self.name)
    }

    /// A program that runs on a host.
    pub fn program(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(host), program]);
        command
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn order(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        assert_eq!(self.answer(), "ok", "{command}");
    }

    /// Cuts a host off from others: what it sends, and what is sent to it.
    fn cut(&mut self, host: usize, others: &[usize], ways: [bool; 2]) {
        for other in others.iter().filter(|other| **other != host) {
            let pairs = [(host, *other), (*other, host)];
            for ((from, to), _) in pairs.into_iter().zip(ways).filter(|(_, is_cut)| *is_cut) {
                self.order(&format!("cut {from} {to}"));
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.switch.kill());
        drop(self.switch.wait());
        // What was not made is not there.
        (0..self.hosts).for_each(|host| drop(ip(&["netns", "delete", &self.space(host)])));
    }
}

/// The address of a host.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    let words = || format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(words()) }
}

/// A cluster of five workers and a job that trains on four of them.
fn cluster() -> Option<(Cluster, String)> {
    let network = match Network::of(6) {
        Ok(network) => network,
        Err(reason) => {
            eprintln!("skipped: needs root, ip, /dev/net/tun and python3: {reason}");
            return None;
        }
    };
    let cluster = Cluster::secured_on(5, Some(network));
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 6);
    Some((cluster, job))
}

fn number(cluster: &Cluster, job: &str, field: &str) -> u64 {
    until(field, || cluster.status(job)?[field].as_u64())
}

fn some_more_steps(cluster: &Cluster, job: &str) {
    cluster.until_step(job, number(cluster, job, "step") + 6);
}

/// The curve is that of a job to which nothing happens.
fn assert_same_curve(mut cluster: Cluster, job: &str) {
    cluster.network().order("mend");
    let steps = cluster.ten_more_steps(job);
    assert_eq!(curve(&steps), curve(&cluster.undisturbed(&[ENDLESS], steps.len())));
}

#[test]
fn a_slow_network_that_loses_packets_is_nobodys_end() {
    let Some((mut cluster, job)) = cluster() else { return };
    for (fault, loss) in [("delay 50", 0), ("loss 1", 1), ("loss 10", 10)] {
        cluster.network().order(fault);
        some_more_steps(&cluster, &job);
        if loss <= 1 {
            assert_eq!(
                number(&cluster, &job, "generation"),
                1,
                "{fault}: {}",
                cluster.run(&["logs", &job]).1
            );
        }
        cluster.network().order("mend");
    }
    assert_same_curve(cluster, &job);
}

#[test]
fn a_worker_that_is_cut_off_in_one_way_or_both_is_replaced_and_comes_back() {
    let Some((mut cluster, job)) = cluster() else { return };
    let all: Vec<usize> = (0..6).collect();
    for (losses, ways) in [(1, [true, true]), (2, [true, false]), (3, [false, true])] {
        let victim = cluster.host_of(&job, 1) + 1;
        cluster.network().cut(victim, &all, ways);
        until("a lost worker", || (cluster.status(&job)?["losses"].as_u64()? >= losses).then_some(()));
        some_more_steps(&cluster, &job);
        cluster.network().order("mend");
        until("a full house", || (cluster.nodes().len() == 5).then_some(()));
    }
    assert_same_curve(cluster, &job);
}

#[test]
fn a_network_that_is_silent_for_twenty_seconds_costs_no_formation_and_no_step() {
    let Some((mut cluster, job)) = cluster() else { return };
    let workers: Vec<usize> = (1..6).collect();
    cluster.network().cut(0, &workers, [true, true]);
    // The sleep is the fault itself.
    std::thread::sleep(Duration::from_secs(20));
    cluster.network().order("mend");
    some_more_steps(&cluster, &job);
    let seen = ["generation", "losses"].map(|field| number(&cluster, &job, field));
    assert_eq!(seen, [1, 0], "{}", cluster.run(&["logs", &job]).1);
    assert_same_curve(cluster, &job);
}

#[test]
fn two_workers_that_do_not_reach_each_other_are_parted() {
    let Some((mut cluster, job)) = cluster() else { return };
    let pair = [0, 1].map(|rank| cluster.host_of(&job, rank) + 1);
    cluster.network().cut(pair[0], &pair, [true, true]);
    until("another place", || {
        let places = cluster.status(&job)?["ranks"]
            .as_array()?
            .iter()
            .map(|rank| rank["node"].to_string())
            .collect::<Vec<_>>();
        let is_used = |host: usize| places.contains(&format!("\"n{}\"", host - 1));
        (!is_used(pair[0]) || !is_used(pair[1])).then_some(())
    });
    some_more_steps(&cluster, &job);
    assert_same_curve(cluster, &job);
}

#[test]
fn a_link_that_goes_up_and_down_every_second_does_not_show_in_the_curve() {
    let Some((mut cluster, job)) = cluster() else { return };
    let (victim, all) = (cluster.host_of(&job, 2) + 1, (0..6).collect::<Vec<_>>());
    // The sleeps are the fault itself.
    for _ in 0..10 {
        cluster.network().cut(victim, &all, [true, true]);
        std::thread::sleep(Duration::from_secs(1));
        cluster.network().order("mend");
        std::thread::sleep(Duration::from_secs(1));
    }
    some_more_steps(&cluster, &job);
    assert_same_curve(cluster, &job);
}
