//! Loses answers, scripts, subscriptions and whole links.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stanchion::store::{AcquireOutcome, EndOutcome};
use stanchion::{Event, Locks, LossCause, RetryPolicy, Store};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{block_on, seed, until};

use super::{SECOND, is_free, key, locks, store, url};

/// Makes 10,000 calls in eight tasks through a proxy that loses a fifth of all answers.
#[test]
#[ignore = "long"]
fn lost_answers_leave_no_hold_and_no_error() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("lost_answers_leave_no_hold_and_no_error"));
    block_on(async {
        let locks = Locks::builder(&url(proxy.port()))
            .retry(RetryPolicy { attempts: 60, pause: Duration::from_millis(1), ..RetryPolicy::default() })
            .open()
            .await
            .unwrap();
        let direct = super::locks(server.port()).await;
        proxy.faults().lose_answers(200);
        let failed = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (locks, direct, failed) = (locks.clone(), direct.clone(), failed.clone());
                tokio::spawn(async move {
                    let mut last = None;
                    for turn in 0..625 {
                        let name = format!("k{}", (task + turn) % 4);
                        let guard = match locks.lock(&name).wait(20 * SECOND).await {
                            Ok(guard) => guard,
                            Err(error) => {
                                assert!(error.is_transient(), "{error}");
                                failed.fetch_add(1, Ordering::SeqCst);
                                continue;
                            }
                        };
                        // The guard agrees with the store.
                        if turn % 10 == 0 {
                            let state = direct.inspect(&name).await.unwrap();
                            assert_eq!(state.holders.len(), 1);
                            assert_eq!(state.holders[0].fence, guard.fence());
                        }
                        assert!(last != Some((name.clone(), guard.fence())));
                        last = Some((name, guard.fence()));
                        if let Err(error) = guard.release().await {
                            assert!(error.is_transient(), "{error}");
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(proxy.faults().lost() > 500, "{} lost", proxy.faults().lost());
        assert!(failed.load(Ordering::SeqCst) < 20, "too many calls failed in spite of retries: {failed:?}");
        proxy.faults().lose_answers(0);
        for name in ["k0", "k1", "k2", "k3"] {
            until("nothing is left", async || is_free(&direct, name).await).await;
        }
    });
}

/// A repeated request with the same token gets the same fence, even after lost answers.
#[test]
#[ignore = "long"]
fn repeated_acquire_returns_the_same_fence() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("repeated_acquire_returns_the_same_fence"));
    block_on(async {
        let (through, direct) = (store(proxy.port()), store(server.port()));
        let (client, observer) = (through.client().await, direct.client().await);
        let mut repeated = 0;
        proxy.faults().lose_answers(400);
        for _ in 0..500 {
            let request = client.request(&key("k"));
            let mut attempts = 0;
            let granted = loop {
                attempts += 1;
                match client.store.acquire(request.clone()).await {
                    Ok(reply) => match reply.outcome {
                        AcquireOutcome::Granted(granted) => break granted,
                        other => panic!("{other:?}"),
                    },
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            let before: Vec<_> = observer.inspect(&key("k")).await.holders.iter().map(|hold| hold.fence).collect();
            assert_eq!(before, [granted.fence], "this hold is the only one");
            repeated += u32::from(attempts > 1);
            loop {
                match client.store.release(&key("k"), request.token, None).await {
                    Ok(reply) => {
                        assert!(reply.outcome == EndOutcome::Released || attempts > 0);
                        break;
                    }
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(!observer.is_locked(&key("k")).await);
        }
        assert!(repeated > 50, "{repeated} were repeated");
    });
}

/// A forced release reaches the holder, although the push was lost and the connection of the operator broke half-way.
#[test]
fn repeated_force_release_notifies_the_holder() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("repeated_force_release_notifies_the_holder"));
    block_on(async {
        let holder = Locks::builder(&url(server.port())).session_ttl(2 * SECOND).open().await.unwrap();
        let operator = Locks::builder(&url(proxy.port()))
            .retry(RetryPolicy { attempts: 60, pause: Duration::from_millis(1), ..RetryPolicy::default() })
            .open()
            .await
            .unwrap();
        proxy.faults().lose_answers(100);
        for turn in 0..20 {
            let guard = holder.lock("k").await.unwrap();
            let mut events = holder.events();
            operator.force_release("k", guard.fence(), format!("turn {turn}")).await.unwrap();
            tokio::time::timeout(20 * SECOND, guard.lost()).await.unwrap();
            assert_eq!(guard.loss(), Some(LossCause::ForceReleased), "turn {turn}");
            let reported = events.next().await;
            assert!(
                matches!(&reported, Some(Event::Lost { reason: Some(reason), .. }) if *reason == format!("turn {turn}")),
                "{reported:?}"
            );
        }
    });
}

#[test]
fn cut_subscription_is_restored() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        for _ in 0..5 {
            assert_eq!(server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]), "1");
            let guard = locks.lock("k").await.unwrap();
            let waiting = tokio::spawn(locks.lock("k").into_future());
            until("queued", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
            guard.release().await.unwrap();
            waiting.await.unwrap().unwrap().release().await.unwrap();
            until("subscribed", async || server.command(&["PUBSUB", "CHANNELS"]).contains("stanchion:session:")).await;
        }
    });
}

#[test]
fn forgotten_scripts_are_sent_again() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        for _ in 0..20 {
            let guard = locks.lock("k").await.unwrap();
            assert_eq!(server.command(&["SCRIPT", "FLUSH"]), "OK");
            guard.release().await.unwrap();
        }
    });
}

/// A link dies without any sign: the holder loses its lock on time, and nothing is stuck when the link recovers.
#[test]
fn dead_link_loses_on_time() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let ttl = SECOND;
        let locks = Locks::builder(&url(proxy.port())).session_ttl(ttl).open().await.unwrap();
        let direct = Locks::builder(&url(server.port())).session_ttl(ttl).open().await.unwrap();
        let guard = locks.lock("k").await.unwrap();
        proxy.faults().silence(true);
        let cut = Instant::now();
        let next = tokio::spawn(direct.lock("k").into_future());
        tokio::time::timeout(10 * SECOND, guard.lost()).await.unwrap();
        let lost = cut.elapsed();
        let fence = guard.fence();
        let next = next.await.unwrap().unwrap();
        assert!(
            lost < ttl && lost < cut.elapsed(),
            "lost after {lost:?}, granted to the next waiter after {:?}",
            cut.elapsed()
        );
        assert!(next.fence() > fence);
        assert!(cut.elapsed() < ttl + SECOND, "{:?}", cut.elapsed());
        next.release().await.unwrap();
        drop(guard);
        proxy.faults().silence(false);
        until("it works again", async || locks.try_lock("k").await.is_ok_and(|guard| guard.is_some())).await;
        until("nothing is left", async || is_free(&direct, "k").await).await;
    });
}

/// Connections die without any sign, and no request waits long enough to suspect them alone.
#[test]
fn short_attempts_replace_a_dead_connection() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let retry = RetryPolicy { attempt: Duration::from_millis(300), ..RetryPolicy::default() };
        let locks = Locks::builder(&url(proxy.port())).session_ttl(SECOND).retry(retry).open().await.unwrap();
        for _ in 0..2 {
            locks.lock("k").await.unwrap().release().await.unwrap();
            proxy.faults().strand();
            // This needs the connection of the calls and that of the renewals: without a session nothing is granted.
            until("it works again", async || locks.try_lock("k").await.is_ok_and(|guard| guard.is_some())).await;
        }
    });
}

/// A thousand tasks meet an unavailable server, and make no storm of connections.
#[test]
fn reconnecting_is_no_storm() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let locks = Locks::open(&url(proxy.port())).await.unwrap();
        proxy.faults().refuse(true);
        proxy.faults().cut();
        let before = proxy.faults().connections();
        let start = Instant::now();
        let tasks: Vec<_> =
            (0..500).map(|task| tokio::spawn(locks.lock(format!("k{task}")).wait(2 * SECOND).into_future())).collect();
        for task in tasks {
            let error = task.await.unwrap().unwrap_err();
            assert!(error.is_transient() && error.to_string().contains("cannot connect"), "{error}");
        }
        let made = proxy.faults().connections() - before;
        assert!(made < 60, "{made} connections in {:?}", start.elapsed());
        proxy.faults().refuse(false);
        until("it works again", async || locks.lock("k0").wait(SECOND).await.is_ok()).await;
    });
}

/// Any client with the right to publish can flood a session, which renews all the same and receives its own messages.
#[test]
fn message_flood_delays_no_renewal() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        // Longer than a busy machine needs to send the messages.
        let ttl = 5 * SECOND;
        let locks = Locks::builder(&url(server.port())).session_ttl(ttl).open().await.unwrap();
        let other = super::locks(server.port()).await;
        let guard = locks.lock("held").await.unwrap();
        let wanted = other.lock("wanted").await.unwrap();
        let waiting = tokio::spawn(locks.lock("wanted").into_future());
        until("queued", async || other.inspect("wanted").await.unwrap().waiters.len() == 1).await;
        let session = locks.session();
        let channel = format!("stanchion:session:{{{}}}", session.unwrap().to_hex());
        let flood = "for at = 1, 10000 do redis.call('PUBLISH', KEYS[1], ARGV[1]) end return 'OK'";
        let forged = format!("G{}{:016}stanchion:{{:x}}", stanchion::TokenId::random().unwrap().to_hex(), 7);
        let start = Instant::now();
        let foreign_messages = ["x", "", "G1234", &"y".repeat(1_000), "F0:", &"\u{e9}".repeat(40)];
        for turn in 0..20 {
            let message = if turn < 10 { foreign_messages[turn % foreign_messages.len()] } else { &forged };
            assert_eq!(server.command(&["EVAL", flood, "1", &channel, message]), "OK");
        }
        println!("200,000 messages sent in {:?}", start.elapsed());
        while start.elapsed() < ttl + SECOND {
            guard.check().unwrap();
            assert_eq!(locks.session(), session);
            tokio::time::sleep(ttl / 20).await;
        }
        wanted.release().await.unwrap();
        waiting.await.unwrap().unwrap().release().await.unwrap();
        guard.release().await.unwrap();
    });
}
