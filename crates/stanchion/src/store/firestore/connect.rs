//! The connections to the service, and the four requests that the store makes: read, ask, commit, listen.
//!
//! Everything runs in a thread of the store's own, so that a step can be asked for from any runtime, or from none, and
//! what the user's runtime does delays no answer. One connection carries the steps on keys, another what keeps the
//! sessions: no crowd of steps delays a beat.
//!
//! The client never repeats a request (rule 7 of the store trait).

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use google_cloud_auth::credentials::{CacheableResource, Credentials};
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::firestore_client::FirestoreClient;
use prost_types::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Streaming};

use super::config::Config;
use super::document::micros_of;
use super::error::{Does, error, from_status, malformed};
use crate::error::{Error, ErrorKind, Result};
use crate::thread::RuntimeThread;

const SERVICE: &str = "https://firestore.googleapis.com";
const SCOPE: &str = "https://www.googleapis.com/auth/datastore";

/// How long making a connection may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// A request without an answer for so long is in doubt, and its connection is not used again.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A connection is asked whether it lives, and closed if it does not answer: a listener would notice nothing else.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_WITHIN: Duration = Duration::from_secs(5);

/// The most documents that one request reads.
const MOST_READ: usize = 300;

/// Which connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Steps,
    Session,
}

#[derive(Debug)]
pub(super) struct Service {
    pub(super) config: Config,
    /// Drives the connections. Started with the first request.
    driver: Mutex<Option<RuntimeThread>>,
    lanes: [Mutex<Option<Channel>>; 2],
    credentials: Mutex<Option<Credentials>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a commit did.
#[derive(Clone, Debug)]
pub(super) struct Committed {
    /// When, in µs.
    pub(super) time: u64,
    /// When the documents were last written, one for each write; none for a delete.
    pub(super) written: Vec<Option<Timestamp>>,
}

/// Why a commit was not done, or is in doubt.
#[derive(Debug)]
pub(super) enum Refused {
    /// A document is not as it was said to be. Nothing was done.
    Changed,
    /// The service gave up before others who write the same. Nothing was done.
    Contended,
    Fault(Error),
}

/// What a listener hears, as long as it is kept.
pub(super) struct Heard {
    pub(super) stream: Streaming<api::ListenResponse>,
    _listens: oneshot::Sender<()>,
}

impl Service {
    pub(super) fn new(config: Config) -> Self {
        Self { config, driver: Mutex::default(), lanes: Default::default(), credentials: Mutex::default() }
    }

    /// The runtime that connections live in.
    pub(super) fn runtime(&self) -> Result<Handle> {
        let mut driver = lock(&self.driver);
        match &*driver {
            Some(driver) => Ok(driver.runtime.clone()),
            None => {
                let started = RuntimeThread::start("stanchion-firestore").map_err(|fault| {
                    error(ErrorKind::Unavailable, format!("no thread for the connections: {fault}"))
                })?;
                let runtime = started.runtime.clone();
                *driver = Some(started);
                Ok(runtime)
            }
        }
    }

    /// Documents by name, in that order, and a time of the service's, in µs: none of them is from before it.
    pub(super) async fn read(&self, lane: Lane, names: &[String]) -> Result<(Vec<Option<api::Document>>, u64)> {
        let mut found = std::collections::HashMap::new();
        // More than one request reads are of several times: the first one is true of all.
        let mut time = None;
        for names in names.chunks(MOST_READ) {
            let request = api::BatchGetDocumentsRequest {
                database: self.config.database.clone(),
                documents: names.to_vec(),
                ..api::BatchGetDocumentsRequest::default()
            };
            let (mut client, request) = self.prepare(lane, request).await?;
            let asked = async {
                let mut answers = client.batch_get_documents(request).await?.into_inner();
                let mut all = Vec::new();
                while let Some(answer) = answers.message().await? {
                    all.push(answer);
                }
                Ok(all)
            };
            let mut read = 0;
            for answer in self.answered(lane, asked).await?.map_err(|status| from_status(status, Does::Read))? {
                read = read.max(micros_of(answer.read_time)?);
                if let Some(api::batch_get_documents_response::Result::Found(document)) = answer.result {
                    found.insert(document.name.clone(), document);
                }
            }
            time.get_or_insert(read);
        }
        Ok((names.iter().map(|name| found.remove(name)).collect(), time.unwrap_or_default()))
    }

    /// The documents that a query finds, and when.
    pub(super) async fn ask(
        &self,
        lane: Lane,
        parent: &str,
        query: api::StructuredQuery,
    ) -> Result<(Vec<api::Document>, u64)> {
        let request = api::RunQueryRequest {
            parent: parent.to_owned(),
            query_type: Some(api::run_query_request::QueryType::StructuredQuery(query)),
            ..api::RunQueryRequest::default()
        };
        let (mut client, request) = self.prepare(lane, request).await?;
        let asked = async {
            let mut answers = client.run_query(request).await?.into_inner();
            let (mut found, mut time) = (Vec::new(), None);
            while let Some(answer) = answers.message().await? {
                found.extend(answer.document);
                time = answer.read_time.or(time);
            }
            Ok((found, time))
        };
        let (found, time) = self.answered(lane, asked).await?.map_err(|status| from_status(status, Does::Read))?;
        Ok((found, micros_of(time)?))
    }

    /// All of these writes or none.
    pub(super) async fn commit(&self, lane: Lane, writes: Vec<api::Write>) -> Result<Committed, Refused> {
        let request = api::CommitRequest { database: self.config.database.clone(), writes, transaction: Vec::new() };
        let (mut client, request) = self.prepare(lane, request).await.map_err(Refused::Fault)?;
        let asked = async { client.commit(request).await.map(tonic::Response::into_inner) };
        let answer = self.answered(lane, asked).await.map_err(|late| Refused::Fault(late.in_doubt(true)))?;
        let answer = answer.map_err(|status| match status.code() {
            // All that we ask of a document is that it is there, or not, or unchanged.
            Code::AlreadyExists | Code::FailedPrecondition => Refused::Changed,
            // Of a database that was set back.
            Code::InvalidArgument if status.message().contains("base version") => Refused::Changed,
            // Of a document that somebody has deleted, whose name has that of its database in it; or there is no database.
            Code::NotFound if status.message().contains("/documents/") || !status.message().contains("database") => {
                Refused::Changed
            }
            Code::Aborted => Refused::Contended,
            _ => Refused::Fault(from_status(status, Does::Write)),
        })?;
        let time = micros_of(answer.commit_time).map_err(|fault| Refused::Fault(fault.in_doubt(true)))?;
        Ok(Committed { time, written: answer.write_results.into_iter().map(|result| result.update_time).collect() })
    }

    /// What changes in the documents of a query, from now on.
    pub(super) async fn listen(&self, parent: &str, query: api::StructuredQuery) -> Result<Heard> {
        let target = api::target::QueryTarget {
            parent: parent.to_owned(),
            query_type: Some(api::target::query_target::QueryType::StructuredQuery(query)),
        };
        let target = api::Target {
            target_id: 1,
            target_type: Some(api::target::TargetType::Query(target)),
            ..api::Target::default()
        };
        let request = api::ListenRequest {
            database: self.config.database.clone(),
            target_change: Some(api::listen_request::TargetChange::AddTarget(target)),
            ..api::ListenRequest::default()
        };
        let (mut client, request) = self.prepare(Lane::Session, request).await?;
        // The service ends the stream when the client has no more to say; and the stream stays in the connection until then,
        // whoever has given it up. So it has no more to say as soon as this is dropped, answered or not.
        let (listens, gives_up) = oneshot::channel::<()>();
        let says_nothing = futures_util::stream::once(gives_up).filter_map(|_| std::future::ready(None));
        let request = request.map(|first| futures_util::stream::iter([first]).chain(says_nothing));
        let asked = async { client.listen(request).await.map(tonic::Response::into_inner) };
        let stream = self.answered(Lane::Session, asked).await?.map_err(|status| from_status(status, Does::Read))?;
        Ok(Heard { stream, _listens: listens })
    }

    /// The answer, if it comes in time. After a long silence another connection is made.
    async fn answered<T>(&self, lane: Lane, asked: impl Future<Output = T>) -> Result<T> {
        match within(ANSWER_WITHIN, asked).await {
            Some(answer) => Ok(answer),
            None => {
                *lock(&self.lanes[lane as usize]) = None;
                let message = format!("no answer within {ANSWER_WITHIN:?}");
                Err(error(ErrorKind::NetworkTimeout, message).in_doubt(false))
            }
        }
    }

    /// A client on a lane, and the request with what every request carries.
    async fn prepare<T>(&self, lane: Lane, message: T) -> Result<(FirestoreClient<Channel>, Request<T>)> {
        let database = &self.config.database;
        let mut request = Request::new(message);
        let header = |text: &str| MetadataValue::try_from(text).map_err(|_| malformed());
        let metadata = request.metadata_mut();
        metadata.insert("google-cloud-resource-prefix", header(database)?);
        metadata.insert("x-goog-request-params", header(&format!("database={}", database.replace('/', "%2F")))?);
        if self.config.emulator.is_some() {
            metadata.insert("authorization", MetadataValue::from_static("Bearer owner"));
        } else {
            let none = |kind, fault: &dyn std::fmt::Display| {
                let mend = "on a machine that has none by itself set GOOGLE_APPLICATION_CREDENTIALS to a key's file";
                error(kind, format!("no credentials ({mend}): {fault}")).in_doubt(false)
            };
            let given = within(ANSWER_WITHIN, self.credentials()?.headers(http::Extensions::new())).await;
            let late = || error(ErrorKind::Unavailable, "no credentials in time").in_doubt(false);
            match given.ok_or_else(late)?.map_err(|fault| match fault.is_transient() {
                true => none(ErrorKind::Unavailable, &fault),
                false => none(ErrorKind::Unauthorized, &fault),
            })? {
                CacheableResource::New { data, .. } => metadata.as_mut().extend(data),
                CacheableResource::NotModified => return Err(malformed()),
            }
        }
        Ok((FirestoreClient::new(self.channel(lane)?), request))
    }

    fn channel(&self, lane: Lane) -> Result<Channel> {
        let mut channel = lock(&self.lanes[lane as usize]);
        if let Some(channel) = &*channel {
            return Ok(channel.clone());
        }
        let invalid =
            |fault: tonic::transport::Error| error(ErrorKind::Misconfigured, format!("no connection: {fault}"));
        let endpoint = match &self.config.emulator {
            Some(host) => Endpoint::from_shared(format!("http://{host}")).map_err(invalid)?,
            None => {
                let tls = ClientTlsConfig::new().with_native_roots();
                Endpoint::from_static(SERVICE).tls_config(tls).map_err(invalid)?
            }
        };
        let endpoint = endpoint
            .connect_timeout(CONNECT_WITHIN)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_WITHIN);
        Ok(channel.insert(endpoint.connect_lazy()).clone())
    }

    /// Google's own way to find credentials, and to renew them.
    fn credentials(&self) -> Result<Credentials> {
        let mut credentials = lock(&self.credentials);
        if let Some(credentials) = &*credentials {
            return Ok(credentials.clone());
        }
        // That crate takes the cryptography of the process, and has none of its own. Who chose one before has chosen.
        let _chosen = rustls::crypto::ring::default_provider().install_default();
        let built = google_cloud_auth::credentials::Builder::default().with_scopes([SCOPE]).build();
        let built = built.map_err(|fault| error(ErrorKind::Unauthorized, format!("no credentials: {fault}")))?;
        Ok(credentials.insert(built).clone())
    }
}

/// The outcome, if it comes in time.
#[allow(clippy::disallowed_methods, reason = "a limit on a request, not a deadline of the protocol")]
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

#[allow(clippy::disallowed_methods, reason = "a pause between attempts, not a deadline of the protocol")]
pub(super) async fn pause(span: Duration) {
    tokio::time::sleep(span).await;
}

/// Runs work where connections live. Who no longer waits for it is seen by [`Interest`], and finds it finished or stopped
/// between two requests.
pub(super) async fn in_driver<T, F>(service: &Service, work: impl FnOnce(Interest) -> F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let waits = Arc::new(());
    let task = service.runtime()?.spawn(work(Interest::by(&waits)));
    let done = task.await;
    drop(waits);
    done.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the store was dropped while it was used")))
}

/// Whether anybody still waits for a step.
#[derive(Clone, Debug)]
pub(super) struct Interest(std::sync::Weak<()>);

impl Interest {
    /// Somebody who keeps this.
    pub(super) fn by(waits: &Arc<()>) -> Self {
        Self(Arc::downgrade(waits))
    }

    /// Stops a step whose caller has gone, between two requests.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.strong_count() == 0 {
            return Err(error(ErrorKind::Unavailable, "nobody waits for this step any more").in_doubt(false));
        }
        Ok(())
    }
}
