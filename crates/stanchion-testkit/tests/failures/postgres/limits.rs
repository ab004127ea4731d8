//! Checks that the functions of the schema enforce the documented limits, so that a role with the right to call them
//! cannot write values that others cannot read.

use stanchion::store::ForceReleaseOutcome;

use super::*;

#[test]
fn functions_reject_values_outside_the_limits() {
    let server = server();
    let s16 = "'\\x00000000000000000000000000000001'::bytea";
    server.psql(&format!("SELECT stanchion.open_session({s16}, 3600000000, 'me')"));
    let (day, most) = (24 * 3_600 * 1_000_000u64, 2_721_610_000_000u64);
    let long = |count: usize| format!("repeat('x', {count})");
    let acquire = |key: &str, more: &str| format!("stanchion.acquire({key}, {s16}, {s16}, {more})");
    let usual = "1, 1, true, NULL, false, 9000000000000000, NULL, NULL";
    let together = |units: u32, lifetime: &str| {
        format!(
            "count(*) FROM stanchion.together('{{:t}}', ARRAY[{s16}], ARRAY[{s16}], '{{{units}}}', '{{1}}', '{{true}}', \
             ARRAY[{lifetime}]::bigint[], '{{false}}', '{{9000000000000000}}', '{{NULL}}', '{{NULL}}', '{{NULL}}', true)"
        )
    };
    let rejected = [
        acquire("'no colon'", usual),
        acquire("'9:short'", usual),
        acquire("'256:' || repeat('x', 300)", usual),
        acquire("'01:ab'", usual),
        acquire("'1:ü'", usual),
        acquire("':'", usual),
        acquire("''", usual),
        acquire("NULL", usual),
        acquire(&format!("':' || {}", long(2_000)), usual),
        acquire("':k'", "0, 1, true, NULL, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "-1, 1, true, NULL, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "2, 1, true, NULL, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "NULL, 1, true, NULL, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, false, NULL, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, NULL, 10000, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, false, 0, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, false, -1, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", &format!("1, 1, false, {}, false, 9000000000000000, NULL, NULL", most + 1)),
        acquire("':k'", "1, 1, false, 9223372036854775807, false, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, true, NULL, NULL, 9000000000000000, NULL, NULL"),
        acquire("':k'", "1, 1, true, NULL, false, NULL, NULL, NULL"),
        acquire("':k'", "1, 1, true, NULL, false, -1, NULL, NULL"),
        acquire("':k'", &format!("1, 1, true, NULL, false, 9000000000000000, {}, NULL", long(4_097))),
        acquire("':k'", &format!("1, 1, true, NULL, false, 9000000000000000, NULL, {}", long(4_097))),
        format!("stanchion.acquire(':k', '\\x01', {s16}, {usual})"),
        format!("stanchion.acquire(':k', {s16}, '\\x01', {usual})"),
        together(2, "NULL"),
        together(1, &(most + 1).to_string()),
        "count(*) FROM stanchion.together(array_fill(':t'::text, '{300}'), array_fill('\\x01'::bytea, '{300}'), NULL, NULL, \
         NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)"
            .to_owned(),
        format!("stanchion.finish('no colon', {s16}, NULL)"),
        format!("stanchion.finish(':k', {s16}, -1)"),
        format!("stanchion.finish(':k', {s16}, {})", most + 1),
        format!("stanchion.poll('no colon', {s16})"),
        format!("stanchion.extend(':k', {s16}, 0)"),
        format!("stanchion.extend(':k', {s16}, {})", most + 1),
        format!("stanchion.linger('no colon', {s16})"),
        format!("stanchion.adopt(':k', {s16}, '\\x01', {s16}, 0)"),
        format!("stanchion.adopt(':k', {s16}, {s16}, {s16}, -1)"),
        format!("stanchion.force_release(':k', 1, {})", long(4_097)),
        "stanchion.force_release(':k', 1, NULL)".to_owned(),
        "stanchion.force_release('no colon', 1, 'why')".to_owned(),
        "stanchion.open_session('\\x01', 1000000, 'me')".to_owned(),
        format!("stanchion.open_session(decode('{}', 'hex'), 0, 'me')", "02".repeat(16)),
        format!("stanchion.open_session(decode('{}', 'hex'), {}, 'me')", "02".repeat(16), most + 1),
        format!("stanchion.open_session(decode('{}', 'hex'), 1000000, {})", "02".repeat(16), long(129)),
        "stanchion.close_session('\\x01')".to_owned(),
    ];
    let refusal = |call: &str| {
        server.psql(&format!(
            "CREATE OR REPLACE FUNCTION pg_temp.try() RETURNS text LANGUAGE plpgsql AS $t$ BEGIN PERFORM {call}; RETURN 'done'; \
             EXCEPTION WHEN OTHERS THEN RETURN sqlstate; END $t$; SELECT pg_temp.try()"
        ))
    };
    for call in rejected {
        assert_eq!(refusal(&call), "SF006", "{call}");
    }
    assert_eq!(server.psql("SELECT count(*) FROM stanchion.keys"), "0");
    assert_eq!(server.psql("SELECT count(*) FROM stanchion.sessions"), "1");
    // Values at the documented limits are accepted, and so is the longest lifetime with its grace.
    let full = format!("2147483647, 2147483647, false, {}, true, 9000000000000000, {m}, {m}", most, m = long(4_096));
    for call in [
        acquire("':' || repeat('x', 512)", &full),
        acquire("'128:' || repeat('n', 128) || repeat('x', 512)", usual),
        acquire("'2:üx'", usual),
        together(1, "NULL"),
        format!("stanchion.finish(':t', {s16}, {})", 30 * day),
    ] {
        assert_eq!(refusal(&call), "done", "{call}");
    }
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let listed = store.list("", None, 10).await.unwrap().outcome;
        assert_eq!(listed.len(), 4, "every accepted value can be read");
        // The error says that the request took no effect.
        let key = Key::new("", "k").unwrap();
        let fault =
            store.extend(&key, TokenId::random().unwrap(), Duration::from_secs(1_000_000_000)).await.unwrap_err();
        assert!(fault.kind() == ErrorKind::InvalidArgument && !fault.is_in_doubt(), "{fault:?}");
    });
}

/// After the grant of the highest fence, its holder can release, and every later request fails with an error.
#[test]
fn nothing_follows_the_highest_fence() {
    let server = server();
    let highest = i64::MAX as u64;
    block_on(async {
        let locks = locks(&server).await;
        for waits in [false, true] {
            server.psql(&format!("INSERT INTO stanchion.keys (key, fence) VALUES (':k{waits}', {})", highest - 1));
            let key = format!("k{waits}");
            let held = locks.lock(&key).await.unwrap();
            assert_eq!(held.fence().get(), highest);
            let is_named = |fault: &stanchion::Error| {
                fault.kind() == ErrorKind::Misconfigured && fault.to_string().contains("highest fence")
            };
            if waits {
                let fence = held.fence();
                locks.force_release(&key, fence, "stuck").await.unwrap();
                until("the hold is lost", async || held.check().is_err()).await;
            }
            let fault = locks.lock(&key).wait(20 * SECOND).await.unwrap_err();
            assert!(is_named(&fault), "{fault:?}");
            if !waits {
                assert_eq!(held.release().await.unwrap(), Released::Now);
            }
            let fault = locks.lock(&key).wait(20 * SECOND).await.unwrap_err();
            assert!(is_named(&fault), "{fault:?}");
        }
        // No hold has a fence beyond the range of the database.
        server.psql(&format!("INSERT INTO stanchion.keys (key, fence) VALUES (':last', {})", highest - 1));
        let held = locks.lock("last").await.unwrap();
        assert_eq!(held.fence().get(), highest);
        let beyond = stanchion::Fence::new(highest + 1);
        let outcome = locks.force_release("last", beyond, "stuck").await.unwrap();
        assert_eq!(outcome, ForceReleaseOutcome::NoSuchHold { live: vec![held.fence()] });
        held.check().unwrap();
        let (mut client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let transaction = client.transaction().await.unwrap();
        let store = Postgres::from_url(&server.url()).unwrap();
        let fault = store.check_fence(&transaction, held.key(), beyond).await.unwrap_err();
        assert!(matches!(fault.kind(), ErrorKind::Lost(_)), "{fault:?}");
        drop(transaction);
        // A waiter that was queued before the last grant gets the error too.
        let first = locks.lock("queued").await.unwrap();
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("queued").wait(30 * SECOND).await.map(drop) })
        };
        until("the task waits", async || locks.inspect("queued").await.unwrap().waiters.len() == 1).await;
        server.psql(&format!("UPDATE stanchion.keys SET fence = {highest} WHERE key = ':queued'"));
        assert_eq!(first.release().await.unwrap(), Released::Now);
        let fault = waiting.await.unwrap().unwrap_err();
        assert!(fault.to_string().contains("highest fence"), "{fault:?}");
    });
}
