//! Servers of another kind than the URL says: each message says what would be right.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use crate::common::*;
use stanchion_testkit::servers::{Postgres, PostgresServer, Redis, RedisSentinel, RedisServer};

/// Returns the address of a program that answers the first request of each connection with these bytes, and closes it.
fn imposter(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let _gone = connection.read(&mut [0; 1024]);
            let _gone = connection.write_all(answer);
        }
    });
    address
}

#[track_caller]
fn refused(url: &str, code: i32, texts: &[&str]) {
    let world = World::new();
    eprintln!("{url}");
    let finished = world.stanchion(["run", "-w", "8s", "--store", url, "k", "--", "touch", "started"]).finish();
    eprintln!("  {}", finished.stderr.trim());
    finished.code(code).says(texts);
    assert!(!world.path("started").exists());
}

#[test]
fn other_protocols_are_misconfigured() {
    let http = imposter(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    let ssh = imposter(b"SSH-2.0-OpenSSH_9.2p1\r\n");
    let tls = imposter(b"\x15\x03\x01\x00\x02\x02\x46");
    let garbage = imposter(b"\x00\xff\x13\x37garbage\r\n");
    // This one is the answer to the question whether the server speaks TLS.
    refused(&format!("postgres://me@{ssh}/app?sslmode=require"), 78, &[&ssh, "does not speak TLS on this port"]);
    for address in [&http, &ssh, &tls, &garbage] {
        let says = [address.as_str(), "the answer is not Redis's", "check the host, the port and the scheme"];
        refused(&format!("redis://{address}"), 78, &says);
        let says = [address.as_str(), "a program other than PostgreSQL may listen there"];
        refused(&format!("postgres://me@{address}/app?sslmode=disable"), 78, &says);
    }
    for address in [&http, &tls, &garbage] {
        let says = [address.as_str(), "it may not be PostgreSQL", "`sslmode=disable`"];
        refused(&format!("postgres://me@{address}/app?sslmode=require"), 78, &says);
    }
    for address in [&http, &ssh, &garbage] {
        refused(&format!("rediss://{address}"), 78, &[address, "does not speak TLS on this port"]);
    }
    let closing = imposter(b"");
    refused(&format!("redis://{closing}"), 69, &[&closing, "or expect TLS (`rediss://`)"]);
    refused(&format!("postgres://me@{closing}/app?sslmode=disable"), 69, &[&closing, "it may not be PostgreSQL"]);
}

#[test]
fn other_kinds_of_redis_are_misconfigured() {
    let server = RedisServer::start(Redis::Redis7);
    let port = server.port();
    refused(&format!("redis+cluster://127.0.0.1:{port}"), 78, &["is not part of a cluster: use `redis://`"]);
    let says = ["is not a sentinel: name the sentinels, or use `redis://` for one server"];
    refused(&format!("redis+sentinel://127.0.0.1:{port}/main"), 78, &says);
    let sentinel = RedisSentinel::alone(Redis::Redis7, port, 1);
    refused(
        &format!("redis://127.0.0.1:{}", sentinel.port()),
        78,
        &["is a sentinel; use `redis+sentinel://HOST/SERVICE`"],
    );
    let says = ["no answer in time; if the server does not speak TLS on this port, use `redis://`"];
    refused(&format!("rediss://127.0.0.1:{port}"), 69, &says);
    // Redis takes the first message of PostgreSQL for a command, and waits for the rest of it.
    let says = [&format!("cannot connect to 127.0.0.1:{port}: no answer within")[..]];
    refused(&format!("postgres://me@127.0.0.1:{port}/app"), 69, &says);
    refused(&format!("redis://127.0.0.1:{port}/99"), 64, &["the server has no such database"]);
}

#[test]
fn redis_urls_to_postgres_are_misconfigured() {
    let server = PostgresServer::start(Postgres::V15);
    let address = format!("127.0.0.1:{}", server.port());
    let world = World::new();
    let url = format!("redis://{address}");
    let finished = world.stanchion(["run", "-w", "1s", "--store", &url, "k", "--", "true"]).finish();
    // The server may close the connection without an answer.
    assert!([69, 78].contains(&finished.code.unwrap()), "{finished:?}");
    finished.says(&[&address, "TLS (`rediss://`)"]);
    refused(&format!("postgres://nobody@{address}/postgres"), 77, &[&address]);
    refused(&format!("postgres://postgres@{address}/nowhere"), 78, &[&address, "there is no such database"]);
}

/// Returns the files of a certificate for `localhost` that is its own authority, and of its key.
fn self_signed(world: &World, is_authority: &str) -> (String, String) {
    let (certificate, key) = (world.path(&format!("{is_authority}.pem")), world.path(&format!("{is_authority}.key")));
    let constraints = format!("basicConstraints=critical,CA:{is_authority}");
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    openssl.args([
        "-subj",
        "/CN=a test of stanchion",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-addext",
        &constraints,
    ]);
    assert!(openssl.arg("-out").arg(&certificate).arg("-keyout").arg(&key).output().unwrap().status.success());
    (certificate.display().to_string(), key.display().to_string())
}

#[test]
fn untrusted_certificates_name_a_remedy() {
    let world = World::new();
    let start = |(certificate, key): &(String, String)| {
        let tls = ["--tls-port", "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"];
        RedisServer::with(Redis::Redis7, &tls)
    };
    let authority = self_signed(&world, "TRUE");
    let server = start(&authority);
    let url = format!("rediss://localhost:{}", server.port());
    let says = ["that of an authority", "-addext basicConstraints=critical,CA:FALSE"];
    refused(&format!("{url}?ca_file={}", authority.0), 78, &says);
    // Without TLS the server's answer is an alert, or it closes the connection.
    let plain =
        world.stanchion(["run", "-w", "1s", "--store", &url.replace("rediss", "redis"), "k", "--", "true"]).finish();
    assert!([69, 78].contains(&plain.code.unwrap()), "{plain:?}");
    plain.says(&["TLS (`rediss://`)"]);
    let plain = self_signed(&world, "FALSE");
    let server = start(&plain);
    let url = format!("rediss://localhost:{}", server.port());
    refused(&url, 78, &["no authority that this machine trusts", "`ca_file`"]);
    refused(
        &format!("{}?ca_file={}", url.replace("localhost", "127.0.0.1"), plain.0),
        78,
        &["use a host name that is in"],
    );
    // The advice works.
    let trusted = format!("{url}?ca_file={}", plain.0);
    world.stanchion(["run", "--store", &trusted, "k", "--", "true"]).finish().code(0);
}

#[test]
fn untrusted_postgres_names_a_remedy() {
    let server = PostgresServer::with_tls(Postgres::V15);
    let url = format!("postgres://postgres@localhost:{}/postgres", server.port());
    let says = ["localhost:", "no authority that this machine trusts", "`ca_file`"];
    refused(&format!("{url}?sslmode=require"), 78, &says);
    let says = ["localhost:", "pg_hba.conf"];
    refused(&format!("{url}?sslmode=disable"), 77, &says);
}
