//! Schemas that another role created, as a whole or in part. Code of that role must run neither with the rights of the
//! role that applies the schema, nor with those of the schema's owner.

use super::*;

/// Starts a server with an attacker: a role that may create in the database.
fn with_attacker() -> PostgresServer {
    let server = PostgresServer::start(Kind::V15);
    server.psql("CREATE ROLE mallory LOGIN; GRANT CREATE ON DATABASE postgres TO mallory");
    server
}

fn as_attacker(server: &PostgresServer, sql: &str) {
    server.psql(&format!("SET SESSION AUTHORIZATION mallory; {sql}"));
}

/// The attacker's code. It makes the attacker a superuser if it runs with a superuser's rights, and otherwise fails
/// silently.
const ESCALATE: &str =
    "BEGIN EXECUTE 'ALTER ROLE mallory SUPERUSER'; EXCEPTION WHEN insufficient_privilege THEN NULL; END;";

fn is_rejected(fault: &stanchion::Error) -> bool {
    fault.kind() == ErrorKind::Misconfigured && !fault.is_transient()
}

/// Applies the schema in every way, as superuser. Each way must fail, and the attacker must gain no rights.
async fn assert_apply_is_rejected(server: &PostgresServer, attack: &str) {
    let store = Postgres::from_url(&server.url()).unwrap();
    let fault = store.apply_schema().await.unwrap_err();
    assert!(is_rejected(&fault), "{attack}: {fault:?}");
    let fault = Locks::open(&format!("{}?create_schema=true", server.url())).await.unwrap_err();
    assert!(is_rejected(&fault), "{attack}: {fault:?}");
    // By default `psql` continues after an error.
    let script = server.folder().join("schema.sql");
    std::fs::write(&script, store.schema_sql()).unwrap();
    let mut psql = std::process::Command::new("psql");
    psql.args(["-Xq", &server.url(), "-f"]).arg(&script);
    psql.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status().unwrap();
    assert_eq!(server.psql("SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'"), "f", "{attack}");
}

#[test]
fn schema_of_another_role_is_rejected() {
    let server = with_attacker();
    let trap = format!(
        "CREATE FUNCTION stanchion.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {ESCALATE} RETURN new; END $$; \
         CREATE FUNCTION stanchion.look() RETURNS integer LANGUAGE plpgsql AS $$ BEGIN {ESCALATE} RETURN 1; END $$; "
    );
    let table = "CREATE TABLE stanchion.meta (one boolean PRIMARY KEY DEFAULT true, version integer)";
    block_on(async {
        for (attack, then) in [
            (
                format!(
                    "{table}; CREATE TRIGGER t BEFORE INSERT ON stanchion.meta FOR EACH ROW EXECUTE FUNCTION stanchion.trap()"
                ),
                "",
            ),
            ("CREATE VIEW stanchion.meta AS SELECT true AS one, stanchion.look() AS version".into(), ""),
            (format!("{table}; ALTER TABLE stanchion.meta ALTER one SET DEFAULT stanchion.look() = 1"), ""),
            (format!("{table}; CREATE RULE r AS ON INSERT TO stanchion.meta DO ALSO SELECT stanchion.look()"), ""),
            ("CREATE TYPE stanchion.keys AS (key text)".into(), ""),
            (String::new(), ""),
            // The superuser took over the schema, but not its parts.
            (
                format!(
                    "{table}; CREATE TRIGGER t BEFORE INSERT ON stanchion.meta FOR EACH ROW EXECUTE FUNCTION stanchion.trap()"
                ),
                "ALTER SCHEMA stanchion OWNER TO postgres",
            ),
            ("CREATE SEQUENCE stanchion.queue_place_seq".into(), "ALTER SCHEMA stanchion OWNER TO postgres"),
            // The superuser took over everything, and the attacker's code stayed in the definitions.
            (
                format!("{table}; ALTER TABLE stanchion.meta ADD CHECK (stanchion.look() = version)"),
                "REASSIGN OWNED BY mallory TO postgres",
            ),
            (
                format!("{table}; ALTER TABLE stanchion.meta ALTER version SET DEFAULT stanchion.look()"),
                "REASSIGN OWNED BY mallory TO postgres",
            ),
            (
                format!(
                    "{table}; ALTER TABLE stanchion.meta ALTER version SET DEFAULT \
                      (query_to_xml('SELECT stanchion.look()', true, true, '') IS NOT NULL)::integer"
                ),
                "REASSIGN OWNED BY mallory TO postgres",
            ),
        ] {
            as_attacker(&server, &format!("CREATE SCHEMA stanchion; {trap}{attack}"));
            if !then.is_empty() {
                server.psql(then);
            }
            assert_apply_is_rejected(&server, &format!("{attack}; {then}")).await;
            server.psql("DROP SCHEMA stanchion CASCADE; GRANT CREATE ON DATABASE postgres TO mallory");
        }
        // The attacker's schema is gone, so the schema can be applied.
        Postgres::from_url(&server.url()).unwrap().apply_schema().await.unwrap();
        drop(locks(&server).await.lock("k").await.unwrap());
    });
}

/// By default an unqualified name in the script could also resolve to an object in a schema with the role's name.
#[test]
fn foreign_functions_are_not_called() {
    let server = with_attacker();
    as_attacker(
        &server,
        &format!(
            "CREATE SCHEMA postgres; CREATE FUNCTION postgres.hashtextextended(text, integer) RETURNS bigint \
             LANGUAGE plpgsql AS $$ BEGIN {ESCALATE} RETURN 0; END $$; GRANT USAGE ON SCHEMA postgres TO PUBLIC"
        ),
    );
    block_on(async {
        Postgres::from_url(&server.url()).unwrap().apply_schema().await.unwrap();
        locks(&server).await.lock("k").await.unwrap().release().await.unwrap();
    });
    assert_eq!(server.psql("SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'"), "f");
}

/// Foreign code on the store's tables would run within the operations, with the rights of the schema's owner.
#[test]
fn foreign_code_in_the_schema_is_rejected() {
    let server = server();
    server.psql(
        "CREATE ROLE mallory LOGIN; CREATE ROLE app LOGIN; CREATE SCHEMA evil; \
         CREATE FUNCTION evil.trap() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'; \
         CREATE FUNCTION evil.one(text) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1'; CREATE DOMAIN evil.text AS text",
    );
    let app = server.url().replace("postgres@", "app@");
    let rights = include_str!("../../../../stanchion/src/store/postgres/rights.sql");
    server.psql(&rights.replace("@schema@", "stanchion").replace("@role@", "app"));
    block_on(async {
        drop(Locks::open(&app).await.unwrap());
        for (attack, undo) in [
            (
                "CREATE TRIGGER t BEFORE INSERT ON stanchion.keys FOR EACH ROW EXECUTE FUNCTION evil.trap()",
                "DROP TRIGGER t ON stanchion.keys",
            ),
            ("CREATE RULE r AS ON DELETE TO stanchion.holds DO INSTEAD NOTHING", "DROP RULE r ON stanchion.holds"),
            (
                "ALTER TABLE stanchion.queue ENABLE ROW LEVEL SECURITY",
                "ALTER TABLE stanchion.queue DISABLE ROW LEVEL SECURITY",
            ),
            (
                "ALTER TABLE stanchion.keys ALTER waiting SET DEFAULT evil.one('')",
                "ALTER TABLE stanchion.keys ALTER waiting SET DEFAULT 0",
            ),
            (
                "ALTER TABLE stanchion.keys ADD CONSTRAINT c CHECK (evil.one(key) = 1)",
                "ALTER TABLE stanchion.keys DROP CONSTRAINT c",
            ),
            ("ALTER TABLE stanchion.keys ADD COLUMN x evil.text", "ALTER TABLE stanchion.keys DROP COLUMN x"),
            ("CREATE INDEX i ON stanchion.keys (evil.one(key))", "DROP INDEX stanchion.i"),
            ("CREATE TABLE evil.child () INHERITS (stanchion.holds)", "DROP TABLE evil.child"),
            ("CREATE TABLE evil.refers (k text REFERENCES stanchion.keys)", "DROP TABLE evil.refers"),
            ("ALTER TABLE stanchion.sessions SET UNLOGGED", "ALTER TABLE stanchion.sessions SET LOGGED"),
            (
                "ALTER FUNCTION stanchion.renew_session SECURITY INVOKER",
                "ALTER FUNCTION stanchion.renew_session SECURITY DEFINER",
            ),
            (
                "ALTER FUNCTION stanchion.renew_session RESET search_path",
                "ALTER FUNCTION stanchion.renew_session SET search_path = pg_catalog, pg_temp",
            ),
            ("ALTER FUNCTION stanchion.clock OWNER TO mallory", "ALTER FUNCTION stanchion.clock OWNER TO postgres"),
            ("ALTER TABLE stanchion.holds OWNER TO mallory", "ALTER TABLE stanchion.holds OWNER TO postgres"),
            ("GRANT CREATE ON SCHEMA stanchion TO app", "REVOKE CREATE ON SCHEMA stanchion FROM app"),
            ("GRANT TRIGGER ON stanchion.keys TO app", "REVOKE TRIGGER ON stanchion.keys FROM app"),
        ] {
            server.psql(attack);
            for url in [app.clone(), server.url()] {
                let fault = Locks::open(&url).await.unwrap_err();
                assert!(is_rejected(&fault), "{attack}: {fault:?}");
            }
            if !attack.contains("FUNCTION stanchion.renew_session") {
                let fault = Postgres::from_url(&server.url()).unwrap().apply_schema().await.unwrap_err();
                assert!(is_rejected(&fault), "{attack}: {fault:?}");
            }
            server.psql(undo);
        }
        drop(Locks::open(&app).await.unwrap().lock("k").await.unwrap());
        // A service may use a schema of another role, but it must not create in that schema.
        let fault = Locks::open(&format!("{app}?create_schema=true")).await.unwrap_err();
        assert!(is_rejected(&fault) && fault.to_string().contains("belongs to postgres"), "{fault:?}");
    });
}

/// A role that may only connect takes the lock number that follows from a key's name alone.
#[test]
fn advisory_lock_numbers_are_unpredictable() {
    let server = server();
    server.psql("CREATE ROLE mallory LOGIN");
    let number = "hashtextextended('\"stanchion\" :k', 0)";
    let script = format!("SET SESSION AUTHORIZATION mallory; SELECT pg_advisory_lock({number}); SELECT pg_sleep(60)");
    let mut blocker = std::process::Command::new("psql")
        .args([server.url().as_str(), "-qc", &script])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    block_on(async {
        until("the blocker has the lock", async || {
            server.psql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == "1"
        })
        .await;
        locks(&server).await.lock("k").wait(20 * SECOND).await.unwrap().release().await.unwrap();
    });
    blocker.kill().unwrap();
    blocker.wait().unwrap();
    let rights = "SELECT has_table_privilege('mallory', 'stanchion.meta', 'SELECT'), \
               has_any_column_privilege('mallory', 'stanchion.meta', 'SELECT')";
    assert_eq!(server.psql(rights), "f|f", "only the owner can read the secret");
    assert_eq!(server.psql("SELECT length(secret), secret <> decode('', 'hex') FROM stanchion.meta"), "16|t");
}
