//! Sessions: while a slot is being moved, on a full server, with a clock that was set back; and what they are told.

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

/// A slot that stays on its way for longer than a session lives: the session in it lives on, and so do the locks in it.
#[test]
fn a_slot_that_is_being_moved_ends_no_session_and_keeps_no_key() {
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
            // A key that is not there yet, and one whose record is.
            locks.lock("free").wait(ttl).await.unwrap().release().await.unwrap();
            if !has_moved && started.elapsed() > ttl {
                // Half of the time at the node that it comes from, half at the one that it goes to.
                assert_eq!(nodes[from].command(&["MIGRATE", "127.0.0.1", &port, &session, "0", "5000"]), "OK");
                has_moved = true;
            }
            tokio::time::sleep(ttl / 10).await;
        }
        guard.release().await.unwrap();
    });
}

/// A full server has no room for what a session is to be told, but for this.
#[test]
fn a_forced_release_is_told_also_where_memory_is_short() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (mut victim, other) = (environment.actor().await, environment.actor().await);
        let (token, granted) = victim.takes(&key("k")).await;
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: "by hand".into() };
        assert_eq!(other.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
        let RenewOutcome::Alive { lost } = victim.store.renew_session(victim.session).await.unwrap().outcome else {
            panic!("the session lives");
        };
        assert_eq!((lost.len(), lost[0].token, lost[0].reason.as_str()), (1, token, "by hand"));
        assert_eq!(victim.pushed().await, Push::ForceReleased(lost[0].clone()));
    });
}

/// Who releases by force may die before it has told the session: the message is a part of the step itself.
#[test]
fn a_forced_release_is_told_by_the_step_that_does_it() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let (environment, breaker) = (store(server.port()), store(proxy.port()).open());
        let (mut victim, observer) = (environment.actor().await, environment.actor().await);
        let (token, granted) = victim.takes(&key("k")).await;
        breaker.inspect(&key("k")).await.unwrap();
        proxy.faults().delay_answers(SECOND);
        let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: "by hand".into() };
        let evicting = tokio::spawn(async move { breaker.force_release(request).await });
        until("released", async || !observer.sees_held(&key("k")).await).await;
        // Long before it has the answer.
        evicting.abort();
        assert!(matches!(victim.pushed().await, Push::ForceReleased(lost) if lost.token == token));
        let beaten = victim.store.renew_session(victim.session).await.unwrap().outcome;
        assert_eq!(beaten, RenewOutcome::Alive { lost: Vec::new() }, "the second step was not done");
    });
}

/// An answer that was lost leaves in the list what nobody has any more: ending it once more clears it.
#[test]
fn what_was_taken_by_force_is_told_until_it_is_ended_and_no_longer() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = Locks::builder(&url(server.port())).session_ttl(SECOND).open().await.unwrap();
        let session = server.command(&["KEYS", "stanchion:session:*"]).trim().to_owned();
        let tell = "local s = redis.call('GET', KEYS[1]) \
                    return redis.call('SET', KEYS[1], s .. cmsgpack.pack({ [ARGV[1]] = ARGV[2] }), 'KEEPTTL')";
        let token = TokenId::random().unwrap().to_hex();
        server.command(&["EVAL", tell, "1", &session, &token, "2::kby hand"]);
        assert!(server.command(&["STRLEN", &session]).parse::<usize>().unwrap() > 32);
        until("it is told no longer", async || server.command(&["STRLEN", &session]) == "32").await;
        locks.lock("k").await.unwrap().release().await.unwrap();
    });
}

/// A clock that was set back makes a session look as if it lived for long: after its ttl it is looked at again.
#[test]
fn nobody_is_taken_to_live_for_longer_than_a_ttl() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, other) = (environment.mortal(20 * SECOND).await, environment.actor().await);
        holder.takes(&key("k")).await;
        let session = format!("stanchion:session:{{{}}}", holder.session.to_hex());
        let ahead = Clock::system().wall_micros() + 3_600_000_000;
        server.command(&["SET", &session, &format!("{ahead:016}{:016}", 20_000_000), "PX", "100000"]);
        let asked = AcquireRequest { enqueue: false, ..other.request(&key("k")) };
        let AcquireOutcome::Busy { check_in: Some(check_in), .. } = other.ask(&asked).await else {
            panic!("it is held");
        };
        assert!(check_in <= 20 * SECOND, "{check_in:?}");
    });
}

/// What is taken up by a session that beats once in days is remembered for longer than that.
#[test]
fn an_adopted_hold_is_remembered_for_as_long_as_its_new_session_may_be_silent() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let day = Duration::from_secs(24 * 60 * 60);
        let (holder, rare) = (environment.actor().await, environment.mortal(20 * day).await);
        let (from, _) = holder.takes(&key("k")).await;
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
