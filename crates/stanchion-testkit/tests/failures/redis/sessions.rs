//! Tests sessions while a slot is being moved, on a full server, and with a clock that was set back; and their
//! notifications.

use std::time::{Duration, Instant};

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, ForceReleaseOutcome, ForceReleaseRequest, Push,
    RenewOutcome,
};
use stanchion::{Clock, Locks, Store, TokenId};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisServer};
use stanchion_testkit::{block_on, until};

use super::{SECOND, key, store, url};

/// A slot is being moved for longer than a session lives: the session in it stays alive, and so do the locks.
#[test]
fn moving_slot_keeps_sessions_and_frees_keys() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let nodes = cluster.nodes();
    let ids: Vec<_> = nodes.iter().map(|node| node.command(&["CLUSTER", "MYID"])).collect();
    let moving = |name: &str| {
        let slot = nodes[0].command(&["CLUSTER", "KEYSLOT", name]);
        let number: u16 = slot.parse().unwrap();
        let from = usize::from(number > 5_460) + usize::from(number > 10_922);
        let to = (from + 1) % 3;
        nodes[to].command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]);
        nodes[from].command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]);
        (from, to)
    };
    let ttl = 2 * SECOND;
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(ttl).open().await.unwrap();
        let guard = locks.lock("held").await.unwrap();
        let session = nodes
            .iter()
            .flat_map(|node| {
                let keys = node.command(&["KEYS", "stanchion:session:*"]);
                keys.lines().map(str::to_owned).collect::<Vec<_>>()
            })
            .next()
            .unwrap();
        let started = Instant::now();
        let (from, to) = moving(&session);
        moving("stanchion:{:held}");
        moving("stanchion:{:free}");
        let port = nodes[to].port().to_string();
        let mut has_moved = false;
        while started.elapsed() < 3 * ttl {
            guard.check().unwrap();
            // The record of this key does not exist at first, and later does.
            locks.lock("free").wait(ttl).await.unwrap().release().await.unwrap();
            if !has_moved && started.elapsed() > ttl {
                // The session spends half of the time at the node it leaves, and half at the node it moves to.
                assert_eq!(nodes[from].command(&["MIGRATE", "127.0.0.1", &port, &session, "0", "5000"]), "OK");
                has_moved = true;
            }
            tokio::time::sleep(ttl / 10).await;
        }
        guard.release().await.unwrap();
    });
}

/// A full server has no room for a session's notifications, except for this one.
#[test]
fn force_release_is_reported_without_memory() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (mut holder, other) = (environment.client().await, environment.client().await);
        let (token, granted) = holder.lock(&key("k")).await;
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: "by hand".into() };
        assert_eq!(other.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
        let RenewOutcome::Alive { lost } = holder.store.renew_session(holder.session).await.unwrap().outcome else {
            panic!("the session is alive");
        };
        assert_eq!((lost.len(), lost[0].token, lost[0].reason.as_str()), (1, token, "by hand"));
        assert_eq!(holder.next_push().await, Push::ForceReleased(lost[0].clone()));
    });
}

/// The caller may fail before it has notified the session, so the script itself publishes the message.
#[test]
fn force_release_itself_notifies_the_holder() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let (environment, breaker) = (store(server.port()), store(proxy.port()).open());
        let (mut holder, observer) = (environment.client().await, environment.client().await);
        let (token, granted) = holder.lock(&key("k")).await;
        breaker.inspect(&key("k")).await.unwrap();
        proxy.faults().delay_answers(SECOND);
        let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: "by hand".into() };
        let releasing = tokio::spawn(async move { breaker.force_release(request).await });
        until("released", async || !observer.is_locked(&key("k")).await).await;
        // This is long before the caller gets the answer.
        releasing.abort();
        assert!(matches!(holder.next_push().await, Push::ForceReleased(lost) if lost.token == token));
        let renewed = holder.store.renew_session(holder.session).await.unwrap().outcome;
        assert_eq!(renewed, RenewOutcome::Alive { lost: Vec::new() }, "the second request was not sent");
    });
}

/// A lost answer leaves a token in the list that nobody has any more. Releasing it once more clears the list.
#[test]
fn loss_is_reported_until_its_token_is_released() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = Locks::builder(&url(server.port())).session_ttl(SECOND).open().await.unwrap();
        let session = server.command(&["KEYS", "stanchion:session:*"]).trim().to_owned();
        let add_loss = "local s = redis.call('GET', KEYS[1]) \
                    return redis.call('SET', KEYS[1], s .. cmsgpack.pack({ [ARGV[1]] = ARGV[2] }), 'KEEPTTL')";
        let token = TokenId::random().unwrap().to_hex();
        server.command(&["EVAL", add_loss, "1", &session, &token, "2::kby hand"]);
        assert!(server.command(&["STRLEN", &session]).parse::<usize>().unwrap() > 32);
        until("the loss is no longer reported", async || server.command(&["STRLEN", &session]) == "32").await;
        locks.lock("k").await.unwrap().release().await.unwrap();
    });
}

/// A clock that was set back makes a session look alive for long: it is queried again after its ttl.
#[test]
fn session_is_rechecked_within_its_ttl() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, other) = (environment.client_with_ttl(20 * SECOND).await, environment.client().await);
        holder.lock(&key("k")).await;
        let session = format!("stanchion:session:{{{}}}", holder.session.to_hex());
        let ahead = Clock::system().wall_micros() + 3_600_000_000;
        server.command(&["SET", &session, &format!("{ahead:016}{:016}", 20_000_000), "PX", "100000"]);
        let request = AcquireRequest { enqueue: false, ..other.request(&key("k")) };
        let AcquireOutcome::Busy { check_in: Some(check_in), .. } = other.acquire(&request).await else {
            panic!("the key is held");
        };
        assert!(check_in <= 20 * SECOND, "{check_in:?}");
    });
}

/// A hold that is adopted by a session with rare renewals is remembered for longer than their interval.
#[test]
fn adopted_hold_lives_on() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let day = Duration::from_secs(24 * 60 * 60);
        let (holder, rare) = (environment.client().await, environment.client_with_ttl(20 * day).await);
        let (from, _) = holder.lock(&key("k")).await;
        let request = AdoptRequest {
            key: key("k"),
            from,
            to: TokenId::random().unwrap(),
            session: rare.session,
            not_after: rare.request(&key("k")).not_after,
        };
        let outcome = rare.store.adopt(request).await.unwrap().outcome;
        assert!(matches!(outcome, AdoptOutcome::Adopted { .. }), "{outcome:?}");
        let life = server.command(&["PTTL", "stanchion:{:k}"]).parse().unwrap();
        assert!(Duration::from_millis(life) > 39 * day, "{life} ms");
    });
}
