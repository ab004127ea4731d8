//! Tests random faults between handles and the store: lost, late and repeated messages, and sessions that end.
//!
//! In every run fences must rise, a resource that checks fences must accept no stale write, and the store must be empty
//! a second after the last fault.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test may panic, print, and wait on the real clock"
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stanchion::store::{Fault, Faults, Faulty, Memory};
use stanchion::{Clock, Error, ErrorKind, Event, Locks, RetryPolicy, Store};
use stanchion_testkit::history::{Grant, History, Write};
use stanchion_testkit::{seed, until};

const CLIENTS: usize = 6;
const ROUNDS: usize = 60;
const TTL: Duration = Duration::from_millis(400);

/// Faults that can happen to a message.
const MESSAGES: [Fault; 8] = [
    Fault::LoseRequest,
    Fault::LoseReply,
    Fault::Repeat,
    Fault::Hold,
    Fault::Hold,
    Fault::Delay(Duration::from_millis(5)),
    Fault::DelayReply(Duration::from_millis(5)),
    Fault::Fail(ErrorKind::Unavailable),
];

/// A resource that checks fences and records every write.
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

/// Opens a handle on which one in five messages suffers one of these faults.
async fn handle(store: &Memory, seed: u64, faults: &[Fault]) -> (Locks, Faults) {
    let store = Faulty::new(store.clone());
    let handle_faults = store.faults();
    let retry =
        RetryPolicy { attempt: Duration::from_millis(100), pause: Duration::from_millis(1), ..RetryPolicy::default() };
    let locks = Locks::builder_with_store(store).retry(retry).session_ttl(TTL).open().await.unwrap();
    handle_faults.randomly(seed, 200, faults);
    (locks, handle_faults)
}

/// Ends all faults, delivers the messages that were held back, and waits until the store is empty.
async fn until_empty(store: Memory, all_faults: &[Faults]) {
    let mut fired = 0;
    for faults in all_faults {
        fired += faults.fired().values().sum::<u64>();
        faults.clear();
        faults.deliver().await;
    }
    println!("{fired} faults");
    assert!(fired > 100, "only {fired} faults happened, so this run proves nothing");
    let watch = Locks::with_store(store).await.unwrap();
    until("the store is empty", async || watch.list("").await.unwrap().is_empty()).await;
}

/// Runs clients against one store under these faults, waits until the store is empty, and returns the recorded history.
async fn run(seed: u64, faults: &[Fault], end_sessions: bool) -> History {
    let memory = Memory::new();
    let resource = Arc::new(Mutex::new(Resource::default()));
    let mut clients = Vec::new();
    let mut all_faults = Vec::new();
    for client in 0..CLIENTS {
        let (locks, handle_faults) = handle(&memory, seed.wrapping_add(client as u64), faults).await;
        // One client gets no pushes, so it polls and learns of late messages only by its polls.
        handle_faults.lose_pushes(client == 0);
        let rounds = if client == 0 { ROUNDS / 6 } else { ROUNDS };
        all_faults.push(handle_faults.clone());
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
                let mut valid_until = returned;
                for _ in 0..2 {
                    tokio::time::sleep(Duration::from_micros(300)).await;
                    let checked_at = now();
                    if guard.is_held() {
                        valid_until = checked_at;
                    }
                }
                let fence = guard.fence().get();
                {
                    let mut resource = resource.lock().unwrap();
                    resource.write(fence);
                    let grant = Grant { key: "k".into(), client, fence, invoked, returned, valid_until };
                    resource.history.grants.push(grant);
                }
                if end_sessions && round % 10 == 9 {
                    // The store ends the session, and its holder learns of that later.
                    if let Some(session) = locks.session() {
                        memory.close_session(session).await.unwrap();
                    }
                    // This write may come after another client's grant, and then the resource must reject it.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    resource.lock().unwrap().write(fence);
                }
                if round % 2 == 0 {
                    drop(guard);
                } else {
                    let _ = guard.release().await; // the keeper finishes a failed release
                }
                if client == 0 || round % 7 == client {
                    handle_faults.deliver().await;
                }
            }
            locks
        }));
    }
    let mut handles = Vec::new();
    for client in clients {
        handles.push(client.await.unwrap());
    }
    until_empty(memory, &all_faults).await;
    drop(handles);
    let history = std::mem::take(&mut resource.lock().unwrap().history);
    println!("{} grants, {} writes", history.grants.len(), history.writes.len());
    assert!(history.is_conclusive(CLIENTS * ROUNDS / 2), "too little happened, so this run proves nothing");
    history
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_message_faults_break_nothing() {
    let history = run(seed("random_message_faults_break_nothing"), &MESSAGES, false).await;
    history.check_fences().unwrap();
    history.check_exclusion().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().all(|write| write.accepted), "the resource rejected the write of a valid guard");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fencing_resource_rejects_stale_writes() {
    let faults = [Fault::LoseReply, Fault::DelayReply(Duration::from_millis(2))];
    let history = run(seed("fencing_resource_rejects_stale_writes"), &faults, true).await;
    history.check_fences().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().any(|write| !write.accepted), "no write was late, so this run proves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slot_runs_once_despite_message_faults() {
    const SLOTS: u64 = 60;
    let seed = seed("slot_runs_once_despite_message_faults");
    let memory = Memory::new();
    let (mut clients, mut all_faults) = (Vec::new(), Vec::new());
    for client in 0..4 {
        let (locks, faults) = handle(&memory, seed.wrapping_add(client), &MESSAGES).await;
        all_faults.push(faults);
        clients.push(locks);
    }
    let runs: Mutex<Vec<(u64, u64)>> = Mutex::default();
    let mut unknown_slots = 0;
    for slot in 0..SLOTS {
        let outcome_unknown = AtomicBool::new(false);
        let run_until_done = async |locks: &Locks| {
            let mut events = locks.events();
            loop {
                let once = locks.once("job").slot(slot).wait_at_most(Duration::from_secs(20));
                let outcome = once.run(async |guard| {
                    runs.lock().unwrap().push((slot, guard.fence().get()));
                    Ok::<_, Error>(())
                });
                match outcome.await {
                    Ok(_) => break,
                    // The hold was lost, or the outcome of its release is unknown.
                    Err(error) => {
                        assert!(error.is_transient() || matches!(error.kind(), ErrorKind::Lost(_)), "{error:?}");
                        outcome_unknown.store(true, Ordering::SeqCst);
                    }
                }
            }
            while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, events.next()).await {
                if matches!(&event, Event::Error { message, .. } if message.contains("could not be recorded")) {
                    outcome_unknown.store(true, Ordering::SeqCst);
                }
            }
        };
        let [a, b, c, d] = &clients[..] else { panic!("there are not four clients") };
        // Messages that were held back in earlier slots arrive during this slot.
        let late = all_faults[slot as usize % 4].deliver();
        tokio::join!(run_until_done(a), run_until_done(b), run_until_done(c), run_until_done(d), late);
        let times = runs.lock().unwrap().iter().filter(|(of, _)| *of == slot).count();
        assert!(times >= 1, "slot {slot} was reported as done but did not run");
        if outcome_unknown.into_inner() {
            unknown_slots += 1;
        } else {
            assert_eq!(times, 1, "slot {slot}");
        }
    }
    println!("{unknown_slots} of {SLOTS} slots with an unknown outcome");
    assert!(
        unknown_slots < SLOTS / 2,
        "{unknown_slots} of {SLOTS} slots had an unknown outcome, so this run proves too little"
    );
    assert!(runs.lock().unwrap().is_sorted_by(|(_, one), (_, next)| one < next), "{runs:?}");
    until_empty(memory, &all_faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_never_overlap() {
    const TERMS: usize = 150;
    let seed = seed("leaders_never_overlap");
    let memory = Memory::new();
    let resource = Arc::new(Mutex::new(Resource::default()));
    let (mut candidates, mut all_faults) = (Vec::new(), Vec::new());
    for client in 0..3 {
        let (locks, faults) = handle(&memory, seed.wrapping_add(client as u64), &MESSAGES).await;
        all_faults.push(faults.clone());
        let resource = resource.clone();
        candidates.push(tokio::spawn(async move {
            let sent_at = AtomicU64::new(now());
            let election = locks.elect("office").max_term(Duration::from_millis(60));
            loop {
                let led = election.clone().lead(async |leadership| {
                    let (fence, invoked, returned) = (leadership.term().get(), sent_at.load(Ordering::SeqCst), now());
                    let grant = Grant { key: "k".into(), client, fence, invoked, returned, valid_until: returned };
                    let number = {
                        let history = &mut resource.lock().unwrap().history;
                        history.grants.push(grant);
                        history.grants.len() - 1
                    };
                    if number >= TERMS {
                        return;
                    }
                    // Messages that were held back in earlier terms arrive during this term.
                    faults.deliver().await;
                    loop {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        let mut resource = resource.lock().unwrap();
                        let checked_at = now();
                        if leadership.is_leader() {
                            resource.history.grants[number].valid_until = checked_at;
                            sent_at.store(checked_at, Ordering::SeqCst);
                            resource.write(fence);
                        }
                    }
                });
                match led.await {
                    Ok(()) => return locks,
                    Err(error) => assert!(error.is_transient(), "{error:?}"),
                }
            }
        }));
    }
    let mut handles = Vec::new();
    for candidate in candidates {
        handles.push(candidate.await.unwrap());
    }
    until_empty(memory, &all_faults).await;
    drop(handles);
    let history = std::mem::take(&mut resource.lock().unwrap().history);
    assert!(history.is_conclusive(TERMS), "too little happened, so this run proves nothing");
    history.check_fences().unwrap();
    history.check_exclusion().unwrap();
    history.check_writes().unwrap();
}
