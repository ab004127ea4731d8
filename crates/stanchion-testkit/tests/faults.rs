//! Random faults on the way to the store: lost, late and repeated messages, sessions that end. Whatever happens, fences
//! rise, a resource that checks them takes no stale write, and a second after the last fault nothing is left.
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

/// What may become of a message.
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

/// A handle whose messages meet these faults, one in five.
async fn handle(store: &Memory, seed: u64, faults: &[Fault]) -> (Locks, Faults) {
    let store = Faulty::new(store.clone());
    let its_faults = store.faults();
    let retry =
        RetryPolicy { attempt: Duration::from_millis(100), pause: Duration::from_millis(1), ..RetryPolicy::default() };
    let locks = Locks::builder_with_store(store).retry(retry).session_ttl(TTL).open().await.unwrap();
    its_faults.randomly(seed, 200, faults);
    (locks, its_faults)
}

/// Nothing fails any more, what was held back comes, and nothing is left in the store.
async fn settles(store: Memory, all_faults: &[Faults]) {
    let mut fired = 0;
    for faults in all_faults {
        fired += faults.fired().values().sum::<u64>();
        faults.clear();
        faults.deliver().await;
    }
    println!("{fired} faults");
    assert!(fired > 100, "only {fired} faults happened: this run shows nothing");
    let watch = Locks::with_store(store).await.unwrap();
    until("nothing is left", async || watch.list("").await.unwrap().is_empty()).await;
}

/// Runs clients against one store under these faults; gives what they saw, once nothing is left in the store.
async fn run(seed: u64, faults: &[Fault], end_sessions: bool) -> History {
    let memory = Memory::new();
    let resource = Arc::new(Mutex::new(Resource::default()));
    let mut clients = Vec::new();
    let mut all_faults = Vec::new();
    for client in 0..CLIENTS {
        let (locks, its_faults) = handle(&memory, seed.wrapping_add(client as u64), faults).await;
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
    settles(memory, &all_faults).await;
    drop(handles);
    let history = std::mem::take(&mut resource.lock().unwrap().history);
    println!("{} grants, {} writes", history.grants.len(), history.writes.len());
    assert!(history.is_telling(CLIENTS * ROUNDS / 2), "too little happened: this run shows nothing");
    history
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_message_faults_break_nothing() {
    let history = run(seed("random_message_faults_break_nothing"), &MESSAGES, false).await;
    history.check_fences().unwrap();
    history.check_beliefs().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().all(|write| write.accepted), "who believes is not refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fencing_resource_rejects_stale_writes() {
    let faults = [Fault::LoseReply, Fault::DelayReply(Duration::from_millis(2))];
    let history = run(seed("fencing_resource_rejects_stale_writes"), &faults, true).await;
    history.check_fences().unwrap();
    history.check_writes().unwrap();
    assert!(history.writes.iter().any(|write| !write.accepted), "nobody was late: this run shows nothing");
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
    let mut doubted = 0;
    for slot in 0..SLOTS {
        let in_doubt = AtomicBool::new(false);
        let wants_it_done = async |locks: &Locks| {
            let mut events = locks.events();
            loop {
                let once = locks.once("job").slot(slot).wait_at_most(Duration::from_secs(20));
                let outcome = once.run(async |turn| {
                    runs.lock().unwrap().push((slot, turn.fence().get()));
                    Ok::<_, Error>(())
                });
                match outcome.await {
                    Ok(_) => break,
                    // Lost, or no word of whether it was released.
                    Err(error) => {
                        assert!(error.is_transient() || matches!(error.kind(), ErrorKind::Lost(_)), "{error:?}");
                        in_doubt.store(true, Ordering::SeqCst);
                    }
                }
            }
            while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, events.next()).await {
                if matches!(&event, Event::Error { message, .. } if message.contains("could not be recorded")) {
                    in_doubt.store(true, Ordering::SeqCst);
                }
            }
        };
        let [a, b, c, d] = &clients[..] else { panic!("there are four") };
        // What was held back in slots before arrives while this one is run.
        let late = all_faults[slot as usize % 4].deliver();
        tokio::join!(wants_it_done(a), wants_it_done(b), wants_it_done(c), wants_it_done(d), late);
        let times = runs.lock().unwrap().iter().filter(|(of, _)| *of == slot).count();
        assert!(times >= 1, "slot {slot} was told as done and was not");
        if in_doubt.into_inner() {
            doubted += 1;
        } else {
            assert_eq!(times, 1, "slot {slot}");
        }
    }
    println!("{doubted} of {SLOTS} slots in doubt");
    assert!(doubted < SLOTS / 2, "{doubted} of {SLOTS} slots were in doubt: this run shows too little");
    assert!(runs.lock().unwrap().is_sorted_by(|(_, one), (_, next)| one < next), "{runs:?}");
    settles(memory, &all_faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_never_overlap_under_faults() {
    const TERMS: usize = 150;
    let seed = seed("leaders_never_overlap_under_faults");
    let memory = Memory::new();
    let resource = Arc::new(Mutex::new(Resource::default()));
    let (mut candidates, mut all_faults) = (Vec::new(), Vec::new());
    for client in 0..3 {
        let (locks, faults) = handle(&memory, seed.wrapping_add(client as u64), &MESSAGES).await;
        all_faults.push(faults.clone());
        let resource = resource.clone();
        candidates.push(tokio::spawn(async move {
            let asked = AtomicU64::new(now());
            let election = locks.elect("office").max_term(Duration::from_millis(60));
            loop {
                let led = election.clone().lead(async |leadership| {
                    let (fence, invoked, returned) = (leadership.term().get(), asked.load(Ordering::SeqCst), now());
                    let grant = Grant { key: "k".into(), client, fence, invoked, returned, believed_until: returned };
                    let number = {
                        let history = &mut resource.lock().unwrap().history;
                        history.grants.push(grant);
                        history.grants.len() - 1
                    };
                    if number >= TERMS {
                        return;
                    }
                    // What was held back in lifetimes before arrives in this one.
                    faults.deliver().await;
                    loop {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        let mut resource = resource.lock().unwrap();
                        let looked = now();
                        if leadership.is_leader() {
                            resource.history.grants[number].believed_until = looked;
                            asked.store(looked, Ordering::SeqCst);
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
    settles(memory, &all_faults).await;
    drop(handles);
    let history = std::mem::take(&mut resource.lock().unwrap().history);
    assert!(history.is_telling(TERMS), "too little happened: this run shows nothing");
    history.check_fences().unwrap();
    history.check_beliefs().unwrap();
    history.check_writes().unwrap();
}
