//! Random faults on the way to the store: lost, late and repeated messages, sessions that end. Whatever happens, fences
//! rise, a resource that checks them takes no stale write, and a second after the last fault nothing is left.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test may panic, print, and wait on the real clock"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use stanchion::store::{Fault, Faulty, Memory};
use stanchion::{Clock, ErrorKind, Locks, RetryPolicy, Store};
use stanchion_testkit::history::{Grant, History, Write};
use stanchion_testkit::{seed, until};

const CLIENTS: usize = 6;
const ROUNDS: usize = 60;
const TTL: Duration = Duration::from_millis(400);

/// A resource that checks fences, and writes down what it saw.
#[derive(Default)]
struct Resource {
    highest: u64,
    history: History,
}

impl Resource {
    fn write(&mut self, fence: u64) -> bool {
        let accepted = fence >= self.highest;
        self.highest = self.highest.max(fence);
        self.history.writes.push(Write { key: "k".into(), fence, accepted });
        accepted
    }
}

fn now() -> u64 {
    Clock::system().now().as_nanos()
}

/// Runs clients against one store under these faults; gives what they saw, once nothing is left in the store.
async fn run(seed: u64, faults: &[Fault], end_sessions: bool) -> History {
    let memory = Memory::new();
    let resource = Arc::new(Mutex::new(Resource::default()));
    let retry =
        RetryPolicy { attempt: Duration::from_millis(100), pause: Duration::from_millis(1), ..RetryPolicy::default() };
    let mut clients = Vec::new();
    let mut all_faults = Vec::new();
    for client in 0..CLIENTS {
        let store = Faulty::new(memory.clone());
        let its_faults = store.faults();
        let locks = Locks::builder_with_store(store).retry(retry).session_ttl(TTL).open().await.unwrap();
        its_faults.randomly(seed.wrapping_add(client as u64), 200, faults);
        // One of them gets no push: it polls, and nothing that comes late is noticed by a push either.
        its_faults.lose_pushes(client == 0);
        let rounds = if client == 0 { ROUNDS / 6 } else { ROUNDS };
        all_faults.push(its_faults.clone());
        let (memory, resource) = (memory.clone(), resource.clone());
        clients.push(tokio::spawn(async move {
            for round in 0..rounds {
                let invoked = now();
                let guard = match locks.lock("k").wait(Duration::from_secs(20)).await {
                    Ok(guard) => guard,
                    Err(error) => {
                        let fault = error.is_transient() || error.kind() == ErrorKind::Timeout;
                        assert!(fault, "{error:?}");
                        continue;
                    }
                };
                let returned = now();
                let mut believed_until = returned;
                for _ in 0..2 {
                    tokio::time::sleep(Duration::from_micros(300)).await;
                    let looked = now();
                    if guard.is_held() {
                        believed_until = looked;
                    }
                }
                let fence = guard.fence().get();
                {
                    let mut resource = resource.lock().unwrap();
                    resource.write(fence);
                    let grant = Grant { key: "k".into(), client, fence, invoked, returned, believed_until };
                    resource.history.grants.push(grant);
                }
                if end_sessions && round % 10 == 9 {
                    // The store forgets the session; its holder learns of it later.
                    if let Some(session) = locks.session() {
                        memory.close_session(session).await.unwrap();
                    }
                    // A write that is too late.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    resource.lock().unwrap().write(fence);
                }
                if round % 2 == 0 {
                    drop(guard);
                } else {
                    // A failing release is finished by the keeper.
                    let _outcome = guard.release().await;
                }
                if client == 0 || round % 7 == client {
                    its_faults.deliver().await;
                }
            }
            locks
        }));
    }
    let mut handles = Vec::new();
    for client in clients {
        handles.push(client.await.unwrap());
    }
    let mut fired = 0;
    for faults in &all_faults {
        fired += faults.fired().values().sum::<u64>();
        faults.clear();
        faults.deliver().await;
    }
    assert!(fired > 100, "only {fired} faults happened: this run shows nothing");
    let watch = Locks::with_store(memory).await.unwrap();
    until("nothing is left", async || watch.list("").await.unwrap().is_empty()).await;
    drop(handles);
    let history = std::mem::take(&mut resource.lock().unwrap().history);
    println!("{} grants, {} writes, {fired} faults", history.grants.len(), history.writes.len());
    assert!(history.is_telling(CLIENTS * ROUNDS / 2), "too little happened: this run shows nothing");
    history
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_late_and_repeated_messages_break_nothing() {
    let faults = [
        Fault::LoseRequest,
        Fault::LoseReply,
        Fault::Repeat,
        Fault::Hold,
        Fault::Hold,
        Fault::Delay(Duration::from_millis(5)),
        Fault::DelayReply(Duration::from_millis(5)),
        Fault::Fail(ErrorKind::Unavailable),
    ];
    let history = run(seed("lost_late_and_repeated_messages_break_nothing"), &faults, false).await;
    history.check_fences().unwrap();
    history.check_beliefs().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().all(|write| write.accepted), "who believes is not refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_end_unseen_do_no_harm_at_a_resource_that_checks_fences() {
    let faults = [Fault::LoseReply, Fault::DelayReply(Duration::from_millis(2))];
    let history = run(seed("sessions_that_end_unseen_do_no_harm"), &faults, true).await;
    history.check_fences().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().any(|write| !write.accepted), "nobody was late: this run shows nothing");
}
