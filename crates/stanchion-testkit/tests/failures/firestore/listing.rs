//! Checks listings with damaged documents and expired holds.

use super::*;
use stanchion_testkit::read_pages;

#[test]
fn damaged_documents_are_named_and_skipped() {
    let fake = FirestoreFake::start();
    let url = fake.url();
    block_on(async {
        let good = Client::open(&url, MINUTE).await;
        good.lock(&good.request("good")).await;
        good.lock(&good.request("bad")).await;
        let before = fake.documents();
        good.lock(&good.request("worse")).await;
        let worse = fake.documents().into_iter().find(|document| !before.contains(document)).unwrap();
        fake.corrupt(&worse);
        let observer = Firestore::from_url(&url).unwrap();
        let (pages, damaged) = read_pages(&observer, ":", 2).await;
        let keys: Vec<_> = pages.iter().flat_map(|page| &page.keys).map(|state| state.key.name()).collect();
        assert_eq!(keys, ["bad", "good"]);
        assert_eq!(damaged.iter().map(|entry| &*entry.name).collect::<Vec<_>>(), [":worse"]);
        let fault = Locks::open(&url).await.unwrap().inspect("worse").await.unwrap_err();
        assert!(fault.to_string().starts_with("key `worse` in firestore: "), "{fault}");
    });
}

#[test]
fn list_writes_nothing() {
    let fake = FirestoreFake::start();
    let url = fake.url();
    block_on(async {
        let (expired, actor) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for at in 0..50 {
            expired.lock(&expired.request(&format!("k{at}"))).await;
        }
        actor.lock(&actor.request("last")).await;
        expired.store.close_session(expired.session).await.unwrap();
        let observer = Firestore::from_url(&url).unwrap();
        let before = fake.request_count("Commit");
        let (pages, _) = read_pages(&observer, "", 10).await;
        let keys: Vec<_> = pages.iter().flat_map(|page| &page.keys).map(|state| state.key.name()).collect();
        assert_eq!((keys, fake.request_count("Commit")), (vec!["last"], before));
    });
}
