//! Streams that a client follows while the orchestrator is away.

use std::process::Command;

use crate::cluster::{Cluster, ENDLESS, until};
use crate::deadline;

#[test]
fn followed_logs_go_on_over_a_restart_of_the_orchestrator_with_every_line_once() {
    let mut cluster = Cluster::start(4);
    let job = cluster.submit(&[ENDLESS], &[]);
    cluster.until_step(&job, 3);
    let path = cluster.path().join("followed.txt");
    let followed = || std::fs::read_to_string(&path).unwrap_or_default();
    let follow = "exec \"$0\" logs \"$1\" --follow >followed.txt";
    let mut follow = deadline::spawn(
        Command::new("sh")
            .args(["-c", follow, env!("CARGO_BIN_EXE_contraflow"), &job])
            .current_dir(cluster.path())
            .env("CONTRAFLOW_ORCHESTRATOR", &cluster.address),
    );
    until("the first lines", || followed().contains("4 ranks formed").then_some(()));
    cluster.orchestrator.kill();
    let killed = followed();
    cluster.start_orchestrator(&[]);
    cluster.until_step(&job, 10);
    assert!(follow.try_wait().unwrap().is_none(), "it waits");
    assert_eq!(cluster.run(&["cancel", &job]).0, 0);
    let ended = until("the end of the followed logs", || follow.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
    let (whole, followed) = (cluster.run(&["logs", &job]).1, followed());
    // What ranks say after the end is not waited for.
    assert!(whole.starts_with(&followed) && followed.len() > killed.len(), "{followed}\n--- of ---\n{whole}");
    assert!(followed.contains("cancelled by the user"), "{followed}");
}
