//! What happens when a hold is lost, and when the whole process drains: in processes of their own.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::collections::HashSet;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::{ErrorKind, Locks, Loss, LossCause, OnLost};

/// This test again, in a process of its own, to play a part.
fn play(part: &str) -> Output {
    let test = std::env::current_exe().unwrap();
    let mut command = Command::new(test);
    command.args(["--exact", &format!("losses::{part}"), "--nocapture", "--ignored"]).env("STANCHION_PART", part);
    command.output().unwrap()
}

async fn depose(locks: &Locks, guard: &stanchion::Guard) {
    locks.force_release("k", guard.fence(), "for a test").await.unwrap();
    guard.lost().await;
}

#[tokio::test]
async fn a_hook_is_called_once_for_each_hold_and_may_block() {
    let (sender, calls) = mpsc::channel::<Loss>();
    let hook = OnLost::hook(move |loss| {
        std::thread::sleep(Duration::from_millis(50));
        sender.send(loss.clone()).unwrap();
    });
    let locks = Locks::builder("memory:").on_lost(hook).open().await.unwrap();
    for _ in 0..3 {
        let guard = locks.lock("k").await.unwrap();
        depose(&locks, &guard).await;
        assert!(guard.check().is_err() && guard.loss().is_some(), "asked again and again");
        let loss = calls.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!((loss.key.name(), loss.fence, loss.cause), ("k", guard.fence(), LossCause::ForceReleased));
    }
    // A request has its own word, and what is released is not lost.
    let guard = locks.lock("k").on_lost(OnLost::Signal).await.unwrap();
    depose(&locks, &guard).await;
    locks.lock("k").await.unwrap().release().await.unwrap();
    drop(locks.lock("k").await.unwrap());
    locks.close().await.unwrap();
    drop(guard);
    drop(locks);
    assert!(calls.recv_timeout(Duration::from_millis(200)).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_hook_is_called_for_a_hold_that_nobody_was_given() {
    for round in 0..300 {
        let (sender, calls) = mpsc::channel();
        let hook = OnLost::hook(move |loss| sender.send(loss.fence).unwrap());
        let locks = Locks::builder("memory:").on_lost(hook).open().await.unwrap();
        let given = Arc::new(Mutex::new(HashSet::new()));
        let mut asking = Vec::new();
        for task in 0..4 {
            let (locks, given) = (locks.clone(), given.clone());
            asking.push(tokio::spawn(async move {
                while let Ok(guard) = locks.lock(format!("{task}")).await {
                    given.lock().unwrap().insert(guard.fence());
                }
            }));
        }
        crate::support::until("some were given", async || given.lock().unwrap().len() > 20).await;
        locks.close().await.unwrap();
        for task in asking {
            task.await.unwrap();
        }
        drop(locks);
        let given = given.lock().unwrap();
        assert!(calls.iter().all(|fence| given.contains(&fence)), "in round {round}");
    }
}

#[test]
fn a_process_that_does_not_stop_in_time_aborts() {
    use std::os::unix::process::ExitStatusExt as _;

    for (part, lost) in [
        ("part_does_not_stop", "key `k` was lost (it was force-released)"),
        ("part_does_not_stop_when_the_keeper_ends", "key `k` was lost (the handle was closed)"),
    ] {
        let start = Instant::now();
        let out = play(part);
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{said}");
        assert!(start.elapsed() >= GRACE);
        assert!(said.contains(lost) && said.contains("aborting"), "{said}");
    }
}

#[test]
fn a_process_that_stops_in_time_lives_on() {
    let out = play("part_stops");
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("lives on"), "{out:?}");
}

#[test]
fn draining_the_process_drains_every_handle_of_it() {
    let out = play("part_drains");
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("drained"), "{out:?}");
}

fn is_its_part() -> bool {
    std::env::var_os("STANCHION_PART").is_some()
}

const GRACE: Duration = Duration::from_millis(100);

#[tokio::test]
#[ignore = "a part that another test has played"]
async fn part_does_not_stop() {
    assert!(is_its_part());
    let locks = Locks::open("memory:").await.unwrap();
    let guard = locks.lock("k").on_lost(OnLost::abort_after(GRACE)).await.unwrap();
    depose(&locks, &guard).await;
    std::thread::sleep(Duration::from_secs(60));
    drop(guard);
}

#[tokio::test]
#[ignore = "a part that another test has played"]
async fn part_does_not_stop_when_the_keeper_ends() {
    assert!(is_its_part());
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let builder = Locks::builder_with_store(store).session_ttl(Duration::from_secs(1));
    let locks = builder.on_lost(OnLost::abort_after(GRACE)).open().await.unwrap();
    let guard = locks.lock("k").await.unwrap();
    faults.next(Operation::RenewSession, Fault::Panic);
    assert_eq!(guard.lost().await, LossCause::Closed);
    std::thread::sleep(Duration::from_secs(60));
    drop(guard);
}

#[tokio::test]
#[ignore = "a part that another test has played"]
async fn part_stops() {
    assert!(is_its_part());
    let locks = Locks::builder("memory:").on_lost(OnLost::abort_after(GRACE)).open().await.unwrap();
    for _ in 0..2 {
        let guard = locks.lock("k").await.unwrap();
        depose(&locks, &guard).await;
        drop(guard);
    }
    let guard = locks.lock("k").await.unwrap();
    depose(&locks, &guard).await;
    guard.release().await.unwrap();
    // Closed on purpose, with a guard that is still there.
    let guard = locks.lock("k").await.unwrap();
    locks.close().await.unwrap();
    std::thread::sleep(GRACE * 4);
    println!("lives on");
    drop(guard);
}

#[tokio::test]
#[ignore = "a part that another test has played"]
async fn part_drains() {
    assert!(is_its_part());
    let (one, two) = (Locks::open("memory:").await.unwrap(), Locks::open("memory:").await.unwrap());
    drop(Locks::open("memory:").await.unwrap());
    let guard = one.lock("k").await.unwrap();
    let waiting = tokio::spawn(one.lock("k").into_future());
    stanchion::drain("SIGTERM");
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Draining);
    assert_eq!((guard.draining(), two.draining()), (Some("SIGTERM"), Some("SIGTERM")));
    assert_eq!(two.lock("k").await.unwrap_err().kind(), ErrorKind::Draining);
    assert!(guard.is_held());
    let later = Locks::open("memory:").await.unwrap();
    assert!(later.draining().is_none(), "one that is opened later is another matter");
    println!("drained");
}
