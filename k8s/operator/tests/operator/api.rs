//! An API server as small as it can be: keeps objects, answers get, list, watch, create, patch (merge, JSON, server-side apply as a
//! merge), status, scale and delete with finalizers and owners. Knows no schema and no rules.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contraflow_operator::context::Clock;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::stage::{Change, Fuse};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// The path of its kind and namespace, then its name.
type Key = (String, String);

#[derive(Default)]
struct Kept {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Version, what happened, path of the kind, the object.
    log: Vec<(u64, &'static str, String, Value)>,
    /// By verb and path, how often it was asked for.
    requests: BTreeMap<String, usize>,
    /// The path of a kind that it does not know.
    undefined: Option<String>,
}

/// The server; its clones are the same.
#[derive(Clone)]
pub struct ApiServer {
    kept: Arc<Mutex<Kept>>,
    change: Change,
    clock: Clock,
}

/// Where the objects of a kind are.
pub fn path_of(kind: &str) -> String {
    let group = match kind {
        "configmaps" | "secrets" | "services" | "persistentvolumeclaims" => "api/v1",
        "statefulsets" => "apis/apps/v1",
        "poddisruptionbudgets" => "apis/policy/v1",
        "networkpolicies" => "apis/networking.k8s.io/v1",
        "events" => "apis/events.k8s.io/v1",
        _ => "apis/contraflow.dev/v1alpha1",
    };
    format!("/{group}/namespaces/training/{kind}")
}

fn json_answer(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(value.to_string())).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
}

fn refusal(code: u16, reason: &str) -> Answer {
    json_answer(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason}),
    )
}

fn merge(into: &mut Value, patch: &Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                match value {
                    Value::Null => drop(into.remove(key)),
                    value => merge(into.entry(key.clone()).or_insert(Value::Null), value),
                }
            }
        }
        (into, patch) => *into = patch.clone(),
    }
}

impl ApiServer {
    pub fn new(change: Change, clock: Clock) -> Self {
        ApiServer { kept: Arc::default(), change, clock }
    }

    /// A client; its requests burn down `fuse`.
    pub fn client(&self, fuse: Fuse) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (server, fuse) = (server.clone(), fuse.clone());
            async move {
                fuse.before().await;
                let answer = server.answer(request).await;
                fuse.after().await;
                Ok::<_, Infallible>(answer)
            }
        });
        kube::Client::new(service, "training")
    }

    /// From now on it does not know a kind.
    pub fn undefine(&self, kind: &str) {
        self.kept.lock().unwrap().undefined = Some(path_of(kind));
    }

    /// An object as it is.
    pub fn get(&self, kind: &str, name: &str) -> Option<Value> {
        self.kept.lock().unwrap().objects.get(&(path_of(kind), name.to_owned())).cloned()
    }

    /// All names of a kind.
    pub fn names(&self, kind: &str) -> Vec<String> {
        let (kept, path) = (self.kept.lock().unwrap(), path_of(kind));
        kept.objects.keys().filter(|key| key.0 == path).map(|key| key.1.clone()).collect()
    }

    /// Reasons of events, in order.
    pub fn events(&self) -> Vec<String> {
        let (kept, path) = (self.kept.lock().unwrap(), path_of("events"));
        let of = kept.log.iter().filter(|(_, happened, kind, _)| *kind == path && *happened == "ADDED");
        of.map(|(.., event)| event["reason"].as_str().unwrap().to_owned()).collect()
    }

    /// How often a verb was asked for of paths that contain this text.
    pub fn requests(&self, verb: &str, text: &str) -> usize {
        let kept = self.kept.lock().unwrap();
        let of = kept
            .requests
            .iter()
            .filter(|(key, _)| key.starts_with(&format!("{verb} ")) && key.contains(text));
        of.map(|(_, count)| count).sum()
    }

    /// Verb and path of whatever was asked for.
    pub fn all_requests(&self) -> Vec<(String, String)> {
        let kept = self.kept.lock().unwrap();
        let split = |key: &String| {
            key.split_once(' ').map(|(verb, path)| (verb.to_owned(), path.to_owned())).unwrap()
        };
        kept.requests.keys().map(split).collect()
    }

    /// What a user asks for.
    pub fn create(&self, kind: &str, object: Value) {
        let answer = self.kept.lock().unwrap().create(&path_of(kind), object, &self.now());
        assert_eq!(answer.status(), 201);
        self.change.tell();
    }

    /// What a user, or a controller of Kubernetes, changes.
    pub fn patch(&self, kind: &str, name: &str, subresource: &str, patch: &Value) {
        let key = (path_of(kind), name.to_owned());
        let answer =
            self.kept.lock().unwrap().patch(key, subresource, |object| merge(object, patch), &self.now());
        assert_eq!(answer.status(), 200);
        self.change.tell();
    }

    pub fn delete(&self, kind: &str, name: &str) {
        let answer = self.kept.lock().unwrap().delete(&(path_of(kind), name.to_owned()), &self.now());
        assert_eq!(answer.status(), 200);
        self.change.tell();
    }

    fn now(&self) -> String {
        contraflow_operator::conditions::time((self.clock)())
    }

    async fn answer(&self, request: Request<Body>) -> Answer {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let path = head.uri.path().to_owned();
        let query: BTreeMap<String, String> =
            head.uri.query().unwrap_or_default().split('&').filter_map(pair).collect();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        // The collection ends with the kind: after namespaces/NAMESPACE.
        let at = parts.iter().position(|part| *part == "namespaces").unwrap() + 3;
        let collection = format!("/{}", parts[..at].join("/"));
        let (name, subresource) = (parts.get(at).copied(), parts.get(at + 1).copied().unwrap_or_default());
        let is_watch = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
        let mut kept = self.kept.lock().unwrap();
        let verb = if is_watch { "WATCH" } else { head.method.as_str() };
        *kept.requests.entry(format!("{verb} {path}")).or_default() += 1;
        if kept.undefined.as_ref() == Some(&collection) {
            return refusal(404, "NotFound");
        }
        let answer = match (&head.method, name) {
            (&Method::GET, None) if is_watch => {
                drop(kept);
                return self.watch(collection, &query);
            }
            (&Method::GET, None) => kept.list(&collection, query.get("labelSelector")),
            (&Method::GET, Some(name)) => match kept.objects.get(&(collection, name.to_owned())) {
                Some(object) => json_answer(200, object),
                None => refusal(404, "NotFound"),
            },
            (&Method::POST, _) => {
                kept.create(&collection, serde_json::from_slice(&body).unwrap(), &self.now())
            }
            (&Method::DELETE, Some(name)) => kept.delete(&(collection, name.to_owned()), &self.now()),
            (&Method::PATCH, Some(name)) => {
                let kind = head.headers["content-type"].to_str().unwrap();
                kept.patched((collection, name.to_owned()), subresource, kind, &body, &self.now())
            }
            other => panic!("{other:?} {path}"),
        };
        drop(kept);
        self.change.tell();
        answer
    }

    /// Events from a version on, until the time that the client gives it is over.
    fn watch(&self, collection: String, query: &BTreeMap<String, String>) -> Answer {
        let from: u64 = query["resourceVersion"].parse().unwrap();
        let seconds = query.get("timeoutSeconds").and_then(|text| text.parse().ok()).unwrap_or(290);
        let end = Instant::now() + Duration::from_secs(seconds);
        let selector = query.get("labelSelector").cloned();
        let state = (self.clone(), self.change.subscribe(), from);
        let events = stream::unfold(state, move |(server, mut change, from)| {
            let (collection, selector) = (collection.clone(), selector.clone());
            async move {
                loop {
                    let next = {
                        let kept = server.kept.lock().unwrap();
                        let of = |event: &&(u64, &str, String, Value)| {
                            event.0 > from
                                && event.2 == collection
                                && is_selected(&event.3, selector.as_ref())
                        };
                        kept.log.iter().find(of).cloned()
                    };
                    if let Some((version, happened, _, object)) = next {
                        let line = format!("{}\n", json!({"type": happened, "object": object}));
                        let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(line)));
                        return Some((frame, (server, change, version)));
                    }
                    match tokio::time::timeout_at(end, change.changed()).await {
                        Ok(Ok(())) => {}
                        _ => return None,
                    }
                }
            }
        });
        Response::new(StreamBody::new(events).boxed_unsync())
    }
}

/// `%2C` and such stand in selectors.
fn pair(text: &str) -> Option<(String, String)> {
    let (key, value) = text.split_once('=')?;
    let value = value.replace("%2C", ",").replace("%3D", "=").replace("%2F", "/");
    Some((key.to_owned(), value))
}

fn is_selected(object: &Value, selector: Option<&String>) -> bool {
    let wanted = selector.map_or("", String::as_str).split(',').filter(|pair| !pair.is_empty());
    wanted.into_iter().all(|pair| {
        let (key, value) = pair.split_once('=').unwrap();
        object["metadata"]["labels"][key] == value
    })
}

impl Kept {
    fn store(&mut self, key: Key, mut object: Value, happened: &'static str) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.log.push((self.version, happened, key.0.clone(), object.clone()));
        match happened {
            "DELETED" => {
                self.objects.remove(&key);
                self.collect(&object["metadata"]["uid"]);
            }
            _ => drop(self.objects.insert(key, object.clone())),
        }
        object
    }

    /// What an object that is gone has owned goes too.
    fn collect(&mut self, uid: &Value) {
        let is_owned = |object: &Value| {
            object["metadata"]["ownerReferences"]
                .as_array()
                .is_some_and(|owners| owners.iter().any(|owner| owner["uid"] == *uid))
        };
        let owned: Vec<(Key, Value)> = self
            .objects
            .iter()
            .filter(|(_, object)| is_owned(object))
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        for (key, object) in owned {
            self.store(key, object, "DELETED");
        }
    }

    fn list(&self, collection: &str, selector: Option<&String>) -> Answer {
        let of =
            self.objects.iter().filter(|(key, object)| key.0 == *collection && is_selected(object, selector));
        let items: Vec<&Value> = of.map(|(_, object)| object).collect();
        json_answer(
            200,
            &json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": self.version.to_string()}, "items": items}),
        )
    }

    fn create(&mut self, collection: &str, mut object: Value, now: &str) -> Answer {
        let key = (collection.to_owned(), object["metadata"]["name"].as_str().unwrap().to_owned());
        if self.objects.contains_key(&key) {
            return refusal(409, "AlreadyExists");
        }
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.insert("uid".into(), format!("{:08x}-uid", self.version + 1).into());
        metadata.insert("namespace".into(), "training".into());
        metadata.insert("generation".into(), 1.into());
        metadata.insert("creationTimestamp".into(), now.into());
        let owner = object["metadata"]["ownerReferences"][0].get("uid").cloned();
        let is_orphan =
            owner.is_some_and(|owner| self.objects.values().all(|other| other["metadata"]["uid"] != owner));
        let made = self.store(key.clone(), object, "ADDED");
        if is_orphan {
            self.store(key, made.clone(), "DELETED");
        }
        json_answer(201, &made)
    }

    fn patched(&mut self, key: Key, subresource: &str, kind: &str, body: &[u8], now: &str) -> Answer {
        let patch: Value = serde_json::from_slice(body).unwrap();
        if kind.starts_with("application/json-patch") {
            let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
            let mut fits = true;
            // What is not there is null to a test of the real server.
            if let Some(object) =
                self.objects.get_mut(&key).filter(|object| object["metadata"].get("finalizers").is_none())
            {
                object["metadata"]["finalizers"] = Value::Null;
            }
            let answer =
                self.patch(key, subresource, |object| fits = json_patch::patch(object, &patch).is_ok(), now);
            return if fits { answer } else { refusal(422, "Invalid") };
        }
        let is_apply = kind.starts_with("application/apply-patch");
        let known = self.objects.get(&key).map(|object| object["metadata"]["uid"].clone());
        let uid = patch["metadata"].get("uid").cloned();
        match known {
            None if is_apply && subresource.is_empty() => self.create(&key.0, patch, now),
            Some(known) if uid.is_some_and(|uid| uid != known) => refusal(409, "Conflict"),
            _ if is_apply && subresource == "status" => {
                self.patch(key, subresource, |object| object["status"] = patch["status"].clone(), now)
            }
            _ => self.patch(key, subresource, |object| merge(object, &patch), now),
        }
    }

    fn patch(&mut self, key: Key, subresource: &str, change: impl FnOnce(&mut Value), now: &str) -> Answer {
        let Some(before) = self.objects.get(&key).cloned() else { return refusal(404, "NotFound") };
        let mut changed = before.clone();
        change(&mut changed);
        let mut after = before.clone();
        match subresource {
            "status" => after["status"] = changed["status"].clone(),
            "scale" => after["spec"]["ranks"] = changed["spec"]["replicas"].clone(),
            _ => {
                after = changed;
                if let Some(status) = before.get("status") {
                    after["status"] = status.clone();
                }
            }
        }
        if after == before {
            return json_answer(200, &before);
        }
        if after.get("spec") != before.get("spec") {
            after["metadata"]["generation"] = (before["metadata"]["generation"].as_u64().unwrap() + 1).into();
        }
        let is_over = after["metadata"].get("deletionTimestamp").is_some() && has_no_finalizers(&after);
        let _ = now;
        json_answer(200, &self.store(key, after, if is_over { "DELETED" } else { "MODIFIED" }))
    }

    fn delete(&mut self, key: &Key, now: &str) -> Answer {
        let Some(mut object) = self.objects.get(key).cloned() else { return refusal(404, "NotFound") };
        if has_no_finalizers(&object) {
            return json_answer(200, &self.store(key.clone(), object, "DELETED"));
        }
        if object["metadata"].get("deletionTimestamp").is_none() {
            object["metadata"]["deletionTimestamp"] = now.into();
            object["metadata"]["generation"] =
                (object["metadata"]["generation"].as_u64().unwrap() + 1).into();
            object = self.store(key.clone(), object, "MODIFIED");
        }
        json_answer(200, &object)
    }
}

fn has_no_finalizers(object: &Value) -> bool {
    object["metadata"]
        .get("finalizers")
        .is_none_or(|finalizers| finalizers.as_array().is_none_or(Vec::is_empty))
}
