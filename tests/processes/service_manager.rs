//! What systemd is told, by sockets that stand in for its own.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use crate::cluster::{Cluster, DEADLINE};

/// Where a service says what it is.
struct Manager {
    socket: UnixDatagram,
    environment: Vec<(&'static str, String)>,
}

impl Manager {
    fn new(folder: &Path, name: &str) -> Manager {
        let path = folder.join(name);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let environment = vec![
            ("NOTIFY_SOCKET", path.to_str().unwrap().to_owned()),
            // So often that a socket which nobody reads is full at once.
            ("WATCHDOG_USEC", "30000".to_owned()),
        ];
        Manager { socket, environment }
    }

    fn next(&self) -> String {
        let mut buffer = [0; 64];
        let length = self.socket.recv(&mut buffer).expect("a message in time");
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    }
}

#[test]
fn services_say_that_they_are_ready_and_then_that_they_work() {
    let folder = tempfile::tempdir().unwrap();
    let [of_orchestrator, of_worker] =
        ["orchestrator", "worker"].map(|name| Manager::new(folder.path(), name));
    let mut cluster = Cluster::start_with(0, of_orchestrator.environment.clone());
    let worker = cluster.worker_with(0, &of_worker.environment);
    cluster.workers.push(Some(worker));
    assert_eq!(of_worker.next(), "READY=1");
    // It is so as a member, not before.
    assert_eq!(cluster.nodes().len(), 1);
    assert_eq!(of_orchestrator.next(), "READY=1");
    for manager in [&of_orchestrator, &of_worker] {
        for _ in 0..3 {
            assert_eq!(manager.next(), "WATCHDOG=1");
        }
    }
}
