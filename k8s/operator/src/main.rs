//! `contraflow-operator`: `run` looks after the objects of a namespace, `crds` prints their definitions.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use contraflow_operator::context::{Context, Home};
use contraflow_operator::decide::Pace;
use contraflow_operator::{cluster, clusters, job, jobs, link, watching};
use k8s_openapi::jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Looks after TrainingJob and TrainingCluster objects of Kubernetes.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the definition of a kind, as YAML
    Crds {
        /// Which one
        #[arg(value_enum)]
        kind: Kind,
    },
    /// Look after the objects of a namespace until SIGTERM
    Run {
        /// The namespace; that of the pod if not given
        #[arg(long, env = "CONTRAFLOW_NAMESPACE")]
        namespace: Option<String>,
        /// Where jobs go that name no orchestrator, HOST:PORT
        #[arg(long, value_name = "ADDR")]
        orchestrator: Option<String>,
        /// The Secret with the operator's credentials there
        #[arg(long, value_name = "NAME", requires = "orchestrator")]
        secret: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// TrainingJob
    Trainingjobs,
    /// TrainingCluster
    Trainingclusters,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Crds { kind } => print(kind),
        Command::Run { namespace, orchestrator, secret } => {
            let home = orchestrator.map(|address| Home { address, secret });
            look_after(namespace, home)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody reads, there is nobody to tell.
            drop(writeln!(std::io::stderr(), "error: {error}"));
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn print(kind: Kind) -> Outcome {
    let definition = match kind {
        Kind::Trainingjobs => job::definition(),
        Kind::Trainingclusters => cluster::definition(),
    };
    std::io::stdout().write_all(contraflow_operator::yaml(&definition)?.as_bytes())?;
    Ok(())
}

#[tokio::main(worker_threads = 2)]
async fn look_after(namespace: Option<String>, home: Option<Home>) -> Outcome {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, end) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        sender.send_replace(true);
    });
    let client = kube::Client::try_default().await?;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    watching::check(&client, &namespace).await?;
    tracing::info!("looks after the namespace {namespace}");
    let connect = Arc::new(link::connect);
    let context = Arc::new(Context::new(client, connect, Pace::default(), home, Arc::new(Timestamp::now)));
    let ended = || {
        let mut end = end.clone();
        async move { drop(end.wait_for(|end| *end).await) }
    };
    tokio::join!(
        jobs::run(context.clone(), &namespace, ended()),
        clusters::run(context, &namespace, ended())
    );
    Ok(())
}
