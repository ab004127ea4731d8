//! Runs a small Firestore in this process, with documents, preconditions, three kinds of query, and listening. Unlike
//! the emulator it can lose responses, reject or delay requests, end streams, and run on another clock.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::SystemTime;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;
use tokio::sync::{oneshot, watch};
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, StreamingService, UnaryService};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// Says what happens to one commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitFault {
    /// The commit is rejected with this code and not done.
    Rejected(Code),
    /// The commit is done, and the client receives this error code.
    DoneWithError(Code),
    /// The commit is done, and the client receives no response.
    Unanswered,
    /// The commit is done when the test calls [`FirestoreFake::finish_delayed_commits`]. The client receives a response
    /// if it still waits then.
    Delayed,
    /// The commit is done at once, but the client receives the response when the test calls
    /// [`FirestoreFake::finish_delayed_commits`].
    AnsweredLate,
}

/// A running fake, which stops when it is dropped.
#[derive(Debug)]
pub struct FirestoreFake {
    inner: Arc<Inner>,
    port: u16,
    _keep_running: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    documents: Mutex<Documents>,
    changed: watch::Sender<u64>,
    streams: watch::Sender<u64>,
    offset: AtomicI64,
    is_unauthenticated: AtomicBool,
    suppresses_changes: AtomicBool,
    faults: Mutex<std::collections::VecDeque<CommitFault>>,
    delayed_commits: Mutex<Vec<DelayedCommit>>,
    /// Number of reads that are still answered, or `None` for no limit.
    reads: watch::Sender<Option<u64>>,
    /// Whether the fake leaves requests to listen unanswered.
    ignores_listens: watch::Sender<bool>,
    request_counts: Mutex<HashMap<String, u64>>,
}

type Answer = Result<api::CommitResponse, Status>;

/// A commit whose response is delayed.
#[derive(Debug)]
struct DelayedCommit {
    /// The response of a finished commit, or a request that is still to be done.
    work: Result<Box<Answer>, api::CommitRequest>,
    sender: oneshot::Sender<Answer>,
}

#[derive(Debug, Default)]
struct Documents {
    /// Documents by name, with the time of the last write. A deleted document keeps the time of its deletion.
    all: BTreeMap<String, (Option<api::Document>, u64)>,
    last: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

fn stamp(micros: u64) -> Timestamp {
    Timestamp { seconds: (micros / 1_000_000) as i64, nanos: (micros % 1_000_000 * 1_000) as i32 }
}

fn micros(time: &Timestamp) -> u64 {
    time.seconds as u64 * 1_000_000 + time.nanos as u64 / 1_000
}

impl FirestoreFake {
    /// Starts a fake.
    ///
    /// # Panics
    /// Panics if the fake cannot open a port.
    pub fn start() -> Self {
        let inner = Arc::new(Inner::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (keep_running, stopped) = oneshot::channel::<()>();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let service = Service(inner.clone());
        std::thread::spawn(move || {
            runtime.block_on(async move {
                let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
                let serve = tonic::transport::Server::builder().serve_with_incoming(service, incoming);
                tokio::select! { _ = stopped => {}, served = serve => served.unwrap() }
            });
        });
        Self { inner, port, _keep_running: keep_running }
    }

    /// Returns the URL of a new project.
    pub fn url(&self) -> String {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        format!("firestore://fake-{}?emulator=127.0.0.1:{}", NEXT.fetch_add(1, Ordering::Relaxed), self.port)
    }

    /// Applies these faults to the next commits, one to each.
    pub fn next_commits(&self, faults: impl IntoIterator<Item = CommitFault>) {
        lock(&self.inner.faults).extend(faults);
    }

    /// Returns the number of faults that have not been applied yet.
    pub fn faults_left(&self) -> usize {
        lock(&self.inner.faults).len()
    }

    /// Returns the number of delayed commits.
    pub fn delayed_commits(&self) -> usize {
        lock(&self.inner.delayed_commits).len()
    }

    /// Does the delayed commits and sends their responses. Returns the number of commits that succeeded.
    pub fn finish_delayed_commits(&self) -> usize {
        let held_back = std::mem::take(&mut *lock(&self.inner.delayed_commits));
        let answer = |DelayedCommit { work, sender }| {
            let answer = work.map_or_else(|request| self.inner.commit(&request), |done| *done);
            let is_done = answer.is_ok();
            let _ = sender.send(answer); // the client may have stopped waiting
            is_done
        };
        held_back.into_iter().map(answer).filter(|is_done| *is_done).count()
    }

    /// Answers this many more reads of documents. Later reads wait until [`answer_reads`](Self::answer_reads).
    pub fn hold_reads_after(&self, answered: u64) {
        self.inner.reads.send_replace(Some(answered));
    }

    /// Returns the number of waiting reads.
    pub fn held_reads(&self) -> usize {
        self.inner.reads.receiver_count()
    }

    /// Answers all waiting and later reads.
    pub fn answer_reads(&self) {
        self.inner.reads.send_replace(None);
    }

    /// Sets whether requests to listen stay unanswered.
    pub fn ignore_listens(&self, ignores: bool) {
        self.inner.ignores_listens.send_replace(ignores);
    }

    /// Makes a document's record unreadable.
    ///
    /// # Panics
    /// Panics if there is no document of this name.
    pub fn corrupt(&self, name: &str) {
        let mut documents = lock(&self.inner.documents);
        let there = documents.all.iter_mut().find(|(whole, _)| whole.ends_with(&format!("/documents/{name}")));
        let document = there.and_then(|(_, (document, _))| document.as_mut()).expect("no such document");
        let garbage = api::Value { value_type: Some(api::value::ValueType::BytesValue(vec![0xff])) };
        document.fields.insert("record".to_owned(), garbage);
    }

    /// Moves the service's clock this many seconds away from the machine's clock.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.inner.offset.store(seconds * 1_000_000, Ordering::SeqCst);
    }

    /// Sets whether the service rejects all credentials.
    pub fn refuse_credentials(&self, refuses: bool) {
        self.inner.is_unauthenticated.store(refuses, Ordering::SeqCst);
    }

    /// Returns the number of open streams.
    pub fn streams(&self) -> usize {
        self.inner.streams.receiver_count()
    }

    /// Ends all streams, as a real server does before it is replaced.
    pub fn end_streams(&self) {
        self.inner.streams.send_modify(|ended| *ended += 1);
    }

    /// Sets whether streams stop reporting changes.
    pub fn suppress_changes(&self, suppresses: bool) {
        self.inner.suppresses_changes.store(suppresses, Ordering::SeqCst);
    }

    /// Returns the number of requests by method.
    pub fn request_counts(&self) -> HashMap<String, u64> {
        lock(&self.inner.request_counts).clone()
    }

    /// Returns the number of requests of one method: `Commit`, `BatchGetDocuments`, `RunQuery` or `Listen`.
    pub fn request_count(&self, method: &str) -> u64 {
        self.request_counts().get(method).copied().unwrap_or_default()
    }

    /// Returns the names of the existing documents, including their collections.
    pub fn documents(&self) -> Vec<String> {
        let documents = lock(&self.inner.documents);
        let there = documents.all.iter().filter(|(_, (document, _))| document.is_some());
        there.map(|(name, _)| name.split_once("/documents/").unwrap().1.to_owned()).collect()
    }
}

impl Inner {
    /// Returns the time of the service's clock, which never returns the same time twice.
    fn now(&self, documents: &mut Documents) -> u64 {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as i64;
        let now = (wall + self.offset.load(Ordering::SeqCst)) as u64;
        documents.last = now.max(documents.last + 1);
        documents.last
    }

    fn commit(&self, request: &api::CommitRequest) -> Result<api::CommitResponse, Status> {
        use api::precondition::ConditionType;
        use api::write::Operation;

        let mut documents = lock(&self.documents);
        for write in &request.writes {
            let name = match write.operation.as_ref().unwrap() {
                Operation::Update(document) => &document.name,
                Operation::Delete(name) => name,
                Operation::Transform(_) => return Err(Status::unimplemented("transforms")),
            };
            let there = documents.all.get(name).filter(|(document, _)| document.is_some()).map(|(_, at)| *at);
            match write.current_document.as_ref().and_then(|condition| condition.condition_type.as_ref()) {
                Some(ConditionType::Exists(false)) if there.is_some() => {
                    return Err(Status::already_exists("the document exists"));
                }
                // The real service reports this; the emulator reports a failed precondition instead.
                Some(ConditionType::Exists(true) | ConditionType::UpdateTime(_)) if there.is_none() => {
                    return Err(Status::not_found(format!("No document to update: {name}")));
                }
                Some(ConditionType::UpdateTime(time)) if there != Some(micros(time)) => {
                    return Err(Status::failed_precondition("the document has changed"));
                }
                _ => {}
            }
        }
        let now = self.now(&mut documents);
        let mut results = Vec::new();
        for write in &request.writes {
            let mut written = None;
            match write.operation.clone().unwrap() {
                Operation::Update(mut document) => {
                    let before = documents.all.get(&document.name).and_then(|(before, _)| before.clone());
                    if let Some(mask) = &write.update_mask {
                        let mut fields = before.as_ref().map(|before| before.fields.clone()).unwrap_or_default();
                        for path in &mask.field_paths {
                            match document.fields.remove(path) {
                                Some(value) => drop(fields.insert(path.clone(), value)),
                                None => drop(fields.remove(path)),
                            }
                        }
                        document.fields = fields;
                    }
                    let is_same = before.as_ref().is_some_and(|before| before.fields == document.fields);
                    let at = if is_same { micros(&before.as_ref().unwrap().update_time.unwrap()) } else { now };
                    document.create_time = before.map_or(Some(stamp(now)), |before| before.create_time);
                    document.update_time = Some(stamp(at));
                    written = document.update_time;
                    documents.all.insert(document.name.clone(), (Some(document), at));
                }
                Operation::Delete(name) => drop(documents.all.insert(name, (None, now))),
                Operation::Transform(_) => {}
            }
            results.push(api::WriteResult { update_time: written, transform_results: Vec::new() });
        }
        drop(documents);
        self.changed.send_modify(|version| *version += 1);
        Ok(api::CommitResponse { write_results: results, commit_time: Some(stamp(now)) })
    }

    async fn respond_to_commit(&self, request: api::CommitRequest) -> Result<api::CommitResponse, Status> {
        let fault = lock(&self.faults).pop_front();
        match fault {
            None => self.commit(&request),
            Some(CommitFault::Rejected(code)) => Err(Status::new(code, "rejected by the test")),
            Some(CommitFault::DoneWithError(code)) => {
                self.commit(&request)?;
                Err(Status::new(code, "done, but the test reports an error"))
            }
            Some(CommitFault::Unanswered) => {
                drop(self.commit(&request));
                std::future::pending().await
            }
            Some(CommitFault::Delayed) => self.delay(Err(request)).await,
            Some(CommitFault::AnsweredLate) => self.delay(Ok(Box::new(self.commit(&request)))).await,
        }
    }

    async fn delay(&self, work: Result<Box<Answer>, api::CommitRequest>) -> Answer {
        let (sender, receiver) = oneshot::channel();
        lock(&self.delayed_commits).push(DelayedCommit { work, sender });
        match receiver.await {
            Ok(answer) => answer,
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until reads are allowed.
    async fn wait_for_reads(&self) {
        let mut reads = self.reads.subscribe();
        loop {
            let mut is_allowed = false;
            self.reads.send_if_modified(|left| {
                is_allowed = *left != Some(0);
                *left = left.map(|left| left.saturating_sub(1));
                false
            });
            if is_allowed {
                return;
            }
            drop(reads.changed().await);
        }
    }

    fn read(&self, request: &api::BatchGetDocumentsRequest) -> Vec<api::BatchGetDocumentsResponse> {
        use api::batch_get_documents_response::Result as Read;
        let mut documents = lock(&self.documents);
        let now = self.now(&mut documents);
        let read = request.documents.iter().map(|name| {
            let there = documents.all.get(name).and_then(|(document, _)| document.clone());
            let result = Some(there.map_or_else(|| Read::Missing(name.clone()), Read::Found));
            api::BatchGetDocumentsResponse { transaction: Vec::new(), read_time: Some(stamp(now)), result }
        });
        read.collect()
    }

    fn found(&self, parent: &str, query: &api::StructuredQuery) -> (Vec<api::Document>, u64) {
        let mut documents = lock(&self.documents);
        let now = self.now(&mut documents);
        let folder = format!("{parent}/{}/", query.from[0].collection_id);
        let within = documents.all.range(folder.clone()..).take_while(|(name, _)| name.starts_with(&folder));
        let within = within.filter(|(name, _)| !name[folder.len()..].contains('/'));
        let mut found: Vec<_> = within.filter_map(|(_, (document, _))| document.clone()).collect();
        found.retain(|document| query.r#where.as_ref().is_none_or(|filter| fits(document, filter)));
        if let Some(order) = query.order_by.first() {
            let field = &order.field.as_ref().unwrap().field_path;
            found.retain(|document| document.fields.contains_key(field));
            found.sort_by_key(|document| rank(&document.fields[field]));
        }
        found.truncate(query.limit.map_or(usize::MAX, |limit| limit as usize));
        (found, now)
    }

    fn run_query(&self, request: &api::RunQueryRequest) -> Vec<api::RunQueryResponse> {
        let Some(api::run_query_request::QueryType::StructuredQuery(query)) = &request.query_type else {
            return Vec::new();
        };
        let (found, now) = self.found(&request.parent, query);
        let answer = |document| api::RunQueryResponse {
            document,
            read_time: Some(stamp(now)),
            ..api::RunQueryResponse::default()
        };
        let end = found.is_empty().then(|| answer(None));
        found.into_iter().map(Some).map(answer).chain(end).collect()
    }

    fn listen(self: Arc<Self>, first: api::ListenRequest) -> BoxStream<'static, Result<api::ListenResponse, Status>> {
        use api::listen_response::ResponseType;
        let (changed, ended) = (self.changed.subscribe(), self.streams.subscribe());
        let start = (changed, ended, HashMap::<String, u64>::new(), true);
        let listened = futures_util::stream::unfold(start, move |(mut changed, mut ended, mut sent, is_first)| {
            let (inner, first) = (self.clone(), first.clone());
            async move {
                if !is_first {
                    // An ended stream must not report later changes.
                    tokio::select! {
                        biased;
                        _ = ended.changed() => return None,
                        _ = changed.changed() => {}
                    }
                }
                if inner.suppresses_changes.load(Ordering::SeqCst) && !is_first {
                    return Some((Vec::new(), (changed, ended, sent, false)));
                }
                let Some(api::listen_request::TargetChange::AddTarget(target)) = &first.target_change else {
                    return None;
                };
                let Some(api::target::TargetType::Query(query)) = &target.target_type else { return None };
                let Some(api::target::query_target::QueryType::StructuredQuery(structured)) = &query.query_type else {
                    return None;
                };
                let mut answers = Vec::new();
                for document in inner.found(&query.parent, structured).0 {
                    let at = micros(&document.update_time.unwrap());
                    if sent.insert(document.name.clone(), at) != Some(at) {
                        let change = api::DocumentChange {
                            document: Some(document),
                            target_ids: vec![1],
                            removed_target_ids: Vec::new(),
                        };
                        answers.push(ResponseType::DocumentChange(change));
                    }
                }
                if is_first {
                    let mut current = api::TargetChange { target_ids: vec![1], ..api::TargetChange::default() };
                    current.set_target_change_type(api::target_change::TargetChangeType::Current);
                    answers.push(ResponseType::TargetChange(current));
                }
                let answers = answers.into_iter().map(|answer| Ok(api::ListenResponse { response_type: Some(answer) }));
                Some((answers.collect(), (changed, ended, sent, false)))
            }
        });
        listened.flat_map(|answers: Vec<_>| futures_util::stream::iter(answers)).boxed()
    }
}

/// Returns the sort key of a value. All values of one field must have the same type.
fn rank(value: &api::Value) -> (u64, String) {
    match value.value_type.as_ref().unwrap() {
        api::value::ValueType::StringValue(text) => (0, text.clone()),
        api::value::ValueType::TimestampValue(time) => (micros(time), String::new()),
        other => panic!("the fake cannot sort by {other:?}"),
    }
}

fn fits(document: &api::Document, filter: &api::structured_query::Filter) -> bool {
    use api::structured_query::field_filter::Operator;
    use api::structured_query::filter::FilterType;
    match filter.filter_type.as_ref().unwrap() {
        FilterType::CompositeFilter(all) => all.filters.iter().all(|filter| fits(document, filter)),
        FilterType::FieldFilter(filter) => {
            let Some(value) = document.fields.get(&filter.field.as_ref().unwrap().field_path) else { return false };
            let with = filter.value.as_ref().unwrap();
            match filter.op() {
                Operator::GreaterThan => rank(value) > rank(with),
                Operator::GreaterThanOrEqual => rank(value) >= rank(with),
                Operator::LessThan => rank(value) < rank(with),
                Operator::ArrayContains => match value.value_type.as_ref().unwrap() {
                    api::value::ValueType::ArrayValue(array) => array.values.contains(with),
                    _ => false,
                },
                other => panic!("the fake does not support {other:?}"),
            }
        }
        FilterType::UnaryFilter(_) => panic!("the fake does not support unary filters"),
    }
}

#[derive(Clone, Debug)]
struct Service(Arc<Inner>);

type ResponseFuture<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

struct Commit(Arc<Inner>);

impl UnaryService<api::CommitRequest> for Commit {
    type Response = api::CommitResponse;
    type Future = ResponseFuture<api::CommitResponse>;

    fn call(&mut self, request: Request<api::CommitRequest>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move { inner.respond_to_commit(request.into_inner()).await.map(Response::new) })
    }
}

/// Answers requests that have a stream of responses.
struct Read(Arc<Inner>);

impl ServerStreamingService<api::BatchGetDocumentsRequest> for Read {
    type Response = api::BatchGetDocumentsResponse;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = ResponseFuture<Self::ResponseStream>;

    fn call(&mut self, request: Request<api::BatchGetDocumentsRequest>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move {
            inner.wait_for_reads().await;
            let answers = inner.read(request.get_ref()).into_iter().map(Ok);
            Ok(Response::new(futures_util::stream::iter(answers).boxed()))
        })
    }
}

impl ServerStreamingService<api::RunQueryRequest> for Read {
    type Response = api::RunQueryResponse;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = ResponseFuture<Self::ResponseStream>;

    fn call(&mut self, request: Request<api::RunQueryRequest>) -> Self::Future {
        let answers = self.0.run_query(request.get_ref()).into_iter().map(Ok);
        Box::pin(async { Ok(Response::new(futures_util::stream::iter(answers).boxed())) })
    }
}

impl StreamingService<api::ListenRequest> for Read {
    type Response = api::ListenResponse;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = ResponseFuture<Self::ResponseStream>;

    fn call(&mut self, request: Request<Streaming<api::ListenRequest>>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move {
            drop(inner.ignores_listens.subscribe().wait_for(|ignores| !ignores).await);
            let mut requests = request.into_inner();
            let first = requests.message().await?.ok_or_else(|| Status::cancelled("the client sent no request"))?;
            Ok(Response::new(inner.listen(first)))
        })
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move {
            let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
            *lock(&inner.request_counts).entry(method.clone()).or_default() += 1;
            if inner.is_unauthenticated.load(Ordering::SeqCst) {
                return Ok(Status::unauthenticated("the token has expired").into_http());
            }
            Ok(match method.as_str() {
                "Commit" => Grpc::new(ProstCodec::default()).unary(Commit(inner), request).await,
                "BatchGetDocuments" => {
                    let codec = ProstCodec::<_, api::BatchGetDocumentsRequest>::default();
                    Grpc::new(codec).server_streaming(Read(inner), request).await
                }
                "RunQuery" => {
                    let codec = ProstCodec::<_, api::RunQueryRequest>::default();
                    Grpc::new(codec).server_streaming(Read(inner), request).await
                }
                "Listen" => {
                    let codec = ProstCodec::<_, api::ListenRequest>::default();
                    Grpc::new(codec).streaming(Read(inner), request).await
                }
                other => Status::unimplemented(format!("the fake does not support {other}")).into_http(),
            })
        })
    }
}
