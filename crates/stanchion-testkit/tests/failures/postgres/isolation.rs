//! Checks databases with another default isolation level. At such a level, an operation that waited for the turn of a
//! key would see the sessions of the time before it waited.

use stanchion_testkit::servers::PgBouncer;

use super::connections::store_with_users_pool;
use super::*;

fn is_rejected(fault: &stanchion::Error) -> bool {
    fault.kind() == ErrorKind::Misconfigured && !fault.is_in_doubt() && fault.to_string().contains("ALTER ROLE")
}

/// The contender waits for the turn of the key longer than the holder's session would live without renewals.
async fn assert_live_holder_keeps_its_key(server: &PostgresServer, contender: &str) {
    let held = locks(server).await.lock("k").await.unwrap();
    let mut transaction = sleeping_transaction(server, held.fence().get(), 4, "SELECT").await;
    let other = Locks::open(contender).await.unwrap();
    let refused = other.lock("k").wait(6 * SECOND).await.map(drop).unwrap_err();
    assert!(refused.kind() == ErrorKind::Timeout || refused.is_transient(), "{refused}");
    held.check().unwrap();
    assert_eq!(other.inspect("k").await.unwrap().holders.len(), 1);
    assert!(transaction.wait().unwrap().success(), "check_fence works at every isolation level");
    held.release().await.unwrap();
    other.lock("k").await.unwrap().release().await.unwrap();
}

#[test]
fn repeatable_read_default_adds_no_holder() {
    let server = server();
    server.psql("ALTER ROLE postgres SET default_transaction_isolation = 'repeatable read'");
    block_on(assert_live_holder_keeps_its_key(&server, &server.url()));
}

#[test]
fn repeatable_read_in_the_url_adds_no_holder() {
    let server = server();
    let url = format!("{}?options=-c%20default_transaction_isolation%3Drepeatable%5C%20read", server.url());
    block_on(assert_live_holder_keeps_its_key(&server, &url));
}

/// The store changes no settings of the user's connections, so it rejects those with another isolation level.
#[test]
fn pool_of_another_isolation_is_rejected() {
    let server = server();
    block_on(async {
        let (store, pool) = store_with_users_pool(server.port(), 2, "postgres", &server.url()).unwrap();
        let locks = Locks::with_store(store).await.unwrap();
        let held = locks.lock("held").await.unwrap();
        locks.lock("free").await.unwrap().release().await.unwrap();
        for isolation in ["repeatable read", "serializable"] {
            let all = (pool.get().await.unwrap(), pool.get().await.unwrap());
            let set = format!("SET default_transaction_isolation = '{isolation}'");
            all.0.batch_execute(&set).await.unwrap();
            all.1.batch_execute(&set).await.unwrap();
            drop(all);
            for key in ["held", "free", "new"] {
                let fault = locks.lock(key).wait(SECOND).await.unwrap_err();
                assert!(is_rejected(&fault), "{key}: {fault:?}");
            }
        }
        held.check().unwrap();
        server.psql("ALTER ROLE postgres SET default_transaction_isolation = 'serializable'");
        let (store, _pool) = store_with_users_pool(server.port(), 2, "postgres", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert!(is_rejected(&fault), "{fault:?}");
    });
}

/// Clients share the connections of a pooler, so the store must not change settings of these connections.
#[test]
fn other_isolation_behind_a_pooler_is_rejected() {
    let server = server();
    server.psql("ALTER ROLE postgres SET default_transaction_isolation = 'repeatable read'");
    let pooler = PgBouncer::start(&server);
    block_on(async {
        let fault = Locks::open(&pooler.url()).await.unwrap_err();
        assert!(is_rejected(&fault), "{fault:?}");
    });
    assert_eq!(pooler.psql_in("postgres", "SHOW default_transaction_isolation"), "repeatable read");
}
