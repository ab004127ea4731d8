//! Releases many tokens at once, and sends messages that the store did not send.

use std::io::Write as _;
use std::time::Instant;

use stanchion::{Locks, LossCause, SessionId, TokenId};
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{block_on, until};

use super::{SECOND, locks, url};
use crate::ends::{drop_calls, drop_many, number};

/// Publishes a grant in the format of the scripts.
fn grant(server: &RedisServer, session: SessionId, token: TokenId, fence: u64, key: &str) {
    let message = format!("G{}{fence:016}stanchion:{{:{key}}}", token.to_hex());
    server.command(&["PUBLISH", &channel(session), &message]);
}

fn channel(session: SessionId) -> String {
    format!("stanchion:session:{{{}}}", session.to_hex())
}

/// Waits until the session of `locks` has read every message that was sent to it before.
async fn messages_are_read(locks: &Locks, other: &Locks) {
    let guard = other.lock("read").await.unwrap();
    let waiting = tokio::spawn(locks.lock("read").into_future());
    until("queued", async || !other.inspect("read").await.unwrap().waiters.is_empty()).await;
    guard.release().await.unwrap();
    drop(waiting.await.unwrap().unwrap());
    // The keeper releases tokens in the order in which they were scheduled.
    until("released", async || !other.is_locked("read").await.unwrap()).await;
}

fn requests(server: &RedisServer) -> usize {
    let stats = server.command(&["INFO", "commandstats"]);
    let calls = stats.lines().filter(|line| line.starts_with("cmdstat_eval"));
    calls.filter_map(|line| line.split_once("calls=")?.1.split_once(',')?.0.parse::<usize>().ok()).sum()
}

#[test]
fn many_dropped_guards_are_released_soon() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(drop_many(&url(server.port()), number("STANCHION_TEST_GUARDS", 20_000)));
}

#[test]
fn dropped_calls_free_their_keys_soon() {
    let server = RedisServer::start(Kind::Redis7);
    let count = number("STANCHION_TEST_DROPS", 320);
    let longest = block_on(drop_calls(&url(server.port()), count, "dropped_calls_free_their_keys_soon"));
    assert!(longest < 3 * SECOND, "{longest:?}");
}

#[test]
fn forged_messages_cost_no_requests() {
    let server = RedisServer::start(Kind::Redis7);
    let count = number("STANCHION_TEST_MESSAGES", 20_000);
    block_on(async {
        let (locks, other) = (locks(server.port()).await, locks(server.port()).await);
        let kept = locks.lock("kept").await.unwrap();
        let session = locks.session().unwrap();
        let before = requests(&server);
        let mut messages = String::new();
        for _ in 0..count {
            let token = TokenId::random().unwrap().to_hex();
            messages += &format!("PUBLISH {} G{token}{:016}stanchion:{{:k}}\r\n", channel(session), 7);
        }
        let started = Instant::now();
        let mut forger = std::net::TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        let answers = forger.try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut answers = std::io::BufReader::new(answers);
            let mut line = String::new();
            for _ in 0..count {
                std::io::BufRead::read_line(&mut answers, &mut line).unwrap();
            }
        });
        tokio::task::spawn_blocking(move || forger.write_all(messages.as_bytes()).unwrap()).await.unwrap();
        println!("{count} messages sent after {:?}", started.elapsed());
        messages_are_read(&locks, &other).await;
        println!("read after {:?}", started.elapsed());
        reading.join().unwrap();
        for _ in 0..number("STANCHION_TEST_SECONDS", 0) {
            tokio::time::sleep(SECOND).await;
            kept.check().unwrap();
        }
        kept.check().unwrap();
        assert_eq!(locks.session(), Some(session));
        let requests = requests(&server) - before;
        assert!(requests < 1_000, "{requests}");
    });
}

#[test]
fn foreign_token_is_not_released() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (locks, other) = (locks(server.port()).await, locks(server.port()).await);
        let guard = locks.lock("k").await.unwrap();
        let fence = guard.fence();
        let token = guard.detach();
        for _ in 0..10 {
            grant(&server, other.session().unwrap(), token.id(), fence.get(), "k");
            messages_are_read(&other, &locks).await;
        }
        assert!(locks.owns(&token).await.unwrap());
    });
}

#[test]
fn a_forged_grant_is_lost_at_once() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (locks, other) = (locks(server.port()).await, locks(server.port()).await);
        let holder = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(other.lock("k").into_future());
        until("queued", async || !locks.inspect("k").await.unwrap().waiters.is_empty()).await;
        let queue = server.command(&["KEYS", "*"]).lines().find_map(|key| {
            (server.command(&["TYPE", key]) == "zset").then(|| server.command(&["ZRANGE", key, "0", "-1"]))
        });
        let token = TokenId::from_hex(queue.unwrap().trim()).unwrap();
        grant(&server, other.session().unwrap(), token, 1 << 52, "k");
        let forged = waiting.await.unwrap().unwrap();
        assert_eq!(forged.fence().get(), 1 << 52, "the forged message is accepted at first");
        until("the hold is lost", async || forged.loss() == Some(LossCause::Missing)).await;
        holder.check().unwrap();
        until("the waiter leaves the queue", async || locks.inspect("k").await.unwrap().waiters.is_empty()).await;
    });
}

#[test]
fn forged_loss_is_ignored() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (locks, other) = (locks(server.port()).await, locks(server.port()).await);
        let guard = locks.lock("k").await.unwrap();
        let record = server.command(&["GET", "stanchion:{:k}"]);
        let token = other.inspect("k").await.unwrap();
        assert_eq!(token.holders.len(), 1, "{record}");
        // The record contains the token in hexadecimal digits.
        let digits = |at: usize| record.get(at..at + 32).and_then(TokenId::from_hex);
        for token in (0..record.len()).filter_map(digits) {
            let message = format!("F{}2::kforged", token.to_hex());
            server.command(&["PUBLISH", &channel(locks.session().unwrap()), &message]);
        }
        messages_are_read(&locks, &other).await;
        messages_are_read(&locks, &other).await;
        guard.check().unwrap();
    });
}

#[test]
fn deleted_record_is_a_loss() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = Locks::builder(&url(server.port())).session_ttl(2 * SECOND).open().await.unwrap();
        let (deleted, kept) = (locks.lock("deleted").await.unwrap(), locks.lock("kept").await.unwrap());
        assert_eq!(server.command(&["DEL", "stanchion:{:deleted}"]), "1");
        let started = Instant::now();
        until("the hold is lost", async || deleted.loss() == Some(LossCause::Missing)).await;
        println!("reported after {:?}", started.elapsed());
        kept.check().unwrap();
    });
}
