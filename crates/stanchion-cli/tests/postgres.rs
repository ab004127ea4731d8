//! The tool on a PostgreSQL server.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[macro_use]
mod on_a_server;
use common::*;
use stanchion_testkit::servers::{Postgres, PostgresServer};

impl on_a_server::Server for PostgresServer {
    fn url(&self, password: &str) -> String {
        format!("postgres://locker:{password}@127.0.0.1:{}/postgres", self.port())
    }
    fn kill(&mut self) {
        self.kill();
    }
}

/// Its schema is applied by its owner, by the tool; whoever uses locks has the rights of the documentation.
fn server() -> PostgresServer {
    let server = PostgresServer::with_passwords(Postgres::V15, &[]);
    server.psql("CREATE ROLE locker LOGIN PASSWORD 'hunter2'");
    let world = World::new();
    std::fs::write(world.path("url"), server.url()).unwrap();
    let url = world.path("url");
    world.stanchion(["schema", "--apply", "--store-file", url.to_str().unwrap()]).finish().code(0).silent();
    let rights = include_str!("../../stanchion/src/store/postgres/rights.sql");
    server.psql(&rights.replace("@schema@", "stanchion").replace("@role@", "locker"));
    server
}

on_a_server!(server);

#[test]
fn what_cannot_be_used_has_its_code() {
    let world = World::new();
    let run = |url: &str| world.stanchion(["run", "-w", "1s", "--store", url, "k", "--", "true"]).finish();
    run("postgres://127.0.0.1:1/app").code(69).says(&["cannot connect"]);
    run("postgres://127.0.0.1/app?pool=none").code(64).says(&["`pool` must be a whole number"]);
    let server = PostgresServer::start(Postgres::V15);
    run(&server.url()).code(78).says(&["stanchion schema --store URL --apply"]);
    run(&format!("{}x", server.url())).code(78).says(&["there is no such database"]);
    world.stanchion(["schema", "--store", "memory:"]).finish().code(64);
}

#[test]
fn the_schema_is_printed_and_can_be_applied_by_psql() {
    let server = PostgresServer::start(Postgres::V15);
    let world = World::new();
    let sql = world.stanchion(["schema", "--store", "postgres://nowhere/app?schema=locks"]).finish().ok();
    server.psql(&sql);
    let url = format!("{}?schema=locks", server.url());
    world.stanchion(["run", "--store", &url, "k", "--", "true"]).finish().code(0);
}
