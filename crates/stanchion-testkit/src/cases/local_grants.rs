//! Keys that linger in a process: who is granted them without the store, and how other processes get them back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stanchion::store::{Fault, Faults, Faulty, ForceReleaseOutcome, Operation};
use stanchion::{ErrorKind, Event, EventStream, Guard, LingerEnd, LockRequest, Locks, LossCause, Released, Store};
use tokio::task::JoinHandle;

use crate::environment::{Environment, GENEROUS, seed, until};
use crate::history::{Grant, History};

/// Longer than a test.
const LINGER: Duration = Duration::from_secs(30);
/// Time after which the store's clock is certain to be ahead of a fence that it has just made.
const MOMENT: Duration = Duration::from_millis(2);

/// A handle whose store counts operations and fails on request.
struct Process {
    locks: Locks,
    faults: Faults,
    events: EventStream,
}

impl Process {
    async fn open<S: Store>(env: &Environment<S>) -> Self {
        let store = Faulty::new(env.open());
        let faults = store.faults();
        let locks = env.locks_on(store).open().await.unwrap();
        let events = locks.events();
        Self { locks, faults, events }
    }

    /// A handle on which `k` lingers.
    async fn lingering<S: Store>(env: &Environment<S>) -> Self {
        let process = Self::open(env).await;
        process.linger(env, LINGER).await;
        process
    }

    fn lock(&self) -> LockRequest {
        self.locks.lock("k").linger(LINGER)
    }

    fn spawn(&self) -> JoinHandle<stanchion::Result<Guard>> {
        tokio::spawn(self.lock().into_future())
    }

    /// Uses the key until it lingers.
    async fn linger<S: Store>(&self, env: &Environment<S>, linger: Duration) {
        until("the key lingers", async || {
            let guard = self.locks.lock("k").linger(linger).await.unwrap();
            env.advance(MOMENT).await;
            guard.release().await.unwrap();
            self.locks.inspect("k").await.unwrap().holders.first().is_some_and(|holder| holder.lingers)
        })
        .await;
    }

    /// Returns the number of requests so far that acquire or release a key.
    fn requests(&self) -> u64 {
        let operations = [Operation::Acquire, Operation::Poll, Operation::Release, Operation::Abandon];
        operations.iter().map(|operation| self.faults.count(*operation)).sum()
    }

    /// Starts a call that waits for the key in this process, and returns when it waits.
    async fn wait_here(&mut self) -> JoinHandle<stanchion::Result<Guard>> {
        let waiting = self.spawn();
        self.event("a call waits", |event| matches!(event, Event::Contended { .. })).await;
        waiting
    }

    async fn event(&mut self, what: &str, mut is_it: impl FnMut(&Event) -> bool) -> Event {
        let wait = async {
            loop {
                let event = self.events.next().await.expect("the handle is open");
                if is_it(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(GENEROUS, wait).await.unwrap_or_else(|_| panic!("{what}: no event"))
    }

    /// Waits until the key lingers no more, and returns the cause.
    async fn end_of_linger(&mut self) -> LingerEnd {
        match self.event("the key lingers no more", |event| matches!(event, Event::LingerEnded { .. })).await {
            Event::LingerEnded { end, .. } => end,
            _ => unreachable!(),
        }
    }
}

/// Lets time pass until a task has ended, and returns its result.
async fn passing_time<S: Store, T>(env: &Environment<S>, task: JoinHandle<T>) -> T {
    let started = std::time::Instant::now();
    while !task.is_finished() {
        assert!(started.elapsed() < GENEROUS, "the task does not end");
        env.advance(Duration::from_millis(5)).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    task.await.unwrap()
}

pub async fn lingering_key_is_granted_without_requests<S: Store>(env: &Environment<S>) {
    let process = Process::lingering(env).await;
    let before = process.requests();
    for round in 0..100 {
        let guard = match round % 2 {
            0 => process.lock().await.unwrap(),
            _ => process.lock().try_acquire().await.unwrap().expect("the key is free"),
        };
        assert!(guard.is_held());
        match round % 3 {
            0 => drop(guard),
            _ => assert_eq!(guard.release().await.unwrap(), Released::Now),
        }
    }
    assert_eq!(process.requests(), before);
}

pub async fn local_fences_rise_below_the_next_store_grant<S: Store>(env: &Environment<S>) {
    let (process, other) = (Process::lingering(env).await, Process::open(env).await);
    let mut last = process.locks.inspect("k").await.unwrap().holders[0].fence;
    for _ in 0..50 {
        let guard = process.lock().await.unwrap();
        assert!(guard.fence() > last, "{} after {last}", guard.fence());
        last = guard.fence();
    }
    let guard = other.lock().await.unwrap();
    assert!(guard.fence() > last, "{} after {last}", guard.fence());
}

pub async fn unused_key_goes_to_the_next_process<S: Store>(env: &Environment<S>) {
    let (mut process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = other.locks.lock("k").await.unwrap();
    assert_eq!(process.end_of_linger().await, LingerEnd::Recalled);
    assert!(process.lock().try_acquire().await.unwrap().is_none());
    let waiting = process.spawn();
    let fence = guard.fence();
    guard.release().await.unwrap();
    assert!(waiting.await.unwrap().unwrap().fence() > fence);
}

pub async fn used_key_goes_to_the_next_process_later<S: Store>(env: &Environment<S>) {
    let (process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let waiting = other.spawn();
    until("the other process waits", async || other.locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    assert!(guard.is_held(), "a recall ends no use");
    let fence = guard.fence();
    drop(guard);
    assert!(waiting.await.unwrap().unwrap().fence() > fence);
}

pub async fn calls_of_a_process_hand_the_key_over<S: Store>(env: &Environment<S>) {
    let mut process = Process::lingering(env).await;
    let guard = process.lock().await.unwrap();
    let before = process.requests();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..20 {
        let waiting = process.wait_here().await;
        let order = order.clone();
        tasks.push(tokio::spawn(async move {
            let guard = waiting.await.unwrap().unwrap();
            order.lock().unwrap().push((guard.fence(), number));
        }));
    }
    assert!(process.lock().try_acquire().await.unwrap().is_none());
    drop(guard);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(process.requests(), before);
    let mut order = std::mem::take(&mut *order.lock().unwrap());
    order.sort_unstable();
    assert_eq!(order.iter().map(|(_, number)| *number).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
}

pub async fn calls_before_the_first_grant_share_it<S: Store>(env: &Environment<S>) {
    let (mut process, other) = (Process::open(env).await, Process::open(env).await);
    let held = other.locks.lock("k").await.unwrap();
    let first = process.wait_here().await;
    let mut waiting = vec![first];
    for _ in 0..5 {
        waiting.push(process.wait_here().await);
    }
    assert_eq!(process.locks.inspect("k").await.unwrap().waiters.len(), 1, "one call asks for the process");
    env.advance(MOMENT).await;
    held.release().await.unwrap();
    let mut last = stanchion::Fence::new(0);
    for call in waiting {
        let guard = passing_time(env, call).await.unwrap();
        assert!(guard.fence() > last);
        last = guard.fence();
        env.advance(MOMENT).await;
    }
}

pub async fn abandoned_turns_go_to_the_next_call<S: Store>(env: &Environment<S>) {
    let mut process = Process::lingering(env).await;
    for _ in 0..10 {
        let guard = process.lock().await.unwrap();
        let abandoned = [process.wait_here().await, process.wait_here().await, process.wait_here().await];
        let last = process.wait_here().await;
        abandoned[0].abort();
        abandoned[2].abort();
        drop(guard);
        abandoned[1].abort();
        drop(passing_time(env, last).await.unwrap());
        env.advance(MOMENT).await;
    }
    // The first call of a key gives up while it asks the store.
    let other = Process::open(env).await;
    let held = other.locks.lock("k").await.unwrap();
    let first = process.spawn();
    until("the first call waits", async || !other.locks.inspect("k").await.unwrap().waiters.is_empty()).await;
    let next = process.spawn();
    first.abort();
    held.release().await.unwrap();
    drop(passing_time(env, next).await.unwrap());
}

pub async fn calls_after_a_recall_wait_behind_others<S: Store>(env: &Environment<S>) {
    let (process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let use_once = |process: &Process| {
        let request = process.lock();
        // The guard is dropped at once, so that the key goes on.
        tokio::spawn(async move { request.await.map(|guard| guard.fence()) })
    };
    let elsewhere = use_once(&other);
    until("the other process waits", async || other.locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    let before = process.faults.count(Operation::Acquire);
    let mut calls = Vec::new();
    // The message arrives at some time: from then on calls go to the store.
    until("a call goes to the store", async || {
        calls.push(use_once(&process));
        tokio::task::yield_now().await;
        process.faults.count(Operation::Acquire) > before
    })
    .await;
    until("the call is in the queue", async || other.locks.inspect("k").await.unwrap().waiters.len() >= 2).await;
    drop(guard);
    let elsewhere = passing_time(env, elsewhere).await.unwrap();
    let last = passing_time(env, calls.pop().unwrap()).await.unwrap();
    assert!(last > elsewhere, "{last} after {elsewhere}");
    for call in calls {
        passing_time(env, call).await.unwrap();
    }
}

pub async fn key_used_once_does_not_linger<S: Store>(env: &Environment<S>) {
    let process = Process::open(env).await;
    for key in ["a", "b", "c"] {
        let guard = process.locks.lock(key).linger(LINGER).await.unwrap();
        env.advance(MOMENT).await;
        guard.release().await.unwrap();
        assert!(!process.locks.is_locked(key).await.unwrap());
    }
    assert_eq!(process.faults.count(Operation::Linger), 0);
}

pub async fn unused_key_is_free_after_its_time<S: Store>(env: &Environment<S>) {
    let mut process = Process::open(env).await;
    process.linger(env, Duration::from_millis(200)).await;
    until("the key is free", async || {
        env.advance(Duration::from_millis(10)).await;
        !process.locks.is_locked("k").await.unwrap()
    })
    .await;
    assert_eq!(process.end_of_linger().await, LingerEnd::Unused);
}

/// The process hears no recall. Its next request to linger says that another process waits.
pub async fn lost_recall_delays_others_by_one_linger<S: Store>(env: &Environment<S>) {
    wait_for_a_busy_process(env, |faults| faults.lose_pushes(true)).await;
}

/// The process hears no recall, and its requests to linger are not answered.
pub async fn unconfirmed_lease_ends<S: Store>(env: &Environment<S>) {
    let cut_off = |faults: &Faults| {
        faults.lose_pushes(true);
        faults.always(Operation::Linger, Fault::LoseRequest);
    };
    wait_for_a_busy_process(env, cut_off).await;
}

/// Waits for a key that lingers in a process, which uses it all the time and from now on has `faults`.
async fn wait_for_a_busy_process<S: Store>(env: &Environment<S>, faults: impl FnOnce(&Faults)) {
    const SHORT: Duration = Duration::from_millis(300);
    let (process, other) = (Process::open(env).await, Process::open(env).await);
    process.linger(env, SHORT).await;
    faults(&process.faults);
    let ended = Arc::new(AtomicBool::new(false));
    let busy = tokio::spawn({
        let (locks, ended) = (process.locks.clone(), ended.clone());
        async move {
            while !ended.load(Ordering::SeqCst) {
                let request = locks.lock("k").linger(SHORT).wait(Duration::from_secs(20));
                drop(request.await.unwrap());
                tokio::task::yield_now().await;
            }
        }
    });
    let waiting = other.spawn();
    let guard = passing_time(env, waiting).await.unwrap();
    ended.store(true, Ordering::SeqCst);
    drop(guard);
    passing_time(env, busy).await;
}

pub async fn attempt_recalls_an_unused_key<S: Store>(env: &Environment<S>) {
    let (process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let attempt = tokio::spawn(other.locks.lock("k").try_acquire());
    assert!(passing_time(env, attempt).await.unwrap().is_none(), "the key is in use");
    until("the queue is empty", async || other.locks.inspect("k").await.unwrap().waiters.is_empty()).await;
    drop(guard);
    let mut got = None;
    until("the attempt gets the key", async || {
        let attempt = tokio::spawn(other.locks.lock("k").try_acquire());
        got = passing_time(env, attempt).await.unwrap();
        got.is_some()
    })
    .await;
    assert!(got.unwrap().is_held());
}

pub async fn lost_session_ends_lingering_keys<S: Store>(env: &Environment<S>) {
    let store = Faulty::new(env.open());
    let faults = store.faults();
    let locks = env.locks_on(store).session_ttl(Duration::from_secs(1)).open().await.unwrap();
    let events = locks.events();
    let mut process = Process { locks, faults, events };
    process.linger(env, LINGER).await;
    let guard = process.lock().await.unwrap();
    let last = guard.fence();
    guard.release().await.unwrap();
    let session = process.locks.session();
    process.faults.always(Operation::RenewSession, Fault::LoseRequest);
    until("the session is lost", async || {
        env.advance(Duration::from_millis(20)).await;
        process.locks.session() != session
    })
    .await;
    process.faults.clear();
    assert_eq!(process.end_of_linger().await, LingerEnd::Lost);
    let waiting = process.spawn();
    assert!(passing_time(env, waiting).await.unwrap().fence() > last);
}

pub async fn draining_releases_lingering_keys<S: Store>(env: &Environment<S>) {
    let mut process = Process::lingering(env).await;
    let last = process.lock().await.unwrap().fence();
    process.locks.drain("the test ends");
    assert_eq!(process.end_of_linger().await, LingerEnd::Released);
    assert_eq!(process.lock().await.unwrap_err().kind(), ErrorKind::Draining);
    let other = Process::open(env).await;
    assert!(other.lock().await.unwrap().fence() > last);
}

pub async fn closing_releases_lingering_keys<S: Store>(env: &Environment<S>) {
    let other = Process::open(env).await;
    let process = Process::lingering(env).await;
    process.locks.close().await.unwrap();
    assert!(!other.locks.is_locked("k").await.unwrap());
    let Process { locks, .. } = Process::lingering(env).await;
    drop(locks);
    until("the dropped handle has released the key", async || !other.locks.is_locked("k").await.unwrap()).await;
}

pub async fn forced_release_ends_a_lingering_key<S: Store>(env: &Environment<S>) {
    let (mut process, operator) = (Process::lingering(env).await, Process::open(env).await);
    let last = process.lock().await.unwrap().fence();
    let fence = operator.locks.inspect("k").await.unwrap().holders[0].fence;
    let outcome = operator.locks.force_release("k", fence, "test").await.unwrap();
    assert_eq!(outcome, ForceReleaseOutcome::Released);
    assert_eq!(process.end_of_linger().await, LingerEnd::Lost);
    let before = process.faults.count(Operation::Acquire);
    let guard = process.lock().await.unwrap();
    assert!(guard.fence() > last);
    assert_eq!(process.faults.count(Operation::Acquire), before + 1);
}

pub async fn forced_release_ends_a_local_grant<S: Store>(env: &Environment<S>) {
    let (process, operator) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let fence = operator.locks.inspect("k").await.unwrap().holders[0].fence;
    assert!(guard.fence() > fence);
    let waiting = process.spawn();
    let outcome = operator.locks.force_release("k", fence, "test").await.unwrap();
    assert_eq!(outcome, ForceReleaseOutcome::Released);
    assert_eq!(guard.lost().await, LossCause::ForceReleased);
    assert!(passing_time(env, waiting).await.unwrap().fence() > guard.fence());
}

pub async fn detached_local_grant_is_not_recalled<S: Store>(env: &Environment<S>) {
    let (process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let fence = guard.fence();
    let token = guard.detach();
    let waiting = other.spawn();
    until("the other process waits", async || other.locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    assert!(other.locks.owns(&token).await.unwrap());
    let adopted = process.locks.adopt(token).await.unwrap();
    assert!(adopted.fence() > fence, "{} after {fence}", adopted.fence());
    adopted.verify().await.unwrap();
    let fence = adopted.fence();
    drop(adopted);
    assert!(passing_time(env, waiting).await.unwrap().fence() > fence);
}

pub async fn cooldown_ends_a_lingering_key<S: Store>(env: &Environment<S>) {
    let process = Process::lingering(env).await;
    let guard = process.lock().await.unwrap();
    guard.set_cooldown(Some(Duration::from_secs(60))).unwrap();
    guard.release().await.unwrap();
    assert!(process.locks.inspect("k").await.unwrap().closed_for.is_some());
    assert!(process.lock().try_acquire().await.unwrap().is_none());
}

pub async fn token_releases_a_lingering_key<S: Store>(env: &Environment<S>) {
    let (mut process, other) = (Process::lingering(env).await, Process::open(env).await);
    let guard = process.lock().await.unwrap();
    let (token, last) = (guard.token(), guard.fence());
    guard.release().await.unwrap();
    assert_eq!(process.locks.release(&token, None).await.unwrap(), Released::Now);
    assert_eq!(process.end_of_linger().await, LingerEnd::Lost);
    assert!(other.lock().try_acquire().await.unwrap().is_some_and(|guard| guard.fence() > last));
}

pub async fn guard_can_forbid_to_linger<S: Store>(env: &Environment<S>) {
    let process = Process::lingering(env).await;
    let guard = process.lock().await.unwrap();
    guard.forbid_linger();
    guard.release().await.unwrap();
    assert!(!process.locks.is_locked("k").await.unwrap());
    process.linger(env, LINGER).await;
    assert!(process.locks.release_lingering("k").await.unwrap());
    assert!(!process.locks.is_locked("k").await.unwrap());
    assert!(!process.locks.release_lingering("k").await.unwrap());
    process.linger(env, LINGER).await;
    assert_eq!(process.locks.release_all_lingering().await.unwrap(), 1);
    assert!(!process.locks.is_locked("k").await.unwrap());
}

pub async fn unsuitable_requests_cannot_linger<S: Store>(env: &Environment<S>) {
    let locks = env.locks().open().await.unwrap();
    let minute = Duration::from_secs(60);
    let requests = [
        locks.lock("k").ttl(minute),
        locks.lock("k").max_hold(minute),
        locks.lock("k").cooldown(minute),
        locks.read("k"),
        locks.semaphore("k", 3).permits(2),
    ];
    for request in requests {
        let error = request.linger(LINGER).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("linger"), "{error}");
    }
    for linger in [Duration::from_millis(9), Duration::from_secs(31)] {
        assert_eq!(locks.lock("k").linger(linger).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(env.locks().linger(linger).open().await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    let locks = env.locks().linger(LINGER).open().await.unwrap();
    drop(locks.read("k").await.unwrap());
    drop(locks.lock("other").ttl(minute).await.unwrap());
}

pub async fn handle_default_lets_keys_linger<S: Store>(env: &Environment<S>) {
    let locks = env.locks().linger(LINGER).open().await.unwrap();
    let is_lingering =
        async |key: &str| locks.inspect(key).await.unwrap().holders.first().is_some_and(|holder| holder.lingers);
    until("the key lingers", async || {
        let guard = locks.lock("k").await.unwrap();
        env.advance(MOMENT).await;
        guard.release().await.unwrap();
        is_lingering("k").await
    })
    .await;
    for _ in 0..3 {
        let guard = locks.lock("never").linger(Duration::ZERO).await.unwrap();
        env.advance(MOMENT).await;
        guard.release().await.unwrap();
        let all = locks.lock_all(["one", "two"]).await.unwrap();
        env.advance(MOMENT).await;
        all.release().await.unwrap();
    }
    for key in ["never", "one", "two"] {
        assert!(!locks.is_locked(key).await.unwrap(), "{key}");
    }
}

pub async fn contested_keys_stop_lingering<S: Store>(env: &Environment<S>) {
    let processes = [Process::open(env).await, Process::open(env).await];
    for _ in 0..30 {
        for process in &processes {
            let guard = process.lock().await.unwrap();
            env.advance(MOMENT).await;
            guard.release().await.unwrap();
        }
    }
    let asked: u64 = processes.iter().map(|process| process.faults.count(Operation::Linger)).sum();
    assert!(asked < 20, "{asked} requests to linger for 60 grants");
}

pub async fn failed_request_fails_waiting_calls<S: Store>(env: &Environment<S>) {
    let process = Process::open(env).await;
    process.faults.always(Operation::Acquire, Fault::Fail(ErrorKind::Unauthorized));
    let calls: Vec<_> = (0..5).map(|_| process.spawn()).collect();
    for call in calls {
        assert_eq!(passing_time(env, call).await.unwrap_err().kind(), ErrorKind::Unauthorized);
    }
    process.faults.clear();
    assert!(process.lock().await.unwrap().is_held());
}

pub async fn late_answer_revives_nothing<S: Store>(env: &Environment<S>) {
    let process = Process::open(env).await;
    process.faults.always(Operation::Linger, Fault::Hold);
    for _ in 0..3 {
        let guard = process.lock().await.unwrap();
        env.advance(MOMENT).await;
        guard.release().await.unwrap();
        // Without an answer the key is released.
        until("the key is free", async || !process.locks.is_locked("k").await.unwrap()).await;
    }
    assert!(process.faults.held() > 0);
    process.faults.clear();
    process.faults.deliver().await;
    assert!(!process.locks.is_locked("k").await.unwrap());
    let other = Process::open(env).await;
    assert!(other.lock().try_acquire().await.unwrap().is_some());
}

/// Several tasks in several processes, while messages are lost at times: never two at once, and fences rise in the order of use.
pub async fn random_local_grants_pass_the_history_check<S: Store>(env: &Environment<S>) {
    const PROCESSES: usize = 3;
    let seed = seed("random_local_grants_pass_the_history_check");
    let linger = Duration::from_millis(100);
    let started = std::time::Instant::now();
    let history = Arc::new(Mutex::new(History::default()));
    let mut tasks = Vec::new();
    let mut processes = Vec::new();
    for process in 0..PROCESSES {
        processes.push(Process::open(env).await);
        for task in 0..3 {
            let (locks, faults) = (processes[process].locks.clone(), processes[process].faults.clone());
            let history = history.clone();
            let mut random = seed.wrapping_add((process * 10 + task) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            tasks.push(tokio::spawn(async move {
                let mut next = move |below: u64| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random % below
                };
                let now = || u64::try_from(started.elapsed().as_nanos()).unwrap();
                for _ in 0..60 {
                    if task == 0 {
                        faults.lose_pushes(next(4) == 0);
                    }
                    let invoked = now();
                    let request = locks.lock("k").linger(linger);
                    let guard = if next(5) == 0 {
                        match tokio::time::timeout(Duration::from_millis(next(3)), request.into_future()).await {
                            Ok(guard) => guard.unwrap(),
                            Err(_) => continue,
                        }
                    } else {
                        request.await.unwrap()
                    };
                    let returned = now();
                    for _ in 0..next(4) {
                        tokio::task::yield_now().await;
                    }
                    let valid_until = if guard.is_held() { now() } else { returned };
                    let (key, fence) = ("k".to_owned(), guard.fence().get());
                    let grant = Grant { key, client: process, fence, invoked, returned, valid_until };
                    drop(guard);
                    history.lock().unwrap().grants.push(grant);
                    for _ in 0..next(3) {
                        tokio::task::yield_now().await;
                    }
                }
                faults.lose_pushes(false);
            }));
        }
    }
    for task in tasks {
        passing_time(env, task).await;
    }
    let history = std::mem::take(&mut *history.lock().unwrap());
    assert!(history.is_conclusive(200), "{} grants", history.grants.len());
    history.check_fences().unwrap_or_else(|violation| panic!("{violation}"));
    history.check_exclusion().unwrap_or_else(|violation| panic!("{violation}"));
}
