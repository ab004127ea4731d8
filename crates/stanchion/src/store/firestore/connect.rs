//! Connects to the service and sends the four requests that the store uses: read, query, commit and listen.
//!
//! All I/O runs on a thread of the store's own. A caller can therefore use any runtime or none, and a busy runtime of
//! the user delays no response. One connection carries the operations on keys and another one carries the sessions, so
//! that many operations cannot delay a renewal.
//!
//! The client never repeats a request (rule 7 of the store trait).

use std::future::Future;
use std::sync::{Arc, Mutex};
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
use super::error::{RequestKind, error, from_status, malformed};
use crate::error::{Error, ErrorKind, Result};
use crate::store::backoff::within;
use crate::store::connection_thread::ConnectionThread;
use crate::sync::lock;

const SERVICE: &str = "https://firestore.googleapis.com";
const SCOPE: &str = "https://www.googleapis.com/auth/datastore";

/// Time limit for establishing a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time after which an unanswered request has an unknown outcome and its connection is replaced.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval between pings. Without pings a listener would never notice a dead connection.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// Time limit for the answer to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of documents that one request reads.
const MAX_DOCUMENTS_PER_READ: usize = 300;

/// Identifies one of the two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Keys,
    Sessions,
}

#[derive(Debug)]
pub(super) struct Service {
    pub(super) config: Config,
    /// Runs the connections' runtime. The first request starts it.
    thread: ConnectionThread,
    channels: [Mutex<Option<Channel>>; 2],
    credentials: Mutex<Option<Credentials>>,
}

/// Describes a commit that was done.
#[derive(Clone, Debug)]
pub(super) struct Committed {
    /// Commit time in µs.
    pub(super) time: u64,
    /// New `update_time` of each written document, in the order of the writes; `None` for a delete.
    pub(super) written: Vec<Option<Timestamp>>,
}

/// Says why a commit failed.
#[derive(Debug)]
pub(super) enum CommitError {
    /// A precondition did not hold. Nothing was written.
    Changed,
    /// The service gave up because of concurrent writers. Nothing was written.
    Contended,
    /// The request failed for another reason, and its outcome may be unknown.
    Fault(Error),
}

/// Receives the changes to a query's documents until it is dropped.
pub(super) struct ListenStream {
    pub(super) stream: Streaming<api::ListenResponse>,
    _keep_open: oneshot::Sender<()>,
}

impl Service {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            thread: ConnectionThread::new("stanchion-firestore"),
            channels: Default::default(),
            credentials: Mutex::default(),
        }
    }

    /// Returns the runtime of the connections and starts it if necessary.
    pub(super) fn runtime(&self) -> Result<Handle> {
        self.thread.runtime()
    }

    /// Reads documents by name, in the order of `names`. The returned time, in µs, is a read time of the service that
    /// is not later than the read time of any document.
    pub(super) async fn read(&self, lane: Lane, names: &[String]) -> Result<(Vec<Option<api::Document>>, u64)> {
        let mut found = std::collections::HashMap::new();
        // Chunks have different read times; the first one holds for all documents.
        let mut time = None;
        for names in names.chunks(MAX_DOCUMENTS_PER_READ) {
            let request = api::BatchGetDocumentsRequest {
                database: self.config.database.clone(),
                documents: names.to_vec(),
                ..api::BatchGetDocumentsRequest::default()
            };
            let (mut client, request) = self.prepare(lane, request).await?;
            let response = async {
                let mut answers = client.batch_get_documents(request).await?.into_inner();
                let mut all = Vec::new();
                while let Some(answer) = answers.message().await? {
                    all.push(answer);
                }
                Ok(all)
            };
            let mut read = 0;
            for answer in
                self.in_time(lane, response).await?.map_err(|status| from_status(status, RequestKind::Read))?
            {
                read = read.max(micros_of(answer.read_time)?);
                if let Some(api::batch_get_documents_response::Result::Found(document)) = answer.result {
                    found.insert(document.name.clone(), document);
                }
            }
            time.get_or_insert(read);
        }
        Ok((names.iter().map(|name| found.remove(name)).collect(), time.unwrap_or_default()))
    }

    /// Runs a query and returns its documents and the read time in µs.
    pub(super) async fn run_query(
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
        let response = async {
            let mut answers = client.run_query(request).await?.into_inner();
            let (mut found, mut time) = (Vec::new(), None);
            while let Some(answer) = answers.message().await? {
                found.extend(answer.document);
                time = answer.read_time.or(time);
            }
            Ok((found, time))
        };
        let (found, time) =
            self.in_time(lane, response).await?.map_err(|status| from_status(status, RequestKind::Read))?;
        Ok((found, micros_of(time)?))
    }

    /// Commits either all of these writes or none.
    pub(super) async fn commit(&self, lane: Lane, writes: Vec<api::Write>) -> Result<Committed, CommitError> {
        let request = api::CommitRequest { database: self.config.database.clone(), writes, transaction: Vec::new() };
        let (mut client, request) = self.prepare(lane, request).await.map_err(CommitError::Fault)?;
        let response = async { client.commit(request).await.map(tonic::Response::into_inner) };
        let answer = self.in_time(lane, response).await.map_err(|late| CommitError::Fault(late.in_doubt(true)))?;
        let answer = answer.map_err(|status| match status.code() {
            // Our only preconditions are that a document exists, does not exist or is unchanged.
            Code::AlreadyExists | Code::FailedPrecondition => CommitError::Changed,
            // The service reports this for a database that was rewound.
            Code::InvalidArgument if status.message().contains("base version") => CommitError::Changed,
            // Another client has deleted the document: then the message contains the document's full name. A message
            // about a missing database must not match.
            Code::NotFound if status.message().contains("/documents/") || !status.message().contains("database") => {
                CommitError::Changed
            }
            Code::Aborted => CommitError::Contended,
            _ => CommitError::Fault(from_status(status, RequestKind::Write)),
        })?;
        let time = micros_of(answer.commit_time).map_err(|fault| CommitError::Fault(fault.in_doubt(true)))?;
        Ok(Committed { time, written: answer.write_results.into_iter().map(|result| result.update_time).collect() })
    }

    /// Listens to changes in a query's documents, starting with all documents that exist now.
    pub(super) async fn listen(&self, parent: &str, query: api::StructuredQuery) -> Result<ListenStream> {
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
        let (mut client, request) = self.prepare(Lane::Sessions, request).await?;
        // The service ends the stream when the client's half closes. Until then the stream occupies the connection,
        // even if its receiver was dropped. Dropping the sender closes the client's half, whether the service has
        // answered or not.
        let (keep_open, closed) = oneshot::channel::<()>();
        let until_closed = futures_util::stream::once(closed).filter_map(|_| std::future::ready(None));
        let request = request.map(|first| futures_util::stream::iter([first]).chain(until_closed));
        let response = async { client.listen(request).await.map(tonic::Response::into_inner) };
        let stream =
            self.in_time(Lane::Sessions, response).await?.map_err(|status| from_status(status, RequestKind::Read))?;
        Ok(ListenStream { stream, _keep_open: keep_open })
    }

    /// Waits for a response, but no longer than `RESPONSE_TIMEOUT`. After a timeout the next request uses a new
    /// connection.
    async fn in_time<T>(&self, lane: Lane, response: impl Future<Output = T>) -> Result<T> {
        match within(RESPONSE_TIMEOUT, response).await {
            Some(answer) => Ok(answer),
            None => {
                *lock(&self.channels[lane as usize]) = None;
                let message = format!("no answer within {RESPONSE_TIMEOUT:?}");
                Err(error(ErrorKind::NetworkTimeout, message).in_doubt(false))
            }
        }
    }

    /// Returns a client for this connection, and the request with the headers that every request needs.
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
            let headers = within(RESPONSE_TIMEOUT, self.credentials()?.headers(http::Extensions::new())).await;
            let late = || no_credentials(ErrorKind::Unavailable, &format!("none within {RESPONSE_TIMEOUT:?}"));
            match headers.ok_or_else(late)?.map_err(|fault| match fault.is_transient() {
                true => no_credentials(ErrorKind::Unavailable, &fault),
                false => no_credentials(ErrorKind::Unauthorized, &fault),
            })? {
                CacheableResource::New { data, .. } => metadata.as_mut().extend(data),
                CacheableResource::NotModified => return Err(malformed()),
            }
        }
        Ok((FirestoreClient::new(self.channel(lane)?), request))
    }

    fn channel(&self, lane: Lane) -> Result<Channel> {
        let mut channel = lock(&self.channels[lane as usize]);
        if let Some(channel) = &*channel {
            return Ok(channel.clone());
        }
        let invalid = |fault: tonic::transport::Error| {
            error(ErrorKind::Misconfigured, format!("cannot set up a connection: {fault}"))
        };
        let endpoint = match &self.config.emulator {
            Some(host) => Endpoint::from_shared(format!("http://{host}")).map_err(invalid)?,
            None => {
                let tls = ClientTlsConfig::new().with_native_roots();
                Endpoint::from_static(SERVICE).tls_config(tls).map_err(invalid)?
            }
        };
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        Ok(channel.insert(endpoint.connect_lazy()).clone())
    }

    /// Returns Google's default credentials, which renew themselves.
    fn credentials(&self) -> Result<Credentials> {
        let mut credentials = lock(&self.credentials);
        if let Some(credentials) = &*credentials {
            return Ok(credentials.clone());
        }
        // The credentials crate needs a process-wide crypto provider and has none of its own. If the program has
        // installed one already, this call fails and changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default(); // fails if there is one already
        let built = google_cloud_auth::credentials::Builder::default().with_scopes([SCOPE]).build();
        let built = built.map_err(|fault| no_credentials(ErrorKind::Unauthorized, &fault))?;
        Ok(credentials.insert(built).clone())
    }
}

/// Returns the error of a request that could not be sent, because there are no credentials.
fn no_credentials(kind: ErrorKind, fault: &dyn std::fmt::Display) -> Error {
    let advice = "outside Google Cloud, set GOOGLE_APPLICATION_CREDENTIALS to the path of a key file";
    error(kind, format!("no credentials ({advice}): {fault}")).in_doubt(false)
}

/// Runs work on the store's runtime. If the caller drops the returned future, the work either finishes or stops between
/// two requests, at the next [`CallerWatch::check`].
pub(super) async fn run_on_driver<T, F>(service: &Service, work: impl FnOnce(CallerWatch) -> F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let caller_token = Arc::new(());
    let task = service.runtime()?.spawn(work(CallerWatch::of(&caller_token)));
    let done = task.await;
    drop(caller_token);
    done.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the store was dropped during an operation")))
}

/// Tells a running operation whether its caller still waits for the result.
#[derive(Clone, Debug)]
pub(super) struct CallerWatch(std::sync::Weak<()>);

impl CallerWatch {
    /// Watches a caller that keeps `caller_token` alive while it waits.
    pub(super) fn of(caller_token: &Arc<()>) -> Self {
        Self(Arc::downgrade(caller_token))
    }

    /// Fails if the caller is gone, so that an operation stops between two requests.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.strong_count() == 0 {
            return Err(error(ErrorKind::Unavailable, "the caller no longer waits for this operation").in_doubt(false));
        }
        Ok(())
    }
}
