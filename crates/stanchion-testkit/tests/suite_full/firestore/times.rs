//! Checks the assumptions about the service's times on which the store relies (ADR 13).
#![allow(clippy::unwrap_used, reason = "test code")]

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::firestore_client::FirestoreClient;
use stanchion::Locks;
use stanchion_testkit::block_on;
use stanchion_testkit::servers::FirestoreEmulator;
use tonic::transport::{Channel, Endpoint};

const DATABASE: &str = "projects/times/databases/(default)";

async fn client() -> FirestoreClient<Channel> {
    let emulator = FirestoreEmulator::shared().expect("this machine has no Firestore emulator");
    let address = format!("http://127.0.0.1:{}", emulator.port());
    FirestoreClient::new(Endpoint::from_shared(address).unwrap().connect_lazy())
}

fn create(name: &str) -> api::Write {
    let document = api::Document { name: name.to_owned(), ..api::Document::default() };
    let missing = api::precondition::ConditionType::Exists(false);
    api::Write {
        operation: Some(api::write::Operation::Update(document)),
        current_document: Some(api::Precondition { condition_type: Some(missing) }),
        ..api::Write::default()
    }
}

fn delete(name: &str) -> api::Write {
    api::Write { operation: Some(api::write::Operation::Delete(name.to_owned())), ..api::Write::default() }
}

/// Commits the writes. Returns the commit time and the update time of each document, in µs.
async fn commit(client: &mut FirestoreClient<Channel>, writes: Vec<api::Write>) -> (u64, Vec<Option<u64>>) {
    let micros = |time: prost_types::Timestamp| time.seconds as u64 * 1_000_000 + time.nanos as u64 / 1_000;
    let request = api::CommitRequest { database: DATABASE.to_owned(), writes, transaction: Vec::new() };
    let mut request = tonic::Request::new(request);
    request.metadata_mut().insert("authorization", "Bearer owner".parse().unwrap());
    let done = client.commit(request).await.unwrap().into_inner();
    (
        micros(done.commit_time.unwrap()),
        done.write_results.iter().map(|result| result.update_time.map(micros)).collect(),
    )
}

#[test]
fn document_times_increase_across_deletion() {
    block_on(async {
        let mut client = client().await;
        let name = format!("{DATABASE}/documents/keys/k");
        let mut last = 0;
        for round in 0..300 {
            let (created, written) = commit(&mut client, vec![create(&name)]).await;
            assert_eq!(written, [Some(created)], "the update time is the commit time");
            let (deleted, _) = commit(&mut client, vec![delete(&name)]).await;
            assert!(last < created && created < deleted, "round {round}: {last}, {created}, {deleted}");
            last = deleted;
        }
    });
}

/// A notification is written with the key's document, and its own update time must tell when that was.
#[test]
fn one_commit_has_one_time() {
    block_on(async {
        let mut client = client().await;
        for round in 0..50 {
            let names = ["one", "two/below/three"].map(|name| format!("{DATABASE}/documents/commit{round}/{name}"));
            let (time, written) = commit(&mut client, names.iter().map(|name| create(name)).collect()).await;
            assert_eq!(written, [Some(time); 2]);
        }
    });
}

#[test]
fn fences_outlive_deleted_keys() {
    let emulator = FirestoreEmulator::shared().expect("this machine has no Firestore emulator");
    block_on(async {
        let url = emulator.url();
        let both = [Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap()];
        let mut last = None;
        for number in 0..300 {
            let guard = both[number % 2].lock("k").await.unwrap();
            assert!(Some(guard.fence()) > last, "{number}: {last:?}, then {}", guard.fence());
            last = Some(guard.fence());
            guard.release().await.unwrap();
        }
        assert!(both[0].list("").await.unwrap().is_empty(), "the key's document is deleted");
    });
}
