//! Checks the fast path of polls against the general path, and the cost of a poll for the server.

use super::*;

const SESSION: &str = "decode(repeat('ab', 16), 'hex')";
const DEAD: &str = "decode(repeat('de', 16), 'hex')";

/// Cases of a poll of `w`, the last waiter in the queue of `k`: a name, and the state of the store before the poll.
const CASES: [(&str, &str); 8] = [
    ("held", "INSERT INTO holds VALUES ({k}, 'h', {live}, true, NULL, 7, 1, 1, 'me', 7)"),
    (
        "permits",
        "INSERT INTO holds VALUES ({k}, 'h', {live}, true, NULL, 7, 2, 3, 'me', 7), ({k}, 'i', {live}, true, NULL, 7, 1, 4, 'me', 7)",
    ),
    ("deadline", "INSERT INTO holds VALUES ({k}, 'h', {dead}, false, 8000000000000000, 7, 1, 1, 'me', 7)"),
    ("closed", "UPDATE keys SET closed_until = 8000000000000000 WHERE key = {k}"),
    ("deadline over", "INSERT INTO holds VALUES ({k}, 'h', {live}, true, 8, 7, 1, 1, 'me', 7)"),
    ("dead holder", "INSERT INTO holds VALUES ({k}, 'h', {dead}, true, NULL, 7, 1, 1, 'me', 7)"),
    ("free", ""),
    ("closed before", "UPDATE keys SET closed_until = 8 WHERE key = {k}"),
];

/// Inserts each case twice, for the two kinds of polls, with this number of waiters before `w`.
fn insert(server: &PostgresServer, before: usize) {
    for (at, (_, case)) in CASES.iter().enumerate() {
        for kind in ["one", "two"] {
            let key = format!("':{kind} {before} {at}'");
            server.psql(&format!(
                "SET search_path = stanchion;
                 INSERT INTO keys (key, fence, busy, waiting) VALUES ({key}, 7, true, {before} + 1);
                 INSERT INTO queue (key, token, session, bound, units, capacity, at)
                   SELECT {key}, decode(md5(n::text), 'hex'), {SESSION}, true, 1, 1, 7 FROM generate_series(1, {before}) n;
                 INSERT INTO queue (key, token, session, bound, units, capacity, at) VALUES ({key}, 'w', {SESSION}, true, 1, 1, 7);
                 {}",
                case.replace("{k}", &key).replace("{live}", SESSION).replace("{dead}", DEAD)
            ));
        }
    }
}

/// A poll of one token takes the fast path. A poll of two tokens does not, here with an unknown second token.
#[test]
fn fast_polls_match_slow_polls() {
    let server = server();
    server.psql(&format!("SELECT stanchion.open_session({SESSION}, 3600000000, 'me')"));
    for before in [0, 1, 2] {
        insert(&server, before);
        for (at, (name, _)) in CASES.iter().enumerate() {
            // The values of both rows of the answer, with times rounded to a minute.
            let answer = |kind: &str, tokens: &str| {
                server.psql(&format!(
                    "SELECT max(check_in) / 60000000, max(in_use), max(number), max(fence) > 7, max(remaining) \
                     FROM stanchion.poll_many(':{kind} {before} {at}', ARRAY[{tokens}]::bytea[])"
                ))
            };
            let (one, two) = (answer("one", "'w'"), answer("two", "'w', 'unknown'"));
            assert_eq!(one, two, "{name} behind {before}");
            println!("{name} behind {before}: {one}");
        }
    }
}

/// Each path of a poll recalls a hold that lingers, for the head of the queue alone.
#[test]
fn only_polls_of_the_head_recall() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    let sent = || -> u32 {
        let sent = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE NOT toplevel \
                    AND query LIKE '%pg_notify%' AND query NOT LIKE '%pg_stat%'";
        server.psql(sent).parse().unwrap()
    };
    block_on(async {
        let holder = Holder::begin(&server.url()).await;
        let [head, second, unknown] = [(); 3].map(|()| TokenId::random().unwrap());
        holder.acquire(head).await;
        assert_eq!(sent(), 0, "the hold does not linger");
        holder.store.abandon(&k(), head).await.unwrap();
        holder.mark().await;
        for (token, recalls) in [(head, 1), (second, 1), (head, 2)] {
            holder.acquire(token).await;
            assert_eq!(sent(), recalls);
        }
        let recalls_of = async |tokens: &[TokenId]| {
            let before = sent();
            let outcomes = holder.store.poll(&k(), tokens).await.unwrap().outcome;
            assert!(matches!(outcomes[0], PollOutcome::Queued(_)), "{outcomes:?}");
            sent() - before
        };
        assert_eq!((recalls_of(&[head]).await, recalls_of(&[second]).await), (1, 0), "the fast path");
        assert_eq!((recalls_of(&[head, second]).await, recalls_of(&[second, second]).await), (1, 0));
        let with_unknown = (recalls_of(&[head, unknown]).await, recalls_of(&[second, unknown]).await);
        assert_eq!(with_unknown, (1, 0), "these polls reconcile the key");
    });
}

#[test]
fn waiter_poll_costs_few_statements() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    server.psql(&format!("SELECT stanchion.open_session({SESSION}, 3600000000, 'me')"));
    insert(&server, 0);
    server.psql("SELECT pg_stat_statements_reset()");
    for _ in 0..100 {
        server.psql("SELECT * FROM stanchion.poll_many(':one 0 0', ARRAY['w']::bytea[])");
    }
    let nested = "SELECT sum(calls) / 100 FROM pg_stat_statements WHERE NOT toplevel AND query NOT LIKE '%pg_stat%'";
    let nested: f64 = server.psql(nested).parse().unwrap();
    assert!(nested < 6.0, "{nested} statements per poll");
}
