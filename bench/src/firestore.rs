//! Measures commits and hand-offs on Firestore in Google's emulator, if the machine has it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use stanchion::{Clock, Locks};
use stanchion_testkit::servers::FirestoreEmulator;

/// Measures acquire + release, hand-offs between two handles, and a wave of waiters.
pub(crate) async fn all() {
    const PAIRS: usize = 300;
    const TURNS: usize = 200;
    const WAITERS: usize = 50;
    const HELD: Duration = Duration::from_millis(20);
    let started = tokio::task::spawn_blocking(FirestoreEmulator::shared).await.unwrap();
    let Some(emulator) = started else {
        println!("firestore  NOT MEASURED: this machine has no emulator");
        return;
    };
    let clock = Clock::system();
    let url = emulator.url();
    let locks = [Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap()];
    let commits = Mutex::new(Vec::new());
    let pair = async || {
        let start = clock.now();
        let guard = locks[0].lock("pair").await.unwrap();
        let acquired = clock.now();
        guard.release().await.unwrap();
        commits.lock().unwrap().extend([acquired.since(start), clock.now().since(acquired)]);
    };
    for _ in 0..PAIRS {
        pair().await;
    }
    // A fresh emulator is slow at first. Drop these figures, and measure commits during the hand-offs.
    commits.lock().unwrap().clear();
    // Each hold lasts until the holder's store has learned of the waiter.
    let pause = async || {
        let start = clock.now();
        while clock.now().since(start) < HELD {
            pair().await;
        }
    };
    let (mut answers, mut spans) =
        super::in_turn(&locks, TURNS, pause).await.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
    let commit = super::median(&mut commits.lock().unwrap());
    println!("firestore  an operation of one commit (acquire or release): p50 {commit:.2?}");
    let handoff = super::median(&mut spans);
    let ratio = handoff.as_secs_f64() / commit.as_secs_f64();
    let answered = super::median(&mut answers);
    let own_ratio = handoff.as_secs_f64() / answered.as_secs_f64();
    println!(
        "firestore  hand-off, two handles: p50 {handoff:.2?}, {ratio:.2} such operations; the reply to its own commit \
         takes {answered:.2?}, and the hand-off {own_ratio:.2} times that"
    );
    wave(&locks, WAITERS, commit).await;
    bare(emulator.port(), TURNS, HELD).await;
}

/// Measures the emulator without this library.
///
/// The figures are the time to commit one document without a listener, and for a commit of two documents the times
/// until its reply and until a stream reports the second document. A hand-off writes two documents, so it cannot be
/// faster.
async fn bare(port: u16, turns: usize, pause: Duration) {
    use api::firestore_client::FirestoreClient;
    use api::listen_response::ResponseType;
    use api::value::ValueType;

    const DATABASE: &str = "projects/bare/databases/(default)";
    let parent = format!("{DATABASE}/documents");
    let channel =
        async || tonic::transport::Channel::from_shared(format!("http://127.0.0.1:{port}")).unwrap().connect().await;
    let named = |mut request: tonic::Request<()>| {
        request.metadata_mut().insert("google-cloud-resource-prefix", DATABASE.parse().unwrap());
        Ok(request)
    };
    let mut writer = FirestoreClient::with_interceptor(channel().await.unwrap(), named);
    let mut reader = FirestoreClient::with_interceptor(channel().await.unwrap(), named);
    let from = api::structured_query::CollectionSelector { collection_id: "calls".into(), all_descendants: false };
    let query = api::StructuredQuery { from: vec![from], ..Default::default() };
    let query_type = Some(api::target::query_target::QueryType::StructuredQuery(query));
    let target = api::target::QueryTarget { parent: parent.clone(), query_type };
    let target_type = Some(api::target::TargetType::Query(target));
    let target = api::Target { target_id: 1, target_type, ..Default::default() };
    let target_change = Some(api::listen_request::TargetChange::AddTarget(target));
    let first = api::ListenRequest { database: DATABASE.into(), target_change, ..Default::default() };
    let requests = futures_util::stream::iter([first]).chain(futures_util::stream::pending());
    let mut stream = reader.listen(requests).await.unwrap().into_inner();
    let clock = Clock::system();
    let [mut commits, mut answers, mut calls] = [const { Vec::new() }; 3];
    for turn in 0..turns {
        // Every round writes the same documents, because a stream gets slower with more documents.
        let mut commit = async |collections: &[&str]| {
            let write = |collection| {
                let turn = api::Value { value_type: Some(ValueType::IntegerValue(turn as i64)) };
                let fields = [("turn".to_owned(), turn)].into();
                let document =
                    api::Document { name: format!("{parent}/{collection}/one"), fields, ..Default::default() };
                api::Write { operation: Some(api::write::Operation::Update(document)), ..Default::default() }
            };
            let writes = collections.iter().map(write).collect();
            let request = api::CommitRequest { database: DATABASE.into(), writes, ..Default::default() };
            let start = clock.now();
            writer.commit(request).await.unwrap();
            clock.now().since(start)
        };
        let since = clock.now();
        while clock.now().since(since) < pause {
            commits.push(commit(&["others"]).await);
        }
        let start = clock.now();
        let report = async {
            loop {
                let message = stream.message().await.unwrap().unwrap();
                let Some(ResponseType::DocumentChange(change)) = message.response_type else { continue };
                let written = change.document.and_then(|mut document| document.fields.remove("turn"));
                if written.is_some_and(|written| written.value_type == Some(ValueType::IntegerValue(turn as i64))) {
                    return clock.now().since(start);
                }
            }
        };
        let (answered, reported) = tokio::join!(commit(&["keys", "calls"]), report);
        answers.push(answered);
        calls.push(reported);
    }
    let [commit, answered, call] = [commits, answers, calls].map(|mut spans| super::median(&mut spans));
    let ratio = call.as_secs_f64() / commit.as_secs_f64();
    println!(
        "firestore  the emulator alone: commit p50 {commit:.2?}; two documents with a listener: reply after \
         {answered:.2?}, stream after {call:.2?}, {ratio:.2} commits"
    );
}

/// Measures the hand-offs of waiters that arrived one after another.
async fn wave(locks: &[Locks; 2], waiters: usize, commit: Duration) {
    let clock = Clock::system();
    let held = locks[0].lock("wave").await.unwrap();
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiting = Vec::new();
    for i in 0..waiters {
        let (waiter, served, clock) = (locks[i % 2].clone(), served.clone(), clock.clone());
        waiting.push(tokio::spawn(async move {
            let guard = waiter.lock("wave").await.unwrap();
            served.lock().unwrap().push((i, clock.now()));
            guard.release().await.unwrap();
        }));
        while locks[0].inspect("wave").await.unwrap().waiters.len() <= i {}
    }
    held.release().await.unwrap();
    for task in waiting {
        task.await.unwrap();
    }
    let served = served.lock().unwrap();
    let in_order = served.windows(2).filter(|pair| pair[0].0 < pair[1].0).count();
    let mut spans: Vec<_> = served.windows(2).map(|pair| pair[1].1.since(pair[0].1)).collect();
    let handoff = super::median(&mut spans);
    let ratio = handoff.as_secs_f64() / commit.as_secs_f64();
    println!(
        "firestore  wave of {waiters}: {in_order} of {} in order, hand-off p50 {handoff:.2?}, {ratio:.2} commits",
        waiters - 1
    );
}
