//! Holds that linger: they meet failovers, clocks that are set back, full servers, missing rights and older programs.

use stanchion::store::{
    AcquireOutcome, AcquireRequest, EndOutcome, LingerOutcome, OpenSession, PollOutcome, Push, Redis,
};
use stanchion::{ErrorKind, Fence, SessionId, Store, TokenId};
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{Client, Environment, block_on, until};

use super::{SECOND, key, store, url};

const RECORD: &str = "stanchion:{:k}";

async fn linger(client: &Client<Redis>, token: TokenId) -> LingerOutcome {
    client.store.linger(&key("k"), token).await.unwrap().outcome
}

/// Marks the hold of `k` as soon as the session hears pushes. Returns its fence and the newest fence of the key.
async fn mark(client: &Client<Redis>, token: TokenId) -> (Fence, Fence) {
    let mut marked = None;
    until("the hold lingers", async || match linger(client, token).await {
        LingerOutcome::Lingers { fence, up_to } => marked.insert((fence, up_to)).0 == fence,
        _ => false,
    })
    .await;
    marked.unwrap()
}

async fn lingers(client: &Client<Redis>) -> bool {
    client.inspect(&key("k")).await.holders[0].lingers
}

/// A new primary may lack the hold, or have it without the mark and with the last fence of its grant. The fences that
/// the old primary reserved are lower than every later grant.
#[test]
fn failover_without_lingering_hold_grants_higher() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, other) = (environment.client().await, environment.client().await);
        for (forgets_hold, verifies) in [(true, false), (false, false), (false, true)] {
            let (token, granted) = holder.lock(&key("k")).await;
            assert_eq!(server.command(&["COPY", RECORD, "older", "REPLACE"]), "1");
            let (fence, up_to) = mark(&holder, token).await;
            assert!(granted.fence == fence && fence < up_to, "{granted:?}, {fence} to {up_to}");
            if forgets_hold {
                assert_eq!(server.command(&["DEL", RECORD]), "1");
                assert_eq!(linger(&holder, token).await, LingerOutcome::Gone);
            } else {
                assert_eq!(server.command(&["COPY", "older", RECORD, "REPLACE"]), "1");
                assert_eq!(
                    other.inspect(&key("k")).await.last_fence,
                    Some(fence),
                    "the new primary has no reserved fences"
                );
                assert!(!lingers(&other).await, "the new primary has no mark");
            }
            if verifies {
                // The holder verifies its hold, which marks it at the new primary.
                let (same, raised) = mark(&holder, token).await;
                assert!(same == fence && raised > up_to, "{raised} after {up_to}");
            }
            holder.release(&key("k"), token).await;
            let (next, granted) = other.lock(&key("k")).await;
            assert!(granted.fence > up_to, "{} after {up_to}", granted.fence);
            assert_eq!(other.release(&key("k"), next).await, EndOutcome::Released);
        }
    });
}

/// At a new primary the token of a hold may wait, and get the key again after others: its fence tells the holder.
#[test]
fn hold_granted_again_has_another_fence() {
    let server = RedisServer::start(Kind::Redis7);
    let names = ["", ":queue", ":waiting"].map(|end| (format!("{RECORD}{end}"), format!("older:{{:k}}{end}")));
    block_on(async {
        let environment = store(server.port());
        let (first, second) = (environment.client().await, environment.client().await);
        let (held, _) = first.lock(&key("k")).await;
        let waiting = second.enqueue(&key("k")).await;
        for (name, older) in &names {
            assert_eq!(server.command(&["COPY", name, older]), "1");
        }
        first.release(&key("k"), held).await;
        let granted = second.current_grant(&key("k"), waiting).await.unwrap();
        for (name, older) in &names {
            assert_eq!(server.command(&["COPY", older, name, "REPLACE"]), "1");
        }
        assert_eq!(linger(&second, waiting).await, LingerOutcome::Gone, "the token waits");
        first.release(&key("k"), held).await;
        let (fence, up_to) = mark(&second, waiting).await;
        assert!(fence > granted.fence && up_to >= fence, "{fence} to {up_to} after {}", granted.fence);
    });
}

/// The server's clock was set back behind the last fence. The hold has no fences of its own then, and its record keeps the
/// mark all the same.
#[test]
fn hold_without_reserved_fences_keeps_its_mark() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (mut holder, other) = (environment.client().await, environment.client().await);
        let ahead = stanchion::Clock::system().wall_micros() + 3_600_000_000;
        server.command(&["SET", RECORD, &format!("0{ahead}")]);
        let (token, granted) = holder.lock(&key("k")).await;
        assert_eq!(granted.fence.get(), ahead + 1);
        assert_eq!(mark(&holder, token).await, (granted.fence, granted.fence));
        assert!(lingers(&other).await);
        // The waiter rewrites the record as it comes and as it leaves.
        let waiting = other.enqueue(&key("k")).await;
        assert_eq!(holder.next_push().await, Push::Recall { token });
        assert_eq!(other.store.abandon(&key("k"), waiting).await.unwrap().outcome, EndOutcome::Dequeued);
        assert!(lingers(&other).await);
        assert!(other.list("").await[0].holders[0].lingers);
        assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
        assert_eq!(other.lock(&key("k")).await.1.fence.get(), ahead + 2);
    });
}

#[test]
fn only_the_head_recalls() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (mut holder, other) = (environment.client().await, environment.client().await);
        let (token, _) = holder.lock(&key("k")).await;
        mark(&holder, token).await;
        let first = other.enqueue(&key("k")).await;
        assert_eq!(holder.next_push().await, Push::Recall { token });
        for _ in 0..20 {
            let waiting = other.enqueue(&key("k")).await;
            assert!(matches!(other.poll(&key("k"), waiting).await, PollOutcome::Queued(_)));
        }
        // Messages of a session keep their order, so this grant comes after every recall of these waiters.
        let (signal, _) = other.lock(&key("signal")).await;
        let granted = holder.enqueue(&key("signal")).await;
        other.release(&key("signal"), signal).await;
        loop {
            match holder.next_push().await {
                Push::Granted { token, .. } if token == granted => break,
                // The holder is reminded of an older hold, which the machine may make of this one.
                Push::Granted { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(other.poll(&key("k"), first).await, PollOutcome::Queued(_)));
        until("the head recalls", async || holder.next_push().await == Push::Recall { token }).await;
    });
}

/// A mark makes the record larger, so a full server refuses it. The hold is left as it is.
#[test]
fn full_server_lets_no_hold_linger() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let client = environment.client().await;
        let (other, _) = client.lock(&key("other")).await;
        until("the session hears pushes", async || {
            let outcome = client.store.linger(&key("other"), other).await.unwrap().outcome;
            matches!(outcome, LingerOutcome::Lingers { .. })
        })
        .await;
        let (token, granted) = client.lock(&key("k")).await;
        let record = server.command(&["GET", RECORD]);
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        assert_eq!(linger(&client, token).await, LingerOutcome::Wanted);
        assert_eq!(linger(&client, TokenId::random().unwrap()).await, LingerOutcome::Gone);
        assert_eq!(server.command(&["GET", RECORD]), record, "nothing was written");
        server.command(&["CONFIG", "SET", "maxmemory", "0"]);
        assert_eq!(mark(&client, token).await.0, granted.fence);
        // A marked hold is released on a full server too.
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
        server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    });
}

/// Other faults of the write than a lack of memory are errors: the hold is not known to be there.
#[test]
fn rejected_mark_is_an_error() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let client = store(server.port()).client().await;
        let (token, _) = client.lock(&key("k")).await;
        mark(&client, token).await;
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        let error = client.store.linger(&key("k"), token).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
        assert!(error.to_string().contains("too few replicas"), "{error}");
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        server.command(&["ACL", "SETUSER", "default", "-set"]);
        let error = client.store.linger(&key("k"), token).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
        server.command(&["ACL", "SETUSER", "default", "+set"]);
        mark(&client, token).await;
    });
}

/// A hold lingers only while its session hears a recall.
#[test]
fn deaf_session_lets_no_hold_linger() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let client = store(server.port()).client().await;
        for right in ["subscribe", "publish"] {
            let rights = ["ACL", "SETUSER", right, "on", ">pw", "~*", "&*", "+@all", &format!("-{right}")];
            assert_eq!(server.command(&rights), "OK");
            let deaf = Redis::from_url(&format!("redis://{right}:pw@127.0.0.1:{}", server.port())).unwrap();
            let session = SessionId::random().unwrap();
            let mut pushes = deaf.grants(session);
            deaf.open_session(OpenSession { session, ttl: 600 * SECOND, owner: "deaf".into() }).await.unwrap();
            let is_warning = |push| matches!(push, Some(Push::Warning(text)) if text.contains("notifications"));
            until("the store warns of it", async || is_warning(pushes.next().await)).await;
            let request = AcquireRequest { session, ..client.request(&key("k")) };
            let (name, token) = (request.key.clone(), request.token);
            assert!(matches!(deaf.acquire(request).await.unwrap().outcome, AcquireOutcome::Granted(_)));
            assert_eq!(deaf.linger(&name, token).await.unwrap().outcome, LingerOutcome::Wanted, "without {right}");
            assert!(!lingers(&client).await);
            assert_eq!(deaf.release(&name, token, None).await.unwrap().outcome, EndOutcome::Released);
            assert_eq!(deaf.linger(&name, token).await.unwrap().outcome, LingerOutcome::Gone);
        }
        // The subscription ends and cannot be made again for a while.
        let (token, _) = client.lock(&key("k")).await;
        mark(&client, token).await;
        server.command(&["ACL", "SETUSER", "default", "-subscribe"]);
        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        until("the session is deaf", async || linger(&client, token).await == LingerOutcome::Wanted).await;
        server.command(&["ACL", "SETUSER", "default", "+subscribe"]);
        mark(&client, token).await;
    });
}

/// Grants count only when replicas have them, and so do the fences that a holder uses by itself.
#[test]
fn min_replicas_covers_reserved_fences() {
    let primary = RedisServer::start(Kind::Redis7);
    let replica = RedisServer::with(Kind::Redis7, &["--replicaof", &format!("127.0.0.1 {}", primary.port())]);
    let linked = || replica.command(&["INFO", "replication"]).contains("master_link_status:up");
    stanchion_testkit::servers::wait("linked", linked);
    block_on(async {
        let url = format!("{}?min_replicas=1", url(primary.port()));
        let client = Environment::new(move || Redis::from_url(&url).unwrap()).client().await;
        let (token, _) = client.lock(&key("k")).await;
        mark(&client, token).await;
        replica.process().unwrap().signal("STOP");
        let error = client.store.linger(&key("k"), token).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, true), "{error}");
        assert!(error.to_string().contains("0 replicas"), "{error}");
        replica.process().unwrap().signal("CONT");
        until("the replica has it", async || client.store.linger(&key("k"), token).await.is_ok()).await;
    });
}

#[test]
fn linger_takes_one_request() {
    let server = RedisServer::start(Kind::Redis7);
    let requests = || -> u64 {
        let stats = server.command(&["INFO", "commandstats"]);
        let calls = |name: &str| -> u64 {
            let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls=")));
            line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
        };
        calls("eval") + calls("evalsha")
    };
    block_on(async {
        let environment = store(server.port());
        let (client, other) = (environment.client().await, environment.client().await);
        // Each client checks once that it hears its own messages.
        let (token, _) = other.lock(&key("k")).await;
        mark(&other, token).await;
        other.release(&key("k"), token).await;
        let (token, _) = client.lock(&key("k")).await;
        mark(&client, token).await;
        let before = requests();
        for _ in 0..10 {
            mark(&client, token).await;
        }
        assert_eq!(requests() - before, 10);
        let waiting = other.enqueue(&key("k")).await;
        let before = requests();
        assert_eq!(linger(&client, token).await, LingerOutcome::Wanted);
        assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
        assert_eq!(requests() - before, 2, "a refusal and the hand-off");
        assert!(matches!(other.poll(&key("k"), waiting).await, PollOutcome::Granted(_)));
    });
}

/// Programs of several versions share a key: each keeps what it does not know of the other's holds and waiters.
#[test]
fn unknown_fields_of_a_record_are_kept() {
    let server = RedisServer::start(Kind::Redis7);
    let change = |change: &str| {
        let script = format!(
            "local state = cmsgpack.unpack(string.sub(redis.call('GET', KEYS[1]), 2)) {change} \
             redis.call('SET', KEYS[1], '2' .. cmsgpack.pack(state)) return state.holds[1].newer"
        );
        server.command(&["EVAL", &script, "1", RECORD])
    };
    block_on(async {
        let environment = store(server.port());
        let (holder, other) = (environment.client().await, environment.client().await);
        let (token, _) = holder.lock(&key("k")).await;
        mark(&holder, token).await;
        assert_eq!(change("state.holds[1].newer = 'field'"), "field");
        let waiting = other.enqueue(&key("k")).await;
        other.poll(&key("k"), waiting).await;
        other.store.abandon(&key("k"), waiting).await.unwrap();
        let request = holder.request(&key("k"));
        let again = holder.acquire(&AcquireRequest { token, ..request }).await;
        assert!(matches!(again, AcquireOutcome::Granted(_)));
        mark(&holder, token).await;
        assert_eq!(change(""), "field");
        assert!(lingers(&other).await);
        assert_eq!(other.list("").await.len(), 1, "a listing reads the record");
        tokio::time::timeout(10 * SECOND, holder.release(&key("k"), token)).await.unwrap();
    });
}
