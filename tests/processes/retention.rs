//! Retention: nothing remains of removed jobs, not even after a restart, and no other job is affected.

use crate::cluster::Cluster;

fn jobs(cluster: &Cluster) -> Vec<String> {
    let (code, out, stderr) = cluster.run(&["jobs", "--format", "json"]);
    assert_eq!(code, 0, "{stderr}");
    let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
    let listed = listed["jobs"].as_array().unwrap().iter();
    listed.map(|job| job["job"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_first_jobs_to_end_are_forgotten_for_good() {
    let mut cluster = Cluster::start(0);
    for number in 1..=4 {
        assert_eq!(cluster.submit(&[], &["--key", &format!("key {number}")]), format!("job-{number}"));
    }
    for job in ["job-2", "job-1", "job-3"] {
        assert_eq!(cluster.run(&["cancel", job]).0, 0);
    }
    assert_eq!(jobs(&cluster), ["job-4", "job-3", "job-2", "job-1"]);
    for options in [&["--keep-jobs", "1"][..], &[]] {
        cluster.orchestrator.kill();
        cluster.start_orchestrator(options);
        assert_eq!(jobs(&cluster), ["job-4", "job-3"]);
        for command in ["status", "watch", "logs", "cancel"] {
            let (code, out, stderr) = cluster.run(&[command, "job-1"]);
            assert_eq!((code, out.as_str()), (2, ""), "{stderr}");
            assert!(stderr.contains("job-1 has ended and is no longer retained"), "{stderr}");
        }
        assert!(cluster.run(&["logs", "job-3"]).1.contains("cancelled"));
    }
    assert_eq!(cluster.submit(&[], &["--key", "key 4"]), "job-4", "still known");
    assert_eq!(cluster.submit(&[], &["--key", "key 1"]), "job-5", "another job, with a number of its own");
}
