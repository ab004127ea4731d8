//! Where transactions are of another isolation by default: a step that waited for a key's turn would look at sessions as
//! they were before it waited.

use stanchion_testkit::servers::PgBouncer;

use super::connections::store_with_users_pool;
use super::*;

fn is_refused(fault: &stanchion::Error) -> bool {
    fault.kind() == ErrorKind::Misconfigured && !fault.is_in_doubt() && fault.to_string().contains("ALTER ROLE")
}

/// The key's turn is waited for longer than the session of its holder would live without the beats meanwhile.
async fn assert_live_holder_keeps_its_key(server: &PostgresServer, contender: &str) {
    let held = locks(server).await.lock("k").await.unwrap();
    let mut transaction = sleeping_transaction(server, held.fence().get(), 4, "SELECT").await;
    let other = Locks::open(contender).await.unwrap();
    let refused = other.lock("k").wait(6 * SECOND).await.map(drop).unwrap_err();
    assert!(refused.kind() == ErrorKind::Timeout || refused.is_transient(), "{refused}");
    held.check().unwrap();
    assert_eq!(other.inspect("k").await.unwrap().holders.len(), 1);
    assert!(transaction.wait().unwrap().success(), "check_fence takes every isolation");
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

/// Nothing is set on connections that are the user's: those of another isolation take no steps.
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
                assert!(is_refused(&fault), "{key}: {fault:?}");
            }
        }
        held.check().unwrap();
        server.psql("ALTER ROLE postgres SET default_transaction_isolation = 'serializable'");
        let (store, _pool) = store_with_users_pool(server.port(), 2, "postgres", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert!(is_refused(&fault), "{fault:?}");
    });
}

/// A pooler's connections are everybody's: what is set on one would be set for others.
#[test]
fn other_isolation_behind_a_pooler_is_rejected() {
    let server = server();
    server.psql("ALTER ROLE postgres SET default_transaction_isolation = 'repeatable read'");
    let pooler = PgBouncer::start(&server);
    block_on(async {
        let fault = Locks::open(&pooler.url()).await.unwrap_err();
        assert!(is_refused(&fault), "{fault:?}");
    });
    assert_eq!(pooler.psql_in("postgres", "SHOW default_transaction_isolation"), "repeatable read");
}
