//! Lists damaged entries and many keys, and uses a server that rejects SCAN.

use std::time::Instant;

use super::*;
use stanchion::ErrorKind;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisServer};
use stanchion_testkit::{block_on, list_all, read_pages, until};

const SESSION: &str = "0123456789abcdef0123456789abcdef";

/// Returns the record of a mutex that this session holds.
fn held_by(session: &str) -> String {
    format!("1{:016}{:016}{}{session}S2:me--", 1_764_000_000_000_000_u64, 1_764_000_000_000_000_u64, "c".repeat(32))
}

#[test]
fn damaged_entries_are_named_and_skipped() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (locks, waiter) = (locks(server.port()).await, locks(server.port()).await);
        let _good = locks.lock("good").await.unwrap();
        let _queued = locks.lock("queued").await.unwrap();
        let waits = tokio::spawn(async move { waiter.lock("queued").await });
        until("queued", async || locks.inspect("queued").await.unwrap().waiters.len() == 1).await;
        let token = server.command(&["HKEYS", "stanchion:{:queued}:waiting"]);
        server.command(&["HSET", "stanchion:{:queued}:waiting", token.trim(), "rubbish"]);
        server.command(&["SET", &format!("stanchion:session:{{{SESSION}}}"), "rubbish"]);
        for (name, record) in [
            (":text", "hello"),
            (":short", "1000"),
            (":packed", "2\u{81}"),
            (":a%zz", "x"),
            (":}", "x"),
            (":", "x"),
            (":of whom", &held_by(SESSION)),
        ] {
            server.command(&["SET", &format!("stanchion:{{{name}}}"), record]);
        }
        server.command(&["LPUSH", "stanchion:{:list}", "x"]);
        // Foreign Redis keys, and a hold beyond the year 9999.
        server.command(&["SET", "stanchion:else", "x"]);
        server.command(&["SET", "stanchion:session:{x}:{:y}", "x"]);
        let own = locks.session().unwrap().to_hex();
        let far = held_by(&own).replacen("1764000000000000", "9999999999999999", 2);
        server.command(&["SET", "stanchion:{:far}", &far]);

        let listing = locks.list("").await.unwrap();
        let keys: Vec<_> = listing.keys.iter().map(|state| state.key.name()).collect();
        assert_eq!(keys, ["far", "good"]);
        let damaged: Vec<_> = listing.damaged.iter().map(|entry| &*entry.name).collect();
        let expected = [":list", ":of whom", ":packed", ":queued", ":short", ":text"];
        let names = ["stanchion:{:a%zz}", "stanchion:{:}", "stanchion:{:}}"];
        assert_eq!(damaged, [&expected[..], &names[..]].concat());
        assert!(listing.damaged.iter().all(|entry| !entry.problem.is_empty()), "{listing:?}");
        for (key, problem) in [
            ("text", "key `text` in redis: the record was not written by this library"),
            ("short", "key `short` in redis: the record is too short"),
            ("list", "key `list` in redis: "),
        ] {
            let fault = locks.inspect(key).await.unwrap_err();
            assert!(fault.to_string().starts_with(problem), "{fault}");
        }
        waits.abort();
    });
}

#[test]
fn many_keys_are_listed_in_linear_time() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        let plant = "for at = 1, 30000 do redis.call('SET', ARGV[1] .. at .. '}', ARGV[2]) end";
        let own = locks.session().unwrap().to_hex();
        server.command(&["EVAL", plant, "0", "stanchion:{:own/", &held_by(&own)]);
        // Nobody has opened this session, so it counts as expired like that of a killed process.
        server.command(&["EVAL", plant, "0", "stanchion:{:dead/", &held_by(SESSION)]);
        let start = Instant::now();
        let listing = locks.list("").await.unwrap();
        assert_eq!((listing.keys.len(), listing.damaged.len()), (30_000, 0));
        assert!(listing.keys.is_sorted_by(|one, other| one.key < other.key), "keys are in order and unique");
        assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
        assert_eq!(
            server.command(&["GET", "stanchion:{:dead/1}"]).trim(),
            held_by(SESSION),
            "a listing writes nothing"
        );
    });
}

#[test]
fn long_queues_do_not_make_a_page_unbounded() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let store = store(server.port());
        let (holder, waiter) = (store.client().await, store.client().await);
        for at in 0..3 {
            holder.lock(&key(&format!("k{at}"))).await;
            waiter.enqueue(&key(&format!("k{at}"))).await;
            // Multiplies the one waiter until the queue fills a page.
            let grow = "local queue, waiting = KEYS[1], KEYS[2]
                local one = redis.call('HVALS', waiting)[1]
                for at = 1, 15000 do
                  local token = string.format('%032x', at)
                  redis.call('HSET', waiting, token, one)
                  redis.call('ZADD', queue, at + 1, token)
                end";
            let [queue, waiting] = ["queue", "waiting"].map(|end| format!("stanchion:{{:k{at}}}:{end}"));
            server.command(&["EVAL", grow, "2", &queue, &waiting]);
        }
        let (pages, damaged) = read_pages(&holder.store, "", 1_000).await;
        assert_eq!(damaged, []);
        let waiting: Vec<_> =
            pages.iter().map(|page| page.keys.iter().map(|state| state.waiters.len()).sum::<usize>()).collect();
        assert_eq!(waiting, [15_001; 3]);
    });
}

#[test]
fn a_cluster_lists_every_node() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    block_on(async {
        let locks = Locks::open(&format!("redis+cluster://{}", cluster.hosts())).await.unwrap();
        let names: Vec<String> = (0..200).map(|at| format!("k{at:03}")).collect();
        let _held = locks.lock_all(names.clone()).await.unwrap();
        let listing = locks.list("").await.unwrap();
        assert_eq!(listing.keys.iter().map(|state| state.key.name()).collect::<Vec<_>>(), names);
        assert_eq!(listing.damaged, []);
    });
}

#[test]
fn rejected_scan_names_the_missing_right() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        let _held = locks.lock("k").await.unwrap();
        server.command(&["ACL", "SETUSER", "default", "-scan"]);
        let fault = locks.list("").await.unwrap_err();
        assert_eq!(fault.kind(), ErrorKind::Unauthorized);
        assert!(fault.to_string().contains("+scan"), "{fault}");
        server.command(&["ACL", "SETUSER", "default", "+scan"]);
        assert_eq!(list_all(&Redis::from_url(&url(server.port())).unwrap(), "").await.len(), 1);
    });
}
