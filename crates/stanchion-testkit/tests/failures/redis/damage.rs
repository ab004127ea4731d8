//! Uses foreign or damaged records, and the highest fence: no operation panics, and each error describes the problem.

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptRequest, Demand, EndOutcome, ForceReleaseRequest, PollOutcome, RenewOutcome,
};
use stanchion::{Error, ErrorKind, Fence, Store, TokenId};
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{Client, block_on};

use super::{SECOND, key, locks, store};

const RECORD: &str = "stanchion:{:k}";

/// Returns commands that write records which this library does not.
fn damages() -> Vec<Vec<String>> {
    let set = |text: &str| vec!["SET".to_owned(), RECORD.to_owned(), text.to_owned()];
    let packed = |state: &str| {
        let script = format!("return redis.call('SET', KEYS[1], '2' .. cmsgpack.pack({state}))");
        vec!["EVAL".to_owned(), script, "1".to_owned(), RECORD.to_owned()]
    };
    let digits = "1234567890123456";
    let hex = "0123456789abcdef0123456789abcdef";
    vec![
        set(""),
        set("hello"),
        set("0"),
        set("0123"),
        set("0 is no number"),
        set("1"),
        set(&format!("1{digits}")),
        set(&format!("1{digits}{digits}{hex}")),
        set(&format!("1{digits}{digits}{hex}{hex}X")),
        set(&format!("1{digits}xxxxxxxxxxxxxxxx{hex}{hex}S1:a--")),
        set(&format!("1{digits}{digits}zzzz{}{hex}S1:a--", &hex[4..])),
        set(&format!("1{digits}{digits}{hex}{hex}S99:a")),
        set("2"),
        set("2garbage"),
        packed("1"),
        packed("{}"),
        packed("{ holds = 1, forced = {} }"),
        packed("{ holds = { 1 }, forced = {} }"),
        packed("{ holds = { {} }, forced = {} }"),
        packed("{ holds = {}, forced = { x = 1 } }"),
        packed("{ holds = {}, forced = {}, closed = 'x', last = {} }"),
        packed(
            "{ holds = { { units = 'x', capacity = {}, token = 1, session = 2, kind = 3, fence = {}, at = 4 } }, forced = {} }",
        ),
        vec!["RPUSH".into(), RECORD.into(), "hello".into()],
    ]
}

/// Runs every operation on the key, and counts the errors. Any error will do if its kind fits and its outcome is known.
async fn all_operations<S: Store>(actor: &Client<S>, what: &str) -> u32 {
    let (store, key, token) = (&actor.store, key("k"), TokenId::random().unwrap());
    let request = actor.request(&key);
    let adopt = AdoptRequest {
        key: key.clone(),
        from: token,
        to: TokenId::random().unwrap(),
        session: actor.session,
        not_after: request.not_after,
    };
    let force = ForceReleaseRequest { key: key.clone(), fence: Fence::new(1), reason: "damaged".into() };
    let pooled = AcquireRequest { demand: Demand::new(1, 3).unwrap(), enqueue: false, ..actor.request(&key) };
    let faults: Vec<Option<Error>> = vec![
        store.acquire(request).await.err(),
        store.acquire(pooled).await.err(),
        store.poll(&key, &[token]).await.err(),
        store.extend(&key, token, SECOND).await.err(),
        store.linger(&key, token).await.err(),
        store.adopt(adopt).await.err(),
        store.force_release(force).await.err(),
        store.inspect(&key).await.err(),
        store.release(&key, token, Some(SECOND)).await.err(),
        store.abandon(&key, token).await.err(),
    ];
    let faults: Vec<_> = faults.into_iter().flatten().collect();
    for fault in &faults {
        let outcome = (fault.kind(), fault.is_in_doubt());
        assert!(matches!(outcome, (ErrorKind::Misconfigured | ErrorKind::Internal, false)), "{what}: {fault}");
    }
    faults.len() as u32
}

#[test]
fn damaged_records_cause_no_panic() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = environment.client().await;
        let locks = locks(server.port()).await;
        for damage in damages() {
            let words: Vec<_> = damage.iter().map(String::as_str).collect();
            let what = words.join(" ");
            server.command(&["DEL", RECORD]);
            let written = server.command(&words);
            assert!(written == "OK" || written == "1", "{written}");
            all_operations(&actor, &what).await;
            server.command(&["DEL", RECORD]);
            server.command(&words);
            // Errors that people see name the key.
            for outcome in [
                locks.inspect("k").await.map(drop),
                locks.try_lock("k").await.map(drop),
                locks.lock("k").wait(SECOND / 10).await.map(drop),
                locks.force_release("k", Fence::new(1), "damaged").await.map(drop),
            ] {
                if let Err(error) = outcome {
                    assert!(error.to_string().contains("key `k` in redis"), "{what}: {error}");
                }
            }
        }
        server.command(&["DEL", RECORD]);
        // A foreign record is not overwritten.
        for text in ["hello", "0 is no number", "2garbage", "1"] {
            server.command(&["SET", RECORD, text]);
            assert_eq!(all_operations(&actor, text).await, 10, "{text}");
            assert_eq!(server.command(&["GET", RECORD]), text);
        }
        // The queue and the requests of waiters may be damaged too.
        for other in [":queue", ":waiting"] {
            server.command(&["DEL", RECORD, "stanchion:{:k}:queue", "stanchion:{:k}:waiting"]);
            actor.lock(&key("k")).await;
            actor.enqueue(&key("k")).await;
            server.command(&["SET", &format!("{RECORD}{other}"), "hello"]);
            assert!(all_operations(&actor, other).await > 0);
        }
    });
}

#[test]
fn damaged_session_is_reported_without_panic() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let other = environment.client().await;
        for damage in ["", "x", "00", &"x".repeat(32), &"9".repeat(32), &"9".repeat(400)] {
            let actor = environment.client().await;
            actor.lock(&key(damage.get(..1).unwrap_or("empty"))).await;
            let name = format!("stanchion:session:{{{}}}", actor.session.to_hex());
            server.command(&["SET", &name, damage]);
            let renewed = actor.store.renew_session(actor.session).await;
            assert!(renewed.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::Misconfigured), "{renewed:?}");
            let lives = other.store.session_lives(actor.session).await;
            assert!(lives.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::Misconfigured), "{lives:?}");
            server.command(&["DEL", &name]);
            server.command(&["RPUSH", &name, "hello"]);
            let renewed = actor.store.renew_session(actor.session).await.unwrap_err();
            assert_eq!(renewed.kind(), ErrorKind::Misconfigured, "{renewed}");
            server.command(&["FLUSHALL"]);
        }
        // An unreadable list of losses must not cost the session.
        let actor = environment.client().await;
        let name = format!("stanchion:session:{{{}}}", actor.session.to_hex());
        let kept = server.command(&["GETRANGE", &name, "0", "31"]);
        server.command(&["SET", &name, &format!("{kept}garbage"), "PX", "60000"]);
        let renewed = actor.store.renew_session(actor.session).await.unwrap().outcome;
        assert_eq!(renewed, RenewOutcome::Alive { lost: Vec::new() });
    });
}

/// After the highest fence nothing is granted, by any kind of request, and existing holds can be released.
#[test]
fn highest_fence_stops_every_grant() {
    const LAST: u64 = 9_007_199_254_740_990;
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, next) = (environment.client().await, environment.client().await);
        server.command(&["SET", RECORD, &format!("0{}", LAST - 1)]);
        let (token, granted) = holder.lock(&key("k")).await;
        assert_eq!(granted.fence.get(), LAST);
        let waiting = next.enqueue(&key("k")).await;
        // This release would hand the key on.
        assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
        assert_eq!(next.poll(&key("k"), waiting).await, PollOutcome::Gone);
        // Single calls, batched calls, and a request with a capacity.
        let pooled = AcquireRequest { demand: Demand::new(1, 3).unwrap(), ..next.request(&key("k")) };
        let requests = (0..40).map(|turn| {
            let request = if turn % 10 == 0 { pooled.clone() } else { next.request(&key("k")) };
            next.store.acquire(AcquireRequest { token: TokenId::random().unwrap(), ..request })
        });
        for outcome in futures_util::future::join_all(requests).await {
            let error = outcome.unwrap_err();
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Misconfigured, false), "{error}");
            assert!(error.to_string().contains("highest fence"), "{error}");
        }
        assert_eq!(server.command(&["GET", RECORD]), format!("0{LAST}"));
        let other = next.acquire(&next.request(&key("other"))).await;
        assert!(matches!(other, AcquireOutcome::Granted(_)), "{other:?}");
    });
}
