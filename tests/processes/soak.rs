//! Many watchers, half of which never read, while jobs come and go: what the orchestrator takes does not grow with the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use contraflow_proto::v1;
use tonic::Streaming;
use v1::job_service_client::JobServiceClient;

use crate::cluster::{Cluster, ENDLESS, until};
use crate::hostile::{ALONE, plain, runtime};
use crate::places::{outcome, resources};

const WATCHERS: usize = 200;

/// A short while here, longer where the test runs alone.
fn lasts() -> Duration {
    let minutes = std::env::var("CONTRAFLOW_SOAK_MINUTES").ok();
    minutes
        .map_or(Duration::from_secs(16), |minutes| Duration::from_secs(60 * minutes.parse::<u64>().unwrap()))
}

#[test]
fn an_orchestrator_with_many_watchers_needs_no_more_after_many_jobs_than_after_a_few() {
    let mut cluster = Cluster::start(2);
    // What is known of jobs that have ended takes its place, up to 10,000 of them: here few are kept, and the rest must be gone.
    cluster.orchestrator.kill();
    cluster.start_orchestrator(&["--keep-jobs", "50"]);
    let job = cluster.submit(&[&ALONE[..], &[ENDLESS]].concat(), &[]);
    cluster.until_step(&job, 3);
    let (runtime, heard) = (runtime(), Arc::new(AtomicU64::new(0)));
    let idle: Vec<Streaming<_>> = runtime.block_on(async {
        let mut idle = Vec::new();
        for number in 0..WATCHERS {
            let mut jobs = JobServiceClient::new(plain(&cluster).await);
            let request = v1::WatchRequest { job: job.clone(), ..Default::default() };
            let mut stream = jobs.watch(request).await.unwrap().into_inner();
            if number % 2 == 0 {
                idle.push(stream);
                continue;
            }
            let heard = heard.clone();
            tokio::spawn(async move {
                while let Ok(Some(_)) = stream.message().await {
                    heard.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        idle
    });
    let short = [&ALONE[..], &["training.steps=3"]].concat();
    let (began, lasts) = (Instant::now(), lasts());
    let (mut samples, mut done) = (Vec::new(), 0);
    while began.elapsed() < lasts {
        let job = cluster.submit(&short, &[]);
        assert_eq!(outcome(&cluster, &job).0, "done");
        done += 1;
        samples.push(resources(&cluster.orchestrator));
    }
    // What is there at most in the second quarter, and in the last.
    let most = |part: usize| {
        let quarter = samples.len() / 4;
        let of =
            |index: usize| samples[part * quarter..(part + 1) * quarter].iter().map(|all| all[index]).max();
        [0, 1, 2].map(|index| of(index).unwrap())
    };
    let ([_, files, memory], [threads_after, files_after, memory_after]) = (most(1), most(3));
    eprintln!("{done} jobs, {WATCHERS} watchers: {:?}, then {:?} threads, files, KiB", most(1), most(3));
    assert!(threads_after <= 64, "threads: {threads_after}");
    assert!(files_after <= files + 4, "open files: {files}, then {files_after}");
    // HTTP/2 buffers up to 400 KiB of each stream that is not read: until they are full it grows.
    let bound = if lasts > Duration::from_secs(600) { 16 << 10 } else { WATCHERS as u64 / 2 * 400 };
    assert!(memory_after <= memory + bound, "KiB: {memory}, then {memory_after}");
    until("steps in every stream that is read", || {
        (heard.load(Ordering::Relaxed) > WATCHERS as u64).then_some(())
    });
    drop(idle);
}
