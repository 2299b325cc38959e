//! Who belongs to a formation and where: what a process has to know before it can join one.

use std::collections::HashMap;
use std::time::Duration;

use super::FabricError;
use super::delays::DelayInjection;
use super::links::Links;
use super::stream::Address;
use crate::topology::FormationId;

/// What carries the frames between two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory within a host, TCP to another.
    Auto,
    /// A Unix socket within a host, TCP to another.
    Socket,
    /// TCP everywhere.
    Tcp,
    /// Shared memory; all ranks have to be on one host.
    SharedMemory,
}

/// A job's ranks and where they are, until one of them is lost.
pub struct Formation {
    /// By what its processes name it to one another.
    pub id: FormationId,
    /// Shared secret of the processes of this formation.
    pub secret: [u8; 32],
    /// Where each rank is, by rank.
    pub ranks: Vec<Address>,
    /// The ranks of this process.
    pub local: Vec<usize>,
    /// How long a wait, a write, or a silence may last.
    pub timeout: Duration,
    /// What carries the frames.
    pub transport: Transport,
    /// Delays of frames from other processes, for measurements. A peer that leaves takes along what is still held back.
    pub delay_injection: Option<DelayInjection>,
    /// How fast frames from other processes travel, for measurements: as if all of them came by these links. What is on their way to
    /// other processes is not known here and takes no port.
    pub links: Option<Links>,
}

/// A peer is lost: reported once per process, however its links end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerLost {
    /// The ranks of the process.
    pub ranks: Vec<usize>,
    /// What was seen.
    pub reason: String,
}

/// A process of the formation.
pub(super) struct Site {
    pub(super) address: Address,
    /// Ascending.
    pub(super) ranks: Vec<usize>,
}

impl Formation {
    /// The processes in the order of their lowest ranks, and the process of each rank.
    ///
    /// **Errors**: [`FabricError::Formation`] if this is no formation, or not one that this process can join.
    pub(super) fn sites(&self) -> Result<(Vec<Site>, Vec<usize>), FabricError> {
        let refuse = |message: String| Err(FabricError::Formation { message });
        let (world, local) = (self.ranks.len(), &self.local);
        if u32::try_from(world).is_err() {
            return refuse(format!("expected at most {} ranks, got {world}", u32::MAX));
        }
        if local.is_empty() || local.iter().any(|&rank| rank >= world) {
            return refuse(format!("expected ranks below {world} in this process, got {local:?}"));
        }
        let (sites, site_of) = sites_of(&self.ranks);
        let Site { address, ranks } = &sites[site_of[local[0]]];
        if ranks != local {
            return refuse(format!("ranks {ranks:?} have the address of this process, expected {local:?}"));
        }
        let far = sites.iter().find(|site| site.address.host != address.host);
        match far {
            Some(far) if self.transport == Transport::SharedMemory => {
                refuse(format!("rank {} is on another host and cannot share memory", far.ranks[0]))
            }
            _ => Ok((sites, site_of)),
        }
    }
}

fn sites_of(ranks: &[Address]) -> (Vec<Site>, Vec<usize>) {
    let mut sites: Vec<Site> = Vec::new();
    let mut numbers: HashMap<&Address, usize> = HashMap::new();
    let mut site_of = Vec::with_capacity(ranks.len());
    for (rank, address) in ranks.iter().enumerate() {
        let number = *numbers.entry(address).or_insert_with(|| {
            sites.push(Site { address: address.clone(), ranks: Vec::new() });
            sites.len() - 1
        });
        sites[number].ranks.push(rank);
        site_of.push(number);
    }
    (sites, site_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u16, host: &str) -> Address {
        Address { host: host.into(), tcp: ([127, 0, 0, 1], number).into(), unix: format!("test-{number}") }
    }

    #[test]
    fn what_cannot_be_joined_is_refused_with_a_message() {
        let ranks = vec![address(1, "a"), address(2, "b"), address(1, "a")];
        let refusal = |local: &[usize], transport| {
            let (ranks, local, timeout) = (ranks.clone(), local.to_vec(), Duration::from_secs(1));
            let (id, secret, delay_injection) = (FormationId::default(), [0; 32], None);
            let formation =
                Formation { id, secret, ranks, local, timeout, transport, delay_injection, links: None };
            formation.sites().err().map(|error| error.to_string())
        };
        assert_eq!(refusal(&[0, 2], Transport::Auto), None);
        assert_eq!(refusal(&[1], Transport::Tcp), None);
        let cases = [
            (refusal(&[], Transport::Auto), "expected ranks below 3 in this process, got []"),
            (refusal(&[3], Transport::Auto), "expected ranks below 3 in this process, got [3]"),
            (refusal(&[0], Transport::Auto), "ranks [0, 2] have the address of this process, expected [0]"),
            (refusal(&[1], Transport::SharedMemory), "rank 0 is on another host and cannot share memory"),
        ];
        for (got, expected) in cases {
            assert_eq!(got.as_deref(), Some(expected));
        }
    }
}
