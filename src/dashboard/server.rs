//! The thread that serves: connections, their bounds, and the end. Knows no page.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use contraflow_orchestrator::server::Front;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio_io_timeout::TimeoutStream;

use super::guard::Token;
use super::routes::{Served, router};
use super::subject::Subject;
use crate::failure::Failure;

/// Connections at once; more wait to be taken in.
const MAX_CONNECTIONS: usize = 256;

/// How long a connection may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(10);

/// How long an answer waits for a viewer that takes nothing of it.
const UNREAD: Duration = Duration::from_secs(10);

/// Pause after the system could not give a connection, for want of files for instance.
const PAUSE: Duration = Duration::from_millis(100);

/// The port that is tried first where none is named: an address one can keep open.
const PORT: u16 = 7080;

/// Where a dashboard listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// On loopback: port 7080, or any other one if that is taken.
    #[default]
    Anywhere,
    /// Nowhere.
    Off,
    /// There and nowhere else; port 0 is any.
    At(SocketAddr),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Listen::Off);
        }
        let place = text
            .strip_prefix("localhost:")
            .map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
        place
            .parse()
            .map(Listen::At)
            .map_err(|_| "expected off or HOST:PORT, the host as an IP address".to_owned())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Anywhere => write!(f, "127.0.0.1:{PORT}"),
            Listen::Off => f.write_str("off"),
            Listen::At(address) => address.fmt(f),
        }
    }
}

impl Listen {
    /// Whether others than this machine can reach it.
    pub fn is_open(self) -> bool {
        matches!(self, Listen::At(address) if !address.ip().is_loopback())
    }

    fn bind(self) -> std::io::Result<Option<std::net::TcpListener>> {
        let listener = match self {
            Listen::Off => return Ok(None),
            Listen::At(address) => std::net::TcpListener::bind(address)?,
            Listen::Anywhere => {
                let on = |port| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
                on(PORT).or_else(|_| on(0))?
            }
        };
        listener.set_nonblocking(true)?;
        Ok(Some(listener))
    }
}

/// What the command line says of a dashboard.
#[derive(clap::Args, Clone, Debug)]
pub struct DoorArgs {
    /// Where the dashboard is served: an address of this machine, or off [default: 127.0.0.1:7080, or any port if that is taken]
    #[arg(id = "dashboard", long, value_name = "off|HOST:PORT")]
    pub listen: Option<Listen>,
    /// What viewers have to know; needed where others than this machine can reach the dashboard
    #[arg(
        id = "dashboard-token",
        long,
        value_name = "TOKEN",
        env = "CONTRAFLOW_DASHBOARD_TOKEN",
        hide_env_values = true
    )]
    pub token: Option<String>,
}

/// A port that is had and not yet served: it is asked for before anything is begun.
pub struct Door {
    listener: std::net::TcpListener,
    address: SocketAddr,
    token: Option<Token>,
}

impl Door {
    /// Of a cluster, which has tokens of its own where it `is_secured`; None where the dashboard is off.
    ///
    /// **Errors**: code 2; the address cannot be had; it is one that others can reach, and the cluster has no certificates.
    pub fn open_cluster(args: &DoorArgs, is_secured: bool) -> Result<Option<Self>, Failure> {
        let listen = args.listen.unwrap_or_default();
        if args.token.as_ref().is_some_and(|token| !token.is_empty()) {
            return Err(Failure::input(
                "--dashboard-token: expected none, viewers of a cluster use tokens of certs issue",
            ));
        }
        if listen.is_open() && !is_secured {
            return Err(Failure::input(format!(
                "--dashboard {listen}: expected --tls DIR for an address that others than this machine can reach, got none"
            )));
        }
        Door::bind(listen, None)
    }

    /// None where the dashboard is off.
    ///
    /// **Errors**: code 2; the address cannot be had; it is one that others can reach, and there is no token.
    pub fn open(args: &DoorArgs) -> Result<Option<Self>, Failure> {
        let listen = args.listen.unwrap_or_default();
        let token = args.token.as_deref().filter(|token| !token.is_empty()).map(Token::new).transpose();
        let token = token.map_err(|why| Failure::input(format!("--dashboard-token: {why}, got others")))?;
        if listen.is_open() && token.is_none() {
            return Err(Failure::input(format!(
                "--dashboard {listen}: expected --dashboard-token or CONTRAFLOW_DASHBOARD_TOKEN for an address that others than \
                 this machine can reach, got none"
            )));
        }
        Door::bind(listen, token)
    }

    fn bind(listen: Listen, token: Option<Token>) -> Result<Option<Self>, Failure> {
        let failed = |error: std::io::Error| Failure::input(format!("--dashboard {listen}: {error}"));
        let Some(listener) = listen.bind().map_err(failed)? else { return Ok(None) };
        let address = listener.local_addr().map_err(failed)?;
        Ok(Some(Door { listener, address, token }))
    }

    /// Serves runs on a thread of its own.
    ///
    /// **Errors**: code 1; the system gives no thread.
    pub fn serve(self, subject: Arc<Subject>) -> Result<Dashboard, Failure> {
        let Door { listener, address, token } = self;
        let failed = |error: std::io::Error| Failure::run(format!("dashboard: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let served = Served::new(address, token, subject);
        let thread = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, router(served), None) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("dashboard".into()).spawn(thread).map_err(failed)?;
        Ok(Dashboard { address, _stop: stop })
    }
}

impl Door {
    /// Serves the jobs of a cluster on the runtime of its orchestrator. Its connections are the cluster's: by its certificates, if it has
    /// some.
    pub async fn serve_cluster(self, subject: Arc<Subject>, front: Front) {
        let served = Served::new(self.address, self.token, subject);
        serve(self.listener, router(served), Some(front)).await;
    }

    /// What to type into a browser on this machine; `is_secured` says whether through TLS.
    pub fn url(&self, is_secured: bool) -> String {
        url(self.address, is_secured)
    }
}

fn url(address: SocketAddr, is_secured: bool) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    let scheme = if is_secured { "https" } else { "http" };
    format!("{scheme}://{}/", SocketAddr::new(host, address.port()))
}

/// A dashboard that is served until it is dropped.
pub struct Dashboard {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Dashboard {
    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What to type into a browser on this machine.
    pub fn url(&self) -> String {
        url(self.address, false)
    }
}

async fn serve(listener: std::net::TcpListener, router: Router, front: Option<Front>) {
    // It was made not to block.
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((tcp, address)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (router, front) = (router.clone(), front.clone());
        tokio::spawn(async move {
            let _place = place;
            match front {
                None => connected(tcp, router, UNREAD).await,
                // Whoever is refused was told so, or logged.
                Some(front) => {
                    if let Ok((io, visitor)) = front.admit(tcp, address).await {
                        connected(io, router.layer(Extension(visitor)), UNREAD).await;
                    }
                }
            }
        });
    }
}

/// Serves a connection to its end, which also comes where its viewer takes nothing of an answer for so long.
async fn connected(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    unread: Duration,
) {
    let mut io = TimeoutStream::new(io);
    io.set_write_timeout(Some(unread));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(Box::pin(io)), TowerToHyperService::new(router));
    // A viewer that breaks off is none any more.
    drop(connection.await);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn whoever_takes_nothing_of_an_answer_is_let_go() {
        let address: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let router = router(Served::new(address, None, Subject::of_runs(Vec::new())));
        let request =
            b"GET /assets/uplot/uPlot.esm.js HTTP/1.1\r\nhost: 127.0.0.1:80\r\nconnection: close\r\n\r\n";
        let (mut reads, served) = tokio::io::duplex(1 << 10);
        let reading = tokio::spawn(connected(served, router.clone(), Duration::from_secs(10)));
        reads.write_all(request).await.unwrap();
        let mut whole = Vec::new();
        reads.read_to_end(&mut whole).await.unwrap();
        reading.await.unwrap();
        let (mut stands, served) = tokio::io::duplex(1 << 10);
        let standing = tokio::spawn(connected(served, router, Duration::from_millis(20)));
        stands.write_all(request).await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), standing).await.unwrap().unwrap();
        let mut part = Vec::new();
        stands.read_to_end(&mut part).await.unwrap();
        assert!(part.len() < 1 << 12 && whole.starts_with(&part), "{} of {}", part.len(), whole.len());
    }

    #[test]
    fn a_place_is_read_and_one_that_others_reach_needs_a_token() {
        let place = |text: &str| text.parse::<Listen>();
        assert_eq!(place("off"), Ok(Listen::Off));
        assert_eq!(place("localhost:0"), Ok(Listen::At("127.0.0.1:0".parse().unwrap())));
        assert!(!place("[::1]:80").unwrap().is_open() && place("0.0.0.0:80").unwrap().is_open());
        assert!(place("7080").is_err() && place("somewhere").is_err());
        let door = |listen: &str, token: Option<&str>| {
            Door::open(&DoorArgs { listen: Some(place(listen).unwrap()), token: token.map(str::to_owned) })
        };
        let refused = door("0.0.0.0:0", None).err().unwrap();
        assert!(refused.code == 2 && refused.message.contains("expected --dashboard-token"), "{refused}");
        assert!(door("0.0.0.0:0", Some("short")).is_err() && door("off", None).unwrap().is_none());
        assert!(door("0.0.0.0:0", Some("0123456789abcdef")).unwrap().is_some());
    }
}
