//! Checks that a batch runs operations on many keys with few statements, and that its outcomes match single operations.

use super::*;
use crate::ends::acquire_many;

/// Starts a server that also counts the statements inside functions, and whose statistics stay those of small tables.
fn counting_server() -> PostgresServer {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all"), ("autovacuum", "off")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    server
}

fn reset(server: &PostgresServer) {
    server.psql("SELECT pg_stat_statements_reset()");
}

/// Returns the number of operations that a function for one key has run, single or within a batch.
fn single(server: &PostgresServer) -> usize {
    let calls = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat%' \
                 AND (query LIKE '%.acquire(%' OR query LIKE '%.finish(%') AND query NOT LIKE 'CREATE %'";
    server.psql(calls).parse().unwrap()
}

/// Returns the number of pages that the operations have read.
fn pages(server: &PostgresServer) -> usize {
    let pages = "SELECT coalesce(sum(shared_blks_hit + shared_blks_read), 0) FROM pg_stat_statements WHERE toplevel \
                 AND (query LIKE '%.acquire(%' OR query LIKE '%.finish(%' OR query LIKE '%.together(%') \
                 AND query NOT LIKE '%pg_stat%' AND query NOT LIKE 'CREATE %'";
    server.psql(pages).parse().unwrap()
}

#[test]
fn new_keys_are_locked_and_released_in_bulk() {
    const KEYS: usize = 2_000;
    let server = counting_server();
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        reset(&server);
        let guards = acquire_many(&locks, KEYS).await;
        let acquired = single(&server);
        assert!(acquired < KEYS / 10, "{acquired} of {KEYS} keys were locked one by one");
        reset(&server);
        drop(guards);
        until("all keys are free", async || locks.list("").await.unwrap().is_empty()).await;
        let released = single(&server);
        assert!(released < KEYS / 10, "{released} of {KEYS} keys were released one by one");
    });
}

#[test]
fn holds_with_deadlines_are_released_in_bulk() {
    const KEYS: usize = 500;
    let server = counting_server();
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        let mut guards = Vec::new();
        for at in 0..KEYS {
            guards.push(locks.lock(format!("k{at}")).ttl(600 * SECOND).await.unwrap());
        }
        reset(&server);
        drop(guards);
        until("all keys are free", async || locks.list("").await.unwrap().is_empty()).await;
        let released = single(&server);
        assert!(released < KEYS / 5, "{released} of {KEYS} keys were released one by one");
    });
}

/// A connection keeps its plans, and for a table with one row a scan of the whole table is the cheapest plan.
#[test]
fn plans_made_for_one_key_serve_many() {
    const KEYS: usize = 3_000;
    let server = counting_server();
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        locks.lock("first").await.unwrap().release().await.unwrap();
        server.psql("ANALYZE stanchion.keys, stanchion.holds, stanchion.sessions, stanchion.queue, stanchion.forced");
        reset(&server);
        let guards = acquire_many(&locks, KEYS).await;
        let per_key = pages(&server) / KEYS;
        assert!(per_key < 60, "{per_key} pages per key to lock it");
        reset(&server);
        drop(guards);
        until("all keys are free", async || locks.list("").await.unwrap().is_empty()).await;
        let per_key = pages(&server) / KEYS;
        assert!(per_key < 60, "{per_key} pages per key to release it");
        reset(&server);
        for at in 0..100 {
            locks.lock(format!("single{at}")).await.unwrap().release().await.unwrap();
        }
        let per_key = pages(&server) / 100;
        assert!(per_key < 60, "{per_key} pages to lock and release one key");
    });
}

/// Cases of `finish`: a name, the state of the store before the call, and the cooldown. `{k}` is the key.
const ENDS: [(&str, &str, &str); 14] = [
    ("unknown key", "", "NULL"),
    ("idle key", "INSERT INTO keys (key, fence) VALUES ({k}, 7)", "NULL"),
    ("own", "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {own}, {live}, 7)", "NULL"),
    ("own, 0", "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {own}, {live}, 7)", "0"),
    ("own, cooldown", "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {own}, {live}, 7)", "3600000000"),
    ("own, dead", "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {own}, {dead}, 7)", "NULL"),
    ("other's", "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {other}, {live}, 7)", "NULL"),
    (
        "own permit of two",
        "INSERT INTO keys (key, fence, busy) VALUES ({k}, 7, true);
         INSERT INTO holds VALUES ({k}, {own}, {live}, true, NULL, 6, 1, 2, 'me', 7), ({k}, {other}, {live}, true, NULL, 7, 1, 2, 'me', 7)",
        "NULL",
    ),
    (
        "own deadline",
        "INSERT INTO keys (key, fence, busy) VALUES ({k}, 7, true);
         INSERT INTO holds VALUES ({k}, {own}, {dead}, false, 8000000000000000, 7, 1, 1, 'me', 7)",
        "NULL",
    ),
    (
        "own deadline over",
        "INSERT INTO keys (key, fence, busy) VALUES ({k}, 7, true);
         INSERT INTO holds VALUES ({k}, {own}, {dead}, false, 8, 7, 1, 1, 'me', 7)",
        "NULL",
    ),
    (
        "own and closed",
        "INSERT INTO keys (key, fence, busy, closed_until) VALUES ({k}, 7, true, 8000000000000000);
         INSERT INTO holds VALUES ({k}, {own}, {live}, true, NULL, 7, 1, 1, 'me', 7)",
        "NULL",
    ),
    (
        "own, waited for",
        "INSERT INTO keys (key, fence, busy, waiting) VALUES ({k}, 7, true, 1);
         INSERT INTO holds VALUES ({k}, {own}, {live}, true, NULL, 7, 1, 1, 'me', 7);
         INSERT INTO queue (key, token, session, bound, units, capacity, at) VALUES ({k}, {other}, {live}, true, 1, 1, 7)",
        "NULL",
    ),
    (
        "waits",
        "INSERT INTO keys (key, fence, busy, waiting) VALUES ({k}, 7, true, 1);
         INSERT INTO holds VALUES ({k}, {other}, {live}, true, NULL, 7, 1, 1, 'me', 7);
         INSERT INTO queue (key, token, session, bound, units, capacity, at) VALUES ({k}, {own}, {live}, true, 1, 1, 7)",
        "NULL",
    ),
    (
        "forced",
        "INSERT INTO keys (key, fence, busy) VALUES ({k}, 7, true); INSERT INTO forced VALUES ({own}, {live}, {k}, 'why', 7)",
        "NULL",
    ),
];

/// Cases of `acquire`: a name, the state of the store before the call, the session, and the latest time of a grant.
const ACQUIRES: [(&str, &str, &str, &str); 9] = [
    ("new key", "", "{live}", "8000000000000000"),
    ("new key, dead session", "", "{dead}", "8000000000000000"),
    ("new key, late", "", "{live}", "8"),
    ("idle", "INSERT INTO keys (key, fence) VALUES ({k}, 7)", "{live}", "8000000000000000"),
    ("idle, late", "INSERT INTO keys (key, fence) VALUES ({k}, 7)", "{live}", "8"),
    ("entered", "INSERT INTO keys (key) VALUES ({k})", "{live}", "8000000000000000"),
    (
        "held",
        "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {other}, {live}, 7)",
        "{live}",
        "8000000000000000",
    ),
    (
        "held by a dead session",
        "INSERT INTO keys (key, fence, token, session, at) VALUES ({k}, 7, {other}, {dead}, 7)",
        "{live}",
        "8000000000000000",
    ),
    (
        "closed",
        "INSERT INTO keys (key, fence, busy, closed_until) VALUES ({k}, 7, true, 8000000000000000)",
        "{live}",
        "8000000000000000",
    ),
];

/// Fills in the placeholders of a case. Each case runs with both dispatches, with separate keys and tokens.
fn fill_in(text: &str, dispatch: &str, at: usize) -> String {
    let token = |whose: &str| format!("decode(md5('{whose} {dispatch} {at}'), 'hex')");
    text.replace("{k}", &format!("':{dispatch} {at}'"))
        .replace("{own}", &token("own"))
        .replace("{other}", &token("other"))
        .replace("{live}", "decode(repeat('ab', 16), 'hex')")
        .replace("{dead}", "decode(repeat('de', 16), 'hex')")
}

/// Returns the final state of each case, with the times left to a power of two, because the calls come one after the other.
fn states(server: &PostgresServer, dispatch: &str, count: usize) -> Vec<String> {
    let state = |at| {
        let state = format!(
            "SELECT string_agg(concat_ws(' ', kind, owner, units, capacity, bound, \
             round(log(2.0, greatest(remaining, 1)::numeric)), fence > 7), ', ') \
             FROM stanchion.inspect(':{dispatch} {at}') WHERE kind <> 'key' OR remaining > 0"
        );
        let forced = format!("SELECT count(*) FROM stanchion.forced WHERE key = ':{dispatch} {at}'");
        format!("{}; forced {}", server.psql(&state), server.psql(&forced))
    };
    (0..count).map(state).collect()
}

fn insert(server: &PostgresServer, before: &[&str]) {
    server.psql("SELECT stanchion.open_session(decode(repeat('ab', 16), 'hex'), 3600000000, 'me')");
    for dispatch in ["single", "batch"] {
        for (at, before) in before.iter().enumerate() {
            server.psql(&format!("SET search_path = stanchion; {}", fill_in(before, dispatch, at)));
        }
    }
}

/// Asserts that each case has the same outcome and the same final state as a single call and as a batch.
fn compare(server: &PostgresServer, names: &[&str], single: impl Fn(usize) -> String, batch: impl Fn(usize) -> String) {
    let outcomes = |dispatch: &str, call: &dyn Fn(usize) -> String| -> Vec<String> {
        (0..names.len()).map(|at| server.psql(&fill_in(&call(at), dispatch, at))).collect()
    };
    let results = |dispatch: &str, outcomes: Vec<String>| -> Vec<String> {
        let all = names.iter().zip(outcomes).zip(states(server, dispatch, names.len()));
        all.map(|((name, outcome), state)| format!("{name}: {outcome}; {state}")).collect()
    };
    let single = results("single", outcomes("single", &single));
    assert_eq!(results("batch", outcomes("batch", &batch)), single);
    println!("{single:#?}");
}

#[test]
fn batch_ends_match_single_ends() {
    let server = server();
    insert(&server, &ENDS.map(|(_, before, _)| before));
    let single = |at: usize| format!("SELECT outcome FROM stanchion.finish({{k}}, {{own}}, {})", ENDS[at].2);
    // The last argument makes the batch wait for its turn and run its first operation, however long that takes.
    let batch = |at: usize| {
        format!(
            "SELECT outcome FROM stanchion.together(ARRAY[{{k}}], ARRAY[{{own}}], ARRAY[NULL::bytea], ARRAY[NULL::integer], \
             ARRAY[NULL::integer], ARRAY[NULL::boolean], ARRAY[NULL::bigint], ARRAY[NULL::boolean], ARRAY[NULL::bigint], \
             ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[{}::bigint], true)",
            ENDS[at].2
        )
    };
    compare(&server, &ENDS.map(|(name, ..)| name), single, batch);
}

#[test]
fn acquires_in_a_batch_match_single_acquires() {
    let server = server();
    insert(&server, &ACQUIRES.map(|(_, before, ..)| before));
    let single = |at: usize| {
        let (_, _, session, latest) = ACQUIRES[at];
        format!(
            "SELECT outcome FROM stanchion.acquire({{k}}, {{own}}, {session}, 1, 1, true, NULL, true, {latest}, NULL, NULL)"
        )
    };
    let batch = |at: usize| {
        let (_, _, session, latest) = ACQUIRES[at];
        format!(
            "SELECT outcome FROM stanchion.together(ARRAY[{{k}}], ARRAY[{{own}}], ARRAY[{session}], ARRAY[1], ARRAY[1], \
             ARRAY[true], ARRAY[NULL::bigint], ARRAY[true], ARRAY[{latest}], ARRAY[NULL::text], ARRAY[NULL::text], \
             ARRAY[NULL::bigint], true)"
        )
    };
    compare(&server, &ACQUIRES.map(|(name, ..)| name), single, batch);
}

/// No fence of a deleted key is above the floor, so the fences of new keys must be.
#[test]
fn new_keys_have_fences_above_the_floor() {
    const FLOOR: u64 = 1 << 60;
    let server = server();
    server.psql(&format!("UPDATE stanchion.meta SET fence_floor = {FLOOR}"));
    block_on(async {
        let locks = locks(&server).await;
        assert_eq!(locks.lock("single").await.unwrap().fence().get(), FLOOR + 1);
        for guard in acquire_many(&locks, 100).await {
            assert_eq!(guard.fence().get(), FLOOR + 1);
        }
    });
}
