//! Measures the embedded store: `cargo run --release --example sqlite_bench`.
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing to tell")]

use std::sync::Arc;
use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, OpenSession, PollOutcome, Push, Sqlite, Store, StoreTime, Term,
};
use stanchion::{Clock, Key, SessionId, TokenId};

fn request(key: &Key, session: SessionId, enqueue: bool) -> AcquireRequest {
    AcquireRequest {
        key: key.clone(),
        token: TokenId::random().unwrap(),
        session,
        demand: Demand::MUTEX,
        term: Term::Session { max_hold: None },
        enqueue,
        not_after: StoreTime::from_micros(u64::MAX),
        metadata: None,
        trace: None,
    }
}

async fn session(store: &Sqlite) -> SessionId {
    let session = SessionId::random().unwrap();
    store.open_session(OpenSession { session, ttl: Duration::from_secs(10), owner: "bench".into() }).await.unwrap();
    session
}

async fn pairs(store: &Sqlite, session: SessionId, key: &Key, count: u32) {
    for _ in 0..count {
        let request = request(key, session, false);
        let token = request.token;
        let reply = store.acquire(request).await.unwrap();
        assert!(matches!(reply.outcome, AcquireOutcome::Granted(_)), "{:?}", reply.outcome);
        assert_eq!(store.release(key, token, None).await.unwrap().outcome, EndOutcome::Released);
    }
}

fn report(what: &str, pairs: u32, clock: &Clock, start: stanchion::BootTime, transactions: u64) {
    let span = clock.now().since(start);
    let rate = f64::from(pairs) / span.as_secs_f64();
    eprintln!(
        "{what}: {rate:.0} pairs/s, {:.1} µs a pair, {transactions} write transactions for {pairs} pairs",
        1e6 / rate
    );
}

fn main() {
    let count: u32 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(40_000);
    let temp = tempfile::tempdir().unwrap();
    let clock = Clock::system();
    let store = Arc::new(Sqlite::open(temp.path().join("locks")).unwrap());
    for (name, runtime) in [
        ("current thread", tokio::runtime::Builder::new_current_thread().build().unwrap()),
        ("multi thread", tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap()),
    ] {
        runtime.block_on(async {
            let id = session(&store).await;
            let key = Key::new("", "bench").unwrap();
            pairs(&store, id, &key, count / 10).await;
            let (start, before) = (clock.now(), store.write_transactions());
            pairs(&store, id, &key, count).await;
            report(&format!("{name}, one caller, one key"), count, &clock, start, store.write_transactions() - before);

            let (start, before) = (clock.now(), store.write_transactions());
            let tasks: Vec<_> = (0..50u32)
                .map(|n| {
                    let (store, key) = (store.clone(), Key::new("", &format!("bench-{n}")).unwrap());
                    tokio::spawn(async move { pairs(&store, id, &key, count / 50).await })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            report(&format!("{name}, 50 tasks, 50 keys"), count, &clock, start, store.write_transactions() - before);

            // 50 tasks of one session queue for one key, and learn of their grants by pushes.
            let (start, before) = (clock.now(), store.write_transactions());
            contended(&store, count / 50).await;
            report(&format!("{name}, 50 tasks, one key"), count, &clock, start, store.write_transactions() - before);
        });
    }
}

async fn contended(store: &Arc<Sqlite>, each: u32) {
    let id = SessionId::random().unwrap();
    let mut grants = store.grants(id);
    store.open_session(OpenSession { session: id, ttl: Duration::from_secs(10), owner: "bench".into() }).await.unwrap();
    let waiting =
        Arc::new(std::sync::Mutex::new(std::collections::HashMap::<TokenId, tokio::sync::oneshot::Sender<()>>::new()));
    let listener = tokio::spawn({
        let waiting = waiting.clone();
        async move {
            while let Some(push) = grants.next().await {
                if let Push::Granted { token, .. } | Push::Recheck { token } = push
                    && let Some(waiter) = waiting.lock().unwrap().remove(&token)
                {
                    let _gone = waiter.send(());
                }
            }
        }
    });
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (store, waiting) = (store.clone(), waiting.clone());
            tokio::spawn(async move {
                let key = Key::new("", "contended").unwrap();
                for _ in 0..each {
                    let request = request(&key, id, true);
                    let token = request.token;
                    let (sender, granted) = tokio::sync::oneshot::channel();
                    waiting.lock().unwrap().insert(token, sender);
                    match store.acquire(request).await.unwrap().outcome {
                        AcquireOutcome::Granted(_) => {}
                        AcquireOutcome::Queued(_) => {
                            let _told = granted.await;
                            debug_assert!(matches!(
                                store.poll(&key, token).await.unwrap().outcome,
                                PollOutcome::Granted(_)
                            ));
                        }
                        other => panic!("{other:?}"),
                    }
                    assert_eq!(store.release(&key, token, None).await.unwrap().outcome, EndOutcome::Released);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    store.close_session(id).await.unwrap();
    listener.await.unwrap();
}
