//! The tool on a PostgreSQL server.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use stanchion_testkit::servers::{Postgres, PostgresServer};

impl crate::on_a_server::Server for PostgresServer {
    fn url(&self, password: &str) -> String {
        format!("postgres://locker:{password}@127.0.0.1:{}/postgres", self.port())
    }
    fn kill(&mut self) {
        self.kill();
    }
}

/// Starts a server. The tool applies the schema as its owner, and the user of locks has only the documented rights.
fn server() -> PostgresServer {
    let server = PostgresServer::with_passwords(Postgres::V15, &[]);
    server.psql("CREATE ROLE locker LOGIN PASSWORD 'hunter2'");
    apply(&server);
    let rights = include_str!("../../../stanchion/src/store/postgres/rights.sql");
    server.psql(&rights.replace("@schema@", "stanchion").replace("@role@", "locker"));
    server
}

fn apply(server: &PostgresServer) {
    let world = World::new();
    let url = world.path("url");
    world.write_store_file("url", &server.url());
    // The servers of tests do not sync.
    let said = ["fsync is off: a crash of the server may lose grants that were answered"];
    world.stanchion(["schema", "--apply", "--store-file", url.to_str().unwrap()]).finish().code(0).says(&said);
}

on_a_server!(server);

#[test]
fn older_schema_is_upgraded_with_its_rights() {
    let server = server();
    let world = World::new();
    let url = world.path("url");
    world.write_store_file("url", &crate::on_a_server::Server::url(&server, "hunter2"));
    let run = || world.stanchion(["run", "--store-file", url.to_str().unwrap(), "k", "--", "true"]).finish();
    run().code(0);
    let fence = || server.psql("SELECT fence FROM stanchion.keys").parse::<u64>().unwrap();
    let before = fence();
    // A table that version 1 lacked.
    server.psql("UPDATE stanchion.meta SET version = 1; DROP FUNCTION stanchion.session_lives, stanchion.together");
    run().code(78).says(&["the schema is of version 1", "run `stanchion schema --apply`"]);
    apply(&server);
    run().code(0);
    assert!(fence() > before, "what was there stays");
    let looked = "SET ROLE locker; SELECT alive FROM stanchion.session_lives('\\x00')";
    assert_eq!(server.psql(looked), "f", "the new step too");
    let may = "SELECT has_function_privilege('locker', oid, 'EXECUTE') FROM pg_proc WHERE proname = 'together'";
    assert_eq!(server.psql(may), "t", "and the newest");
}

#[test]
fn what_cannot_be_used_has_its_code() {
    let world = World::new();
    let run = |url: &str| world.stanchion(["run", "-w", "1s", "--store", url, "k", "--", "true"]).finish();
    run("postgres://127.0.0.1:1/app").code(69).says(&["cannot connect"]);
    run("postgres://127.0.0.1/app?pool=none").code(64).says(&["`pool` must be a whole number"]);
    let server = PostgresServer::start(Postgres::V15);
    run(&server.url()).code(78).says(&["STANCHION_STORE=URL stanchion schema --apply"]);
    run(&format!("{}x", server.url())).code(78).says(&["there is no such database"]);
    world.stanchion(["schema", "--store", "memory:"]).finish().code(64);
}

#[test]
fn doctor_names_a_server_without_schema() {
    let server = PostgresServer::start(Postgres::V15);
    let world = World::new();
    let examined = world.stanchion(["doctor", "--store", &server.url()]).finish().code(78);
    let lines: Vec<_> = examined.stdout.lines().collect();
    assert!(lines[1].starts_with("failed   open ") && lines[1].contains("stanchion schema"), "{examined:?}");
    assert!(lines[2].starts_with("ok       server    PostgreSQL 15."), "{examined:?}");
}

#[test]
fn psql_applies_the_printed_schema() {
    let server = PostgresServer::start(Postgres::V15);
    let world = World::new();
    let sql = world.stanchion(["schema", "--store", "postgres://nowhere/app?schema=locks"]).finish().ok();
    server.psql(&sql);
    let url = format!("{}?schema=locks", server.url());
    world.stanchion(["run", "--store", &url, "k", "--", "true"]).finish().code(0);
}

#[test]
fn limits_hold_while_the_server_is_away() {
    let world = World::new();
    for away in stanchion_testkit::servers::Away::all() {
        let url = format!("postgres://me@{}/app?sslmode=disable", away.address);
        limits_are_kept(away.name, |options| {
            world.stanchion([&["run"], options, &["--store", &url, "k", "--", "true"]].concat())
        });
    }
}

#[test]
fn schema_of_another_role_is_misconfigured() {
    let server = PostgresServer::start(Postgres::V15);
    server.psql("CREATE ROLE mallory LOGIN; GRANT CREATE ON DATABASE postgres TO mallory");
    server.psql("SET ROLE mallory; CREATE SCHEMA stanchion");
    let world = World::new();
    let apply = || world.stanchion(["schema", "--apply", "--store", &server.url()]).finish();
    apply().code(78).says(&["the schema belongs to mallory"]);
    server.psql("DROP SCHEMA stanchion");
    server.psql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    apply().code(0);
    let latin = format!("{}/latin", server.url().rsplit_once('/').unwrap().0);
    world.stanchion(["schema", "--apply", "--store", &latin]).finish().code(78).says(&["is not in UTF-8"]);
}
