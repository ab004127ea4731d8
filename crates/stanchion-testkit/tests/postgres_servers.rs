//! Tests the PostgreSQL servers of the testkit: start, restart, replication, and clean-up.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "test code")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use stanchion_testkit::servers::{PgBouncer, Postgres, PostgresServer, runs, wait};

const KINDS: [Postgres; 2] = [Postgres::V15, Postgres::V18];

/// Runs SQL over TCP and returns the output or the error. `more` is the rest of a connection string.
fn connect(port: u16, more: &str, sql: &str) -> Result<String, String> {
    let target = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres {more}");
    let psql = Command::new(Postgres::V15.program("psql"))
        .args(["-X", "-A", "-t", "-q", "-w", "-c", sql, &target])
        .env_remove("PGPASSWORD")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    if psql.status.success() { Ok(text(psql.stdout)) } else { Err(text(psql.stderr)) }
}

/// Starts a client whose query computes for hours and so does not notice that the server has gone.
fn busy(server: &PostgresServer) -> Child {
    let client = Command::new(Postgres::V15.program("psql"))
        .args(["-X", "-c", "SELECT count(*) FROM (SELECT generate_series(1, 10000000000)) AS numbers", &server.url()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let count_running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT count(*) FROM (SELECT gen%'";
    wait("the query to run", || server.psql(count_running) == "1");
    client
}

#[test]
fn each_version_starts() {
    for (kind, version) in KINDS.into_iter().zip(["15", "18"]) {
        let server = PostgresServer::with(kind, &[("max_connections", "77"), ("deadlock_timeout", "5s")]);
        assert!(server.psql("SHOW server_version").starts_with(version));
        let shown = ["max_connections", "fsync", "synchronous_commit", "deadlock_timeout", "listen_addresses"]
            .map(|name| server.psql(&format!("SHOW {name}")));
        assert_eq!(shown, ["77", "off", "on", "5s", "127.0.0.1"]);
        assert_eq!(connect(server.port(), "", "SELECT 1").unwrap(), "1");
        assert_eq!(server.url(), format!("postgres://postgres@127.0.0.1:{}/postgres", server.port()));
        server.psql("CREATE EXTENSION pg_stat_statements");
        server.psql("CREATE DATABASE other");
        assert_eq!(server.psql_in("other", "SELECT current_database(), 2"), "other|2");
    }
}

#[test]
#[should_panic(expected = "relation \"nothing\" does not exist")]
fn failed_sql_shows_its_message() {
    PostgresServer::start(Postgres::V15).psql("SELECT * FROM nothing");
}

#[test]
#[should_panic(expected = "unrecognized configuration parameter")]
fn unknown_setting_panics_at_start() {
    PostgresServer::with(Postgres::V15, &[("no_such_setting", "1")]);
}

#[test]
fn servers_of_a_kind_share_no_data() {
    let servers = [PostgresServer::start(Postgres::V15), PostgresServer::start(Postgres::V15)];
    servers[0].psql("CREATE TABLE t (x int)");
    assert_eq!(servers[1].psql("SELECT count(*) FROM pg_class WHERE relname = 't'"), "0");
}

/// Commits survive a kill, and a running query ends with the server.
#[test]
fn killed_server_keeps_its_data() {
    for kind in KINDS {
        let mut server = PostgresServer::start(kind);
        server.psql("CREATE TABLE t (x int)");
        for round in 1..=3 {
            server.psql(&format!("INSERT INTO t VALUES ({round})"));
            let before = server.processes();
            assert!(before.contains(&server.process().unwrap().pid()) && before.len() > 4, "{before:?}");
            let mut busy = busy(&server);
            server.kill();
            assert!(server.process().is_none());
            assert_eq!(server.processes(), Vec::<i32>::new());
            assert!(!busy.wait().unwrap().success());
            assert!(before.iter().all(|pid| !runs(*pid)));
            server.restart();
            assert_eq!(server.psql("SELECT count(*) FROM t"), round.to_string());
        }
    }
}

/// A server that a signal killed leaves nothing that blocks its restart.
#[test]
fn sigkill_ends_idle_server_processes() {
    for kind in KINDS {
        let mut server = PostgresServer::start(kind);
        server.process().unwrap().signal("KILL");
        wait("all processes to notice the death of the first one", || server.processes().is_empty());
        server.restart();
        assert_eq!(server.psql("SELECT 1"), "1");
    }
}

#[test]
fn fast_stop_allows_a_restart() {
    for kind in KINDS {
        let mut server = PostgresServer::start(kind);
        server.psql("CREATE TABLE t (x int)");
        server.stop_fast();
        assert_eq!(server.processes(), Vec::<i32>::new());
        let log = std::fs::read_to_string(server.folder().join("server.log")).unwrap();
        assert!(log.contains("database system is shut down"), "{log}");
        server.restart();
        assert_eq!(server.psql("SELECT count(*) FROM t"), "0");
    }
}

#[test]
fn passwords_are_required_over_tcp() {
    for kind in KINDS {
        let server = PostgresServer::with_passwords(kind, &[("max_connections", "55")]);
        server.psql("CREATE ROLE other LOGIN PASSWORD 'secret'");
        let error = connect(server.port(), "", "SELECT 1").unwrap_err();
        assert!(error.contains("no password supplied"), "{error}");
        let error = connect(server.port(), "user=other password=wrong", "SELECT 1").unwrap_err();
        assert!(error.contains("password authentication failed"), "{error}");
        assert_eq!(connect(server.port(), "user=other password=secret", "SELECT current_user").unwrap(), "other");
        let mut by_url = Command::new(Postgres::V15.program("psql"));
        by_url.args(["-X", "-w", "-c", "SELECT 1", &server.url()]).stdout(Stdio::null());
        assert!(by_url.status().unwrap().success());
        assert_eq!(server.psql("SHOW max_connections"), "55");
    }
}

#[test]
fn tls_server_rejects_plain_connections() {
    for kind in KINDS {
        let server = PostgresServer::with_tls(kind);
        let error = connect(server.port(), "sslmode=disable", "SELECT 1").unwrap_err();
        assert!(error.contains("no encryption"), "{error}");
        let verified = format!("hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={}", server.ca_file().display());
        let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        assert_eq!(connect(server.port(), &format!("host=localhost {verified}"), query).unwrap(), "t");
        let error = connect(server.port(), &format!("host=elsewhere {verified}"), query).unwrap_err();
        assert!(error.contains("does not match host name"), "{error}");
    }
}

#[test]
fn pgbouncer_pools_per_transaction() {
    for kind in KINDS {
        let server = PostgresServer::start(kind);
        let mut pooler = PgBouncer::with(&server, &[("default_pool_size", "1")]);
        assert_eq!(connect(pooler.port(), "", "SELECT 1").unwrap(), "1");
        let first = pooler.psql_in("postgres", "SELECT pg_backend_pid()");
        // Another client gets the same connection.
        assert_eq!(pooler.psql_in("postgres", "SELECT pg_backend_pid()"), first);
        assert!(pooler.psql_in("pgbouncer", "SHOW CONFIG").contains("pool_mode|transaction|"));
        let old = pooler.process().unwrap().pid();
        pooler.kill();
        assert!(!runs(old));
        assert!(TcpStream::connect(("127.0.0.1", pooler.port())).is_err());
        pooler.restart();
        assert_ne!(pooler.psql_in("postgres", "SELECT pg_backend_pid()"), first);
        assert_eq!(pooler.url(), format!("postgres://postgres@127.0.0.1:{}/postgres", pooler.port()));
    }
}

#[test]
fn pgbouncer_reaches_password_server() {
    let server = PostgresServer::with_passwords(Postgres::V15, &[]);
    assert_eq!(PgBouncer::start(&server).psql_in("postgres", "SELECT 1"), "1");
}

#[test]
fn standby_streams_and_can_be_promoted() {
    for kind in KINDS {
        let mut primary = PostgresServer::start(kind);
        primary.psql("CREATE TABLE t (x int)");
        let mut standby = PostgresServer::standby_of(&primary);
        primary.psql("INSERT INTO t VALUES (1)");
        wait("a row to arrive at the standby", || standby.psql("SELECT count(*) FROM t") == "1");
        let error = connect(standby.port(), "", "INSERT INTO t VALUES (2)").unwrap_err();
        assert!(error.contains("read-only transaction"), "{error}");
        standby.kill();
        standby.restart();
        primary.psql("INSERT INTO t VALUES (3)");
        wait("a row to arrive after a restart", || standby.psql("SELECT count(*) FROM t") == "2");
        primary.kill();
        standby.promote();
        standby.psql("INSERT INTO t VALUES (4)");
        standby.kill();
        standby.restart();
        assert_eq!(standby.psql("SELECT count(*) FROM t"), "3");
    }
}

#[test]
fn standby_requires_the_same_passwords() {
    let primary = PostgresServer::with_passwords(Postgres::V18, &[]);
    let standby = PostgresServer::standby_of(&primary);
    assert!(connect(standby.port(), "", "SELECT 1").unwrap_err().contains("no password supplied"));
    assert!(standby.url().contains(":of-postgres@"));
}

#[test]
fn dropped_server_leaves_nothing() {
    for kind in KINDS {
        let server = PostgresServer::start(kind);
        let pooler = PgBouncer::start(&server);
        pooler.psql_in("postgres", "SELECT 1");
        let mut busy = busy(&server);
        let mut processes = server.processes();
        processes.push(pooler.process().unwrap().pid());
        // A few of these processes may be ending already.
        assert!(processes.iter().filter(|pid| runs(**pid)).count() > 5, "{processes:?}");
        let folder = server.folder().to_owned();
        drop(pooler);
        drop(server);
        let left: Vec<_> = processes.into_iter().filter(|pid| runs(*pid)).collect();
        assert_eq!(left, Vec::<i32>::new());
        assert!(!busy.wait().unwrap().success());
        assert!(!folder.exists());
    }
}

/// Environment variable that tells a child process which version to start.
const CHILD: &str = "STANCHION_TEST_SERVERS";

/// Not a test: the process with a server that [`killed_test_process_leaves_nothing`] kills.
#[test]
fn process_with_a_server() {
    let Ok(kind) = std::env::var(CHILD) else { return };
    let kind = if kind == "15" { Postgres::V15 } else { Postgres::V18 };
    let server = PostgresServer::start(kind);
    let pooler = PgBouncer::start(&server);
    let _busy = busy(&server);
    let processes = server.processes().into_iter().chain([pooler.process().unwrap().pid()]);
    let processes: Vec<_> = processes.map(|pid| pid.to_string()).collect();
    println!("server {} {}", server.folder().display(), processes.join(" "));
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn killed_test_process_leaves_nothing() {
    for kind in ["15", "18"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["process_with_a_server", "--exact", "--nocapture"])
            .env(CHILD, kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut reports = lines.filter_map(|line| line.split_once("server ").map(|(_, report)| report.to_owned()));
        let report = reports.next().unwrap();
        let (folder, processes) = report.split_once(' ').unwrap();
        let processes: Vec<i32> = processes.split(' ').map(|pid| pid.parse().unwrap()).collect();
        // A few of these processes may be ending already.
        assert!(processes.iter().filter(|pid| runs(**pid)).count() > 5, "{processes:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        wait("all processes to end", || processes.iter().all(|pid| !runs(*pid)));
        wait("the folder to be removed", || !Path::new(folder).exists());
    }
}
