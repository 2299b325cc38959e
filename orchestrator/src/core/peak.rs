//! How fast the cores are that a formation computes on: what its MFU is measured against. Pure.

use std::collections::BTreeMap;

use super::members::Registration;

/// What is known of a host.
#[derive(Default)]
struct Host {
    ranks: usize,
    cores: usize,
    peak_flops: u64,
}

/// Measured peak of the cores that ranks on these workers, one entry a rank, keep busy with this many threads each; 0 if some
/// worker has not measured it. Workers of one host share its cores, and the best of their measurements is the host's: the
/// others had less of it to themselves.
///
/// **Units**: FLOP/s.
pub(super) fn peak_flops(of_rank: &[&Registration], threads_per_rank: usize) -> u64 {
    let mut hosts: BTreeMap<&str, Host> = BTreeMap::new();
    for registration in of_rank {
        let Some(address) =
            registration.fabric.as_ref().filter(|_| registration.cores > 0 && registration.peak_flops > 0)
        else {
            return 0;
        };
        let host = hosts.entry(&address.host).or_default();
        host.ranks += 1;
        host.cores = host.cores.max(registration.cores);
        host.peak_flops = host.peak_flops.max(registration.peak_flops);
    }
    let in_use = |host: &Host| {
        let threads = host.cores.min(host.ranks * threads_per_rank);
        u128::from(host.peak_flops) * threads as u128 / host.cores as u128
    };
    let sum: u128 = hosts.values().map(in_use).sum();
    u64::try_from(sum).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use contraflow_runtime::fabric::Address;

    use super::*;

    fn worker(host: &str, cores: usize, peak_flops: u64) -> Registration {
        let tcp = ([127, 0, 0, 1], 1).into();
        let fabric = Some(Address { host: host.into(), tcp, unix: String::new() });
        Registration { fabric, cores, peak_flops, ..Registration::default() }
    }

    #[test]
    fn cores_count_once_and_as_far_as_they_are_used() {
        let (a, busy, b) = (worker("a", 4, 400), worker("a", 4, 90), worker("b", 8, 1_600));
        assert_eq!(peak_flops(&[&a], 1), 100);
        assert_eq!(peak_flops(&[&a, &busy], 1), 200);
        assert_eq!(peak_flops(&[&a, &busy, &busy, &a, &a, &a], 1), 400);
        assert_eq!(peak_flops(&[&busy, &a, &b], 3), 400 + 600);
    }

    #[test]
    fn without_a_measurement_there_is_no_peak() {
        let (known, unknown) = (worker("a", 4, 400), Registration::default());
        for of_rank in [&[&known, &unknown][..], &[&worker("a", 0, 400)], &[&worker("a", 4, 0)]] {
            assert_eq!(peak_flops(of_rank, 1), 0);
        }
        assert_eq!(peak_flops(&[], 1), 0);
    }
}
