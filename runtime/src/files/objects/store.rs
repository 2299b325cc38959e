//! The objects below one location: listed, read, written, created where there is none, removed.
//!
//! Callers block: the requests run on threads of their own. Knows no cache.

use std::collections::BTreeSet;
use std::fs::File;
use std::future::Future;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, SystemTime};

use futures_util::stream::{self, FuturesUnordered};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{
    BackoffConfig, Error, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, RetryConfig,
};
use tokio::runtime::Runtime;

use super::http::Connector;
use super::{Location, ObjectError, ObjectFault, Scheme};

/// How often a request is tried again, and for how long.
const RETRIES: usize = 6;
const RETRY_TIME: Duration = Duration::from_secs(90);

/// Requests of one call at the same time.
const PARALLEL: usize = 4;

/// Files from this size on are sent in parts of it. **Units**: bytes.
const PART: usize = 8 << 20;

/// An object as a listing names it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name below the location; empty: the location is the object's own.
    pub name: String,
    /// **Units**: bytes.
    pub size: u64,
    pub(super) meta: ObjectMeta,
}

impl Listed {
    /// How long ago it was written, by the store's clock.
    pub fn age(&self) -> Duration {
        SystemTime::now().duration_since(self.meta.last_modified.into()).unwrap_or_default()
    }

    /// What tells its content from another one under the same name: ETag, size, and when it was written.
    pub(super) fn identity(&self) -> String {
        let ObjectMeta { e_tag, last_modified, size, .. } = &self.meta;
        match e_tag {
            Some(tag) => format!("{} {size} {tag}", self.name),
            None => format!("{} {size} {last_modified}", self.name),
        }
    }
}

/// What became of an object that was to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there now: by this call, or by an earlier try of it whose answer was lost.
    Here,
    /// Another one was there before.
    Before,
}

/// The objects below a location.
#[derive(Clone)]
pub struct Objects {
    location: Location,
    store: Arc<dyn ObjectStore>,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Objects({})", self.location)
    }
}

impl Objects {
    /// Nothing is sent yet.
    ///
    /// **Errors**: the environment does not say what the store needs to know.
    pub fn open(location: &Location) -> Result<Self, ObjectError> {
        let retry = RetryConfig {
            max_retries: RETRIES,
            retry_timeout: RETRY_TIME,
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(10),
                base: 2.0,
            },
        };
        let Location { scheme, bucket, .. } = location;
        let built: object_store::Result<Arc<dyn ObjectStore>> = match scheme {
            Scheme::S3 => AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::Gs => GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::Az => MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_http_connector(Connector)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::Https | Scheme::Http => HttpBuilder::new()
                .with_url(Location { key: String::new(), ..location.clone() }.to_string())
                .with_http_connector(Connector)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
        };
        let store = built.map_err(|error| ObjectError::new(location, ObjectFault::Refused, error))?;
        Ok(Objects { location: location.clone(), store })
    }

    /// Where they are.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The object at the location itself, or everything below it, by name; never none.
    ///
    /// **Errors**: nothing is there; the store refuses or fails.
    pub fn list(&self) -> Result<Vec<Listed>, ObjectError> {
        if !self.location.key.is_empty() {
            let (store, key) = (self.store.clone(), self.key("")?);
            match wait(async move { store.head(&key).await }) {
                Ok(meta) => return Ok(vec![Listed { name: String::new(), size: meta.size, meta }]),
                Err(Error::NotFound { .. }) if !self.location.is_web() => {}
                Err(error) => return Err(self.error("", error)),
            }
        }
        match self.list_below("")? {
            none if none.is_empty() => {
                let message = "expected an object, or objects below this prefix, got none";
                Err(ObjectError::new(&self.location, ObjectFault::Missing, message))
            }
            listed => Ok(listed),
        }
    }

    /// Everything below a name, which may be nothing, by name.
    ///
    /// **Errors**: the store refuses or fails; a key that is no relative path.
    pub fn list_below(&self, name: &str) -> Result<Vec<Listed>, ObjectError> {
        let whole = self.key(name)?;
        let (store, own) = (self.store.clone(), self.key("")?);
        let prefix = (!whole.as_ref().is_empty()).then_some(whole);
        let metas: Vec<ObjectMeta> = wait(async move { store.list(prefix.as_ref()).try_collect().await })
            .map_err(|error| self.error(name, error))?;
        let mut listed = Vec::new();
        for meta in metas {
            let parts: Option<Vec<String>> = meta
                .location
                .prefix_match(&own)
                .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect());
            let name = parts.unwrap_or_default().join("/");
            if !name.is_empty() {
                listed.push(Listed { name, size: meta.size, meta });
            }
        }
        listed.sort_by(|one, other| one.name.cmp(&other.name));
        // Consoles make an empty object for a folder, so that it shows.
        let folders: BTreeSet<String> = listed
            .iter()
            .flat_map(|object| object.name.match_indices('/').map(|(end, _)| object.name[..end].to_owned()))
            .collect();
        listed.retain(|object| object.size > 0 || !folders.contains(&object.name));
        Ok(listed)
    }

    /// The bytes of a small object; `None` if there is none.
    ///
    /// **Errors**: the store refuses or fails; it is larger than `most` bytes.
    pub fn get(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, ObjectError> {
        let (store, key) = (self.store.clone(), self.key(name)?);
        let read = wait(async move {
            let got = store.get(&key).await?;
            let size = got.meta.size;
            if size > most { Ok(Err(size)) } else { Ok(Ok(got.bytes().await?)) }
        });
        match read {
            Ok(Ok(bytes)) => Ok(Some(bytes.to_vec())),
            Ok(Err(size)) => {
                let message = format!("expected at most {most} bytes, got {size}");
                Err(ObjectError::new(&self.location.join(name), ObjectFault::Refused, message))
            }
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error(name, error)),
        }
    }

    /// Writes listed objects as files: each to the path that `to` says, whose folder is there; synced.
    ///
    /// **Errors**: the first fault: one has changed since it was listed, or is gone; the store or the disk refuses or fails.
    pub fn download(&self, listed: &[Listed], to: impl Fn(&Listed) -> PathBuf) -> Result<(), ObjectError> {
        let downloads: Vec<_> = listed
            .iter()
            .map(|object| {
                let (store, meta, to) = (self.store.clone(), object.meta.clone(), to(object));
                let name = object.name.clone();
                async move { download(store, meta, to).await.map_err(|fault| (name, fault)) }.boxed()
            })
            .collect();
        let done = wait(stream::iter(downloads).buffer_unordered(PARALLEL).try_collect::<Vec<()>>());
        done.map(drop).map_err(|(name, fault)| match fault {
            Transfer::Store(Error::NotFound { .. }) => self.changed(&name, "nothing: it was removed"),
            Transfer::Store(error) => self.error(&name, error),
            Transfer::Changed(got) => self.changed(&name, &got),
            Transfer::Disk(error) => ObjectError::new(
                &self.location.join(&name),
                ObjectFault::Failed,
                format!("on this node: {error}"),
            ),
        })
    }

    fn changed(&self, name: &str, got: &str) -> ObjectError {
        let message = format!("expected the object as it was listed a moment before, got {got}");
        ObjectError::new(&self.at(name), ObjectFault::Changed, message)
    }

    /// Writes an object, over what may be there.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), ObjectError> {
        let (store, key) = (self.store.clone(), self.key(name)?);
        let put = wait(async move { store.put(&key, bytes.into()).await });
        put.map(drop).map_err(|error| self.error(name, error))
    }

    /// Writes an object if there is none of its name, in one request that the store decides.
    ///
    /// The answer to a request that took effect may be lost; then the next try finds the own object, which is no loss.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn create(&self, name: &str, bytes: Vec<u8>) -> Result<Created, ObjectError> {
        let (store, key, payload) = (self.store.clone(), self.key(name)?, bytes.clone());
        let put = wait(async move { store.put_opts(&key, payload.into(), PutMode::Create.into()).await });
        match put {
            Ok(_) => Ok(Created::Here),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                let found = self.get(name, bytes.len() as u64);
                Ok(match found {
                    Ok(found) if found.as_deref() == Some(&bytes[..]) => Created::Here,
                    _ => Created::Before,
                })
            }
            Err(error) => match self.get(name, bytes.len() as u64) {
                // All tries have failed, and one of them has taken effect.
                Ok(found) if found.as_deref() == Some(&bytes[..]) => Ok(Created::Here),
                _ => Err(self.error(name, error)),
            },
        }
    }

    /// Writes a file as an object, in parts where it is large.
    ///
    /// **Errors**: the store or the disk refuses or fails.
    pub fn put_file(&self, name: &str, from: &Path) -> Result<(), ObjectError> {
        let (store, key, from) = (self.store.clone(), self.key(name)?, from.to_owned());
        let done = wait(async move { upload(store, &key, &from).await });
        done.map_err(|fault| match fault {
            Transfer::Disk(error) => {
                ObjectError::new(&self.at(name), ObjectFault::Failed, format!("on this node: {error}"))
            }
            Transfer::Store(error) => self.error(name, error),
            Transfer::Changed(got) => self.changed(name, &got),
        })
    }

    /// Removes an object; one that is not there is none less.
    ///
    /// **Errors**: the store refuses or fails.
    pub fn remove(&self, name: &str) -> Result<(), ObjectError> {
        let (store, key) = (self.store.clone(), self.key(name)?);
        match wait(async move { store.delete(&key).await }) {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error(name, error)),
        }
    }

    fn at(&self, name: &str) -> Location {
        if name.is_empty() { self.location.clone() } else { self.location.join(name) }
    }

    fn key(&self, name: &str) -> Result<Key, ObjectError> {
        let at = self.at(name);
        let key = if at.is_web() { Key::from_url_path(&at.key) } else { Key::parse(&at.key) };
        key.map_err(|error| ObjectError::new(&at, ObjectFault::Refused, error))
    }

    /// What a store says, in words.
    fn error(&self, name: &str, error: Error) -> ObjectError {
        let at = self.at(name);
        match &error {
            Error::NotFound { .. } => ObjectError::new(&at, ObjectFault::Missing, "no such object or bucket"),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                let message = format!("the store denies access with {}", credentials(at.scheme));
                ObjectError::new(&at, ObjectFault::Denied, message)
            }
            _ => {
                let has_key = std::env::var_os("AWS_ACCESS_KEY_ID").is_some();
                let hint =
                    if at.scheme == Scheme::S3 && !has_key { "; AWS_ACCESS_KEY_ID is not set" } else { "" };
                ObjectError::new(&at, ObjectFault::Failed, format!("{}{hint}", causes(&error)))
            }
        }
    }
}

/// Which credentials were used, without them.
fn credentials(scheme: Scheme) -> &'static str {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    match scheme {
        Scheme::S3 if is_set("AWS_ACCESS_KEY_ID") => {
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment"
        }
        Scheme::S3 => "the role of this machine; AWS_ACCESS_KEY_ID is not set",
        Scheme::Gs => "the account of GOOGLE_APPLICATION_CREDENTIALS or of this machine",
        Scheme::Az => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY of the environment",
        Scheme::Https | Scheme::Http => "no credentials, which is all that is sent to a web server",
    }
}

/// An error with what led to it, each said once.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    // A store answers with documents: they go on one line.
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(600).collect()
}

/// Why an object did not become a file, or a file no object.
enum Transfer {
    Store(Error),
    Disk(std::io::Error),
    Changed(String),
}

async fn download(store: Arc<dyn ObjectStore>, meta: ObjectMeta, to: PathBuf) -> Result<(), Transfer> {
    if meta.size == 0 {
        return File::create(to).and_then(|file| file.sync_all()).map_err(Transfer::Disk);
    }
    let got = store.get(&meta.location).await.map_err(Transfer::Store)?;
    if got.meta.e_tag != meta.e_tag || got.meta.size != meta.size {
        let name = |meta: &ObjectMeta| meta.e_tag.clone().unwrap_or_else(|| format!("{} bytes", meta.size));
        return Err(Transfer::Changed(format!("{} in place of {}", name(&got.meta), name(&meta))));
    }
    let mut file = File::create(to).map_err(Transfer::Disk)?;
    let (mut bytes, mut parts) = (0, got.into_stream());
    while let Some(part) = parts.next().await {
        let part = part.map_err(Transfer::Store)?;
        bytes += part.len() as u64;
        file.write_all(&part).map_err(Transfer::Disk)?;
    }
    if bytes != meta.size {
        return Err(Transfer::Changed(format!("{bytes} bytes in place of {}", meta.size)));
    }
    file.sync_all().map_err(Transfer::Disk)
}

async fn upload(store: Arc<dyn ObjectStore>, key: &Key, from: &Path) -> Result<(), Transfer> {
    let mut file = File::open(from).map_err(Transfer::Disk)?;
    let size = file.metadata().map_err(Transfer::Disk)?.len();
    if size <= PART as u64 {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Transfer::Disk)?;
        return store.put(key, bytes.into()).await.map(drop).map_err(Transfer::Store);
    }
    let mut parts = store.put_multipart(key).await.map_err(Transfer::Store)?;
    if let Err(fault) = send_parts(&mut *parts, &mut file).await {
        // What is left of an upload costs its owner money; the first fault is reported.
        drop(parts.abort().await);
        return Err(fault);
    }
    match parts.complete().await {
        Ok(_) => Ok(()),
        // The answer to a request that took effect may have been lost: then the next try finds no upload any more.
        Err(error) => match store.head(key).await {
            Ok(meta) if meta.size == size => Ok(()),
            _ => {
                drop(parts.abort().await);
                Err(Transfer::Store(error))
            }
        },
    }
}

/// Sends a file part by part, a few at a time.
async fn send_parts(parts: &mut dyn MultipartUpload, file: &mut File) -> Result<(), Transfer> {
    let mut under_way = FuturesUnordered::new();
    loop {
        let mut part = Vec::new();
        file.take(PART as u64).read_to_end(&mut part).map_err(Transfer::Disk)?;
        let is_end = part.is_empty();
        if !is_end {
            under_way.push(parts.put_part(part.into()));
        }
        while under_way.len() >= if is_end { 1 } else { PARALLEL } {
            under_way.try_next().await.map_err(Transfer::Store)?;
        }
        if is_end {
            return Ok(());
        }
    }
}

/// Runs a request on the threads for it, wherever the caller is.
fn wait<T: Send + 'static>(request: impl Future<Output = T> + Send + 'static) -> T {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("objects")
            .enable_all()
            .build()
            .expect("threads for requests")
    });
    let (answer, answered) = mpsc::sync_channel(1);
    runtime.spawn(async move {
        // The caller waits.
        drop(answer.send(request.await));
    });
    answered.recv().expect("a request ends, and does not panic")
}
