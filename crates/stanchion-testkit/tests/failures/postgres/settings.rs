//! Checks databases with unusual settings, other schema versions or unexpected answers.

use super::*;

#[test]
fn ten_processes_apply_the_schema_at_once() {
    let server = PostgresServer::start(Kind::V15);
    block_on(async {
        for _ in 0..2 {
            let all: Vec<_> = (0..10)
                .map(|_| Postgres::from_url(&server.url()).unwrap())
                .map(|store| tokio::spawn(async move { store.apply_schema().await }))
                .collect();
            for process in all {
                process.await.unwrap().unwrap();
            }
        }
        drop(locks(&server).await.lock("k").await.unwrap());
        // The error for an older schema names the command that upgrades it.
        server.psql(
            "CREATE ROLE service; GRANT EXECUTE ON FUNCTION stanchion.open_session, stanchion.acquire TO service; \
             UPDATE stanchion.meta SET version = 1; DROP FUNCTION stanchion.session_lives, stanchion.together, \
             stanchion.renew_session, stanchion.force_release, stanchion.linger; \
             ALTER TABLE stanchion.holds DROP lingers, DROP checked",
        );
        let error = Locks::open(&server.url()).await.unwrap_err();
        assert!(error.to_string().contains("stanchion schema --apply"), "{error}");
        Postgres::from_url(&server.url()).unwrap().apply_schema().await.unwrap();
        drop(locks(&server).await.lock("k").await.unwrap());
        let holder = Holder::begin(&server.url()).await;
        holder.mark().await;
        holder.store.close_session(holder.session).await.unwrap();
        let rights = "SELECT count(*) FROM unnest('{session_lives,renew_session,acquire,poll_many,together,linger,\
                      force_release,inspect,list_page}'::text[]) f (name) \
                      JOIN pg_proc p ON p.proname = f.name WHERE has_function_privilege('service', p.oid, 'EXECUTE')";
        assert_eq!(server.psql(rights), "9", "replaced functions keep their rights");
        // A running program of an older version, which omits the last argument, keeps working.
        let old = "SELECT count(*) FROM stanchion.together('{:a}', '{x}', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, \
                   ARRAY[NULL]::bigint[])";
        // Such a batch skips calls that it cannot start within 10 ms. The first batches of a connection are slow, and
        // so is a busy machine.
        let batches = [old; 4].join(";");
        until("a batch of the older program runs", async || server.psql(&batches).ends_with('1')).await;
        // A newer schema is neither changed nor used.
        server.psql("UPDATE stanchion.meta SET version = 8");
        let store = Postgres::from_url(&server.url()).unwrap();
        assert_eq!(store.apply_schema().await.unwrap_err().kind(), ErrorKind::Misconfigured);
        let error = Locks::open(&server.url()).await.unwrap_err();
        assert!(
            error.kind() == ErrorKind::Misconfigured && error.to_string().contains("update this program"),
            "{error}"
        );
    });
}

#[test]
fn unusable_databases_are_rejected_with_a_hint() {
    let server = PostgresServer::start(Kind::V15);
    block_on(async {
        let error = Locks::open(&server.url()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("schema --apply"), "{error}");
        let own = format!("{}?create_schema=true", server.url());
        drop(Locks::open(&own).await.unwrap().lock("k").await.unwrap());
        server.psql("CREATE ROLE nobody LOGIN");
        let stranger = server.url().replace("postgres@", "nobody@");
        let error = Locks::open(&stranger).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        let standby = PostgresServer::standby_of(&server);
        let error = Locks::open(&standby.url()).await.unwrap_err();
        let applied = Postgres::from_url(&standby.url()).unwrap().apply_schema().await.unwrap_err();
        assert!(applied.kind() == ErrorKind::Misconfigured && applied.to_string().contains("standby"), "{applied}");
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("standby"), "{error}");
        server.psql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
        let latin = own.replace("/postgres?", "/latin?");
        let error = Locks::open(&latin).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("UTF-8"), "{error}");
        let error = Postgres::from_url(&latin).unwrap().apply_schema().await.unwrap_err();
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("UTF-8"), "{error}");
        assert_eq!(server.psql_in("latin", "SELECT count(*) FROM pg_namespace WHERE nspname = 'stanchion'"), "0");
    });
}

/// The operations work although the database sets time limits and another isolation level.
#[test]
fn database_defaults_do_not_affect_operations() {
    let server = PostgresServer::with(
        Kind::V15,
        &[("default_transaction_isolation", "serializable"), ("statement_timeout", "5s"), ("lock_timeout", "1s")],
    );
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    block_on(async {
        let count = std::sync::Arc::new(std::sync::Mutex::new((0u32, 0u64)));
        let handles = [locks(&server).await, locks(&server).await];
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (locks, count) = (handles[task % 2].clone(), count.clone());
                tokio::spawn(async move {
                    for _ in 0..25 {
                        let guard = locks.lock("k").wait(60 * SECOND).await.unwrap();
                        let before = {
                            let mut count = count.lock().unwrap();
                            assert!(guard.fence().get() > count.1, "fences increase");
                            count.1 = guard.fence().get();
                            count.0
                        };
                        tokio::task::yield_now().await;
                        count.lock().unwrap().0 = before + 1;
                        guard.release().await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(count.lock().unwrap().0, 200, "one holder at a time");
    });
}

/// A full queue of notifications is a transient error, and an unreadable answer leaves the outcome unknown.
#[test]
fn server_errors_map_to_kind_and_outcome() {
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let (key, token) = (Key::new("", "k").unwrap(), TokenId::random().unwrap());
        let extend = |body: &str| {
            server.psql(&format!(
                "CREATE OR REPLACE FUNCTION stanchion.extend(wanted text, asked_token bytea, ttl bigint, \
                 OUT outcome text, OUT at bigint) LANGUAGE plpgsql AS $$ BEGIN {body}; END $$"
            ));
        };
        extend("RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000'");
        let fault = store.extend(&key, token, SECOND).await.unwrap_err();
        assert!(fault.kind() == ErrorKind::Unavailable && !fault.is_in_doubt(), "{fault:?}");
        // The server has run the operation, so the outcome is unknown.
        for strange in ["outcome := 'odd'; at := 1", "outcome := 'extended'; at := -1", "at := 1"] {
            extend(strange);
            let fault = store.extend(&key, token, SECOND).await.unwrap_err();
            assert!(fault.kind() == ErrorKind::Internal && fault.is_in_doubt(), "{strange}: {fault:?}");
        }
    });
}

/// Somebody may have put a secret into the user part of the URL, and the server's messages name the user.
#[test]
fn errors_do_not_name_the_user() {
    let server = PostgresServer::with_passwords(Kind::V15, &[]);
    server.psql("CREATE ROLE hunter2 LOGIN PASSWORD 'hunter3' CONNECTION LIMIT 0");
    block_on(async {
        for url in [
            format!("postgres://hunter2:hunter2@127.0.0.1:{}/postgres", server.port()),
            format!("postgres://hunter2:hunter3@127.0.0.1:{}/postgres", server.port()),
            format!("postgres://hunter2@127.0.0.1:{}/postgres", server.port()),
            format!("postgres://hunter2:hunter2@127.0.0.1:{}/postgres?replication=database", server.port()),
            format!("postgres://hunter2:hunter2@127.0.0.1:1/postgres"),
        ] {
            let store = match Postgres::from_url(&url) {
                Ok(store) => store,
                Err(fault) => {
                    assert!(!format!("{fault} {fault:?}").contains("hunter"), "{fault:?}");
                    continue;
                }
            };
            let fault = store.apply_schema().await.unwrap_err();
            let texts = format!("{store:?} {fault} {fault:?}");
            assert!(!texts.contains("hunter"), "{texts}");
        }
    });
}
