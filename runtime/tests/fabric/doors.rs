//! Who does not belong to a formation is refused with a message, counted, and disturbs nothing.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use contraflow_runtime::fabric::handshake::{HELLO_BYTES, Hello, connect as shake};
use contraflow_runtime::fabric::{FrameKind, Listener, Region, Transport};
use contraflow_runtime::topology::{FormationId, JobId, Rank};

use crate::lab::{
    DEADLINE, SECRET, Site, close, connect, form, formation, generation, hello, listener, noise, rest_of,
    sites, tag,
};

/// What the door says to bytes, whatever they are.
fn answer_to(site: &Site, bytes: &[u8]) -> String {
    let mut stream = connect(&site.listener.address());
    // It may be closed before all has been written.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    rest_of(&mut stream)
}

/// The formation whose doors are tried, after which its ranks still talk to one another.
fn disturbed(trial: impl FnOnce(&Site) -> u64) {
    let sites = sites(&[1, 1], Transport::Tcp);
    let ends = [sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap()];
    let talk = |step: u64| {
        ends[1].send(0, tag(step, 1, FrameKind::Combine), vec![Region::new(noise(5000, step))]).unwrap();
        assert!(ends[0].receive(tag(step, 1, FrameKind::Combine)).unwrap()[0].bytes() == noise(5000, step));
    };
    talk(1);
    let refused = trial(&sites[0]);
    assert_eq!(sites[0].listener.num_refused(), refused);
    talk(2);
    assert_eq!(ends[0].num_waiting(), 0);
    assert_eq!(close(sites), []);
}

#[test]
fn garbage() {
    disturbed(|site| {
        for bytes in [&[0; 500][..], b"GET / HTTP/1.1\r\nhost: contraflow\r\n\r\n", &noise(100_000, 3)] {
            let reply = answer_to(site, bytes);
            assert!(reply.contains("not a hello of a rank") || reply.is_empty(), "{reply}");
        }
        let name = SocketAddr::from_abstract_name(site.listener.address().unix).unwrap();
        let mut stream = UnixStream::connect_addr(&name).unwrap();
        stream.write_all(&[9; 100]).unwrap();
        assert!(rest_of(&mut stream).contains("not a hello of a rank"));
        4
    });
}

#[test]
fn a_hello_of_another_version_or_formation() {
    disturbed(|site| {
        let reply = |hello: Hello| answer_to(site, &hello.encode());
        for version in [1, 9] {
            let words = format!("expected version 3 of the fabric, got version {version}");
            assert!(reply(Hello { version, ..hello() }).contains(&words));
        }
        assert!(
            reply(Hello { formation: generation(2), ..hello() }).contains("generation 2 of job-1 has ended")
        );
        assert!(
            reply(Hello { formation: generation(4), ..hello() })
                .contains("generation 4 of job-1 has not been joined here")
        );
        let other = FormationId { job: JobId::new(8, 0), ..generation(3) };
        assert!(reply(Hello { formation: other, ..hello() }).contains("job-8 has not been joined here"));
        let shake_as = |hello: Hello| {
            let mut stream = connect(&site.listener.address());
            shake(&mut stream, &hello, &SECRET).err().unwrap().to_string()
        };
        assert!(
            shake_as(Hello { to: Rank::new(1), ..hello() })
                .ends_with("this process hosts rank 0, not rank 1")
        );
        assert!(
            shake_as(Hello { from: Rank::new(7), ..hello() })
                .ends_with("rank 7 belongs to no process of this formation")
        );
        assert!(shake_as(hello()).ends_with("rank 1 is connected already"));
        8
    });
}

/// Says hello and is asked for a proof: what was said, the question, and the connection.
fn challenged(site: &Site) -> (TcpStream, [u8; HELLO_BYTES], [u8; 65]) {
    let mut stream = connect(&site.listener.address());
    let reply = hello().encode();
    stream.write_all(&reply).unwrap();
    let mut question = [0; 65];
    stream.read_exact(&mut question).unwrap();
    (stream, reply, question)
}

#[test]
fn a_wrong_proof() {
    disturbed(|site| {
        let (mut stream, ..) = challenged(site);
        stream.write_all(&[1; 32]).unwrap();
        assert!(rest_of(&mut stream).contains("rank 1 does not know the secret of this formation"));
        // The door's own proof, sent back to it, is none.
        let (mut stream, _, question) = challenged(site);
        stream.write_all(&question[33..]).unwrap();
        assert!(rest_of(&mut stream).contains("rank 1 does not know the secret of this formation"));
        2
    });
}

#[test]
fn a_door_that_does_not_know_the_secret() {
    let mut stream = Played { replies: [&[1_u8; 65][..], &[2]].concat(), reply: Vec::new() };
    let error = shake(&mut stream, &hello(), &SECRET).err().unwrap().to_string();
    assert_eq!(error, "the other end does not know the secret of this formation");
    assert_eq!(stream.reply.len(), HELLO_BYTES, "it proved itself to a peer that had not");
}

/// A connection that says what it was given and notes what is said to it.
struct Played {
    replies: Vec<u8>,
    reply: Vec<u8>,
}

impl Read for Played {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(self.replies.len());
        buffer[..len].copy_from_slice(&self.replies[..len]);
        self.replies.drain(..len);
        Ok(len)
    }
}

impl Write for Played {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reply.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection whose writes are recorded.
struct Recorded<'a> {
    stream: &'a TcpStream,
    reply: Vec<u8>,
}

impl Read for Recorded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Recorded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reply.extend(bytes);
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_handshake_played_again() {
    let (own, other) = (listener(), listener());
    let ranks = vec![own.address(), other.address()];
    let site = form(&own, formation(ranks, &[0], Transport::Tcp));
    let stream = connect(&own.address());
    let mut recorded = Recorded { stream: &stream, reply: Vec::new() };
    shake(&mut recorded, &hello(), &SECRET).unwrap();
    let reply = recorded.reply;
    // The real one is still connected, and would be refused for that; what is played must not even get so far.
    let answer = answer_to(&site, &reply);
    assert!(answer.contains("rank 1 does not know the secret of this formation"), "{answer}");
    assert_eq!(own.num_refused(), 1);
    assert!(site.faults.try_recv().is_err());
    drop(stream);
    assert_eq!(site.faults.recv_timeout(DEADLINE).unwrap().ranks, [1]);
    other.stop();
    assert_eq!(close(vec![site]), []);
}

#[test]
fn peers_of_different_secrets_do_not_come_together() {
    let listeners = [listener(), listener()];
    let ranks = vec![listeners[0].address(), listeners[1].address()];
    let part = |rank: usize, secret: u8| {
        let formation = formation(ranks.clone(), &[rank], Transport::Socket);
        form(&listeners[rank], contraflow_runtime::fabric::Formation { secret: [secret; 32], ..formation })
    };
    let sites = vec![part(0, 1), part(1, 2)];
    let end = sites[0].network.join(0).unwrap();
    let error = end.receive(tag(1, 1, FrameKind::Combine)).err().unwrap().to_string();
    assert_eq!(error, "rank 1 is lost: the other end does not know the secret of this formation");
    assert_eq!(sites[0].faults.recv_timeout(DEADLINE).unwrap().ranks, [1]);
    assert_eq!(close(sites), []);
}

#[test]
fn a_formation_is_joined_once_and_a_newer_one_lets_no_old_peer_in() {
    let own = listener();
    let other = listener();
    let ranks = vec![own.address(), other.address()];
    let old = form(&own, formation(ranks.clone(), &[0], Transport::Tcp));
    let again = contraflow_runtime::fabric::WiredNetwork::form(
        &own,
        formation(ranks.clone(), &[0], Transport::Tcp),
        std::sync::Arc::new(|_| {}),
    );
    let error = again.err().unwrap().to_string();
    assert_eq!(error, "generation 3 of job-1 has been joined already");
    old.network.close();
    let new =
        contraflow_runtime::fabric::Formation { id: generation(4), ..formation(ranks, &[0], Transport::Tcp) };
    let new = form(&own, new);
    let mut stream = connect(&own.address());
    let error = shake(&mut stream, &hello(), &SECRET).err().unwrap().to_string();
    assert!(error.ends_with("generation 3 of job-1 has ended, the newest here is 4"), "{error}");
    let mut stream = connect(&own.address());
    shake(&mut stream, &Hello { formation: generation(4), ..hello() }, &SECRET).unwrap();
    drop(stream);
    assert_eq!(new.faults.recv_timeout(DEADLINE).unwrap().ranks, [1]);
    other.stop();
    assert_eq!(close(vec![new]), []);
}

#[test]
fn a_crowd_at_the_port_keeps_nobody_from_a_formation() {
    let wait = DEADLINE;
    let listeners = [(); 2].map(|()| Listener::bind("127.0.0.1:0".parse().unwrap(), wait).unwrap());
    let ranks = vec![listeners[0].address(), listeners[1].address()];
    let other = FormationId::new(JobId::new(8, 0), generation(3).generation);
    let hello = Hello { formation: other, ..hello() }.encode();
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limits.maximum, ..limits };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    // Nothing, half a hello, and whole ones for a formation that does not exist: many times what is let in.
    let mut crowd: Vec<TcpStream> = Vec::new();
    for number in 0..1500 {
        let mut stream = connect(&listeners[0].address());
        let said = [0, HELLO_BYTES / 2, HELLO_BYTES][number % 3];
        drop(stream.write_all(&hello[..said]));
        crowd.push(stream);
    }
    let began = Instant::now();
    let part = |rank: usize| form(&listeners[rank], formation(ranks.clone(), &[rank], Transport::Tcp));
    let sites = vec![part(0), part(1)];
    let ends = [sites[0].network.join(0).unwrap(), sites[1].network.join(1).unwrap()];
    ends[1].send(0, tag(1, 1, FrameKind::Combine), vec![Region::new(noise(5000, 1))]).unwrap();
    assert!(ends[0].receive(tag(1, 1, FrameKind::Combine)).unwrap()[0].bytes() == noise(5000, 1));
    assert_eq!(close(sites), []);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 700, "{threads} threads for {} connections", crowd.len());
}
