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
