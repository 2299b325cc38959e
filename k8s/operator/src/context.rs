//! What reconcilers share: the API server, connections to orchestrators, the clock. Nothing of an object is kept here.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, Resource};

use crate::decide::Pace;
use crate::link::{Connect, Credentials, Links, Place};
use crate::status::Notice;
use crate::trouble::Trouble;

/// Who has set a field of an object.
pub const MANAGER: &str = "contraflow-operator";

/// Where jobs go that name no orchestrator.
#[derive(Clone, Debug)]
pub struct Home {
    /// HOST:PORT.
    pub address: String,
    /// The Secret of the operator's credentials there.
    pub secret: Option<String>,
}

/// All of it.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// Orchestrators.
    pub links: Links,
    /// How often.
    pub pace: Pace,
    /// The orchestrator of jobs that name none.
    pub home: Option<Home>,
    /// Since when this operator has looked after objects.
    pub started: Timestamp,
    clock: Clock,
}

/// What time it is.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Why a reconciler ends early.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The API server.
    #[error("the API server: {0}")]
    Kube(#[source] Box<kube::Error>),
    /// Nothing is wrong with it: it goes on then.
    #[error("goes on in {0:?}")]
    Again(Duration),
    /// The object is gone or about to go, and nothing is begun for it any more.
    #[error("the object is gone")]
    Gone,
    /// The finalizer.
    #[error("the finalizer: {0}")]
    Finalizer(String),
    /// It has taken too long.
    #[error("it has not ended within {0:?}")]
    Slow(Duration),
}

impl From<kube::Error> for Fault {
    fn from(error: kube::Error) -> Self {
        Fault::Kube(Box::new(error))
    }
}

/// Whether an answer of the API server has this code.
pub fn is_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

impl Context {
    /// Speaks to this API server.
    pub fn new(client: Client, connect: Connect, pace: Pace, home: Option<Home>, clock: Clock) -> Self {
        let started = clock();
        Context { client, links: Links::new(connect, pace.call), pace, home, started, clock }
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    /// Tells what has happened to an object. An event that cannot be written is left out.
    pub async fn tell<K: Resource<DynamicType = ()>>(&self, object: &K, notices: Vec<Notice>) {
        let regarding = object.object_ref(&());
        let events: Api<Event> =
            Api::namespaced(self.client.clone(), regarding.namespace.as_deref().unwrap_or_default());
        for Notice { is_warning, reason, words } in notices {
            let now = Timestamp::now();
            let event = Event {
                metadata: ObjectMeta {
                    // As other programs name theirs.
                    name: Some(format!(
                        "{}.{:x}",
                        regarding.name.as_deref().unwrap_or_default(),
                        now.as_nanosecond()
                    )),
                    namespace: regarding.namespace.clone(),
                    ..ObjectMeta::default()
                },
                type_: Some(if is_warning { "Warning" } else { "Normal" }.to_owned()),
                reason: Some(reason.to_owned()),
                action: Some(reason.to_owned()),
                note: Some(words),
                event_time: Some(MicroTime(now)),
                regarding: Some(regarding.clone()),
                reporting_controller: Some(format!("contraflow.dev/{MANAGER}")),
                reporting_instance: Some(MANAGER.to_owned()),
                ..Event::default()
            };
            if let Err(error) = events.create(&PostParams::default(), &event).await {
                tracing::warn!("an event of {}: {error}", regarding.name.as_deref().unwrap_or_default());
            }
        }
    }

    /// An orchestrator, with the credentials of a Secret.
    ///
    /// **Errors**: in `Ok`, the Secret is not there, not whole, or not ours to read; else the API server's.
    pub async fn place(
        &self,
        namespace: &str,
        address: String,
        secret: Option<&str>,
    ) -> Result<Result<Place, Trouble>, Fault> {
        let Some(name) = secret else { return Ok(Ok(Place { address, credentials: None })) };
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        match secrets.get_opt(name).await {
            Ok(Some(secret)) => {
                Ok(credentials(name, &secret).map(|own| Place { address, credentials: Some(own) }))
            }
            Ok(None) => Ok(Err(Trouble::way("NoSecret", format!("there is no Secret {name}")))),
            Err(error) if is_code(&error, 403) => {
                let words = format!(
                    "the operator may not read the Secret {name}: its chart's operator.secrets names those that it may"
                );
                Ok(Err(Trouble::way("NoSecret", words)))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn credentials(name: &str, secret: &Secret) -> Result<Credentials, Trouble> {
    let data = secret.data.clone().unwrap_or_default();
    let keys = ["ca.pem", "client.pem", "client.key", "token"];
    let lacking: Vec<&str> = keys.iter().copied().filter(|key| !data.contains_key(*key)).collect();
    let words = |words: String| Trouble::way("NoSecret", format!("the Secret {name}: {words}"));
    if !lacking.is_empty() {
        return Err(words(format!(
            "expected the keys {}, got none of {}",
            keys.join(", "),
            lacking.join(", ")
        )));
    }
    let read = |key: &str| data.get(key).map(|value| value.0.clone()).unwrap_or_default();
    let token = String::from_utf8(read("token")).map_err(|_| words("token: expected text".into()))?;
    Ok(Credentials { ca: read("ca.pem"), certificate: read("client.pem"), key: read("client.key"), token })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    #[test]
    fn a_secret_that_is_not_whole_is_refused_with_what_it_lacks() {
        let of = |keys: &[&str]| Secret {
            data: Some(
                keys.iter().map(|key| ((*key).to_owned(), ByteString(key.as_bytes().to_vec()))).collect(),
            ),
            ..Secret::default()
        };
        let whole = credentials("own", &of(&["ca.pem", "client.pem", "client.key", "token"]));
        assert!(whole.is_ok_and(|own| own.token == "token" && own.key == b"client.key"));
        let words = credentials("own", &of(&["ca.pem", "token"])).err().map(|trouble| trouble.words);
        assert!(words.is_some_and(|words| words.ends_with("got none of client.pem, client.key")));
    }
}
