//! Checks listings with damaged entries and with many keys.

use super::*;
use stanchion_testkit::read_pages;

#[test]
fn damaged_entries_are_named_and_skipped() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let _good = locks.lock("good").await.unwrap();
        let session = locks.session().unwrap().to_hex();
        let hold = |key: &str, units: i64, at: &str, owner: &str| {
            server.psql(&format!(
                "INSERT INTO stanchion.keys (key, fence, busy) VALUES (':{key}', 7, true);
                 INSERT INTO stanchion.holds VALUES (':{key}', decode(md5('{key}'), 'hex'), decode('{session}', 'hex'), true,
                   NULL, 7, {units}, 1, {owner}, {at}, NULL, NULL)"
            ));
        };
        hold("", 1, "7", "'me'");
        hold("negative", -1, "7", "'me'");
        hold("far", 1, "9223372036854775807", "'me'");
        hold("before", 1, "-9223372036854775808", "'me'");
        hold("long", 1, "7", "repeat('x', 100000)");
        server.psql("UPDATE stanchion.keys SET fence = -7 WHERE key = ':good'");

        let listing = locks.list("").await.unwrap();
        let keys: Vec<_> = listing.keys.iter().map(|state| state.key.name()).collect();
        assert_eq!(keys, ["before", "far", "long"]);
        let damaged: Vec<_> = listing.damaged.iter().map(|entry| (&*entry.name, &*entry.problem)).collect();
        let expected = [
            (":", "the store holds a malformed key"),
            (":good", "the fence is negative"),
            (":negative", "`units` is negative"),
        ];
        assert_eq!(damaged, expected);
        let fault = locks.inspect("negative").await.unwrap_err();
        assert_eq!(fault.to_string(), "key `negative` in postgres: `units` is negative");
    });
}

#[test]
fn many_keys_are_listed_in_linear_time() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let session = locks.session().unwrap().to_hex();
        let insert = |prefix: &str, session: &str| {
            server.psql(&format!(
                "INSERT INTO stanchion.keys (key, fence, token, session, at)
                 SELECT ':{prefix}' || n, 7, decode(md5(n::text), 'hex'), decode('{session}', 'hex'), 7
                 FROM generate_series(1, 20000) n"
            ));
        };
        insert("own/", &session);
        // This session was never opened, so it counts as expired.
        insert("dead/", &"a".repeat(32));
        server.psql(
            "INSERT INTO stanchion.keys (key, fence) SELECT ':idle/' || n, 7 FROM generate_series(1, 20000) n;
             INSERT INTO stanchion.keys (key, fence, busy) SELECT ':term/' || n, 7, true FROM generate_series(1, 20000) n;
             INSERT INTO stanchion.holds SELECT ':term/' || n, decode(md5(n::text), 'hex'), '\\x00', false, 8000000000000000,
               7, 1, 1, 'me', 7, NULL, NULL FROM generate_series(1, 20000) n",
        );
        let start = Instant::now();
        let listing = locks.list("").await.unwrap();
        assert_eq!((listing.keys.len(), listing.damaged.len()), (40_000, 0));
        assert!(
            listing.keys.is_sorted_by(|one, other| one.key < other.key),
            "the keys are not in order, or a key comes twice"
        );
        assert!(start.elapsed() < 20 * SECOND, "{:?}", start.elapsed());
        // A page reads a bounded number of rows, even if it lists none of their keys.
        let store = Postgres::from_url(&server.url()).unwrap();
        let (pages, _) = read_pages(&store, ":idle/", 100).await;
        assert!(pages.len() > 10 && pages.iter().all(|page| page.keys.is_empty()), "{}", pages.len());
    });
}

#[test]
fn page_cost_does_not_depend_on_the_keys() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all"), ("autovacuum", "off")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    block_on(async {
        // No renewal comes during the test, and with it no housekeeping, whose statements would count.
        let locks = Locks::builder(&server.url()).session_ttl(600 * SECOND).open().await.unwrap();
        let session = locks.session().unwrap().to_hex();
        server.psql(&format!(
            "INSERT INTO stanchion.keys (key, fence, busy) SELECT ':permits/' || n, 7, true FROM generate_series(1, 2000) n;
             INSERT INTO stanchion.holds SELECT ':permits/' || n, decode(md5(n || ' ' || m), 'hex'), decode('{session}', 'hex'),
               true, NULL, 7, 1, 2, 'me', 7, NULL, NULL FROM generate_series(1, 2000) n, generate_series(1, 2) m;
             SELECT pg_stat_statements_reset()"
        ));
        let store = Postgres::from_url(&server.url()).unwrap();
        let (pages, _) = read_pages(&store, ":permits/", 1_000).await;
        let keys: Vec<_> = pages.iter().flat_map(|page| &page.keys).collect();
        assert_eq!(keys.len(), 2_000);
        assert!(keys.iter().all(|state| state.holders.len() == 2));
        let nested = "SELECT sum(calls) FROM pg_stat_statements WHERE NOT toplevel AND query NOT LIKE '%pg_stat%'";
        let nested: usize = server.psql(nested).parse().unwrap();
        assert!(nested < 100, "{nested} statements for {} pages", pages.len());
    });
}

#[test]
fn long_queues_do_not_make_a_page_unbounded() {
    let server = server();
    block_on(async {
        // On a slow machine the insertion delays renewals, and the waiters must not expire.
        let locks = Locks::builder(&server.url()).session_ttl(600 * SECOND).open().await.unwrap();
        let session = locks.session().unwrap().to_hex();
        server.psql(&format!(
            "INSERT INTO stanchion.keys (key, fence, busy, waiting) SELECT ':k' || n, 7, true, 9000 FROM generate_series(1, 5) n;
             INSERT INTO stanchion.queue (key, token, session, bound, units, capacity, at)
             SELECT ':k' || k, decode(md5(n::text), 'hex'), decode('{session}', 'hex'), true, 1, 1, 7
             FROM generate_series(1, 5) k, generate_series(1, 9000) n"
        ));
        let store = Postgres::from_url(&server.url()).unwrap();
        let (pages, _) = read_pages(&store, "", 1_000).await;
        assert_eq!(pages.iter().map(|page| page.keys.len()).collect::<Vec<_>>(), [3, 2]);
        assert!(pages.iter().flat_map(|page| &page.keys).all(|state| state.waiters.len() == 9_000));
    });
}
